"""Images per second from files to batches, and what a training step waits for them.

    python -m experiments.benchmarks.data [--frames=DIR] [--out=OUT]

Four minutes on two cores, 1.5 GB in a temporary folder. Three questions:

- How fast does a prepared cache give batches of 50 images of 96x96 (wanted: 10,000
  images/s by one process), of images alone and with masks and attributes?
- How does decoding frames of CLEVR's size on the fly (PNG, 320x240) scale with reading
  threads?
- What share of a training step's time is spent waiting for its batch, by where the
  batches come from?

The frames are embedded scenes, drawn at 240x240 and widened to CLEVR's 320x240, or,
with `--frames`, the PNG files below a folder. Figures are medians of rounds in turns.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from PIL import Image

from configs import base, scenes
from experiments.benchmarks import harness
from implicit_slots.data import registry
from implicit_slots.data.batches import TrainBatches, read_ahead
from implicit_slots.data.prepared import prepare
from implicit_slots.data.prepared.cache import Prepared, Writer
from implicit_slots.data.readers import frame_source
from implicit_slots.data.scenes import rendering
from implicit_slots.data.source import Source
from implicit_slots.models.build import build, split_model
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import build_mesh, replicate
from implicit_slots.training import device_batches, run
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import initial_state
from implicit_slots.training.step import build_steps

matplotlib.use("Agg")

import matplotlib.pyplot as plt

SIZE, BATCH = 96, 50
FRAMES = 400
CACHED = 20_000
WANTED = 10_000


def main() -> None:
    """Measures, prints, and writes OUT.md, OUT.json and OUT.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=Path, help="folder of PNG files to decode")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=harness.positive, default=5)
    parser.add_argument("--steps", type=harness.positive, default=40)
    parser.add_argument("--cached", type=harness.positive, default=CACHED)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/data"))
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lay_frames(flags.frames, folder / "clevr" / "images" / "train")
        results = {
            "cache": time_cache(folder / "arrays", flags),
            "decoding": time_decoding(folder, flags),
            "training": time_training(folder, flags),
        }
    draw(results, harness.beside(flags.out, "png"))
    facts = {"device": jax.devices()[0].device_kind, "versions": run.versions()}
    harness.write(flags, [facts], results, table(results))


def lay_frames(given: Path | None, folder: Path) -> None:
    """Puts FRAMES files of CLEVR's size where an image folder has them."""
    folder.mkdir(parents=True)
    if given is not None:
        found = itertools.cycle(sorted(given.rglob("*.png")))
        for number, file in zip(range(FRAMES), found, strict=False):
            shutil.copy(file, folder / f"{number:04d}.png")
        return
    for first in range(0, FRAMES, 40):
        indices = np.arange(first, first + 40, dtype=np.int32)
        drawn = rendering.render_batch(0, "train", indices, resolution=240)["image"]
        wide = np.pad(drawn, ((0, 0), (0, 0), (40, 40), (0, 0)), mode="edge")
        for number, image in zip(indices, wide, strict=True):
            Image.fromarray(image).save(folder / f"{number:04d}.png")


class Fresh(Source):
    """Decodes anew each time: nothing is kept in memory."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        """Decoded one by one, stacked."""
        return frame_source.stack([self._source.decode(int(i)) for i in indices])


def section(folder: Path, **changes: Any) -> Config:
    """The data section of the frames."""
    data = base.files(
        "folder", resolution=SIZE, max_objects=10, crop="clevr", path=str(folder)
    )
    data.validation_fraction = data.test_fraction = 0.0
    data.cache = ""
    for key, value in changes.items():
        data[key] = value
    return data


def time_cache(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Images/s of a prepared cache of random bytes, by what is read and threads."""
    generator = np.random.default_rng(0)
    example = {
        "image": np.zeros((SIZE, SIZE, 3), np.uint8),
        "segmentation": np.zeros((SIZE, SIZE), np.uint8),
        "objects": {
            "present": np.zeros(10, bool),
            "position": np.zeros((10, 3), np.float32),
        },
    }
    writer = Writer(folder, {}, count=flags.cached, block=500)
    while rest := min(500, flags.cached - writer.count):

        def draw(leaf: np.ndarray, size: int = rest) -> np.ndarray:
            drawn = generator.integers(0, 2, (size, *leaf.shape), np.uint8)
            return drawn.astype(leaf.dtype)

        writer.append(jax.tree.map(draw, example))
    writer.finish()
    everything = Prepared(folder)
    images = Prepared(folder, keys=("image",))
    contestants = {
        f"{what}, {count_threads(threads)}": (source, threads)
        for what, source in (("images", images), ("everything", everything))
        for threads in (0, 1, 2)
    }
    return turns(flags.rounds, contestants, seconds=1.0)


def time_decoding(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Images/s decoded on the fly, and prepared, by threads."""
    source = registry.open_files(registry.request(section(folder / "clevr"), "train"))

    contestants = {count_threads(n): (Fresh(source), n) for n in flags.workers}
    results = turns(flags.rounds, contestants, seconds=2.0)
    for workers in flags.workers:
        rates = []
        for _ in range(3):
            data = section(folder / "clevr", cache=str(folder / "prepared"))
            began = time.perf_counter()
            prepare.prepare(data, "train", say=lambda line: None, workers=workers)
            rates.append(FRAMES / (time.perf_counter() - began))
            shutil.rmtree(folder / "prepared")
        results[f"prepare, {count_threads(workers)}"] = summary(rates)
    return results


def count_threads(threads: int) -> str:
    """Of the reading threads, in a table."""
    return {0: "no thread", 1: "1 thread"}.get(threads, f"{threads} threads")


def turns(
    rounds: int, contestants: Mapping[str, tuple[Source, int]], seconds: float
) -> dict[str, Any]:
    """Lets sources read batches in turns; images/s of each."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for seed in range(rounds):
        for name, (source, threads) in contestants.items():
            batches = read_ahead(TrainBatches(source, BATCH, seed), threads=threads)
            next(batches)
            count, began = 0, time.perf_counter()
            while (spent := time.perf_counter() - began) < seconds:
                count += len(next(batches)["image"])
            rates[name].append(count / spent)
            batches.close()
    return {name: summary(found) for name, found in rates.items()}


def summary(rates: list[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
    }


def time_training(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Steps/s and the share of the time that is spent waiting for the next batch."""
    config = scenes.get_config()
    config.data = section(folder / "clevr", resolution=scenes.RESOLUTION)
    prepared = section(
        folder / "clevr", resolution=scenes.RESOLUTION, cache=str(folder / "cache")
    )
    prepare.prepare(prepared, "train", say=lambda line: None)
    graphdef, params = split_model(build(config))
    optimizer = build_optimizer(config.optimizer, params, num_steps=config.num_steps)
    mesh = build_mesh(config.batch_size)
    steps = build_steps(graphdef, optimizer, config)
    state = replicate(initial_state(params, optimizer, config.optimizer), mesh)
    from_files = registry.build(config.data, "train", ("image",))
    cached = registry.build(prepared, "train", ("image",))

    options: dict[str, tuple[Source, dict[str, Any]]] = {
        "prepared, on the host": (cached, {}),
        "prepared, on the device": (cached, {"placement": "device"}),
        **{
            f"decoded on the fly, {count_threads(n)}": (
                Fresh(from_files),
                {"workers": n},
            )
            for n in flags.workers
        },
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in options}
    for turn in range(flags.rounds):
        for name, (source, how) in options.items():
            batches = device_batches.train_batches(
                source,
                mesh,
                batch_size=config.batch_size,
                seed=turn,
                start_step=0,
                **how,
            )
            state, spent, waited = train(steps.train, state, batches, flags.steps)
            measured[name].append((flags.steps / spent, waited / spent))
    return {
        name: {
            "steps_per_second": summary([rate for rate, _ in found]),
            "data_wait": summary([wait for _, wait in found]),
        }
        for name, found in measured.items()
    }


def train(
    step: Callable[..., Any], state: Any, batches: device_batches.Feed, count: int
) -> tuple[Any, float, float]:
    """Trains some steps; the seconds they took, and those of waiting among them."""
    # Compiles, and fills what is read ahead.
    state, logged = step(state, batches.next())
    jax.block_until_ready(state)
    before, began = batches.waited, time.perf_counter()
    for _ in range(count):
        state, logged = step(state, batches.next(after=logged))
    jax.block_until_ready(state)
    spent, waited = time.perf_counter() - began, batches.waited - before
    batches.close()
    return state, spent, waited


def table(results: dict[str, Any]) -> str:
    """The three questions' answers in Markdown."""
    rows = [
        [f"{title}: {name}", *(f"{rate[k]:,.0f}" for k in ("median", "low", "high"))]
        for title, part in (
            (f"prepared cache, {SIZE}x{SIZE}, batch {BATCH}", results["cache"]),
            ("CLEVR frames from PNG", results["decoding"]),
        )
        for name, rate in part.items()
    ]
    waits = [
        [
            name,
            f"{found['steps_per_second']['median']:.1f}",
            f"{found['data_wait']['median']:.1%}",
        ]
        for name, found in results["training"].items()
    ]
    return "\n\n".join(
        [
            harness.markdown(["", "images/s", "least", "most"], rows),
            harness.markdown(["training on", "steps/s", "time waiting"], waits),
        ]
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of images/s, with the wanted rate, and of steps/s with their waiting."""
    figure, (rates, waits) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    bars = {f"cache: {k}": v["median"] for k, v in results["cache"].items()} | {
        f"PNG: {k}": v["median"] for k, v in results["decoding"].items()
    }
    rates.barh(list(bars), list(bars.values()), color="#5577AA")
    rates.axvline(WANTED, color="#881133", linestyle="--", label="wanted of the cache")
    rates.set(xscale="log", xlabel="images per second", title="From files to batches")
    rates.invert_yaxis()
    rates.legend(loc="lower right")
    training = results["training"]
    steps = [found["steps_per_second"]["median"] for found in training.values()]
    drawn = waits.barh(list(training), steps, color="#AA8822")
    waits.bar_label(
        drawn,
        [f"{f['data_wait']['median']:.1%} waiting" for f in training.values()],
        label_type="center",
    )
    waits.set(xlabel="steps per second", title="Training on them")
    waits.invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
