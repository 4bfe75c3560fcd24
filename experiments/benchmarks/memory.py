"""Memory of slot attention's backward pass against its iterations, by adjoint.

    python -m experiments.benchmarks.memory
    python -m experiments.benchmarks.memory --official=DIR --repeats=5

Needs `pip install -e '.[experiments]'`, and for DIR a checkout of
github.com/singhgautam/slate and PyTorch. Five minutes on two cores without --repeats.

Slot attention alone, at a configuration's sizes: the gradient of the sum of squared
slots with respect to parameters, inputs and initial slots. Ours: the bytes of temporary
buffers in the compiled program, as XLA states them (nothing has to run); on an
accelerator also the device's peak, of a process per adjoint that goes from few
iterations to many, so that it is a running maximum. PyTorch's, of the official module:
on a CPU the bytes that autograd holds for the backward pass, each storage once,
parameters and inputs left out (what passes through memory besides is not in it); on a
GPU the peak of allocated memory. With --repeats each is also timed, alone and not in
turns. Writes memory.md, .json and .png.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
from flax import nnx

from experiments.benchmarks import contestants, harness, official_slate
from experiments.benchmarks.harness import Configuration, markdown, positive, rounded
from implicit_slots.models.build import build
from implicit_slots.models.slot_attention import SlotAttention
from implicit_slots.runtime import compiling
from implicit_slots.runtime.errors import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


def measure_ours(
    configuration: Configuration,
    adjoint: str,
    iterations: list[int],
    repeats: int,
    precision: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns facts, and a row per number of iterations, in one process."""
    compiling.enable_cache()
    facts = contestants.jax_facts()
    on_cpu = facts["platform"] == "cpu"
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
        seconds = timed(
            lambda f=compiled, a=(params, inputs, slots): jax.block_until_ready(f(*a)),
            repeats if on_cpu else max(repeats, 1),
        )
        rows.append(
            {
                "adjoint": adjoint,
                "iterations": count,
                "temporary_bytes": memory.temp_size_in_bytes,
                "peak_bytes": contestants.jax_peak(),
                "seconds": seconds,
            }
        )
    return facts, rows


def build_slots(
    configuration: Configuration, adjoint: str, iterations: int, precision: str
) -> SlotAttention:
    """Builds slot attention as a model of this configuration has it."""
    config = harness.build_config(
        configuration, adjoint="implicit", precision=precision
    )
    # The rest of the model is thrown away: it need not be large.
    config.model.update(vocab_size=2, dvae_features=1, num_blocks=1)
    config.model.solver.max_steps = iterations
    config.model.adjoint.update(ADJOINTS[adjoint])
    return build(config).slot_attention


def timed(work: Callable[[], Any], repeats: int) -> float | None:
    """Median seconds, after one call to warm up; None without repeats."""
    if not repeats:
        return None
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def measure_official(
    directory: Path, configuration: Configuration, iterations: list[int], repeats: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns facts, and a row per number of iterations, in one process."""
    official_slate.use(directory)
    import slot_attn  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    device = official_slate.device()
    width = configuration.width
    shape = (configuration.batch, configuration.tokens, width)
    inputs = torch.randn(shape, device=device, requires_grad=True)
    shape = (configuration.batch, configuration.slots, width)
    slots = torch.randn(shape, device=device, requires_grad=True)
    rows = []
    for count in sorted(iterations):
        module = slot_attn.SlotAttention(
            count, configuration.slots, width, width, width, 1
        ).to(device)
        given = {t.untyped_storage().data_ptr() for t in module.parameters()}
        given |= {
            inputs.untyped_storage().data_ptr(),
            slots.untyped_storage().data_ptr(),
        }
        held: dict[int, int] = {}

        def pack(tensor, given=given, held=held):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        def work(module=module):
            module(inputs, slots)[0].pow(2).sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            work()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        rows.append(
            {
                "adjoint": OFFICIAL,
                "iterations": count,
                "temporary_bytes": sum(held.values()),
                "peak_bytes": peak,
                "seconds": timed(work, repeats),
            }
        )
    return official_slate.facts(), rows


def counts(text: str) -> list[int]:
    """An argument that lists numbers of iterations."""
    return [positive(count) for count in text.split(",")]


def measure(
    configuration: Configuration, flags: Any, isolate: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns facts and rows of every adjoint, each in a process of its own."""
    print(f"({configuration.name}) {configuration}", file=sys.stderr, flush=True)
    chosen = harness.choices("--adjoints", flags.adjoints, ADJOINTS, between=";")
    iterations = flags.iterations
    jobs: list[tuple[Callable, tuple]] = [
        (
            measure_ours,
            (configuration, adjoint, iterations, flags.repeats, flags.precision),
        )
        for adjoint in chosen
    ]
    if flags.official:
        given = flags.official, configuration, iterations, flags.repeats
        jobs.append((measure_official, given))
    facts, rows = [], []
    for function, arguments in jobs:
        with contestants.executor(isolate=isolate) as process:
            known, found = process.submit(function, *arguments).result()
        facts.append(known)
        rows += found
        for row in found:
            print(f"  {row}", file=sys.stderr, flush=True)
    return facts, rows


def table(results: dict[str, Any], key: str, title: str, scale: float) -> str:
    """One row per configuration and adjoint, one column per number of iterations."""
    counts = sorted({row["iterations"] for r in results.values() for row in r["rows"]})
    lines = []
    for name, result in results.items():
        cells: dict[str, dict[int, float]] = {}
        for row in result["rows"]:
            cells.setdefault(row["adjoint"], {})[row["iterations"]] = row[key]
        for adjoint, by_count in cells.items():
            known = [by_count[count] for count in counts]
            if None not in known:
                values = [rounded(value * scale) for value in known]
                lines.append([f"({name})", adjoint, *values])
    if not lines:
        return ""
    header = ["", f"{title}, at iterations", *map(str, counts)]
    return markdown(header, lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Megabytes against iterations, one axis per configuration, a line per adjoint."""
    figure, axes = plt.subplots(
        1,
        len(results),
        figsize=(1.5 + 4 * len(results), 3.6),
        layout="constrained",
        squeeze=False,
    )
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        lines: dict[str, tuple[list[int], list[float]]] = {}
        for row in result["rows"]:
            xs, ys = lines.setdefault(row["adjoint"], ([], []))
            xs.append(row["iterations"])
            ys.append(row["temporary_bytes"] / 2**20)
        for number, (adjoint, (xs, ys)) in enumerate(lines.items()):
            official = adjoint == OFFICIAL
            axis.plot(
                xs,
                ys,
                marker="osDv^<>P*X"[number % 10],
                markersize=4,
                color="0.4" if official else None,
                linestyle="--" if official else "-",
                label=adjoint,
            )
        counts = sorted({x for xs, _ in lines.values() for x in xs})
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="iterations",
            ylabel="MB held, forward and backward pass",
            title=f"({name})",
        )
        axis.set_xticks(counts, map(str, counts))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None, *, isolate: bool = True) -> None:
    """Measures, prints the tables and writes them, the picture and the numbers."""
    parser = harness.build_parser(__doc__, "memory", "b,paper")
    parser.add_argument("--adjoints", default=";".join(ADJOINTS), help="between ;")
    parser.add_argument("--iterations", type=counts, default=[1, 3, 7, 15, 31, 63])
    parser.add_argument("--repeats", type=int, default=0, help="timed runs of each")
    flags = parser.parse_args(arguments)
    official_slate.check(flags.official)
    facts, results = [], {}
    for configuration in harness.pick(flags):
        known, rows = measure(configuration, flags, isolate)
        facts += known
        results[configuration.name] = {"sizes": str(configuration), "rows": rows}
    tables = [
        table(results, "temporary_bytes", "temporary MB", 2**-20),
        table(results, "peak_bytes", "device's peak, MB", 2**-20),
        table(results, "seconds", "ms", 1e3),
    ]
    draw(results, harness.beside(flags.out, "png"))
    harness.write(flags, facts, results, "\n\n".join(filter(None, tables)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
