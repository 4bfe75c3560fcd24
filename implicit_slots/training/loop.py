"""The loop: batches through the step, and what is due at which step."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jaxtyping import PyTree
from tqdm import tqdm

from implicit_slots import visualisation
from implicit_slots.config import Config
from implicit_slots.data import pipeline
from implicit_slots.data.sources import Source, usage_of
from implicit_slots.training import feed
from implicit_slots.training.checkpoint import Checkpoints
from implicit_slots.training.sharding import shard_batch
from implicit_slots.training.state import TrainState
from implicit_slots.training.step import Steps
from implicit_slots.training.writer import MetricWriter


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop needs beside the state.

    Attributes:
      config: the whole configuration.
      workdir: where everything is written.
      mesh: the devices.
      steps: the compiled functions.
      train: training data; None to evaluate.
      validation: held-out data.
      checkpoints: of this workdir.
      writer: of this workdir.
      began: when the run began, by `time.perf_counter`.
    """

    config: Config
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    steps: Steps
    train: Source | None
    validation: Source
    checkpoints: Checkpoints
    writer: MetricWriter
    began: float


def train(run: Run, state: TrainState) -> TrainState:
    """Trains from `state` to `config.num_steps`; returns the last state."""
    config = run.config
    start, end = int(state.step), config.num_steps
    assert run.train is not None
    usage = usage_of(config.data)
    batches = feed.train_batches(
        run.train,
        run.mesh,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        placement=usage["placement"],
        workers=usage["workers"],
        flip=usage["flip"],
    )
    window: list[metrics.Collection] = []
    logged = None
    clock = _Clock(start, batches)
    with contextlib.closing(batches), _progress(start, end) as bar:
        # The step gives the old state up, and the picture of what training starts
        # from can wait until after the first step.
        untrained = jax.tree.map(jnp.copy, state.params) if start == 0 else None
        for step in range(start + 1, end + 1):
            batch = batches.next(after=logged)
            state, logged = run.steps.train(state, batch)
            window.append(logged)
            if step == start + 1:
                jax.block_until_ready(state)
                seconds = time.perf_counter() - run.began
                bar.write(f"first step done {seconds:.1f} s after the start")
                if untrained is not None:
                    draw(run, untrained, 0)
                    untrained = None
                clock.restart(step)
            if _due(step, config.log_every, end):
                values = _mean(window)
                values |= clock.rate(step)
                run.writer.write(step, "train", values)
                window = []
                _say(bar, step, end, "train", values)
            if _due(step, config.validate_every, end):
                with clock.paused():
                    values = validate(run, state, run.validation)
                    run.writer.write(step, "validation", values)
                    _say(bar, step, end, "validation", values)
            every = config.diagnostics.every
            if every and _due(step, every, end):
                with clock.paused():
                    values = diagnose(run, state.params)
                    run.writer.write(step, "validation", values)
            if _due(step, config.draw_every, end):
                with clock.paused():
                    draw(run, state.params, step)
            if _due(step, config.checkpoint_every, end):
                with clock.paused():
                    run.checkpoints.save(state)
            bar.update()
    return state


def validate(run: Run, state: TrainState, source: Source) -> dict[str, float]:
    """Returns the mean losses, and foreground ARI where there are masks."""
    return _mean(
        [
            run.steps.validate(state.params, state.step, batch, number)
            for number, batch in enumerate(_evaluation(run, source))
        ]
    )


def score(run: Run, state: TrainState, source: Source) -> dict[str, float]:
    """Returns the squared errors of the noise-free reconstructions.

    "slot_mse" generates every token from the slots, which takes long: only the first
    `config.num_scored` images count, rounded up to whole batches.
    """
    batches = math.ceil(run.config.num_scored / run.config.batch_size)
    return _mean(
        [
            run.steps.score(state.params, batch, number)
            for number, batch in enumerate(islice(_evaluation(run, source), batches))
        ]
    )


def diagnose(run: Run, params: PyTree) -> dict[str, float]:
    """Returns what the slots' fixed points of the first held-out images are like."""
    count = min(run.config.diagnostics.num_examples, len(run.validation))
    image = run.validation.batch(np.arange(count))["image"]
    values = jax.device_get(run.steps.diagnose(params, image))
    return {name: float(value) for name, value in values.items()}


def draw(run: Run, params: PyTree, step: int) -> None:
    """Saves the reconstruction grid of the first held-out images."""
    count = min(run.config.num_pictures, len(run.validation))
    examples = run.validation.batch(np.arange(count))
    rendered = run.steps.reconstruct(params, examples["image"], 0)
    picture = visualisation.reconstruction_grid(
        examples["image"],
        np.asarray(rendered.dvae),
        np.asarray(rendered.slots),
        np.asarray(rendered.attention),
        examples.get("segmentation"),
    )
    folder = run.workdir / "images"
    folder.mkdir(exist_ok=True)
    visualisation.save_png(picture, folder / f"step_{step:08d}.png")
    run.writer.write_image(step, "reconstructions", picture)


def _evaluation(run: Run, source: Source) -> Iterator[dict]:
    """Whole passes over a source, without what the metrics do not read."""
    batches = pipeline.evaluation_batches(
        source,
        run.config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=usage_of(run.config.data)["workers"],
    )
    with contextlib.closing(batches):
        for batch in batches:
            read = {
                name: batch[name]
                for name in ("image", "segmentation", "mask")
                if name in batch
            }
            yield shard_batch(read, run.mesh)


def _due(step: int, every: int, end: int) -> bool:
    return step % every == 0 or step == end


def _mean(collections: Sequence[metrics.Collection]) -> dict[str, float]:
    """Merges on the host, so that no step waits for a transfer before it is logged."""
    merged = functools.reduce(lambda a, b: a.merge(b), jax.device_get(collections))
    return {name: float(value) for name, value in merged.compute().items()}


def _progress(start: int, end: int) -> tqdm:
    """A bar on a terminal; elsewhere `_say` prints plain lines."""
    return tqdm(
        total=end,
        initial=start,
        unit="step",
        dynamic_ncols=True,
        disable=None,
        file=sys.stderr,
    )


def _say(bar: tqdm, step: int, end: int, split: str, values: dict) -> None:
    shown = ("loss", "mse", "cross_entropy", "fg_ari")
    text = "  ".join(f"{n} {values[n]:.4g}" for n in shown if n in values)
    rate = values.get("steps_per_second")
    if bar.disable and rate:
        text += f"  {rate:.1f} steps/s, {(end - step) / rate / 60:.1f} min left"
    if values.get("data_wait", 0) > 0.1:
        text += f"  {values['data_wait']:.0%} of the time waiting for data"
    bar.write(f"step {step:>{len(str(end))}}/{end}  {split:<10} {text}")


class _Clock:
    """The step rate, without the time spent on anything but steps."""

    def __init__(self, step: int, batches: feed.Feed):
        self._batches = batches
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begins a new window after `step`."""
        self._began, self._step = time.perf_counter(), step
        self._waited = self._batches.waited

    def rate(self, step: int) -> dict[str, float]:
        """Names the speed of the window, if it has any steps; begins a new one."""
        steps, seconds = step - self._step, time.perf_counter() - self._began
        waited = self._batches.waited - self._waited
        self.restart(step)
        if not steps:
            return {}
        return {"steps_per_second": steps / seconds, "data_wait": waited / seconds}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes what happens in the context out of the window."""
        entered = time.perf_counter()
        yield
        self._began += time.perf_counter() - entered
