"""Memory of slot attention's backward pass against its iterations, by adjoint.

    python -m experiments.benchmarks.memory
    python -m experiments.benchmarks.memory --official=DIR

Needs `pip install -e '.[experiments]'`, and for DIR a checkout of
github.com/singhgautam/slate and PyTorch. Five minutes on two cores.

Slot attention alone, at a configuration's sizes: the gradient of the sum of squared
slots with respect to parameters, inputs and initial slots. Ours: the bytes of temporary
buffers in the compiled program, as XLA states them (nothing has to run); on an
accelerator also the device's peak, of a process per adjoint that goes from few
iterations to many, so that it is a running maximum. PyTorch's, of the official module:
on a CPU the bytes that autograd holds for the backward pass, each storage once,
parameters and inputs left out (what passes through memory besides is not in it); on a
GPU the peak of allocated memory. Writes memory.md, .json and .png.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from matplotlib.figure import Figure

from experiments.benchmarks import contestants, harness, official_slate
from experiments.benchmarks.harness import Configuration, markdown, positive, rounded
from implicit_slots.models.build import build
from implicit_slots.models.slot_attention import SlotAttention
from implicit_slots.runtime import compiling

# What each sets in the configuration's section model.adjoint.
ADJOINTS: dict[str, dict[str, Any]] = {
    "unrolled": {"name": "unrolled"},
    "unrolled, remat": {"name": "unrolled", "remat": True},
    "truncated 4": {"name": "truncated", "steps": 4},
    "neumann 1": {"name": "neumann", "terms": 1},
    "neumann 8": {"name": "neumann", "terms": 8},
    "phantom 8": {"name": "phantom", "steps": 8, "damping": 0.5},
    "gmres 20": {"name": "implicit"},
    "adaptive 20": {"name": "adaptive", "max_terms": 20},
}
OFFICIAL = "PyTorch"
# A row of the results, but for the adjoint's name.
FIELDS = ("iterations", "temporary_bytes", "peak_bytes")


def measure_ours(
    configuration: Configuration, iterations: list[int], adjoint: str, precision: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns facts, and a row per number of iterations, in one process."""
    compiling.enable_cache()
    facts = harness.jax_facts()
    keys = jax.random.split(jax.random.key(0), 2)
    shape = (configuration.batch, configuration.tokens, configuration.width)
    inputs = jax.random.normal(keys[0], shape)
    rows = []
    for count in sorted(iterations):
        module = build_slots(configuration, adjoint, count, precision)
        slots = module.initial(configuration.batch, keys[1])
        graphdef, params = nnx.split(module, nnx.Param)

        def loss(params, inputs, slots, graphdef=graphdef):
            found = nnx.merge(graphdef, params)(inputs, slots)
            return jnp.sum(found.slots.astype(jnp.float32) ** 2)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        compiled = gradient.lower(params, inputs, slots).compile()
        memory: Any = compiled.memory_analysis()
        if facts["platform"] != "cpu":
            jax.block_until_ready(compiled(params, inputs, slots))
        rows.append((count, memory.temp_size_in_bytes, contestants.jax_peak()))
    return facts, named(adjoint, rows)


def build_slots(
    configuration: Configuration, adjoint: str, iterations: int, precision: str
) -> SlotAttention:
    """Builds slot attention as a model of this configuration has it."""
    config = harness.build_config(configuration, precision=precision)
    # The rest of the model is thrown away: it need not be large.
    config.model.update(vocab_size=2, dvae_features=1, num_blocks=1)
    config.model.solver.max_steps = iterations
    config.model.adjoint.update(ADJOINTS[adjoint])
    return build(config).slot_attention


def named(adjoint: str, rows: list[tuple]) -> list[dict[str, Any]]:
    """The rows of an adjoint, as the results have them."""
    names = ("adjoint", *FIELDS)
    return [dict(zip(names, (adjoint, *row), strict=True)) for row in rows]


def measure_official(
    configuration: Configuration, iterations: list[int], directory: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns facts, and a row per number of iterations, in one process."""
    sys.path.insert(0, str(directory))
    import slot_attn  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    device, width = official_slate.device(), configuration.width
    inputs, slots = (
        torch.randn(
            (configuration.batch, count, width), device=device, requires_grad=True
        )
        for count in (configuration.tokens, configuration.slots)
    )
    rows = []
    for count in sorted(iterations):
        module = slot_attn.SlotAttention(
            count, configuration.slots, width, width, width, 1
        ).to(device)
        tensors = [*module.parameters(), inputs, slots]
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        held: dict[int, int] = {}

        def pack(tensor, given=given, held=held):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(inputs, slots)[0].pow(2).sum().backward()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        rows.append((count, sum(held.values()), peak))
    return official_slate.facts(), named(OFFICIAL, rows)


def counts(text: str) -> list[int]:
    """An argument that lists numbers of iterations."""
    return [positive(count) for count in text.split(",")]


def measure(
    configuration: Configuration, flags: Any, isolate: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns facts and rows of every adjoint, each in a process of its own."""
    contestants.announce(configuration)
    given = configuration, flags.iterations
    chosen = harness.choices("--adjoints", flags.adjoints, ADJOINTS, between=";")
    jobs: list[tuple] = [
        (measure_ours, *given, adjoint, flags.precision) for adjoint in chosen
    ]
    if flags.official:
        jobs.append((measure_official, *given, flags.official))
    facts, rows = [], []
    for job in jobs:
        with contestants.executor(isolate=isolate) as process:
            known, found = process.submit(*job).result()
        facts.append(known)
        rows += found
        print(*(f"  {row}" for row in found), sep="\n", file=sys.stderr, flush=True)
    return facts, rows


def by_adjoint(result: dict[str, Any], key: str) -> dict[str, dict[int, float]]:
    """Values of a configuration by adjoint and number of iterations."""
    found: dict[str, dict[int, float]] = {}
    for row in result["rows"]:
        found.setdefault(row["adjoint"], {})[row["iterations"]] = row[key]
    return found


def table(results: dict[str, Any], key: str, title: str) -> str:
    """One row per configuration and adjoint, one column per number of iterations."""
    counts = sorted({row["iterations"] for r in results.values() for row in r["rows"]})
    lines = [
        [f"({name})", adjoint, *(rounded(known[count] / 2**20) for count in counts)]
        for name, result in results.items()
        for adjoint, known in by_adjoint(result, key).items()
        if None not in known.values()
    ]
    header = ["", f"{title}, at iterations", *map(str, counts)]
    return markdown(header, lines) if lines else ""


def draw(results: dict[str, Any]) -> Figure:
    """Megabytes against iterations, one axis per configuration, a line per adjoint."""
    size = (1 + 4.2 * len(results), 3.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        lines = by_adjoint(result, "temporary_bytes")
        for number, (adjoint, known) in enumerate(lines.items()):
            official = adjoint == OFFICIAL
            axis.plot(
                list(known),
                [value / 2**20 for value in known.values()],
                marker=harness.MARKERS[number % len(harness.MARKERS)],
                markersize=4,
                color="0.4" if official else None,
                linestyle="--" if official else "-",
                label=adjoint,
            )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="iterations",
            ylabel="MB held, forward and backward pass",
            title=f"({name})",
        )
        counts = sorted({count for known in lines.values() for count in known})
        axis.set_xticks(counts, map(str, counts))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def main(arguments: list[str] | None = None, *, isolate: bool = True) -> None:
    """Measures, prints the tables and writes them, the picture and the numbers."""
    parser = harness.contest_parser(__doc__, "memory", "b,paper")
    parser.add_argument("--adjoints", default=";".join(ADJOINTS), help="between ;")
    parser.add_argument("--iterations", type=counts, default=[1, 3, 7, 15, 31, 63])
    flags = parser.parse_args(arguments)
    official_slate.check(flags.official)
    facts, results = [], {}
    for configuration in harness.pick(flags):
        known, rows = measure(configuration, flags, isolate)
        facts += known
        results[configuration.name] = {"sizes": str(configuration), "rows": rows}
    tables = [
        table(results, "temporary_bytes", "temporary MB"),
        table(results, "peak_bytes", "device's peak, MB"),
    ]
    text = "\n\n".join(filter(None, tables))
    harness.write(flags, facts, results, text, draw(results))


if __name__ == "__main__":
    harness.script(main)
