"""Trackers get every value once, however a run is stopped; and no one else gets any."""

import contextlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from importlib import import_module
from typing import ClassVar

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import scenes
from implicit_slots.runtime import trackers
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.metric_writers import MetricWriter
from implicit_slots.training.run import run

# Those of the libraries.
pytestmark = pytest.mark.filterwarnings("ignore")
PICTURE = np.full((4, 6, 3), 200, np.uint8)


def config_of(track, **more):
    config = {"name": "scenes", "num_steps": 50, "model": {"num_slots": 3}}
    return ConfigDict(config | {"track": track} | more)


def session(workdir, track, start, *steps, close=True):
    """A part of a run: from the checkpoint at `start`."""
    writer = MetricWriter(workdir, config_of(track), step=start)
    for step in steps:
        writer.write(step, "train", {"loss": step / 8, "bad": float("nan")})
        if step % 20 == 0:
            writer.write(step, "validation", {"loss": step / 4})
            writer.write_image(step, "reconstructions", PICTURE)
    if close:
        writer.close()


WANTED = {
    "train/loss": [(10, 1.25), (20, 2.5), (30, 3.75), (40, 5.0), (50, 6.25)],
    "validation/loss": [(20, 5.0), (40, 10.0)],
    "reconstructions": [20, 40],
}


def read_tensorboard(workdir):
    reader = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(workdir))
    events.Reload()
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    (config,) = events.Tensors("config")
    assert b"model.num_slots: 3" in config.tensor_proto.string_val[0]
    pictures = events.Images("reconstructions")
    for event in pictures:
        shown = Image.open(io.BytesIO(event.encoded_image_string))
        assert np.array_equal(np.asarray(shown), PICTURE)
    return found | {"reconstructions": [event.step for event in pictures]}


def records(path):
    """The records of a file of W&B's: LevelDB's format after seven bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # The last part of a record, or all of it.
            yield whole
            whole = b""


def read_wandb(workdir):
    record_of = import_module("wandb.proto.wandb_internal_pb2").Record.FromString
    found, names = defaultdict(list), set()
    for path in sorted((workdir / "wandb").glob("offline-run-*/*.wandb")):
        names.add(path.name)
        for text in records(path):
            record = record_of(text)
            if record.HasField("run"):
                configured = {i.key: i.value_json for i in record.run.config.update}
                assert json.loads(configured["model"]) == {"num_slots": 3}
            step, items = record.history.step.num, record.history.item
            values = {i.key or i.nested_key[0]: i.value_json for i in items}
            for name in values.keys() & WANTED.keys():
                is_curve = "/" in name
                found[name].append((step, float(values[name])) if is_curve else step)
    assert len(names) == 1  # one run, in several parts
    return found


def read_mlflow(workdir, uri=None):
    uri = uri or f"sqlite:///{workdir}/mlflow.db"
    client = import_module("mlflow").MlflowClient(uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "scenes")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["model.num_slots"] == "3"
    curves = {
        name: [
            (m.step, m.value)
            for m in client.get_metric_history(found.info.run_id, name)
        ]
        for name in found.data.metrics
    }
    files = [f.path for f in client.list_artifacts(found.info.run_id, "images")]
    steps = [int(name.split("+")[2]) for name in files if name.endswith(".png")]
    return curves | {"reconstructions": sorted(steps)}


def read_aim(workdir):
    (name,) = os.listdir(workdir / ".aim" / "meta" / "chunks")
    found = import_module("aim").Run(
        name, repo=str(workdir), system_tracking_interval=None
    )
    assert found["config"]["model"] == {"num_slots": 3}
    curves = {
        f"{m.context.to_dict()['subset']}/{m.name}": [
            (step, value) for step, (value,) in m.data.view(["step", "val"]).items()
        ]
        for m in found.metrics()
    }
    pictures = found.get_image_sequence(
        "reconstructions", import_module("aim.storage.context").Context({})
    )
    steps = [step for step, _ in pictures.data.view(["step", "val"]).items()]
    return curves | {"reconstructions": steps}


# What a library says of its own use to its makers, switched off.
OWN_REPORTS = {
    "wandb": ("WANDB_ERROR_REPORTING", "false"),
    "mlflow": ("MLFLOW_DISABLE_TELEMETRY", "true"),
}
READ = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "aim": read_aim,
}


def test_tensorboard_gets_each_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard")
    session(tmp_path, "tensorboard", 0, 10, 20, 30, close=False)  # killed
    session(tmp_path, "tensorboard", 10, 20, 30, 40)
    session(tmp_path, "tensorboard", 40, 50)
    assert read_tensorboard(tmp_path) == WANTED


class _Kept:
    """A tracker that keeps what it gets, by run, and fails at step `fails`."""

    library, durable, folder, shown_by = "json", True, "", "nothing"
    runs: ClassVar = {}
    fails = None

    def __init__(self, workdir, config, run):
        self.run = run or f"run{len(self.runs)}"
        self.got = self.runs.setdefault(self.run, [])

    def write(self, step, values):
        if step == self.fails:
            raise RuntimeError("no answer")
        self.got.extend((name, step) for name in values)

    def draw(self, step, pictures):
        self.write(step, pictures)

    def close(self, *, ended):
        self.got.append("ended" if ended else "stopped")


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "aim", _Kept)
    monkeypatch.setattr(_Kept, "runs", {})
    return _Kept.runs


def steps_of(got, name="train/loss"):
    return [item[1] for item in got if item[0] == name]


def test_a_tracker_that_joins_gets_the_curve_from_its_start(kept, tmp_path):
    session(tmp_path, "", 0, 10, 20)
    session(tmp_path, "aim", 20, 30, 40)
    assert list(kept) == ["run0"] and kept["run0"][-1] == "stopped"
    assert steps_of(kept["run0"]) == [10, 20, 30, 40]
    assert steps_of(kept["run0"], "validation/loss") == [20, 40]
    session(tmp_path, "aim", 40, 50)
    assert kept["run0"][-1] == "ended"
    # Scored again: there is nothing to say, and nobody is asked.
    before = list(kept["run0"])
    session(tmp_path, "aim", 50)
    assert kept == {"run0": before}


def test_a_tracker_that_fails_ends_no_run_and_is_told_later(
    kept, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(_Kept, "fails", 20)
    session(tmp_path, "aim", 0, 10, 20, 30)
    assert steps_of(kept["run0"]) == [10]
    assert "aim failed and is left out (no answer)" in capsys.readouterr().out
    monkeypatch.setattr(_Kept, "fails", None)
    session(tmp_path, "aim", 30, 40)
    assert steps_of(kept["run0"]) == [10, 20, 30, 40]


def test_what_a_killed_process_held_in_memory_is_sent_again(
    kept, tmp_path, monkeypatch
):
    monkeypatch.setattr(_Kept, "durable", False)
    monkeypatch.setattr(_Kept, "folder", "part")
    (tmp_path / "part").mkdir()
    session(tmp_path, "aim", 0, 10, 20, close=False)
    kept["run0"].clear()  # lost
    session(tmp_path, "aim", 10, 20, 30)
    assert (tmp_path / "killed-part").is_dir() and not (tmp_path / "part").exists()
    assert steps_of(kept["run0"]) == [10, 20, 30]


def test_a_library_that_is_not_there_is_named_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = scenes.get_config("tokens-smoke")
    config.track = "wandb"
    sentence = r"needs wandb, .* pip install 'implicit_slots\[wandb\]'"
    with pytest.raises(UserError, match=sentence):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_killed_run_goes_on_in_each_library_and_nothing_is_sent(name, tmp_path):
    library = trackers.TRACKERS[name].library
    pytest.importorskip(library, reason=f"the extra {name}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("WANDB_", "MLFLOW_"))
        }
        environment |= dict.fromkeys(
            ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), address
        )
        parts = ("0, 10, 20, 30, close=False", "10, 20, 30, 40", "40, 50")
        switch, off = OWN_REPORTS.get(name, ("", None))
        for part in parts:
            text = (
                "import os, pathlib, test_trackers as t\n"
                f"t.session(pathlib.Path({str(tmp_path)!r}), {name!r}, {part})\n"
                f"assert os.environ.get({switch!r}) == {off!r}\n"
                "os.kill(os.getpid(), 9)"
            )
            done = subprocess.run(
                [sys.executable, "-c", text],
                env=environment,
                cwd=os.path.dirname(__file__),
                check=False,
            )
            assert done.returncode == -9
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert READ[name](tmp_path) == WANTED


@contextlib.contextmanager
def mlflow_server(folder, port):
    """A server of MLflow's own on this machine; what it has outlives it."""
    text = "from mlflow.cli import cli; cli()"
    options = {
        "backend-store-uri": f"sqlite:///{folder}/store.db",
        "artifacts-destination": folder / "artifacts",
        "port": port,
        "workers": 1,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", text, "server", *flags], stdout=log, stderr=log
        )
    try:
        while server.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_mlflows_server_may_go_away(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow", reason="the extra mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    workdir, store = tmp_path / "run", tmp_path / "store"
    workdir.mkdir()
    store.mkdir()
    with mlflow_server(store, port):
        session(workdir, "mlflow", 0, 10, 20, 30, close=False)  # killed
        assert f"{uri}/#/experiments/1/runs/" in capsys.readouterr().out
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "4"  # half a minute
        writer = MetricWriter(workdir, config_of("mlflow"), step=20)
        writer.write(30, "train", {"loss": 3.75})
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    writer.write(40, "train", {"loss": 5.0})
    writer.write(40, "validation", {"loss": 10.0})
    writer.close()
    assert "mlflow failed and is left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="mlflow cannot be started"):
        session(workdir, "mlflow", 40, 50)
    with mlflow_server(store, port):
        session(workdir, "mlflow", 40, 50)
        assert read_mlflow(workdir, uri) == WANTED | {"reconstructions": [20]}
