"""The folder of a run: its files, its lock, and the configuration that it holds.

`main` passes this file as --config where a --workdir is given without one. It imports
no JAX: what is wrong with a command is said before that is loaded.
"""

import contextlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from implicit_slots.runtime.config import Config
from implicit_slots.runtime.config_files import load_config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand, lock_file

LOCK_FILE = ".lock"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
GOODPUT_FILE = "goodput.json"
EVALUATION_FOLDER = "evaluation"
EVALUATION_FILE = "metrics.json"  # of one evaluation, below EVALUATION_FOLDER/LABEL
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"  # of a folder that holds a model and no run
TRAINED = pathlib.Path(__file__).parents[1] / "trained"
# Keys that configurations of older versions lack, and what their absence means.
ABSENT: Mapping[str, object] = {
    "penalty.attention_entropy": 0.0,
    "penalty.slot_coupling": 0.0,
    "model.kernels": "auto",
    "model.attention_gain": 1.0,
    "model.normalizer": "mean",
    "model.inputs": "tokens",
    "model.encoder_features": 64,
    "model.encoder_strides": [2, 1],
    "model.encoder_kernels": [5],
    "model.encoder_padding": "zeros",
    "model.encoder_positions": "added",
    "model.position_scale": 1.0,
    "model.decoder_order": "raster",
    "model.drop_tokens": 0.0,
    "model.tokenizer": "dvae",
    "model.token_weighting": 0.0,
    "model.decoder": "mlp",
    "model.decoder_blocks": 4,
    "model.decoder_heads": 8,
    "model.cached_features": False,
    "initial_noise.start": 0.0,
    "initial_noise.end": 0.0,
    "initial_noise.steps": 30_000,
    "optimizer.dvae_steps": 0,
    "optimizer.slots_learning_rate": 0.0,
    "optimize_programs": True,
    "track": "",
    "evaluation.masks.starts": 1,
    "evaluation.probes.every": 0,
    "evaluation.probes.num_images": 1_000,
    "evaluation.probes.match": "auto",
    "evaluation.masks.resolution": 0,
    "evaluation.lpips": "",
    "data.ignore_id": 255,
    "data.overlaps": "smaller",
}
# Of them those that some models alone have: their absence elsewhere means nothing.
OF_SLATE = (
    "model.kernels",
    "optimizer.dvae_steps",
    "model.inputs",
    "model.encoder_features",
    "model.encoder_strides",
    "model.drop_tokens",
    "model.tokenizer",
    "model.token_weighting",
)
OF_FEATURES = (
    "model.decoder",
    "model.decoder_blocks",
    "model.decoder_heads",
    "model.cached_features",
)
OF_DECODERS = ("model.decoder_order",)  # of both
# Those that every model has but slots of frozen features, which are younger.
OF_CONVOLUTIONS = (
    "model.encoder_kernels",
    "model.encoder_padding",
    "model.encoder_positions",
    "model.position_scale",
)
# The same of folders of images alone.
OF_FOLDERS = ("data.ignore_id",)
# Of COCO alone.
OF_COCO = ("data.overlaps",)
# Keys of older versions that nothing needs any more.
GONE = ("model.attention",)
# Keys that name a file or folder; empty: none, or a default of the data set's.
PATHS = (
    "data.path",
    "data.cache",
    "evaluation.inception",
    "evaluation.lpips",
    "features.weights",
)
# Between the workdir and the file whose data section takes the place of the run's.
SEPARATOR = "\n"


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps a second run out of the workdir; the lock ends with its process.

    Raises:
      UserError: if another run holds it.
    """
    with (workdir / LOCK_FILE).open("a+") as file:
        try:
            lock_file(file, wait=False)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another run is writing to {workdir} ({file.read().strip()}); wait "
                "for it, stop it, or choose another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def read_summary(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns what an earlier session left in summary.json, or nothing."""
    path = workdir / SUMMARY_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def packaged() -> dict[str, pathlib.Path]:
    """Returns the folders of the models that come with the package, by name."""
    return {file.parent.name: file.parent for file in TRAINED.glob(f"*/{WEIGHTS_FILE}")}


def find_trained(name: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder that a user named, or that of a model of the package.

    Raises:
      UserError: it is the address of a bucket, or there is no home folder for ~.
    """
    path = expand(name)
    return path if path.exists() else packaged().get(os.fspath(name), path)


@contextlib.contextmanager
def writing(workdir: pathlib.Path) -> Iterator[None]:
    """Says in a sentence that a file of the workdir cannot be written or read.

    To be put around nothing but calls that do that.

    Raises:
      UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written: {error}; put that right and "
            "start the same command again"
        ) from error


def workdirs(text: str, *, to_compare: bool) -> list[str]:
    """Returns the workdirs that --workdir names: one, or several with commas between.

    A name may have commas (lr=0.1,wd=0): what is there counts as one, the longest name
    first.

    Args:
      text: of the flag.
      to_compare: whether it may be several of which one alone is there.
    """
    rest, found = text.split(","), []
    while rest:
        count = next(
            (n for n in range(len(rest), 0, -1) if _is_folder(",".join(rest[:n]))), 1
        )
        found.append(",".join(rest[:count]))
        del rest[:count]
    there = [_is_folder(path) for path in found if path]
    several = there and (any(there) if to_compare else all(there))
    return [path for path in found if path] if several else [text]


def _is_folder(path: str) -> bool:
    return bool(path) and os.path.isdir(os.path.expanduser(path))


def absolute(config: Config) -> Config:
    """Returns the configuration with paths that mean the same from every directory.

    Raises:
      UserError: a path is none of this machine's.
    """
    config = config.copy_and_resolve_references()
    for key in PATHS:
        section, name = key.split(".")
        if path := config.get(section, {}).get(name):
            config[section][name] = os.path.abspath(expand(path))
    return config


def is_same_place(before: str | None, now: str | None) -> bool:
    """Whether a run's files are where they were, or were moved and are not there now.

    Args:
      before: as the run has it.
      now: as this command has it.
    """
    if not before or not now:
        return before == now
    if os.path.realpath(before) == os.path.realpath(now):
        return True
    moved = not os.path.exists(before)
    return moved and os.path.basename(before) == os.path.basename(now)


def config_flag(workdir: str, data: str | None) -> str:
    """Returns the --config that stands for a run's own configuration."""
    parts = [workdir] if data is None else [workdir, data]
    return f"--config={__file__}:{SEPARATOR.join(parts)}"


def get_config(what: str) -> Config:
    """Returns the configuration that a workdir holds, for ml_collections' flag.

    Args:
      what: the workdir and, after `SEPARATOR`, FILE or FILE:variant of a configuration
        whose section `data` replaces the run's, at the run's resolution.

    Raises:
      ValueError: if one of them cannot be read, in one sentence.
    """
    workdir, *data = what.split(SEPARATOR)
    path = expand(workdir) / CONFIG_FILE
    try:
        config = read_config(path)
        resolution = config.data.resolution
    except OSError:
        raise ValueError(
            f"{workdir} holds no run; train one there first, or give its --config"
        ) from None
    except (AttributeError, ValueError, TypeError):
        raise ValueError(
            f"{path} is not a run's configuration; give another --workdir"
        ) from None
    for source in data:
        config.data = load_config(source).data
        config.data.resolution = resolution
    return config


def read_config(path: pathlib.Path) -> Config:
    """Returns the configuration in a run's file, with the keys its version lacked.

    Raises:
      OSError: if there is no such file.
      AttributeError, ValueError, TypeError: if it is none.
    """
    values = json.loads(path.read_text())
    for key in GONE:
        section, name = key.split(".")
        values.get(section, {}).pop(name, None)
    config: Config = ConfigDict(values)
    for key, value in ABSENT.items():
        if key in OF_SLATE and config.model.get("name") != "slate":
            continue
        if key in OF_FEATURES and config.model.get("name") != "feature_slots":
            continue
        if key in OF_DECODERS and config.model.get("name") not in (
            "slate",
            "feature_slots",
        ):
            continue
        if key in OF_CONVOLUTIONS and config.model.get("name") == "feature_slots":
            continue
        if key in OF_COCO and config.data.get("name") != "coco":
            continue
        if key in OF_FOLDERS and config.data.get("name") != "folder":
            continue
        *sections, name = key.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        if name not in section:
            section[name] = value
    return config
