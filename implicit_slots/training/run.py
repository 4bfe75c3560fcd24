"""One run, top to bottom: config, data, model, state, loop, report."""

import contextlib
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from implicit_slots.config import Config
from implicit_slots.data import pipeline, sources
from implicit_slots.data.frames import FrameSource
from implicit_slots.models.build import build_model
from implicit_slots.models.slate import SLATE
from implicit_slots.training import feed, loop
from implicit_slots.training.checkpoint import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    Checkpoints,
    check_same_run,
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
POSITIVE = (
    "num_steps",
    "log_every",
    "validate_every",
    "draw_every",
    "checkpoint_every",
    "keep_checkpoints",
    "num_pictures",
    "num_scored",
    "model.vocab_size",
    "model.dvae_features",
    "model.width",
    "model.slot_size",
    "model.slot_mlp_size",
    "diagnostics.num_examples",
    "diagnostics.krylov",
    "data.workers",
)
# What the training step reads of a batch.
TRAINED_ON = ("image",)
NOT_NEGATIVE = ("diagnostics.every", "diagnostics.powers")


def run(
    config: Config,
    workdir: pathlib.Path,
    *,
    mode: str = "train",
    command: str = "",
    began: float | None = None,
) -> dict[str, Any]:
    """Trains, or evaluates a trained model, and reports.

    Args:
      config: see configs/base.py.
      workdir: where everything is written; a run that lies there is resumed.
      mode: "train" or "evaluate".
      command: how the run was started, for the report.
      began: when the user started it, by `time.perf_counter`; now if not given.

    Returns:
      What summary.json holds.

    Raises:
      UserError: what the user can put right, in one sentence; nothing was written.
    """
    began = time.perf_counter() if began is None else began
    training = mode == "train"
    enable_compilation_cache()
    check(config, mode)
    check_same_run(config, workdir, training=training)
    mesh = build_mesh(config.batch_size)

    try:
        # Shapes alone, which takes no time: a model that cannot be built is refused
        # before data is opened.
        graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
        optimizer = build_optimizer(
            config.optimizer, shapes, num_steps=config.num_steps
        )
        train = None
        if training:
            train = sources.build(config.data, "train", TRAINED_ON)
            # Large enough?
            pipeline.TrainBatches(train, config.batch_size, config.seed)
        held_out = {"validation": sources.build(config.data, "validation")}
        if not training:
            held_out["test"] = sources.build(config.data, "test")
    except ValueError as error:
        raise UserError(str(error)) from error
    if train is not None:
        # Scenes are rendered on first use: the first ones while the model is built. A
        # failure here comes up again, in the loop.
        ThreadPoolExecutor(1).submit(train.batch, np.arange(1))
    params = split_model(build(config))[1]
    state = replicate(initial_state(params, optimizer), mesh)

    checkpoints = open_workdir(config, workdir, training)
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
        if training and int(state.step) > config.num_steps:
            raise UserError(
                f"{workdir} is at step {int(state.step)} already, past "
                f"config.num_steps = {config.num_steps}"
            )
        print(f"resumed {workdir} at step {int(state.step)}")
    if training:
        write_json(workdir / CONFIG_FILE, json.loads(config.to_json()))
    this = loop.Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        steps=build_steps(graphdef, optimizer, config),
        train=train,
        validation=held_out["validation"],
        checkpoints=checkpoints,
        writer=MetricWriter(workdir, step=int(state.step) if training else None),
        began=began,
    )
    print(
        f"{config.name}: {count_parameters(params):,} parameters, "
        f"{describe(train, held_out)}, {jax.device_count()} "
        f"{jax.devices()[0].platform} device(s), workdir {workdir}",
        flush=True,
    )
    if note := crowding(config):
        print(note)
    old = read_summary(workdir)
    unfinished = training and int(state.step) < config.num_steps
    try:
        if unfinished:
            state = loop.train(this, state)
        summary = summarise(this, state, held_out)
    finally:
        checkpoints.close()
        this.writer.close()
    if unfinished or not old:
        summary |= {
            "command": command,
            "wall_seconds": round(time.perf_counter() - began, 1),
            "versions": versions(),
        }
    else:
        # Scored again: how it was trained, and how long that took, stays.
        summary = old | summary
    write_json(workdir / SUMMARY_FILE, summary)
    print(f"report: {write_report(workdir)}")
    return summary


def load(workdir: pathlib.Path) -> tuple[Config, SLATE]:
    """Returns the configuration and the trained model of a run, for a study.

    Args:
      workdir: of a run that has a checkpoint; nothing in it is changed.

    Raises:
      UserError: if there is no such run, or it cannot be read.
    """
    path = workdir / CONFIG_FILE
    if not path.exists() or not (workdir / CHECKPOINT_FOLDER).is_dir():
        raise UserError(f"{workdir} holds no run; train one there first")
    config: Config = ConfigDict(json.loads(path.read_text()))
    try:
        graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a configuration of this version ({error}); train again, or "
            "read it with the version that wrote it"
        ) from error
    # Drawing parameters that are replaced at once would take seconds.
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    optimizer = build_optimizer(config.optimizer, params, num_steps=config.num_steps)
    with contextlib.closing(Checkpoints(workdir, keep=1)) as checkpoints:
        if checkpoints.latest_step() is None:
            raise UserError(f"{workdir} holds no checkpoint; train there first")
        state = checkpoints.restore(initial_state(params, optimizer))
    return config, nnx.merge(graphdef, state.params)


def build(config: Config) -> SLATE:
    """Builds the model of a whole configuration.

    Raises:
      ValueError: if a name or a value is not one of the possible ones.
    """
    return build_model(
        config.model,
        resolution=config.data.resolution,
        seed=config.seed,
        precision=config.precision,
    )


def check(config: Config, mode: str) -> None:
    """Refuses numbers that cannot be trained with.

    Raises:
      UserError: naming the key.
    """
    if mode not in MODES:
        raise UserError(f"--mode must be one of {', '.join(MODES)}, got {mode!r}")
    usage = sources.usage_of(config.data)
    flat = {
        **dict(config.items()),
        **{f"model.{key}": value for key, value in config.model.items()},
        **{f"data.{key}": value for key, value in usage.items()},
        **{f"diagnostics.{key}": value for key, value in config.diagnostics.items()},
    }
    for key in POSITIVE:
        if flat[key] < 1:
            raise UserError(f"config.{key} must be at least 1, got {flat[key]}")
    for key in NOT_NEGATIVE:
        if flat[key] < 0:
            raise UserError(f"config.{key} must not be negative, got {flat[key]}")
    if usage["placement"] not in feed.PLACEMENTS:
        raise UserError(
            f"config.data.placement must be one of {', '.join(feed.PLACEMENTS)}, got "
            f"{usage['placement']!r}"
        )
    for key in ("dropout", "attention_dropout"):
        if not 0 <= config.model[key] < 1:
            raise UserError(
                f"config.model.{key} must be in [0, 1), got {config.model[key]}"
            )
    if config.model.attention == "cudnn" and (
        jax.default_backend() != "gpu" or config.precision != "bfloat16"
    ):
        raise UserError(
            'config.model.attention="cudnn" needs an NVIDIA GPU and '
            f'config.precision="bfloat16"; this is a {jax.default_backend()} with '
            f"{config.precision}"
        )
    for key in ("start", "end"):
        if not config.temperature[key] > 0:
            raise UserError(
                f"config.temperature.{key} must be positive, got "
                f"{config.temperature[key]}"
            )
    if not config.optimizer.clip_max_norm > 0:
        raise UserError(
            "config.optimizer.clip_max_norm must be positive (inf for no clipping), "
            f"got {config.optimizer.clip_max_norm}"
        )
    if config.checkpoint_every % config.log_every:
        # Logged values are means since the last logged step; a resumed run must find
        # that window empty to log what an uninterrupted one logs.
        raise UserError(
            f"config.checkpoint_every ({config.checkpoint_every}) must be a multiple "
            f"of config.log_every ({config.log_every})"
        )


def open_workdir(config: Config, workdir: pathlib.Path, training: bool) -> Checkpoints:
    """Finds a run in the workdir, or, to train, creates it.

    Raises:
      UserError: if the workdir cannot be written, or has nothing to evaluate.
    """
    nothing = UserError(f"{workdir} has no checkpoint to evaluate; train there first")
    if not training and not (workdir / CHECKPOINT_FOLDER).is_dir():
        raise nothing
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written: {error}") from error
    if not training and checkpoints.latest_step() is None:
        raise nothing
    return checkpoints


def describe(train: sources.Source | None, held_out: dict[str, sources.Source]) -> str:
    """Says how many images there are and, if that could be faster, how they come."""
    if train is None:
        return ", ".join(f"{len(s):,} {split} images" for split, s in held_out.items())
    text = f"{len(train):,} training images"
    if isinstance(train, FrameSource | sources.Subset):
        text += (
            " decoded on the fly (`python -m implicit_slots.data prepare` with the "
            "same --config makes that faster)"
        )
    return text


def crowding(config: Config) -> str:
    """A note where images may hold more than slots can tell apart, or nothing."""
    most = config.data.max_objects
    if 0 < config.data.get("keep_objects", 0) < most:
        most = config.data.keep_objects
    if most < config.model.num_slots:
        return ""
    return (
        f"note: images may hold {most} objects and a ground, for "
        f"{config.model.num_slots} slots: some slots then share; "
        "--config.model.num_slots and --config.data.keep_objects are the keys"
    )


def summarise(
    this: loop.Run, state: TrainState, held_out: dict[str, sources.Source]
) -> dict[str, Any]:
    """Scores a state on held-out data, none of which chose anything."""
    summary: dict[str, Any] = {
        "step": int(state.step),
        "parameters": count_parameters(state.params),
    }
    for split, source in held_out.items():
        values = loop.validate(this, state, source) | loop.score(this, state, source)
        summary |= {f"{split}/{name}": value for name, value in values.items()}
    return summary


def read_summary(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns what an earlier session left in summary.json, or nothing."""
    path = workdir / SUMMARY_FILE
    return json.loads(path.read_text()) if path.exists() else {}


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


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all; what is not finite becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps(finite, indent=2) + "\n")
    replacement.replace(path)
