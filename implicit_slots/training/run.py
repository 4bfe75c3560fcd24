"""One run, top to bottom: config, data, model, state, loop, report."""

import contextlib
import json
import pathlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from implicit_slots.data import registry
from implicit_slots.data.prepared.features import Features
from implicit_slots.data.readers.frame_source import FrameSource
from implicit_slots.evaluation import shifts
from implicit_slots.evaluation.steps import build_evaluation_steps
from implicit_slots.evaluation.validation import (
    HeldOut,
    build_validation_steps,
    score,
    validate,
)
from implicit_slots.models.build import (
    count_parameters,
    overview,
    table_of_parameters,
)
from implicit_slots.report.page import write_report
from implicit_slots.runtime import compiling, preemption, processes
from implicit_slots.runtime.compiling import Program
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import find_devices
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand, write_atomically, write_json
from implicit_slots.runtime.goodput import (
    Starts,
    WallTime,
    read_starts,
    sentence,
    summarised,
)
from implicit_slots.runtime.metric_writers import MetricWriter
from implicit_slots.runtime.versions import versions
from implicit_slots.runtime.workdir import (
    ABSENT,
    CONFIG_FILE,
    SUMMARY_FILE,
    absolute,
    locked,
    read_summary,
    writing,
)
from implicit_slots.training import loop, replay
from implicit_slots.training.checkpoint import (
    BEST_FOLDER,
    CHECKPOINT_FOLDER,
    Checkpoints,
    SavedLoop,
    open_checkpoints,
    restore,
)
from implicit_slots.training.checks import check, check_same_run, crowding
from implicit_slots.training.codebook import with_codebook
from implicit_slots.training.frozen import (
    keep_transformer,
    read_frozen,
    with_frozen,
    with_standardised,
)
from implicit_slots.training.parts import Parts, build_parts
from implicit_slots.training.precompile import compile_ahead
from implicit_slots.training.state import TrainState, first_state

PARAMETERS_FILE = "parameters.txt"


def run(
    config: Config,
    workdir: pathlib.Path,
    *,
    mode: str = "train",
    checkpoint: str = "latest",
    shift: str = "",
    command: str = "",
    began: float | None = None,
) -> dict[str, Any]:
    """Trains, or evaluates a trained model, and reports.

    With several processes, all of them call it alike; one of them writes.

    Args:
      config: see configs/base.py.
      workdir: where everything is written; a run that lies there is resumed.
      mode: "train", "evaluate", or "replay", see replay.py.
      checkpoint: to evaluate, the "latest" or the "best" by validation loss.
      shift: to evaluate what shifts of the data cost: "all", or names of some.
      command: how the run was started, for the report.
      began: when the user started it, by `time.perf_counter`; now if not given.

    Returns:
      What summary.json holds (train), metrics.json (evaluate), or `replay.run` returns.

    Raises:
      UserError: what the user can put right, in one sentence; nothing was written, or
        the same command goes on from where it stopped.
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
    """
    began = time.perf_counter() if began is None else began
    workdir = expand(workdir)
    compiling.enable_cache()
    find_devices()
    key = "optimize_programs"
    optimised = compiling.optimised(config.get(key, ABSENT[key]))
    with compiling.standard_arithmetic(), optimised:
        if not processes.same(f"{config.to_json()} {workdir} {mode} {checkpoint}"):
            raise UserError(
                "the processes of this run have different configurations, workdirs or "
                "modes; start all of them with the same command"
            )
        with processes.together():
            check(config, mode, checkpoint)
            shifted = shifts.chosen(shift, config, mode) if shift else []
            config = absolute(config)
            check_same_run(config, workdir, training=mode == "train")
            parts = build_parts(config, mode)
        if mode == "replay":
            like = first_state(config, parts.optimizer)
            return replay.run(config, workdir, parts.steps, like)
        if mode == "evaluate":
            # Not at the top: a run that trains starts without what evaluates and draws.
            from implicit_slots.training import evaluate

            return evaluate.run(parts, workdir, checkpoint, command, shifted)
        return train(parts, workdir, command, began)


def train(
    parts: Parts, workdir: pathlib.Path, command: str, began: float
) -> dict[str, Any]:
    """Trains from where the workdir is to the end; returns what summary.json holds."""
    config, mesh = parts.config, parts.mesh
    assert parts.train is not None
    wall = WallTime(began)
    with processes.together():
        frozen = read_frozen(config, parts.graphdef, parts.shapes, workdir)
    # Scenes are rendered on first use: the first ones while the model is built. A
    # failure here comes up again, in the loop.
    ThreadPoolExecutor(1).submit(parts.train.batch, np.arange(1))
    validation = HeldOut(
        build_validation_steps(parts.graphdef, config, mesh),
        config,
        mesh,
        parts.held_out["validation"],
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiling.told_of_compiling(wall.compiled))
        with processes.together():
            open_workdir(config, workdir, stack)
            if isinstance(parts.train, Features) and processes.is_main():
                with writing(workdir):
                    keep_transformer(parts.train, workdir)
        last, best = (
            stack.enter_context(open_checkpoints(workdir, name, keep))
            for name, keep in (
                (CHECKPOINT_FOLDER, config.keep_checkpoints),
                (BEST_FOLDER, 1),
            )
        )
        ahead = begin_to_compile(parts, validation, last)
        state, so_far = first_or_latest(parts, workdir, last, frozen)
        writes = processes.is_main()
        if writes:
            with writing(workdir):
                write_json(workdir / CONFIG_FILE, json.loads(config.to_json()))
        step = int(state.step) if writes else None
        with processes.together():
            writer = MetricWriter(workdir, config, step=step)
        stack.callback(writer.close)
        introduce(parts, state, workdir)
        with writing(workdir):
            old = read_summary(workdir)
        unfinished = int(state.step) < config.num_steps
        starts = Starts(workdir, wall, int(state.step), writes=writes)
        if unfinished:
            stack.enter_context(starts)
            this = loop.Run(
                config=config,
                workdir=workdir,
                mesh=mesh,
                steps=parts.steps,
                evaluation=build_evaluation_steps(parts.graphdef, config, mesh),
                train=parts.train,
                validation=validation,
                checkpoints=last,
                best=best,
                writer=writer,
                wall=wall,
                starts=starts,
                program=ahead,
            )
            with preemption.noticed() as notice:
                state = loop.train(this, state, so_far, notice)
        with wall.part("validation"):
            summary = summarise(parts, validation, state)
        if unfinished or not old:
            summary |= {
                "command": command,
                "wall_seconds": round(time.perf_counter() - began, 1),
                "versions": versions(),
                **summarised(starts.write()),
            }
        else:
            # Scored again: how it was trained, and how long that took, stays.
            summary = old | summary
        if writes:
            with writing(workdir):
                write_json(workdir / SUMMARY_FILE, summary)
                report = write_report(workdir)
            if unfinished:
                print(sentence(read_starts(workdir)))
            print(f"report: {report}")
    return summary


def open_workdir(
    config: Config, workdir: pathlib.Path, stack: contextlib.ExitStack
) -> None:
    """Creates the workdir if it is not there, and keeps other runs out of it.

    Raises:
      UserError: if it cannot be written, or another process writes there.
    """
    if not processes.is_main():
        return
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(workdir))
        # Before the first checkpoint: a run that is killed in between must be known
        # for what it is.
        if not (workdir / CONFIG_FILE).exists():
            write_json(workdir / CONFIG_FILE, json.loads(config.to_json()))


def begin_to_compile(
    parts: Parts, validation: HeldOut, checkpoints: Checkpoints
) -> Future[Program] | None:
    """Begins to compile what the loop will call, if there is something to train.

    Several processes do not: they compile in the order of their calls.
    """
    config = parts.config
    if jax.process_count() > 1:
        return None
    done = max(checkpoints.steps(), default=0)
    if done >= config.num_steps:
        return None
    assert parts.train is not None
    return compile_ahead(
        parts.steps.at(done + 1),
        validation,
        parts.state_shapes(),
        parts.train,
        batch_size=config.batch_size,
    )


def first_or_latest(
    parts: Parts,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    frozen: dict[str, Any] | None,
) -> tuple[TrainState, SavedLoop]:
    """Returns the state to train from, and what its checkpoint held of the loop.

    `frozen` is what the first state takes of `read_frozen`.

    Raises:
      UserError: if the run is past its end, or each of its checkpoints is damaged.
    """
    config = parts.config
    state = parts.first_state()
    found = restore(checkpoints, state, set_aside=True)
    if found is None:
        assert parts.train is not None
        state = with_codebook(state, parts.train, config.seed)
        state = with_frozen(state, frozen)
        state = with_standardised(state, parts.graphdef, parts.train, config)
        return state, SavedLoop(window=[], best=None)
    state, so_far = found
    if int(state.step) > config.num_steps:
        raise UserError(
            f"{workdir} is at step {int(state.step)} already, past "
            f"config.num_steps = {config.num_steps}"
        )
    processes.say(f"resumed {workdir} at step {int(state.step)}")
    return state, so_far


def introduce(parts: Parts, state: TrainState, workdir: pathlib.Path) -> None:
    """Says what is about to run, and writes down every array of the model."""
    config, train = parts.config, parts.train
    assert train is not None
    devices = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    if jax.process_count() > 1:
        devices += f" of {jax.process_count()} processes"
    images = f"{len(train):,} training images"
    if isinstance(train, FrameSource | registry.Subset):
        images += (
            " decoded on the fly (`python -m implicit_slots.data prepare` with the "
            "same --config makes that faster)"
        )
    processes.say(f"{config.name}: {overview(state.params)}")
    processes.say(f"{images}, {devices}, workdir {workdir}")
    if note := crowding(config):
        processes.say(note)
    if processes.is_main():
        with writing(workdir):
            text = table_of_parameters(state.params)
            write_atomically(workdir / PARAMETERS_FILE, text + "\n")


def summarise(parts: Parts, validation: HeldOut, state: TrainState) -> dict[str, Any]:
    """Scores a state on held-out data, none of which chose anything."""
    summary: dict[str, Any] = {
        "step": int(state.step),
        "parameters": count_parameters(state.params),
    }
    for split, source in parts.held_out.items():
        held_out = validation._replace(source=source)
        values = validate(held_out, state.evaluated, state.step)
        values |= score(held_out, state.evaluated)
        summary |= {f"{split}/{name}": value for name, value in values.items()}
    return summary
