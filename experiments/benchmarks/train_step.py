"""Time of a train step: ours alone, or beside official SLATE in PyTorch.

    python -m experiments.benchmarks.train_step
    python -m experiments.benchmarks.train_step --official=DIR
    python -m experiments.benchmarks.train_step --configurations=paper --steps=50

Needs `pip install -e '.[experiments]'`, and for DIR a checkout of
github.com/singhgautam/slate and PyTorch. (a) and (b) take a few minutes on two cores,
(c) ten or more, with DIR twice that; "paper" is for an accelerator.

Ours is the step that `implicit_slots.main` compiles, with its state given up for the
new one; --precision is its, and float32 means what XLA makes of it (TF32 on a GPU).
--kernels=auto,xla compares the step with our own kernels for NVIDIA GPUs to XLA's.
PyTorch's is the recipe of the official train.py: zero_grad, forward, backward, ∞-norm
clipping, Adam in two groups; eager, in float32 with PyTorch's own setting of TF32. On a
CPU it runs twice: as it comes, and with the C library's allocator set as ours sets it
("PyTorch, our allocator"). Each has a process of its own and they take turns; see
contestants.py. On a CPU each step is timed; on an accelerator --steps in a row.

The floor is the time below which no step of this arithmetic goes: its floating-point
operations at the device's peak or, if that is longer, its least traffic at the memory's
bandwidth; see train_step_floor.py. A CPU's peak is measured: the best rate
of a product of two large float32 matrices. Writes train_step.md and .json; the JSON
also has XLA's own count of operations and bytes.
"""

import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import contestants, harness, official_slate
from experiments.benchmarks.contestants import Bench, Contestant
from experiments.benchmarks.harness import Configuration, markdown, positive, rounded
from experiments.benchmarks.train_step_floor import (
    count_flops,
    floor_seconds,
    least_bytes,
)
from implicit_slots.models.build import count_parameters
from implicit_slots.models.kernels import KERNELS
from implicit_slots.runtime import compiling
from implicit_slots.training.state import initial_state

ADJOINTS = ("implicit", "vanilla")
ALLOCATOR = "PyTorch, our allocator"


def build_ours(
    configuration: Configuration, adjoint: str, precision: str, changes: dict[str, Any]
) -> Bench:
    """The compiled train step of a run, on one device."""
    compiling.enable_cache()
    config = harness.build_config(
        configuration, adjoint=adjoint, precision=precision, **changes
    )
    _, params, optimizer, steps = harness.build_run(config)
    parameters = count_parameters(params)
    image = harness.draw_images(configuration)
    state, batch = jax.device_put(
        (initial_state(params, optimizer, config.optimizer), {"image": image}),
        jax.devices()[0],
    )
    begin = time.perf_counter()
    compiled = steps.train.compile(state, batch)
    seconds = time.perf_counter() - begin
    costs = compiled.cost_analysis() or {}
    facts: dict[str, Any] = {
        "parameters": parameters,
        "compilation_seconds": seconds,
        # XLA's own account; it sees no product inside a library call.
        "xla": {
            "flops": costs.get("flops", 0.0),
            "bytes_accessed": costs.get("bytes accessed", 0.0),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        },
    }
    if jax.devices()[0].platform == "cpu":
        facts["matmul_flops"] = measure_matmul()

    def step():
        nonlocal state
        state, logged = steps.train(state, batch)
        return state, logged

    return contestants.jax_bench(step, **facts)


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
    """The official train step."""
    model = official_slate.build(directory, configuration)
    import torch  # pyright: ignore[reportMissingImports]

    image = official_slate.images(configuration)
    named = list(model.named_parameters())
    optimizer = torch.optim.Adam(
        [
            {"params": [p for n, p in named if "dvae" in n], "lr": 3e-4},
            {"params": [p for n, p in named if "dvae" not in n], "lr": 1e-4},
        ]
    )
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
    start = functools.partial(Contestant, steps=flags.steps, isolate=isolate)
    adjoints = harness.choices("--adjoints", flags.adjoints, ADJOINTS)
    steps = {}
    for adjoint in adjoints:
        for kernels in harness.choices("--kernels", flags.kernels, KERNELS):
            name = f"ours, {adjoint}" + (f", {kernels}" if kernels != "auto" else "")
            steps[name] = adjoint, {"kernels": kernels, "remat": flags.remat}
    everyone = [
        start(name, build_ours, configuration, adjoint, flags.precision, changes)
        for name, (adjoint, changes) in steps.items()
    ]
    if flags.official:
        official = build_official, flags.official, configuration
        everyone.append(start("PyTorch", *official, keep_memory=False))
        if everyone[-1].facts["platform"] == "cpu":
            everyone.append(start(ALLOCATOR, *official))
    found = contestants.compete(everyone, flags.rounds)
    theirs = {name: found[name] for name in ("PyTorch", ALLOCATOR) if name in found}
    for name, (adjoint, _) in steps.items():
        ours = found[name]
        facts = ours["facts"]
        flops = count_flops(configuration, adjoint)
        traffic = least_bytes(configuration, facts["parameters"], flags.precision)
        ours |= {
            "flops": flops,
            "least_bytes": traffic,
            "floor_seconds": floor_seconds(flops, traffic, facts, flags.precision),
            "ratios": {
                name: contestants.compare(ours, other) for name, other in theirs.items()
            },
        }
    return found


def table(results: dict[str, Any]) -> str:
    """One row per configuration and contestant."""
    header = ["", "step", "ms, median (quartiles)", "by PyTorch's (range)"]
    header += ["by PyTorch's, our allocator", "GFLOP", "share of floor", "MB"]
    rows = []
    for name, result in results.items():
        for contestant, values in result["contestants"].items():
            ratios = values.get("ratios", {})
            floor, peak = values.get("floor_seconds"), values["peak_bytes"]
            rows.append(
                [
                    f"({name})",
                    contestant,
                    harness.between(values["seconds"], 1e3),
                    harness.ranged(ratios.get("PyTorch")),
                    harness.ranged(ratios.get(ALLOCATOR)),
                    rounded(values["flops"] / 1e9) if "flops" in values else "",
                    f"{floor / values['seconds']['median']:.0%}" if floor else "",
                    f"{peak / 2**20:.0f}" if peak else "",
                ]
            )
    return markdown(header, rows)


def main(arguments: list[str] | None = None, *, isolate: bool = True) -> None:
    """Measures, prints the table and writes it, and the numbers."""
    parser = harness.contest_parser(__doc__, "train_step", "a,b")
    parser.add_argument("--adjoints", default=",".join(ADJOINTS))
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each")
    parser.add_argument("--steps", type=positive, default=5, help="in one turn")
    parser.add_argument("--kernels", default="auto", help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--remat", action="store_true", help="recompute blocks")
    flags = parser.parse_args(arguments)
    official_slate.check(flags.official)
    contestants.report(flags, lambda c: contest(c, flags, isolate), table)


if __name__ == "__main__":
    harness.script(main)
