"""The libraries of `config.track`: TensorBoard, Weights & Biases, MLflow and Aim.

Each is imported when it is used, and may be missing. What they write lies in the
workdir, and nothing is sent, unless their own environment variables say so.
"""

import io
import logging
import os
import pathlib
import re
import socket
import time
import uuid
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from PIL import Image

from implicit_slots.runtime.config import Config, flat


class Tracker(Protocol):
    """A run in one library; it is built from the workdir, the configuration and `run`.

    Attributes:
      library: what is imported.
      durable: whether what is written outlives the process, however that ends.
      run: by what name the library goes on with the run; None begins one.
      folder: what to set aside if the process ends without `close`; empty: nothing.
      shown_by: the command that shows the run.
    """

    library: str
    durable: bool
    run: str
    folder: str
    shown_by: str

    def __init__(self, workdir: pathlib.Path, config: Config, run: str | None): ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes finite values by "split/name"; steps never go back."""
        ...

    def draw(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 [height, width, 3], by name."""
        ...

    def close(self, *, ended: bool) -> None:
        """Writes what is held; `ended`: and the run is not to go on."""
        ...


class _TensorBoard:
    """An event file a session, in the workdir; TensorFlow is not needed."""

    library, durable, folder = "tensorboard", True, ""

    def __init__(self, workdir: pathlib.Path, config: Config, run: str | None):
        event, summary, tensor = (
            import_module(f"tensorboard.compat.proto.{name}_pb2")
            for name in ("event", "summary", "tensor")
        )
        records = import_module("tensorboard.summary.writer.record_writer")
        self._event, self._summary = event.Event, summary.Summary
        # TensorBoard reads them in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._file = records.RecordWriter((workdir / name).open("xb"))
        self._add(file_version="brain.Event:2")
        if run is None:
            lines = [f"    {k}: {v}" for k, v in flat(config.to_dict()).items()]
            text = tensor.TensorProto(
                dtype="DT_STRING", string_val=["\n".join(lines).encode()]
            )
            metadata = import_module("tensorboard.plugins.text.metadata")
            about = metadata.create_summary_metadata("config", "")
            self._put(0, tag="config", tensor=text, metadata=about)
        self.run = run or workdir.name
        self.shown_by = f"tensorboard --logdir={workdir}"

    def _add(self, **event: Any) -> None:
        event["wall_time"] = time.time()
        self._file.write(self._event(**event).SerializeToString())
        self._file.flush()

    def _put(self, step: int, **value: Any) -> None:
        summary = self._summary(value=[self._summary.Value(**value)])
        self._add(step=step, summary=summary)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._put(step, tag=name, simple_value=value)

    def draw(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, "PNG")
            height, width, colours = picture.shape
            image = self._summary.Image(
                height=height,
                width=width,
                colorspace=colours,
                encoded_image_string=stream.getvalue(),
            )
            self._put(step, tag=name, image=image)

    def close(self, *, ended: bool) -> None:
        self._file.close()


class _WeightsAndBiases:
    """A run of Weights & Biases, offline unless WANDB_MODE says otherwise.

    Offline it keeps up to 32 KiB in memory, which are lost where the process is killed.
    """

    library, durable = "wandb", False

    def __init__(self, workdir: pathlib.Path, config: Config, run: str | None):
        # Offline, too, it reports its own use and errors to its makers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = import_module("wandb")
        self.run = run or uuid.uuid4().hex[:8]
        offline = os.environ.get("WANDB_MODE", "offline") == "offline"
        self._run = wandb.init(
            id=self.run,
            resume="allow",
            mode=None if "WANDB_MODE" in os.environ else "offline",
            project=os.environ.get("WANDB_PROJECT", config.name),
            name=os.environ.get("WANDB_NAME", workdir.name),
            dir=str(workdir),
            config=config.to_dict(),
            allow_val_change=True,
            # A bar of its own, and none of the run's; nobody waits for an upload.
            settings=wandb.Settings(console="off", silent=offline, finish_timeout=60),
        )
        folder = os.path.dirname(self._run.dir)
        self.folder = os.path.relpath(folder, workdir) if offline else ""
        self.shown_by = f"wandb sync {folder}" if offline else str(self._run.url)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(values, step=step)

    def draw(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        image = import_module("wandb").Image
        self._run.log({n: image(p) for n, p in pictures.items()}, step=step)

    def close(self, *, ended: bool) -> None:
        self._run.finish(exit_code=0 if ended else 1)


_MLFLOW_SETTINGS = {
    # It reports its use to its makers.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Training waits half a minute for a server that is gone, not four; for one that
    # does not answer two, not twenty.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # A run says at its start where it is shown.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class _MLflow:
    """A run of MLflow, in `mlflow.db` unless MLFLOW_TRACKING_URI names a server."""

    library, durable, folder = "mlflow", True, ""

    def __init__(self, workdir: pathlib.Path, config: Config, run: str | None):
        for variable, value in _MLFLOW_SETTINGS.items():
            os.environ.setdefault(variable, value)
        mlflow = import_module("mlflow")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # It warns of each try; the last one raises.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        workdir = workdir.resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        pictures = None if uri else (workdir / "mlflow").as_uri()
        uri = uri or f"sqlite:///{workdir}/mlflow.db"
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient(uri)
        if run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", config.name)
            found = self._client.get_experiment_by_name(name)
            number = (
                found.experiment_id
                if found
                else self._client.create_experiment(name, artifact_location=pictures)
            )
            run = self._client.create_run(number, run_name=workdir.name).info.run_id
            values = flat(config.to_dict()).items()
            param = mlflow.entities.Param
            params = [param(key, str(value)[:6_000]) for key, value in values]
            for first in range(0, len(params), 100):  # No more at a time.
                self._client.log_batch(run, params=params[first : first + 100])
        self.run = str(run)
        self._client.update_run(run, status="RUNNING")
        shown = re.sub("//[^/@]*@", "//", uri)  # Without a password.
        self.shown_by = f"mlflow ui --backend-store-uri={shown}"
        if uri.startswith("http"):
            number = self._client.get_run(run).info.experiment_id
            self.shown_by = f"{shown.rstrip('/')}/#/experiments/{number}/runs/{run}"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        metric, now = self._entities.Metric, round(1_000 * time.time())
        metrics = [metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.run, metrics=metrics)

    def draw(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self._client.log_image(self.run, picture, key=name, step=step)

    def close(self, *, ended: bool) -> None:
        self._client.set_terminated(self.run, "FINISHED" if ended else "KILLED")


class _Aim:
    """A run of Aim, in the repository `.aim` of the workdir."""

    library, durable, folder = "aim", True, ""

    def __init__(self, workdir: pathlib.Path, config: Config, run: str | None):
        self._run = import_module("aim").Run(
            run,
            repo=str(workdir),
            experiment=config.name,
            # Environment variables, for one, are nobody's business.
            log_system_params=False,
            capture_terminal_logs=False,
            system_tracking_interval=None,
        )
        self.run = self._run.hash
        self._run.name = workdir.name
        self._run["config"] = config.to_dict()
        self.shown_by = f"aim up --repo={workdir}"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            split, _, name = name.partition("/")
            self._run.track(value, name=name, step=step, context={"subset": split})

    def draw(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        image = import_module("aim").Image
        for name, picture in pictures.items():
            self._run.track(image(picture), name=name, step=step)

    def close(self, *, ended: bool) -> None:
        self._run.close()


TRACKERS: Mapping[str, type[Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
    "aim": _Aim,
}
