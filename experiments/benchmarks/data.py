"""Images per second from files to batches, and what a training step waits for them.

    python -m experiments.benchmarks.data [--frames=DIR] [--out=OUT]

Six minutes on two cores, 1.5 GB in a temporary folder. Four questions:

- How fast does a prepared cache give batches of 50 images of 96x96, of images alone and
  with masks and attributes?
- How does decoding frames of CLEVR's size on the fly (PNG, 320x240) scale with reading
  threads?
- How fast are the embedded scenes rendered, by resolution and threads, new ones in each
  round, and how long does the first call take, compilation included?
- What share of a training step's time is spent waiting for its batch, by where the
  batches come from?

The frames are embedded scenes, drawn at 240x240 and widened to CLEVR's 320x240, or,
with `--frames`, the PNG files below a folder. Rates are medians of rounds in turns.
"""

import argparse
import functools
import itertools
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from configs import base, scenes
from experiments.benchmarks import harness
from experiments.benchmarks.harness import positive
from implicit_slots.data import registry
from implicit_slots.data.batches import TrainBatches, read_ahead
from implicit_slots.data.prepared import prepare
from implicit_slots.data.prepared.cache import Prepared, Writer
from implicit_slots.data.readers import frame_source
from implicit_slots.data.scenes import rendering
from implicit_slots.data.source import Source
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import build_mesh, replicate
from implicit_slots.runtime.files import expand
from implicit_slots.training import device_batches
from implicit_slots.training.state import initial_state

SIZE, BATCH = 96, 50
RENDERED = 128  # scenes of a batch


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, and writes OUT.md and OUT.json."""
    parser = harness.build_parser(__doc__, "data")
    parser.add_argument("--frames", type=expand, help="folder of PNG files to decode")
    parser.add_argument(
        "--decoded", type=positive, default=400, help="frames, at least 50"
    )
    parser.add_argument("--workers", type=positive, nargs="+", default=[1, 2])
    parser.add_argument(
        "--resolutions", type=positive, nargs="+", default=[32, 64, 128]
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--cached", type=positive, default=20_000)
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lay_frames(flags, folder / "clevr" / "images" / "train")
        results = {
            "cache": time_cache(folder / "arrays", flags),
            "decoding": time_decoding(folder, flags),
            "rendering": time_rendering(flags),
            "training": time_training(folder, flags),
        }
    facts = [harness.jax_facts()]
    harness.write(flags, facts, results, table(results))


def lay_frames(flags: argparse.Namespace, folder: Path) -> None:
    """Puts files of CLEVR's size where an image folder has them."""
    folder.mkdir(parents=True)
    if flags.frames is not None:
        found = itertools.cycle(sorted(flags.frames.rglob("*.png")))
        for number, file in zip(range(flags.decoded), found, strict=False):
            shutil.copy(file, folder / f"{number:04d}.png")
        return
    for indices in np.array_split(np.arange(flags.decoded), -(-flags.decoded // 40)):
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


def section(folder: Path, *, resolution: int = SIZE, cache: str = "") -> Config:
    """The data section of the frames."""
    path = str(folder / "clevr")
    data = base.files(
        "folder", resolution=resolution, max_objects=10, crop="clevr", path=path
    )
    data.update(validation_fraction=0.0, test_fraction=0.0, cache=cache)
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
    sources = {
        "images": Prepared(folder, keys=("image",)),
        "everything": Prepared(folder),
    }
    return turns(
        flags.rounds,
        {
            f"{what}, {count_threads(threads)}": (source, threads)
            for what, source in sources.items()
            for threads in (0, 1, 2)
        },
        seconds=1.0,
    )


def time_decoding(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Images/s decoded on the fly, and prepared, by threads."""
    source = Fresh(registry.open_files(registry.request(section(folder), "train")))
    readers = {count_threads(n): (source, n) for n in flags.workers}
    results = turns(flags.rounds, readers, seconds=2.0)
    data = section(folder, cache=str(folder / "prepared"))
    for workers in flags.workers:
        rates = []
        for _ in range(3):
            began = time.perf_counter()
            prepare.prepare(data, "train", say=lambda line: None, workers=workers)
            rates.append(flags.decoded / (time.perf_counter() - began))
            shutil.rmtree(folder / "prepared")
        results[f"prepare, {count_threads(workers)}"] = harness.span(rates)
    return results


def time_rendering(flags: argparse.Namespace) -> dict[str, Any]:
    """Images/s of the scenes' renderer, by resolution and threads."""
    results = {}
    for side, threads in itertools.product(flags.resolutions, flags.workers):
        share = RENDERED // threads

        def render(start: int, side=side, share=share) -> None:
            indices = np.arange(start, start + share)
            scenes = rendering.render_batch(0, "train", indices, resolution=side)
            jax.block_until_ready(scenes)

        began = time.perf_counter()
        render(0)
        first, rates = time.perf_counter() - began, []
        with ThreadPoolExecutor(threads) as pool:
            for number in range(1, flags.rounds + 1):
                began = time.perf_counter()
                starts = RENDERED * number + share * np.arange(threads)
                list(pool.map(render, starts))
                rates.append(share * threads / (time.perf_counter() - began))
        name = f"{side}x{side}, {count_threads(threads)}"
        results[name] = harness.span(rates) | {"first_call": first}
    return results


def count_threads(threads: int) -> str:
    """Of the reading threads, in a table."""
    return {0: "no thread", 1: "1 thread"}.get(threads, f"{threads} threads")


def turns(
    rounds: int, readers: Mapping[str, tuple[Source, int]], seconds: float
) -> dict[str, Any]:
    """Lets sources read batches in turns; images/s of each."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for seed in range(rounds):
        for name, (source, threads) in readers.items():
            batches = read_ahead(TrainBatches(source, BATCH, seed), threads=threads)
            next(batches)
            count, began = 0, time.perf_counter()
            while (spent := time.perf_counter() - began) < seconds:
                count += len(next(batches)["image"])
            rates[name].append(count / spent)
            batches.close()
    return {name: harness.span(found) for name, found in rates.items()}


def time_training(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Steps/s and the share of the time that is spent waiting for the next batch."""
    config = scenes.get_config("tokens")
    config.data = section(folder, resolution=scenes.RESOLUTION)
    prepared = section(
        folder, resolution=scenes.RESOLUTION, cache=str(folder / "cache")
    )
    prepare.prepare(prepared, "train", say=lambda line: None)
    mesh = build_mesh(config.batch_size)
    _, params, optimizer, steps = harness.build_run(config)
    state = replicate(initial_state(params, optimizer, config.optimizer), mesh)
    fresh = Fresh(registry.build(config.data, "train", ("image",)))
    cached = registry.build(prepared, "train", ("image",))
    options: dict[str, tuple[Source, dict[str, Any]]] = {
        "prepared, on the host": (cached, {}),
        "prepared, on the device": (cached, {"placement": "device"}),
    }
    for count in flags.workers:
        name = f"decoded on the fly, {count_threads(count)}"
        options[name] = (fresh, {"workers": count})
    rates: dict[str, list[float]] = {name: [] for name in options}
    waits: dict[str, list[float]] = {name: [] for name in options}
    start = functools.partial(device_batches.train_batches, start_step=0)
    for turn in range(flags.rounds):
        for name, (source, how) in options.items():
            batches = start(
                source, mesh, batch_size=config.batch_size, seed=turn, **how
            )
            # Compiles, and fills what is read ahead.
            state, logged = steps.train(state, batches.next())
            jax.block_until_ready(state)
            before, began = batches.waited, time.perf_counter()
            for _ in range(flags.steps):
                state, logged = steps.train(state, batches.next(after=logged))
            jax.block_until_ready(state)
            spent = time.perf_counter() - began
            rates[name].append(flags.steps / spent)
            waits[name].append((batches.waited - before) / spent)
            batches.close()
    return {
        name: {
            "steps_per_second": harness.span(rates[name]),
            "data_wait": harness.span(waits[name]),
        }
        for name in options
    }


def table(results: dict[str, Any]) -> str:
    """The answers in Markdown."""
    titles = {
        "cache": f"prepared cache, {SIZE}x{SIZE}, batch {BATCH}",
        "decoding": "CLEVR frames from PNG",
        "rendering": "scenes rendered",
    }
    rows = [
        [f"{title}: {name}", *(f"{rate[k]:,.0f}" for k in ("median", "low", "high"))]
        for part, title in titles.items()
        for name, rate in results[part].items()
    ]
    waits = [
        [name, f"{found['steps_per_second']['median']:.1f}", waiting(found)]
        for name, found in results["training"].items()
    ]
    return "\n\n".join(
        [
            harness.markdown(["", "images/s", "least", "most"], rows),
            harness.markdown(["training on", "steps/s", "time waiting"], waits),
        ]
    )


def waiting(found: dict[str, Any]) -> str:
    """Share of the time that a training waited."""
    return f"{found['data_wait']['median']:.1%}"


if __name__ == "__main__":
    harness.script(main)
