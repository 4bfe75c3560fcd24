"""One run, top to bottom: config, data, model, state, loop, report."""

import contextlib
import datetime
import hashlib
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from implicit_slots.data import registry
from implicit_slots.data.batches import TrainBatches
from implicit_slots.data.readers.frame_source import FrameSource
from implicit_slots.data.source import CLEVR_CODES
from implicit_slots.evaluation.pictures import draw as draw_pictures
from implicit_slots.evaluation.run import (
    Subject,
    evaluate,
    table,
    write,
)
from implicit_slots.evaluation.run import (
    record as found_record,
)
from implicit_slots.evaluation.steps import (
    EvaluationSteps,
    build_evaluation_steps,
    starts_of,
)
from implicit_slots.models.build import (
    build_model,
    count_parameters,
    model_class,
    overview,
    split_model,
    table_of_parameters,
)
from implicit_slots.report.page import write_report
from implicit_slots.runtime import compiling, preemption, processes
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import build_mesh, replicated, state_sharding
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import write_whole
from implicit_slots.runtime.metric_writers import MetricWriter
from implicit_slots.runtime.workdir import (
    ABSENT,
    CONFIG_FILE,
    EVALUATION_FOLDER,
    SUMMARY_FILE,
    locked,
    read_config,
    read_summary,
    write_json,
)
from implicit_slots.training import loop, replay
from implicit_slots.training.checkpoint import (
    BEST_FOLDER,
    CHECKPOINT_FOLDER,
    Checkpoints,
    Damaged,
    Loop,
    check_same_run,
    restore,
)
from implicit_slots.training.checks import check, crowding
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.precompile import compile_ahead
from implicit_slots.training.state import TrainState, initial_state
from implicit_slots.training.step import build_steps

PARAMETERS_FILE = "parameters.txt"
# Keys of config.data that change no image.
UNSEEN = ("cache", "placement", "workers", "flip")


def run(
    config: Config,
    workdir: pathlib.Path,
    *,
    mode: str = "train",
    checkpoint: str = "latest",
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
      command: how the run was started, for the report.
      began: when the user started it, by `time.perf_counter`; now if not given.

    Returns:
      What summary.json holds; see `replay.run` for what that returns.

    Raises:
      UserError: what the user can put right, in one sentence; nothing was written, or
        the same command goes on from where it stopped.
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
    """
    began = time.perf_counter() if began is None else began
    enable_compilation_cache()
    key = "optimize_programs"
    with compiling.optimised(config.get(key, ABSENT[key])):
        return _run(config, workdir, mode, checkpoint, command, began)


def _run(
    config: Config,
    workdir: pathlib.Path,
    mode: str,
    checkpoint: str,
    command: str,
    began: float,
) -> dict[str, Any]:
    training = mode == "train"
    if not processes.same(f"{config.to_json()} {workdir} {mode} {checkpoint}"):
        raise UserError(
            "the processes of this run have different configurations, workdirs or "
            "modes; start all of them with the same command"
        )
    with processes.together():
        check(config, mode, checkpoint)
        check_same_run(config, workdir, training=training)
        mesh = build_mesh(config.batch_size, parts=config.accumulate)
        try:
            # Shapes alone, which takes no time: a model that cannot be built is
            # refused before data is opened.
            graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
            optimizer = build_optimizer(
                config.optimizer, shapes, num_steps=config.num_steps
            )
            steps = build_steps(graphdef, optimizer, config, mesh)
            train, held_out = open_data(config, mode)
        except ValueError as error:
            raise UserError(str(error)) from error
    if train is not None:
        # Scenes are rendered on first use: the first ones while the model is built. A
        # failure here comes up again, in the loop.
        ThreadPoolExecutor(1).submit(train.batch, np.arange(1))
    with contextlib.ExitStack() as stack, room_in(workdir):
        if mode == "replay":
            return replay.run(config, workdir, steps, first_state(config, optimizer))
        with processes.together():
            open_workdir(config, workdir, training, stack)
        last, best = (
            stack.enter_context(
                contextlib.closing(
                    Checkpoints(workdir / name, keep=keep if training else None)
                )
            )
            for name, keep in (
                (CHECKPOINT_FOLDER, config.keep_checkpoints),
                (BEST_FOLDER, 1),
            )
        )
        ahead = None
        # Several processes compile in the order of their calls.
        if training and jax.process_count() == 1 and not is_finished(config, last):
            assert train is not None
            ahead = compile_ahead(
                steps,
                jax.eval_shape(
                    lambda params: initial_state(params, optimizer, config.optimizer),
                    shapes,
                ),
                train,
                held_out["validation"],
                mesh,
                batch_size=config.batch_size,
                accumulate=config.accumulate,
                sharding=config.sharding,
            )
        state = first_state(config, optimizer)
        state = jax.device_put(state, state_sharding(state, mesh, config.sharding))
        source = best if checkpoint == "best" else last
        found = restore(source, state, set_aside=training)
        so_far = Loop(window=[], best=None)
        if found is not None:
            state, so_far = found
            if training and int(state.step) > config.num_steps:
                raise UserError(
                    f"{workdir} is at step {int(state.step)} already, past "
                    f"config.num_steps = {config.num_steps}"
                )
            processes.say(f"resumed {workdir} at step {int(state.step)}")
        elif not training:
            raise nothing_to_evaluate(workdir)
        writes = processes.is_main()
        evaluation = build_evaluation_steps(graphdef, config, mesh)
        if not training:
            try:
                return evaluate_all(
                    config,
                    workdir,
                    state,
                    checkpoint,
                    evaluation,
                    mesh,
                    held_out,
                    command,
                )
            except ValueError as error:
                raise UserError(str(error)) from error
        if writes:
            write_json(workdir / CONFIG_FILE, json.loads(config.to_json()))
        writer = MetricWriter(workdir, step=int(state.step) if writes else None)
        stack.callback(writer.close)
        this = loop.Run(
            config=config,
            workdir=workdir,
            mesh=mesh,
            steps=steps,
            evaluation=evaluation,
            train=train,
            validation=held_out["validation"],
            checkpoints=last,
            best=best,
            writer=writer,
            began=began,
            program=ahead,
        )
        introduce(this, state.params, held_out)
        old = read_summary(workdir)
        unfinished = int(state.step) < config.num_steps
        if unfinished:
            with preemption.noticed() as notice:
                state = loop.train(this, state, so_far, notice)
        summary = summarise(this, state, held_out)
        if unfinished or not old:
            summary |= {
                "command": command,
                "wall_seconds": round(time.perf_counter() - began, 1),
                "versions": versions(),
            }
        else:
            # Scored again: how it was trained, and how long that took, stays.
            summary = old | summary
        if writes:
            write_json(workdir / SUMMARY_FILE, summary)
            print(f"report: {write_report(workdir)}")
    return summary


def first_state(
    config: Config, optimizer: optax.GradientTransformationExtraArgs
) -> TrainState:
    """Draws the parameters and returns the state before the first update.

    In one program: array by array, each shape would be compiled by itself.
    """

    def draw(seed: jax.Array) -> TrainState:
        params = split_model(build(config, seed))[1]
        return initial_state(params, optimizer, config.optimizer)

    seed = np.asarray(config.seed)
    return jax.jit(draw, compiler_options=compiling.runs_once())(seed)


def is_finished(config: Config, checkpoints: Checkpoints) -> bool:
    """Whether a checkpoint of the last step is there."""
    return max(checkpoints.steps(), default=0) >= config.num_steps


def open_data(
    config: Config, mode: str
) -> tuple[registry.Source | None, dict[str, registry.Source]]:
    """Opens the training data, to train, and the held-out splits that are scored."""
    if mode == "replay":
        return None, {}
    if mode == "evaluate":
        split = config.evaluation.split
        return None, {split: registry.build(config.data, split)}
    reads = model_class(config.model.name).reads
    held_out = {"validation": registry.build(config.data, "validation")}
    train = registry.build(config.data, "train", reads)
    check_read(train, reads, "training", config.model.num_slots)
    check_read(held_out["validation"], reads, "validation", config.model.num_slots)
    # Large enough?
    TrainBatches(train, config.batch_size, config.seed)
    return train, held_out


def check_read(
    source: registry.Source, reads: tuple[str, ...], split: str, num_slots: int
) -> None:
    """Refuses data without what the model learns from, beside images.

    Raises:
      ValueError: naming what is missing.
    """
    if reads == ("image",):
        return
    batch = source.batch(np.arange(1))
    for name in reads:
        if name not in batch:
            raise ValueError(
                f"the model learns from '{name}', which the {split} split does not "
                "have; the embedded scenes have them with "
                "--config.data.with_masks=True, CLEVR in its own files"
            )
    objects = batch["objects"]
    most = objects["present"].shape[1]
    if most > num_slots:
        raise ValueError(
            f"the model has {num_slots} slots for up to {most} objects: set "
            f"--config.model.num_slots={most}, or a smaller config.data.max_objects"
        )
    unknown = sorted(CLEVR_CODES.keys() - objects.keys())
    if unknown:
        raise ValueError(
            f"the model learns CLEVR's attributes, and the {split} split does not name "
            f"{', '.join(unknown)} of objects"
        )


def evaluate_all(
    config: Config,
    workdir: pathlib.Path,
    state: TrainState,
    checkpoint: str,
    steps: EvaluationSteps,
    mesh: jax.sharding.Mesh,
    held_out: dict[str, registry.Source],
    command: str,
) -> dict[str, Any]:
    """Evaluates a state on a split, writes all of it down, and draws.

    Returns:
      What metrics.json holds.
    """
    ((split, source),) = held_out.items()
    label = evaluation_label(config, workdir, checkpoint)
    began = time.perf_counter()
    subject = Subject(
        config=config,
        steps=steps,
        params=jax.device_put(state.evaluated, replicated(mesh)),
        mesh=mesh,
        source=source,
        batch_size=config.batch_size // config.accumulate,
    )
    processes.say(f"evaluating {workdir} at step {int(state.step)} on {label}")
    findings = evaluate(subject)
    folder = workdir / EVALUATION_FOLDER / label
    pictures = draw_pictures(subject, findings, folder)
    about = {
        "label": label,
        "title": f"{split.capitalize()} split of {config.data.name}",
        "step": int(state.step),
        "checkpoint": checkpoint,
        "split": split,
        "images": len(source),
        "seconds": round(time.perf_counter() - began, 1),
        "date": datetime.date.today().isoformat(),
        "command": command,
        "versions": versions(),
        "data": config.data.to_dict(),
        "settings": config.evaluation.to_dict(),
    }
    record = found_record(findings, about | {"pictures": pictures})
    write(folder, findings, record)
    print(table(record))
    print(f"report: {write_report(workdir)}")
    return record


def evaluation_label(config: Config, workdir: pathlib.Path, checkpoint: str) -> str:
    """Names an evaluation: the split, data that are not the run's own, its starts."""
    label = config.evaluation.split
    section = config.data.to_dict()
    trained_on = json.loads((workdir / CONFIG_FILE).read_text())["data"]
    if {k: v for k, v in section.items() if k not in UNSEEN} != {
        k: v for k, v in trained_on.items() if k not in UNSEEN
    }:
        digest = hashlib.sha256(json.dumps(section, sort_keys=True).encode())
        label = f"{config.data.name}-{label}-{digest.hexdigest()[:4]}"
    if (starts := starts_of(config)) > 1:
        label = f"{label}-{starts}-starts"
    return f"{label}-best" if checkpoint == "best" else label


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of a run's checkpoints, from the first to the last."""
    folder = workdir / CHECKPOINT_FOLDER
    with contextlib.closing(Checkpoints(folder, keep=None)) as checkpoints:
        return sorted(checkpoints.steps())


def load(workdir: pathlib.Path, step: int | None = None) -> tuple[Config, Any]:
    """Returns the configuration and the trained model of a run, for a study.

    Args:
      workdir: of a run that has a checkpoint; nothing in it is changed.
      step: of the checkpoint; the latest that is whole if not given.

    Raises:
      UserError: if there is no such run or checkpoint, or it cannot be read.
    """
    path = workdir / CONFIG_FILE
    if not path.exists() or not (workdir / CHECKPOINT_FOLDER).is_dir():
        raise UserError(f"{workdir} holds no run; train one there first")
    config = read_config(path)
    try:
        graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a configuration of this version ({error}); train again, or "
            "read it with the version that wrote it"
        ) from error
    optimizer = build_optimizer(config.optimizer, shapes, num_steps=config.num_steps)

    def zeros() -> TrainState:
        # Drawing parameters that are replaced at once would take seconds.
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return initial_state(params, optimizer, config.optimizer)

    like = jax.jit(zeros, compiler_options=compiling.runs_once())()
    folder = workdir / CHECKPOINT_FOLDER
    with contextlib.closing(Checkpoints(folder, keep=None)) as checkpoints:
        if step is None:
            found = restore(checkpoints, like, set_aside=False)
        else:
            try:
                found = checkpoints.read(step, like)
            except Damaged as damage:
                raise UserError(f"{folder / str(step)}: {damage}") from damage
    if found is None:
        raise UserError(f"{workdir} holds no checkpoint; train there first")
    return config, nnx.merge(graphdef, found[0].evaluated)


def build(config: Config, seed: jax.typing.ArrayLike | None = None) -> Any:
    """Builds the model of a whole configuration.

    Args:
      config: the whole configuration.
      seed: of the parameters, where it is not to be a constant of a program; the
        configuration's if not given.

    Raises:
      ValueError: if a name or a value is not one of the possible ones.
    """
    return build_model(
        config.model,
        resolution=config.data.resolution,
        seed=config.seed if seed is None else seed,
        precision=config.precision,
    )


def open_workdir(
    config: Config, workdir: pathlib.Path, training: bool, stack: contextlib.ExitStack
) -> None:
    """Finds a run in the workdir, or, to train, creates it and keeps others out.

    Raises:
      OSError: if the workdir cannot be written.
      UserError: if another process writes there, or it has nothing to evaluate.
    """
    if not training:
        if not (workdir / CHECKPOINT_FOLDER).is_dir():
            raise nothing_to_evaluate(workdir)
        return
    if not processes.is_main():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(workdir))
    # Before the first checkpoint: a run that is killed in between must be known for
    # what it is.
    if not (workdir / CONFIG_FILE).exists():
        write_json(workdir / CONFIG_FILE, json.loads(config.to_json()))


@contextlib.contextmanager
def room_in(workdir: pathlib.Path) -> Iterator[None]:
    """Says in a sentence that a file of the workdir could not be written or read."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be written: {error}; put that right and "
            "start the same command again"
        ) from error


def nothing_to_evaluate(workdir: pathlib.Path) -> UserError:
    """What is said of a workdir without a checkpoint."""
    return UserError(f"{workdir} has no checkpoint to evaluate; train there first")


def introduce(
    this: loop.Run, params: dict, held_out: dict[str, registry.Source]
) -> None:
    """Says what is about to run, and writes down every array of the model."""
    config = this.config
    devices = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    if jax.process_count() > 1:
        devices += f" of {jax.process_count()} processes"
    processes.say(f"{config.name}: {overview(params)}")
    processes.say(
        f"{describe(this.train, held_out)}, {devices}, workdir {this.workdir}"
    )
    if note := crowding(config):
        processes.say(note)
    if this.train is not None and processes.is_main():
        write_whole(this.workdir / PARAMETERS_FILE, table_of_parameters(params) + "\n")


def describe(
    train: registry.Source | None, held_out: dict[str, registry.Source]
) -> str:
    """Says how many images there are and, if that could be faster, how they come."""
    if train is None:
        return ", ".join(f"{len(s):,} {split} images" for split, s in held_out.items())
    text = f"{len(train):,} training images"
    if isinstance(train, FrameSource | registry.Subset):
        text += (
            " decoded on the fly (`python -m implicit_slots.data prepare` with the "
            "same --config makes that faster)"
        )
    return text


def summarise(
    this: loop.Run, state: TrainState, held_out: dict[str, registry.Source]
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
