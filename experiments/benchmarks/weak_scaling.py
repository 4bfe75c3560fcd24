"""What data parallelism costs: on virtual devices, in bytes, and on 256 chips.

    python -m experiments.benchmarks.weak_scaling [--devices 1 2 4 8] [--out=OUT]

About twenty minutes on a core, most of them compilation; needs no accelerator, but
`pip install -e '.[experiments]'`. Three questions:

- Weak scaling: the step's time on 1, 2, 4 and 8 virtual CPU devices with as many
  examples on each, by devices times the time of one. The cores do the work of all
  devices, so without a cost of parallelism that ratio is one; what exceeds it is what
  parallelism adds in work: partitioned programs, copies, waiting for one another. It
  says nothing about links: devices share a memory. It can be below one where a larger
  program keeps the cores busier.
- Bytes: every collective of the compiled programs, of these and of the paper's model
  (configs/clevr.py), which is compiled for 8 and for 256 virtual devices and not run.
- A pod: the time of those collectives by the links of data sheets, and the share of a
  step that remains for computing: FLOPs of train_step_floor.py at an assumed share of
  the chip's peak, nothing overlapped. A projection, not a measurement.

Writes OUT.md, OUT.json and OUT.png. The partitioner is the same for all platforms, but
what later passes make of its collectives is not: here they are the CPU's.
"""

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from configs import clevr, scenes
from experiments.benchmarks import contestants, harness
from experiments.benchmarks import weak_scaling_report as report
from experiments.benchmarks.collectives import (
    CHIPS,
    PODS,
    project,
    read_collectives,
    summarize,
)
from experiments.benchmarks.contestants import Bench, Contestant
from experiments.benchmarks.harness import positive
from implicit_slots.models.build import build, count_parameters, split_model
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import (
    DATA_AXIS,
    SHARDINGS,
    build_mesh,
    state_sharding,
)
from implicit_slots.runtime.errors import UserError
from implicit_slots.training import run
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import initial_state
from implicit_slots.training.step import build_steps

RESOLUTION = 32  # of the small model
EXAMPLES = 4  # on each device, where time is measured
# Examples on a chip, and in how many parts: random_bits of models/noise.py refuses the
# Gumbel noise of more than 1,820 images of the paper's size in one part.
PER_CHIP = {1: 1, 8: 2}


class Layout(NamedTuple):
    """A training on devices.

    Attributes:
      model: "small" or "paper".
      sharding: one of `sharding.SHARDINGS`.
      devices: how many.
      batch: examples of a step over all of them.
      accumulate: parts of a step.
    """

    model: str
    sharding: str
    devices: int
    batch: int
    accumulate: int = 1

    def __str__(self) -> str:
        return f"{self.model}, {self.sharding}, {self.devices} device(s)"


def build_config(layout: Layout) -> Config:
    """The configuration of a run with this layout."""
    config = clevr.get_config() if layout.model == "paper" else scenes.get_config()
    if layout.model == "small":
        config.data.resolution = RESOLUTION
    config.update(
        batch_size=layout.batch,
        sharding=layout.sharding,
        accumulate=layout.accumulate,
    )
    return config


def build_step(layout: Layout) -> tuple[Any, Any, Any]:
    """Builds the train step of a run; nothing is compiled.

    Returns:
      The step, and its two arguments' shapes with their shardings.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", layout.devices)
    config = build_config(layout)
    graphdef, params = split_model(nnx.eval_shape(lambda: build(config)))
    optimizer = build_optimizer(config.optimizer, params, num_steps=config.num_steps)
    start = functools.partial(
        initial_state, optimizer=optimizer, config=config.optimizer
    )
    state = jax.eval_shape(start, params)
    mesh = build_mesh(layout.batch, parts=layout.accumulate)

    def placed(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    state = jax.tree.map(placed, state, state_sharding(state, mesh, layout.sharding))
    side = config.data.resolution
    image = jax.ShapeDtypeStruct((layout.batch, side, side, 3), jnp.uint8)
    split = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    batch = {"image": placed(image, split)}
    train = build_steps(graphdef, optimizer, config, mesh).train
    return train, state, batch


def describe(compiled: Any, state: Any) -> dict[str, Any]:
    """What a program sends, and what of the state lies on each device."""
    found = read_collectives(compiled.as_text())
    shares = [
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    ]
    return {
        "versions": run.versions(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "parameters": count_parameters(state.params),
        "state_bytes": sum(shares),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": [c._asdict() for c in found],
        "summary": summarize(found),
    }


def examine(layout: Layout) -> dict[str, Any]:
    """What `describe` says of a layout, in a process of its own."""
    train, state, batch = build_step(layout)
    return describe(train.compile(state, batch), state)


def build_bench(layout: Layout) -> Bench:
    """The train step of a layout, ready to run on random numbers."""
    train, state_shapes, batch_shapes = build_step(layout)
    compiled = train.compile(state_shapes, batch_shapes)
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        numbers = 0.05 * rng.normal(size=leaf.shape)
        return jax.device_put(numbers.astype(leaf.dtype), leaf.sharding)

    def zeros(leaf: Any) -> jax.Array:
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    state = jax.tree.map(zeros, state_shapes)
    state = state._replace(params=jax.tree.map(draw, state_shapes.params))
    image = batch_shapes["image"]
    bytes_ = rng.integers(0, 256, image.shape, np.uint8)
    batch = {"image": jax.device_put(bytes_, image.sharding)}

    def step():
        nonlocal state
        state, logged = train(state, batch)
        return state, logged

    for _ in range(2):
        jax.block_until_ready(step())
    return Bench(
        step=step,
        wait=jax.block_until_ready,
        facts=describe(compiled, state_shapes),
        peak=contestants.jax_peak,
        chained=False,
    )


def measure(counts: list[int], flags: Any) -> list[dict[str, Any]]:
    """Times the small model on each number of devices, in turns."""
    layouts = [
        Layout("small", name, count, EXAMPLES * count)
        for count in counts
        for name in (SHARDINGS if count > 1 else SHARDINGS[:1])
    ]
    running = [
        Contestant(str(layout), build_bench, layout, steps=flags.steps)
        for layout in layouts
    ]
    turns = contestants.alternate(running, flags.rounds)
    alone = turns[str(layouts[0])]
    rows = []
    for layout, contestant in zip(layouts, running, strict=True):
        seconds = turns[str(layout)]
        ratio = harness.ratio(seconds, alone)
        work = layout.devices / layouts[0].devices
        rows.append(
            {
                **layout._asdict(),
                **contestant.facts,
                "resolution": RESOLUTION,
                "seconds": harness.spread(seconds),
                "ratio": {name: value / work for name, value in ratio.items()},
            }
        )
        contestant.close()
    return rows


def compile_all(model: str) -> list[dict[str, Any]]:
    """Programs that are not run: for 8 devices and for each chip of a pod."""
    sizes = [(8, CHIPS, 1), *((CHIPS, CHIPS * n, p) for n, p in PER_CHIP.items())]
    rows = []
    for name in SHARDINGS:
        for devices, batch, parts in sizes:
            layout = Layout(model, name, devices, batch, parts)
            print(f"  {layout}, batch {batch}", file=sys.stderr, flush=True)
            with contestants.executor() as process:
                facts = process.submit(examine, layout).result()
            rows.append({**layout._asdict(), **facts})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measures, compiles, projects; prints and writes OUT.md, OUT.json and OUT.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each")
    parser.add_argument("--steps", type=positive, default=5, help="in one turn")
    parser.add_argument(
        "--out", type=Path, default=Path("experiments/results/weak_scaling")
    )
    flags = parser.parse_args(arguments)
    timed = measure(sorted({1, *flags.devices}), flags)
    compiled = compile_all("paper")
    whole = [row for row in compiled if row["devices"] == CHIPS]
    results = {
        "timed": timed,
        "compiled": compiled,
        "projected": {n: [project(r, pod) for r in whole] for n, pod in PODS.items()},
    }
    report.draw(results, harness.beside(flags.out, "png"))
    harness.write(flags, timed, results, report.table(results))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
