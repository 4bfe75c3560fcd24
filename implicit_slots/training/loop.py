"""The loop: batches through the step, and what is due at which step."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jaxtyping import PyTree

from implicit_slots.data.registry import Source, usage_of
from implicit_slots.data.source import DataError
from implicit_slots.drawing import grids
from implicit_slots.evaluation.findings import Subject
from implicit_slots.evaluation.groups import groups_of
from implicit_slots.evaluation.run import evaluate_group
from implicit_slots.evaluation.steps import EvaluationSteps
from implicit_slots.evaluation.validation import (
    HeldOut,
    at_once,
    diagnose,
    rendered,
    validate,
)
from implicit_slots.runtime import garbage, processes
from implicit_slots.runtime.compiling import Program, compile_step
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.goodput import Starts, WallTime
from implicit_slots.runtime.metric_writers import MetricWriter
from implicit_slots.runtime.preemption import Notice, Preempted
from implicit_slots.runtime.progress import Progress
from implicit_slots.runtime.trace import Trace
from implicit_slots.runtime.workdir import writing
from implicit_slots.training import checkpoint, device_batches, nonfinite, replay
from implicit_slots.training.alarms import Alarms
from implicit_slots.training.checkpoint import Checkpoints
from implicit_slots.training.optimizer import learning_rates
from implicit_slots.training.state import TrainState
from implicit_slots.training.step import Steps

# Steps that are dispatched before their predecessors have ended.
AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop needs beside the state.

    Attributes:
      config: the whole configuration.
      workdir: where everything is written.
      mesh: the devices.
      steps: the compiled functions that train.
      evaluation: those of an evaluation.
      train: training data.
      validation: held-out data, and what measures them.
      checkpoints: the latest ones of this workdir.
      best: the one of the lowest validation loss.
      writer: of this workdir.
      wall: counts where the time goes.
      starts: keeps that for all starts of the workdir.
      program: of the train step, where it is being compiled already.
    """

    config: Config
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    steps: Steps
    evaluation: EvaluationSteps
    train: Source
    validation: HeldOut
    checkpoints: Checkpoints
    best: Checkpoints
    writer: MetricWriter
    wall: WallTime
    starts: Starts
    program: Future[Program] | None = None


def train(
    run: Run, state: TrainState, so_far: checkpoint.SavedLoop, notice: Notice
) -> TrainState:
    """Trains to `config.num_steps`.

    Args:
      run: what is trained.
      state: where training goes on.
      so_far: what the checkpoint that the state is from held of the loop.
      notice: tells when to stop early.

    Returns:
      The last state.

    Raises:
      Preempted: told to stop; the state is saved.
      NonFiniteRun: too many steps in a row were skipped.
    """
    usage = usage_of(run.config.data)
    batches = device_batches.train_batches(
        run.train,
        run.mesh,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        start_step=int(state.step),
        placement=usage["placement"],
        workers=usage["workers"],
        flip=usage["flip"],
    )
    silent = not processes.is_main()
    start, end = int(state.step), run.config.num_steps
    with (
        contextlib.closing(batches),
        contextlib.closing(
            Progress(start, end, lambda: batches.waited, silent=silent)
        ) as progress,
        contextlib.closing(Trace(run.workdir, run.config.profile)) as trace,
    ):
        return _Loop(run, state, so_far, notice, batches, progress, trace).run()


class _Loop:
    """The state of a training loop between steps; see `train`."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        so_far: checkpoint.SavedLoop,
        notice: Notice,
        batches: device_batches.Feed,
        progress: Progress,
        trace: Trace,
    ):
        self._run = run
        self._state = state
        self._start = int(state.step)
        self._saved = self._start
        self._notice = notice
        self._batches = batches
        self._progress = progress
        self._trace = trace
        self._alarms = Alarms(run.config.alarms, run.writer.history)
        self._skipped = int(state.faults.skipped)
        self._best = so_far["best"]
        self._earlier = so_far["window"]
        self._window: list[metrics.Collection] = []

    def run(self) -> TrainState:
        run, end, wall = self._run, self._run.config.num_steps, self._run.wall
        logged = None
        for step in range(self._start + 1, end + 1):
            repeated = step <= run.starts.furthest
            wall.turn_to("repeated" if repeated else "steps")
            waited = self._batches.waited
            if self._notice.reached(step):
                self._look_for_faults()
                self._save(step - 1)
                raise Preempted(step - 1)
            if self._progress.failure is not None:
                self._save_alone(step - 1)
                raise unshown(self._progress.failure)
            try:
                batch = self._batches.next(after=logged)
            except DataError:
                self._save_alone(step - 1)
                raise
            if not repeated:
                wall.move(self._batches.waited - waited, "data_wait")
            untrained = None
            if step == self._start + 1:
                with wall.part("compile"):
                    program = (
                        compile_step(run.steps.at(step).train, self._state, batch)
                        if run.program is None
                        else run.program.result()
                    )
                self._progress.write(str(program))
                if self._start == 0:
                    # The step gives the old state up, and the picture of what
                    # training starts from can wait until after the first step.
                    untrained = jax.jit(_copied)(self._state.params)
            self._trace.before(step)
            self._state, logged = run.steps.at(step).train(self._state, batch)
            self._window.append(logged)
            # JAX would take orders without end; a notice to stop waits for them all.
            jax.block_until_ready(self._window[-1 - AHEAD : -AHEAD])
            self._trace.after(step, logged)
            if step == self._start + 1:
                jax.block_until_ready(self._state)
                seconds = time.perf_counter() - wall.began
                self._progress.write(f"first step done {seconds:.1f} s after the start")
                garbage.look_for_it()
                if untrained is not None:
                    with wall.part("pictures"):
                        draw(run, untrained, 0)
                self._progress.restart(step)
            self._due(step)
            self._progress.advance()
        wall.turn_to("other")
        return self._state

    def _due(self, step: int) -> None:
        """Whatever is to be done after this step."""
        config, run = self._run.config, self._run

        def due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == config.num_steps)

        saves, validates = due(config.checkpoint_every), due(config.validate_every)
        if due(config.log_every) or validates or saves:
            self._look_for_faults()
        if due(config.log_every):
            values = computed(self._merged()) | self._progress.rate(step)
            if self._skipped:
                values["skipped"] = float(self._skipped)
            scale = 1.0
            if run.steps.observe is not None:
                values["rate_scale"] = scale = float(self._state.plateau.scale)
            values |= learning_rates(
                config.optimizer,
                self._state.params,
                max(step - self._skipped - 1, 0),
                config.num_steps,
                scale,
            )
            self._window, self._earlier = [], []
            self._log(step, "train", values)
        if validates:
            with self._aside("validation"):
                values = validate(
                    run.validation, self._state.evaluated, self._state.step
                )
                self._log(step, "validation", values)
                self._validated(step, values["loss"])
        if due(config.diagnostics.every):
            with self._aside("validation"):
                values = diagnose(run.validation, self._state.evaluated)
                self._write(step, "validation", values)
        for group in groups_of(config.model.name):
            if due(config.evaluation[group].every):
                with self._aside("validation"):
                    values = measure_group(run, self._state.evaluated, group)
                    self._write(step, "validation", values)
        if due(config.draw_every):
            with self._aside("pictures"):
                draw(run, self._state.evaluated, step)
        if saves:
            with self._aside("checkpoints"):
                self._save(step)
        run.starts.note(step)

    @contextlib.contextmanager
    def _aside(self, part: str) -> Iterator[None]:
        """Takes what happens meanwhile out of the step rate; counts it as `part`."""
        with self._progress.paused(), self._run.wall.part(part):
            yield

    def _log(self, step: int, split: str, values: dict[str, float]) -> None:
        self._progress.say(step, split, values)
        self._write(step, split, values)

    def _write(self, step: int, split: str, values: dict[str, float]) -> None:
        with self._run.wall.part("other"):
            self._run.writer.write(step, split, values)
        for sentence in self._alarms.check(step, split, values):
            self._progress.write(f"alarm: {sentence}")

    def _validated(self, step: int, loss: float) -> None:
        """Lowers the rates if that is due, and keeps the best state."""
        run = self._run
        if run.steps.observe is not None:
            plateau = run.steps.observe(self._state.plateau, loss)
            self._state = self._state._replace(plateau=plateau)
        if math.isfinite(loss) and (self._best is None or loss < self._best):
            self._best = loss
            if step not in run.best.steps():
                with run.wall.part("checkpoints"):
                    run.best.save(self._state, self._record())

    def _look_for_faults(self) -> None:
        """Reports skipped steps; stops the run after too many in a row."""
        run = self._run
        faults = jax.device_get(self._state.faults)
        if faults.skipped > self._skipped:
            count, self._skipped = faults.skipped - self._skipped, int(faults.skipped)
            sentence = nonfinite.explain(faults, run.steps.checks)
            self._progress.write(
                f"{count} step{'s were' if count > 1 else ' was'} skipped, "
                f"{self._skipped} in all; the last: {sentence}"
            )
        settings = run.config.nonfinite
        if settings.skip and faults.in_a_row >= settings.stop_after:
            replay.write(run.config, run.workdir, run.train, self._state)
            raise nonfinite.NonFiniteRun(
                nonfinite.last_words(faults, run.steps.checks, run.workdir)
            )

    def _save(self, step: int) -> None:
        """Saves the state after `step`, unless that is done."""
        if step != self._saved:
            with self._run.wall.part("checkpoints"):
                self._run.checkpoints.save(self._state, self._record())
            self._saved = step

    def _save_alone(self, step: int) -> None:
        """Saves where that takes this process alone."""
        if jax.process_count() == 1:
            self._save(step)

    def _record(self) -> checkpoint.SavedLoop:
        window = self._earlier
        if self._window:
            window = [float(leaf) for leaf in jax.tree.leaves(self._merged())]
        return checkpoint.SavedLoop(window=window, best=self._best)

    def _merged(self) -> metrics.Collection:
        """The training metrics since the last logged step, merged in their order."""
        window = jax.device_get(self._window)
        if self._earlier:
            leaves, structure = jax.tree.flatten(window[0])
            earlier = [
                np.asarray(value, leaf.dtype)
                for value, leaf in zip(self._earlier, leaves, strict=True)
            ]
            window = [jax.tree.unflatten(structure, earlier), *window]
        return merged(window)


def unshown(failure: OSError) -> Exception:
    """What ends a run whose output cannot be written any more."""
    if isinstance(failure, BrokenPipeError):
        return failure
    return UserError(
        f"the output cannot be written any more ({failure.strerror}); put that right "
        "and start the same command again"
    )


def _copied(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def merged(window: Sequence[metrics.Collection]) -> metrics.Collection:
    """Merges the metrics of steps, in their order."""
    return functools.reduce(lambda a, b: a.merge(b), window)


def computed(collection: metrics.Collection) -> dict[str, float]:
    """Returns the numbers of metrics that are on the host."""
    with np.errstate(invalid="ignore"):  # A mean over nothing is NaN.
        return {name: float(value) for name, value in collection.compute().items()}


def measure_group(run: Run, params: PyTree, group: str) -> dict[str, float]:
    """Returns one group of an evaluation's numbers, on held-out images."""
    subject = Subject(
        config=run.config,
        steps=run.evaluation,
        params=params,
        mesh=run.mesh,
        source=run.validation.source,
        batch_size=at_once(run.config),
        quiet=True,
        split="validation",
    )
    return evaluate_group(subject, group)


def draw(run: Run, params: PyTree, step: int) -> None:
    """Saves the reconstruction grid of the first held-out images."""
    source = run.validation.source
    count = min(run.config.num_pictures, len(source))
    parts = [part for _, part in rendered(run.validation, params, count)]
    # Every process computes its part of it.
    drawn = jax.tree.map(
        lambda *leaves: np.concatenate(leaves)[:count], *jax.device_get(parts)
    )
    if not processes.is_main():
        return
    examples = source.batch(np.arange(count))
    picture = grids.reconstruction_grid(
        examples["image"],
        drawn.dvae,
        drawn.slots,
        drawn.attention if drawn.masks is None else drawn.masks,
        examples.get("segmentation"),
    )
    with writing(run.workdir):
        grids.save_png(picture, run.workdir / "images" / f"step_{step:08d}.png")
    run.writer.write_image(step, "reconstructions", picture)
