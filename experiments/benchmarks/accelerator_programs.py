"""What the programs of GPUs and TPUs move, by their own compilers; none is needed.

    python -m experiments.benchmarks.accelerator_programs
    python -m experiments.benchmarks.accelerator_programs --programs=h100,v5e
    python -m experiments.benchmarks.accelerator_programs --programs=h100 --tiny

Needs Linux and `pip install -e '.[experiments,tpu]'`; for GPUs the extra `cuda`.
Nothing is run. One to four minutes a program on two cores, each in a process of its
own: one that cannot be compiled costs its row alone. `--tiny` compiles small models for
the devices that are here.

A train step is that of `--mode=plan`: SLATE as configs/clevr.py has it, the autoencoder
and the set predictor as published, on `h100`, on `h200`, and on a v5e slice of eight
chips. `generation` makes all tokens of a batch from its slots; not on a TPU, whose
program does not tell how often its loop runs. Bytes are those that all kernels read and
write; a loop counts as often as it runs, where the program tells. Cycles are a TPU
compiler's own estimate. Lower bounds are those of data sheets.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from configs import (
    autoencoder_clevr6,
    autoencoder_scenes,
    clevr,
    scenes,
    set_prediction_clevr,
    set_prediction_scenes,
)
from experiments.benchmarks import contestants, harness
from experiments.benchmarks.harness import markdown, rounded
from implicit_slots.runtime import compiling, topologies
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import DATA_AXIS, replicated, traced_for
from implicit_slots.runtime.programs import Kernel, read_kernels
from implicit_slots.training import plan
from implicit_slots.training.parts import build_parts

# By model: the published sizes, and small ones.
PUBLISHED = {
    "slate": (clevr, None),
    "autoencoder": (autoencoder_clevr6, None),
    "set_prediction": (set_prediction_clevr, None),
}
TINY = {
    "slate": (scenes, "tokens-smoke"),
    "autoencoder": (autoencoder_scenes, "smoke"),
    "set_prediction": (set_prediction_scenes, "smoke"),
}
COMPILERS = ("jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


class Program(NamedTuple):
    """A program to compile.

    Attributes:
      model: whose.
      topology: the devices.
      batch: images over all devices.
      precision: of the products.
      generates: tokens from slots; else it is the train step.
    """

    model: str
    topology: str
    batch: int
    precision: str = "bfloat16"
    generates: bool = False

    def config(self, tiny: bool) -> Config:
        """The whole configuration of a run."""
        file, variant = (TINY if tiny else PUBLISHED)[self.model]
        config = file.get_config(variant)
        config.precision = self.precision
        if not tiny:
            config.batch_size = self.batch
        return config


PROGRAMS = {
    "h100": Program("slate", "h100", 50),
    "h100-float32": Program("slate", "h100", 50, "float32"),
    "h200": Program("slate", "h200", 50),
    "v5e": Program("slate", "v5e:2x4", 64),
    "generation-h100": Program("slate", "h100", 50, generates=True),
    "autoencoder-h100": Program("autoencoder", "h100", 64),
    "autoencoder-v5e": Program("autoencoder", "v5e:2x4", 64),
    "set_prediction-h100": Program("set_prediction", "h100", 512),
    "set_prediction-v5e": Program("set_prediction", "v5e:2x4", 512),
}


def compile_one(name: str, tiny: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns facts, and what a device does in one run of a program."""
    program = PROGRAMS[name]
    where = topologies.HERE if tiny else program.topology
    topologies.prepare(where)
    topology = topologies.devices_of(where)
    config = program.config(tiny)
    with compiling.optimised(True):
        made = generation if program.generates else train_step
        found = made(config, topology)
    facts = harness.jax_facts()
    for package in COMPILERS:
        try:
            facts["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts, found


def train_step(config: Config, topology: topologies.Topology) -> dict[str, Any]:
    """What `--mode=plan` knows of a train step."""
    made = plan.make(config, topology)
    return described(
        config, topology, made.kernels, made.memory, made.flops, made.seconds
    )


def generation(config: Config, topology: topologies.Topology) -> dict[str, Any]:
    """The program that makes all tokens of a batch from its slots."""
    parts = build_parts(config, "plan", devices=topology.devices)
    whole = replicated(parts.mesh)
    split = NamedSharding(parts.mesh, PartitionSpec(DATA_AXIS))
    model, batch = config.model, config.batch_size

    def generate(params, slots, seed):
        built: Any = nnx.merge(parts.graphdef, params)
        return built.generate(slots, key=jax.random.key(seed))

    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        parts.shapes,
    )
    shape = (batch, model.num_slots, model.slot_size)
    slots = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    began = time.perf_counter()
    with traced_for(topology.platform):
        compiled = jax.jit(generate).lower(params, slots, seed).compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    held = sum(
        getattr(memory, f"{kind}_size_in_bytes")
        for kind in ("argument", "temp", "output", "generated_code")
    )
    flops = float((compiled.cost_analysis() or {}).get("flops", 0.0))
    kernels = read_kernels(compiled.as_text() or "")
    found = described(config, topology, kernels, held, flops, seconds)
    tokens = (config.data.resolution // 4) ** 2
    item = 2 if config.precision == "bfloat16" else 4
    each = batch // len(topology.devices)
    read = model.width * model.num_blocks * 2 * item * each
    built: Any = nnx.merge(parts.graphdef, parts.shapes)
    used = nnx.state((built.decoder, built.out), nnx.Param)
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(used))
    return found | {
        "tokens": tokens,
        "weights": item * weights,
        # Half of the tokens, in the mean, and all slots.
        "cache": int(read * ((tokens + 1) / 2 + model.num_slots)),
    }


def described(
    config: Config,
    topology: topologies.Topology,
    kernels: list[Kernel],
    memory: int,
    flops: float,
    seconds: float,
) -> dict[str, Any]:
    """The numbers of a program for one device, as JSON takes them."""
    moved = sum(kernel.times * kernel.bytes for kernel in kernels)
    cycles = sum(kernel.times * kernel.cycles for kernel in kernels)
    bounds, chip = {}, topology.chip
    if chip:
        half = config.precision == "bfloat16"
        bounds["bytes"] = moved / chip.bandwidth
        if flops:  # The GPU's compiler tells none of library calls.
            bounds["operations"] = flops / (chip.bfloat16 if half else chip.float32)
        if cycles and chip.clock:
            bounds["cycles"] = cycles / chip.clock
    return {
        "topology": topology.name,
        "devices": len(topology.devices),
        "batch": config.batch_size,
        "precision": config.precision,
        "bytes": moved,
        "kernels": sum(kernel.times for kernel in kernels),
        "memory": memory,
        "flops": flops,
        "cycles": cycles,
        "bounds": bounds,
        "seconds": seconds,
        "largest": plan.largest(kernels),
    }


def compile_all(
    names: Iterable[str], tiny: bool, isolate: bool
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Returns facts, and each program's numbers, or the "error" in their place."""
    facts, results = [], {}
    for name in names:
        print(f"  {name}: compiling", file=sys.stderr, flush=True)
        with contestants.executor(isolate=isolate) as process:
            try:
                known, results[name] = process.submit(compile_one, name, tiny).result()
                facts.append(known)
            except BrokenProcessPool:
                results[name] = {"error": "its process died; is there enough memory?"}
            except Exception as error:
                results[name] = {"error": str(error).strip().splitlines()[0][:200]}
    return facts or [harness.jax_facts()], results


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each program."""
    header = ["program", "devices", "images on each", "precision", "GB moved"]
    header += ["kernels", "memory, GB", "million cycles", "bytes: at least, ms"]
    header += ["operations: at least, ms", "cycles, ms", "compiled in, s"]
    rows = []
    for name, found in results.items():
        if "error" in found:
            rows.append([name, found["error"], *[""] * (len(header) - 2)])
            continue
        bounds = {key: rounded(1e3 * s) for key, s in found["bounds"].items()}
        rows.append(
            [
                name,
                f"{found['devices']} × {found['topology'].partition(':')[0]}",
                str(found["batch"] // found["devices"]),
                found["precision"],
                rounded(found["bytes"] / 1e9),
                f"{found['kernels']:,}",
                rounded(found["memory"] / 1e9),
                rounded(found["cycles"] / 1e6) if found["cycles"] else "",
                *(bounds.get(key, "") for key in ("bytes", "operations", "cycles")),
                rounded(found["seconds"]),
            ]
        )
    return markdown(header, rows)


def pieces(name: str, found: dict[str, Any]) -> str:
    """The lines that move the most bytes; of generation the bytes of a token."""
    lines = [f"{name}:", ""]
    if "tokens" in found:
        parts = [found[key] for key in ("weights", "cache")]
        token, weights, cache = (
            f"{rounded(size / 1e6)} MB"
            for size in (found["bytes"] / found["tokens"], *parts)
        )
        lines = [
            f"{name}: {token} a token; the decoder's weights are {weights}, the keys "
            f"and values of half of the tokens {cache}.",
            "",
        ]
    rows = [[rounded(moved / 1e9), f"`{line}`"] for line, moved in found["largest"]]
    return "\n".join([*lines, markdown(["GB", "line"], rows)])


def main(arguments: list[str] | None = None, *, isolate: bool = True) -> None:
    """Compiles, prints the tables and writes them and the numbers."""
    parser = harness.build_parser(__doc__, "accelerator_programs")
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--tiny", action=argparse.BooleanOptionalAction, default=False)
    flags = parser.parse_args(arguments)
    names = harness.choices("--programs", flags.programs, PROGRAMS)
    facts, results = compile_all(names, flags.tiny, isolate)
    sections = [
        pieces(n, found) for n, found in results.items() if "error" not in found
    ]
    text = "\n\n".join([table(results), *sections])
    harness.write(flags, facts, results, text)


if __name__ == "__main__":
    harness.script(main)
