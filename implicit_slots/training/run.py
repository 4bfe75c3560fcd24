"""One run, top to bottom: config, data, model, state, loop, report."""

import json
import os
import pathlib
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import jax
import numpy as np

from implicit_slots.config import Config
from implicit_slots.data import pipeline, sources
from implicit_slots.models.build import build_model
from implicit_slots.training import loop
from implicit_slots.training.checkpoint import (
    CONFIG_FILE,
    Checkpoints,
    check_same_model,
)
from implicit_slots.training.errors import UserError
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.report import write_report
from implicit_slots.training.sharding import build_mesh, replicate
from implicit_slots.training.state import (
    TrainState,
    count_parameters,
    initial_state,
    split_model,
)
from implicit_slots.training.step import build_steps
from implicit_slots.training.writer import MetricWriter

MODES = ("train", "evaluate")
SUMMARY_FILE = "summary.json"


def run(
    config: Config,
    workdir: pathlib.Path,
    *,
    mode: str = "train",
    command: str = "",
) -> dict[str, object]:
    """Trains, or evaluates a trained model, and reports.

    Args:
      config: see configs/base.py.
      workdir: where everything is written; a run that lies there is resumed.
      mode: "train" or "evaluate".
      command: how the run was started, for the report.

    Returns:
      What summary.json holds.

    Raises:
      UserError: what the user can put right, in one sentence; nothing was written.
    """
    began = time.perf_counter()
    enable_compilation_cache()
    check(config, mode)
    check_same_model(config, workdir)
    mesh = build_mesh(config.batch_size)
    try:
        train, validation, test = (
            sources.build(config.data, split) for split in sources.SPLITS
        )
        pipeline.TrainBatches(train, config.batch_size, config.seed)  # large enough?
        # Scenes are rendered on first use: the first ones while the model is built.
        # A failure here comes up again, in the loop.
        ThreadPoolExecutor(1).submit(train.batch, np.arange(1))
        model = build_model(
            config.model, resolution=config.data.resolution, seed=config.seed
        )
        graphdef, params = split_model(model)
        optimizer = build_optimizer(
            config.optimizer, params, num_steps=config.num_steps
        )
    except ValueError as error:
        raise UserError(str(error)) from error

    state = replicate(initial_state(params, optimizer), mesh)
    checkpoints = open_workdir(config, workdir, mode)
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
        print(f"resumed {workdir} at step {int(state.step)}")
    writer = MetricWriter(workdir, step=int(state.step))
    this = loop.Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        steps=build_steps(graphdef, optimizer, config),
        train=train,
        validation=validation,
        checkpoints=checkpoints,
        writer=writer,
        began=began,
    )
    print(
        f"{config.name}: {count_parameters(params):,} parameters, "
        f"{len(train):,} training images, {jax.device_count()} "
        f"{jax.devices()[0].platform} device(s), workdir {workdir}",
        flush=True,
    )
    try:
        if mode == "train":
            state = loop.train(this, state)
        summary = summarise(this, state, test, mode)
    finally:
        checkpoints.close()
        writer.close()
    summary |= {
        "command": command,
        "wall_seconds": round(time.perf_counter() - began, 1),
        "versions": versions(),
    }
    write_json(workdir / SUMMARY_FILE, summary)
    print(f"report: {write_report(workdir)}")
    return summary


def check(config: Config, mode: str) -> None:
    """Refuses numbers that cannot be trained with.

    Raises:
      UserError: naming the key.
    """
    if mode not in MODES:
        raise UserError(f"--mode must be one of {', '.join(MODES)}, got {mode!r}")
    for key in (
        "num_steps",
        "log_every",
        "validate_every",
        "draw_every",
        "checkpoint_every",
        "keep_checkpoints",
        "num_pictures",
    ):
        if config[key] < 1:
            raise UserError(f"config.{key} must be at least 1, got {config[key]}")
    if config.checkpoint_every % config.log_every:
        # Logged values are means since the last logged step; a resumed run must find
        # that window empty to log what an uninterrupted one logs.
        raise UserError(
            f"config.checkpoint_every ({config.checkpoint_every}) must be a multiple "
            f"of config.log_every ({config.log_every})"
        )


def open_workdir(config: Config, workdir: pathlib.Path, mode: str) -> Checkpoints:
    """Creates the workdir, or finds a run in it; to train, writes its config.json.

    Raises:
      UserError: if the workdir cannot be written, or has nothing to evaluate.
    """
    if mode == "evaluate" and not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} has no checkpoint to evaluate; train there first")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
        if mode == "evaluate" and checkpoints.latest_step() is None:
            raise UserError(
                f"{workdir} has no checkpoint to evaluate; train there first"
            )
        if mode == "train":
            write_json(workdir / CONFIG_FILE, json.loads(config.to_json()))
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written: {error}") from error
    return checkpoints


def summarise(
    this: loop.Run, state: TrainState, test: sources.Source, mode: str
) -> dict[str, object]:
    """Scores the last state on held-out data, none of which chose anything."""
    splits = {"validation": this.validation}
    if mode == "evaluate":
        splits["test"] = test
    summary: dict[str, object] = {
        "step": int(state.step),
        "parameters": count_parameters(state.params),
    }
    for split, source in splits.items():
        values = loop.validate(this, state, source) | loop.score(this, state, source)
        summary |= {f"{split}/{name}": value for name, value in values.items()}
    return summary


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start is fast.

    JAX's own setting (JAX_COMPILATION_CACHE_DIR) wins where it is made.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(home) / "implicit_slots" / "compilation"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def versions() -> dict[str, str]:
    """Returns what the run stood on."""
    packages = ("implicit_slots", "jax", "flax", "optax", "orbax-checkpoint")
    found = {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a file whole or not at all."""
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps(value, indent=2) + "\n")
    replacement.replace(path)
