"""Time of a train step: ours alone, or beside official SLATE in PyTorch.

    python -m experiments.benchmarks.train_step
    python -m experiments.benchmarks.train_step --official=DIR
    python -m experiments.benchmarks.train_step --configurations=paper --steps=50

Needs `pip install -e '.[experiments]'`, and for DIR a checkout of
github.com/singhgautam/slate and PyTorch. (a) and (b) take a few minutes on two cores,
(c) ten or more, with DIR twice that; "paper" is for an accelerator.

Ours is the step that `implicit_slots.main` compiles, with its state given up for the
new one; --precision is its, and float32 means what XLA makes of it (TF32 on a GPU).
--attention=cudnn also switches the dropout on attention weights off, which the fused
kernel does not have and the published model does: say so where you quote it.
PyTorch's is the recipe of the official train.py: zero_grad, forward, backward, ∞-norm
clipping, Adam in two groups; eager, in float32 with PyTorch's own setting of TF32. On a
CPU it runs twice: as it comes, and with the C library's allocator set as ours sets it
("PyTorch, our allocator"). Each has a process of its own and they take turns; see
contestants.py. On a CPU each step is timed; on an accelerator --steps in a row.

The floor is the time below which no step of this arithmetic goes: its floating-point
operations at the device's peak or, if that is longer, its least traffic at the memory's
bandwidth; see train_step_floor.py. A CPU's peak is measured: the best rate
of a product of two large float32 matrices. Writes train_step.md, .json and .png; the
JSON also has XLA's own count of operations and bytes.
"""

import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

from experiments.benchmarks import contestants, harness, official_slate
from experiments.benchmarks.contestants import Bench, Contestant
from experiments.benchmarks.harness import Configuration, markdown, positive, rounded
from experiments.benchmarks.train_step_floor import (
    count_flops,
    floor_seconds,
    least_bytes,
)
from implicit_slots.models.attention import IMPLEMENTATIONS
from implicit_slots.models.build import build, count_parameters, split_model
from implicit_slots.runtime import compiling
from implicit_slots.runtime.errors import UserError
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import initial_state
from implicit_slots.training.step import build_steps

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Wanted time of a step, ours by PyTorch's.
TARGETS = {("a", "cpu"): 0.75, ("b", "cpu"): 0.70, ("c", "cpu"): 0.55}
TARGETS |= {("paper", "gpu"): 0.1}
H200_SECONDS = 6e-3  # wanted of "paper"
ADJOINTS = ("implicit", "vanilla")


def build_ours(
    configuration: Configuration, adjoint: str, precision: str, changes: dict[str, Any]
) -> Bench:
    """The compiled train step of a run, on one device."""
    compiling.enable_cache()
    config = harness.build_config(
        configuration, adjoint=adjoint, precision=precision, **changes
    )
    graphdef, params = split_model(build(config))
    parameters = count_parameters(params)
    optimizer = build_optimizer(config.optimizer, params, num_steps=config.num_steps)
    train = build_steps(graphdef, optimizer, config).train
    image = harness.draw_images(configuration)
    state, batch = jax.device_put(
        (initial_state(params, optimizer, config.optimizer), {"image": image}),
        jax.devices()[0],
    )
    begin = time.perf_counter()
    compiled = train.compile(state, batch)
    facts = contestants.jax_facts() | {
        "parameters": parameters,
        "compilation_seconds": time.perf_counter() - begin,
        "xla": xla_counts(compiled),
    }
    on_cpu = facts["platform"] == "cpu"
    if on_cpu:
        facts["matmul_flops"] = measure_matmul()

    def step():
        nonlocal state
        state, logged = train(state, batch)
        return state, logged

    for _ in range(2):
        jax.block_until_ready(step())
    return Bench(
        step=step,
        wait=jax.block_until_ready,
        facts=facts,
        peak=contestants.jax_peak,
        chained=not on_cpu,
    )


def xla_counts(compiled: Any) -> dict[str, float]:
    """XLA's own account of a program; it sees no product inside a library call."""
    costs = compiled.cost_analysis() or {}
    return {
        "flops": costs.get("flops", 0.0),
        "bytes_accessed": costs.get("bytes accessed", 0.0),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def measure_matmul(size: int = 2048, rounds: int = 3) -> float:
    """The best rate of a product of two large float32 matrices, in operations/s."""
    matrix = jnp.ones((size, size))
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(matrix, matrix))
    best = math.inf
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def build_official(directory: Path, configuration: Configuration) -> Bench:
    """The official train.py's step."""
    model = official_slate.build(directory, configuration)
    import torch  # pyright: ignore[reportMissingImports]

    named = list(model.named_parameters())
    optimizer = torch.optim.Adam(
        [
            {"params": [p for name, p in named if "dvae" in name], "lr": 3e-4},
            {"params": [p for name, p in named if "dvae" not in name], "lr": 1e-4},
        ]
    )
    image = official_slate.images(configuration)
    model.train()

    def step():
        optimizer.zero_grad()
        _, cross_entropy, mse, _ = model(image, 1.0, False)
        (mse + cross_entropy).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, math.inf)
        optimizer.step()

    bench = official_slate.bench(step)
    for _ in range(2):
        bench.wait(step())
    return bench


def contest(configuration: Configuration, flags: Any, isolate: bool) -> dict[str, Any]:
    """Lets the contestants of one configuration take turns; returns what was found."""
    print(f"({configuration.name}) {configuration}", file=sys.stderr, flush=True)
    start = functools.partial(Contestant, steps=flags.steps, isolate=isolate)
    adjoints = harness.choices("--adjoints", flags.adjoints, ADJOINTS)
    changes: dict[str, Any] = {"attention": flags.attention, "remat": flags.remat}
    if flags.attention == "cudnn":
        changes["attention_dropout"] = 0.0
    ours = [
        start(
            f"ours, {adjoint}",
            build_ours,
            configuration,
            adjoint,
            flags.precision,
            changes,
        )
        for adjoint in adjoints
    ]
    theirs = []
    if flags.official:
        official = build_official, flags.official, configuration
        theirs.append(start("PyTorch", *official, keep_memory=False))
        if theirs[0].facts["platform"] == "cpu":
            theirs.append(start("PyTorch, our allocator", *official))
    contestants.check_platforms([*ours, *theirs])
    turns = contestants.alternate([*ours, *theirs], flags.rounds)

    found = {}
    target = TARGETS.get((configuration.name, ours[0].facts["platform"]))
    for contestant in [*ours, *theirs]:
        found[contestant.name] = {
            "seconds": harness.spread(turns[contestant.name]),
            "facts": contestant.facts,
            "peak_bytes": contestant.close(),
        }
    for adjoint, contestant in zip(adjoints, ours, strict=True):
        flops = count_flops(configuration, adjoint)
        parameters = contestant.facts["parameters"]
        traffic = least_bytes(configuration, parameters, flags.precision)
        found[contestant.name] |= {
            "flops": flops,
            "least_bytes": traffic,
            "floor_seconds": floor_seconds(
                flops, traffic, contestant.facts, flags.precision
            ),
            "target": target,
            "ratios": {
                other.name: harness.ratio(turns[contestant.name], turns[other.name])
                for other in theirs
            },
        }
    return found


def table(results: dict[str, Any]) -> str:
    """One row per configuration and contestant."""
    header = ["", "step", "ms, median (quartiles)", "by PyTorch's (range)"]
    header += ["by PyTorch's, our allocator", "wanted", "GFLOP", "share of floor", "MB"]
    rows = []
    for name, result in results.items():
        for contestant, values in result["contestants"].items():
            low, high = values["seconds"]["quartiles"]
            median = values["seconds"]["median"]
            milliseconds = 1e3 * median, 1e3 * low, 1e3 * high
            ratios = values.get("ratios", {})
            floor, peak = values.get("floor_seconds"), values["peak_bytes"]
            rows.append(
                [
                    f"({name})",
                    contestant,
                    "{} ({} to {})".format(*map(rounded, milliseconds)),
                    ratio_cell(ratios.get("PyTorch")),
                    ratio_cell(ratios.get("PyTorch, our allocator")),
                    wanted(name, values),
                    rounded(values["flops"] / 1e9) if "flops" in values else "",
                    f"{floor / median:.0%}" if floor else "",
                    f"{peak / 2**20:.0f}" if peak else "",
                ]
            )
    # Columns in which nothing stands are left out.
    kept = [i for i, _ in enumerate(header) if any(row[i] for row in rows)]
    return markdown([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def ratio_cell(ratio: dict[str, float] | None) -> str:
    """A ratio and its range."""
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def wanted(name: str, values: dict[str, Any]) -> str:
    """The targets of a row."""
    cells = [f"{values['target']:.2f}"] if values.get("target") else []
    if name == "paper" and "flops" in values and "H200" in values["facts"]["device"]:
        cells.append(f"{1e3 * H200_SECONDS:.0f} ms")
    return ", ".join(cells)


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of the median times with their quartiles, one axis per configuration."""
    count = len(results)
    figure, axes = plt.subplots(
        1, count, figsize=(1 + 4 * count, 2.4), layout="constrained", squeeze=False
    )
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for place, (contestant, values) in enumerate(result["contestants"].items()):
            seconds = values["seconds"]
            median, (low, high) = seconds["median"], seconds["quartiles"]
            axis.barh(
                place,
                1e3 * median,
                xerr=[[1e3 * (median - low)], [1e3 * (high - median)]],
                color="tab:blue" if contestant.startswith("ours") else "0.7",
                ecolor="0.3",
            )
            axis.annotate(
                rounded(1e3 * median),
                (0, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axis.set_yticks(range(len(result["contestants"])), list(result["contestants"]))
        axis.invert_yaxis()
        axis.set(xlabel="ms a train step", title=f"({name})")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None, *, isolate: bool = True) -> None:
    """Measures, prints the table and writes it, the picture and the numbers."""
    parser = harness.build_parser(__doc__, "train_step", "a,b")
    parser.add_argument("--adjoints", default=",".join(ADJOINTS))
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each")
    parser.add_argument("--steps", type=positive, default=5, help="in one turn")
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, default="xla")
    parser.add_argument("--remat", action="store_true", help="recompute blocks")
    flags = parser.parse_args(arguments)
    official_slate.check(flags.official)
    harness.report(flags, lambda c: contest(c, flags, isolate), draw, table)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
