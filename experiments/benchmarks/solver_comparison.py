"""Which solver, which backward pass? Measured on trained and untrained slot attention.

    python -m experiments.benchmarks.solver_comparison --workdir=runs/scenes

Needs `pip install -e '.[experiments]'` and a finished run; takes about twenty minutes
on one core. Forward: residual against evaluations of f. Backward: error of the
parameter gradient against the exact solution of the linear system at the same slots (an
LU of each image's Jacobian), with time and memory. The cotangent is that of the
decoder's cross-entropy; the slots are those after the run's own number of iterations,
and for the trained model also after --steps, where most images have converged.

Time is the median of rounds that take each adjoint in turn, forward and backward pass;
memory is XLA's own account of temporary buffers. Writes solver_comparison.png, .md and
.json into --out.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

from implicit_slots.data import registry
from implicit_slots.fixed_point import (
    GMRES,
    Adaptive,
    Adjoint,
    Anderson,
    BiCGSTAB,
    Broyden,
    Dense,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Solver,
    Truncated,
    Unrolled,
    backward_probe,
    diagnostics,
    fixed_point,
)
from implicit_slots.models.build import build_model
from implicit_slots.models.images import as_float
from implicit_slots.models.slate import SLATE, with_bos
from implicit_slots.models.slot_attention import Problem
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.versions import versions
from implicit_slots.training import checkpoint

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

# Tolerance zero: every solver goes on to --steps, or until nothing improves any more.
FORWARD: dict[str, tuple[type[Solver], dict[str, Any]]] = {
    "Picard": (Picard, {}),
    "Picard, damped by half": (Picard, {"damping": 0.5}),
    "Anderson": (Anderson, {}),
    "Anderson, no restart": (Anderson, {"restart": False}),
    "Broyden": (Broyden, {}),
}
BACKWARD: dict[str, tuple[str, Adjoint]] = {
    "Unrolled": ("unrolled", Unrolled()),
    "Unrolled, remat": ("unrolled", Unrolled(remat=True)),
    **{f"Truncated {k}": ("truncated", Truncated(steps=k)) for k in (2, 4, 8)},
    **{f"Neumann {k}": ("neumann", Neumann(terms=k)) for k in (1, 2, 4, 8, 16, 32)},
    **{f"Phantom {k}": ("phantom", Phantom(steps=k, damping=0.5)) for k in (4, 16, 64)},
    **{
        f"Adaptive {rtol:g}": ("adaptive", Adaptive(max_terms=64, rtol=rtol))
        for rtol in (1e-1, 1e-2)
    },
    **{
        f"GMRES {k}": ("gmres", Implicit(solver=GMRES(max_steps=k, rtol=0.0)))
        for k in (4, 8, 16, 32)
    },
    **{
        f"BiCGSTAB {k}": ("bicgstab", Implicit(solver=BiCGSTAB(max_steps=k, rtol=0.0)))
        for k in (8, 32)
    },
    **{
        f"Anderson {k}": (
            "anderson",
            Implicit(solver=Anderson(max_steps=k, depth=5, restart=False)),
        )
        for k in (8, 32)
    },
    **{
        f"Broyden {k}": ("broyden", Implicit(solver=Broyden(max_steps=k, memory=k)))
        for k in (7, 32)
    },
    "Dense": ("dense", Implicit(solver=Dense())),
}
# Errors below it are drawn at it.
ROUNDING = 1e-7
SMOKE = ("Broyden", "Neumann 2", "Dense")


class Case(NamedTuple):
    """A model's slots on some images, and what the decoder asks of them."""

    problem: Problem
    g: jax.Array

    def first(self, count: int) -> "Case":
        """The same for the first images alone."""
        f, params, x, z0 = self.problem
        x, z0, g = jax.tree.map(lambda leaf: leaf[:count], (x, z0, self.g))
        return Case(Problem(f, params, x, z0), g)


def build_case(model: SLATE, image: jax.Array) -> Case:
    """The fixed-point problem of the images, and the cross-entropy's cotangent."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def build(params, image):
        model = nnx.merge(graphdef, params)
        problem = model.slot_problem(image, jax.random.key(0))
        ids = model.dvae.encode(image).argmax(axis=-1).reshape(len(image), -1)
        embedded = model.embed(with_bos(ids))[:, :-1]
        solver = model.slot_attention.solver
        slots = fixed_point(*problem, solver=solver, adjoint=Neumann()).value

        def cross_entropy(slots):
            logits = nnx.log_softmax(model.decode(embedded, slots), axis=-1)
            return -jnp.take_along_axis(logits, ids[..., None], axis=-1).sum()

        return problem[1:], jax.grad(cross_entropy)(slots)

    (step_params, x, z0), g = build(params, image)
    f = model.slot_problem(image[:1], jax.random.key(0)).f
    return Case(Problem(f, step_params, x, z0), g)


def compare_forward(case: Case, names: list[str], steps: int) -> dict[str, np.ndarray]:
    """Per solver, the least residual so far after each evaluation, [images, steps]."""
    f, params, x, z0 = case.problem
    curves = {}
    for name in names:
        kind, options = FORWARD[name]
        solver = kind(max_steps=steps, trace=True, **options)
        solve = jax.jit(lambda p, x, z, s=solver: s.solve(lambda z: f(p, x, z), z))
        trace = np.asarray(solve(params, x, z0).trace)
        curves[name] = np.fmin.accumulate(trace, axis=1)
    return curves


def spectra(case: Case, solver: Solver) -> dict[str, list[float]]:
    """Radius and norm of J at the slots, and the residual there, per image."""
    f, params, x, z0 = case.problem

    @jax.jit
    def measure(params, x, z0):
        found = fixed_point(f, params, x, z0, solver=solver, adjoint=Neumann())
        arguments = f, params, x, found.value, jax.random.key(1)
        return (
            diagnostics.spectral_radius(*arguments),
            diagnostics.spectral_norm(*arguments),
            found.stats.residual,
        )

    names = ("spectral_radius", "spectral_norm", "residual")
    values = measure(params, x, z0)
    return {name: np.asarray(v).tolist() for name, v in zip(names, values, strict=True)}


def gradient_quality(case: Case, adjoint: Adjoint, solver: Solver) -> dict[str, Any]:
    """Relative error and cosine of the parameter gradient, and backward failures."""
    f, params, x, z0 = case.problem

    @jax.jit
    def judge(params, x, z0, g):
        return diagnostics.gradient_error(
            f, params, x, z0, g, solver=solver, adjoint=adjoint
        )

    error = judge(params, x, z0, case.g)
    quality = {
        "relative_error": np.asarray(error.params_error).tolist(),
        "cosine": np.asarray(error.params_cosine).tolist(),
        "ratio": np.asarray(error.params_ratio).tolist(),
    }
    if adjoint.measures:

        @jax.jit
        def report(probe):
            def loss(probe):
                found = fixed_point(
                    *case.problem, solver=solver, adjoint=adjoint, probe=probe
                )
                return jnp.sum(found.value * case.g)

            return jax.grad(loss)(probe)

        stats = report(backward_probe(len(z0)))
        quality |= {n: np.asarray(v).tolist() for n, v in stats._asdict().items()}
    return quality


def costs(
    case: Case, adjoints: dict[str, Adjoint], solver: Solver, rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds and temporary megabytes of forward and backward pass together."""
    f, params, x, z0 = case.problem
    compiled, found = {}, {}
    for name, adjoint in adjoints.items():

        def loss(params, x, z0, g, adjoint=adjoint):
            value = fixed_point(f, params, x, z0, solver=solver, adjoint=adjoint).value
            return jnp.sum(value * g)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        compiled[name] = gradient.lower(params, x, z0, case.g).compile()
        memory: Any = compiled[name].memory_analysis()
        found[name] = {"megabytes": memory.temp_size_in_bytes / 2**20}
        jax.block_until_ready(compiled[name](params, x, z0, case.g))
    seconds: dict[str, list[float]] = {name: [] for name in adjoints}
    for _ in range(rounds):
        for name, gradient in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(gradient(params, x, z0, case.g))
            seconds[name].append(time.perf_counter() - begin)
    for name, values in seconds.items():
        found[name]["milliseconds"] = 1e3 * statistics.median(values)
    return found


def forward_table(curves: dict[str, dict[str, np.ndarray]]) -> str:
    """Median evaluations to a residual, and the share of images that get there."""
    lines = [
        "| model | solver | evaluations to 1e-2 | to 1e-4 | images at 1e-4 "
        "| residual at 7 | at the end |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, by_solver in curves.items():
        for name, curve in by_solver.items():
            reach = []
            for level in (1e-2, 1e-4):
                met = curve <= level
                first = np.where(met.any(1), met.argmax(1) + 1.0, np.inf)
                median = np.median(first)
                reach.append(f"{median:.0f}" if np.isfinite(median) else "never")
            lines.append(
                f"| {model} | {name} | {reach[0]} | {reach[1]} "
                f"| {(curve[:, -1] <= 1e-4).mean():.0%} "
                f"| {np.median(curve[:, min(6, curve.shape[1] - 1)]):.1e} "
                f"| {np.median(curve[:, -1]):.1e} |"
            )
    return "\n".join(lines)


def backward_table(quality: dict[str, Any], cost: dict[str, Any]) -> str:
    """One row per adjoint: error and cosine for both models, time, memory."""
    models = list(quality)
    lines = [
        "| adjoint | "
        + " | ".join(f"error, {m} | cosine, {m}" for m in models)
        + " | ms | MB |",
        "|---|" + "---|---|" * len(models) + "---|---|",
    ]
    for name, spent in cost.items():
        cells = []
        for model in models:
            values = quality[model][name]
            cells += [
                f"{np.median(values['relative_error']):.1e}",
                f"{np.median(values['cosine']):.4f}",
            ]
        lines.append(
            f"| {name} | "
            + " | ".join(cells)
            + f" | {spent['milliseconds']:.1f} | {spent['megabytes']:.1f} |"
        )
    return "\n".join(lines)


def draw(curves, quality, cost, path: Path) -> None:
    """Residual against evaluations above, gradient error against cost below."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    for axis, (model, by_solver) in zip(axes[0], curves.items(), strict=True):
        for name, curve in by_solver.items():
            evaluations = np.arange(1, curve.shape[1] + 1)
            (line,) = axis.plot(evaluations, np.median(curve, axis=0), label=name)
            low, high = np.quantile(curve, [0.25, 0.75], axis=0)
            axis.fill_between(
                evaluations, low, high, color=line.get_color(), alpha=0.15, linewidth=0
            )
        axis.set(
            yscale="log",
            xlabel="evaluations of f",
            ylabel="least ‖f(z) − z‖ / ‖f(z)‖ so far",
            title=f"Forward, {model}: median and quartiles of images",
        )
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    families: dict[str, list[str]] = {}
    for name in cost:
        families.setdefault(BACKWARD[name][0], []).append(name)
    trained = list(quality)[1]
    for axis, key, label in (
        (axes[1][0], "milliseconds", "milliseconds, forward and backward"),
        (axes[1][1], "megabytes", "temporary memory, megabytes"),
    ):
        points: list[tuple[str, float, float]] = []
        for number, (family, names) in enumerate(families.items()):
            xs = [cost[name][key] for name in names]
            errors = [np.median(quality[trained][n]["relative_error"]) for n in names]
            ys = np.maximum(errors, ROUNDING)
            axis.plot(
                xs, ys, marker="osDv^<>P*X"[number % 10], linewidth=0.8, label=family
            )
            points += [
                (name.rpartition(" ")[2], x, y)
                for name, x, y in zip(names, xs, ys, strict=True)
            ]
        axis.set(
            xscale="log",
            yscale="log",
            xlabel=label,
            ylabel="parameter gradient's relative error to the exact one",
            title=f"Backward, {trained}",
        )
        _annotate(axis, points)
        axis.xaxis.set_major_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axis.grid(alpha=0.3)
    axes[1][1].legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _annotate(axis, points: list[tuple[str, float, float]]) -> None:
    """Writes the labels that do not cover one another."""
    written: list[np.ndarray] = []
    for text, x, y in points:
        place = axis.transData.transform((x, y))
        if any(np.all(np.abs(place - other) < (22, 14)) for other in written):
            continue
        written.append(place)
        axis.annotate(
            text,
            (x, y),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
            color="0.35",
        )


def main(arguments: list[str] | None = None) -> None:
    """Prints both tables and writes them, the picture and the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--out", type=Path, default=Path("experiments/results"))
    parser.add_argument("--images", type=int, default=32, help="for the forward part")
    parser.add_argument("--judged", type=int, default=8, help="for the backward part")
    parser.add_argument("--steps", type=int, default=60, help="evaluations of f")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing")
    parser.add_argument("--smoke", action="store_true", help="a few of each, quickly")
    flags = parser.parse_args(arguments)
    wanted = SMOKE if flags.smoke else (*FORWARD, *BACKWARD)
    forward = [name for name in FORWARD if name in wanted]
    adjoints = {name: pair[1] for name, pair in BACKWARD.items() if name in wanted}

    config, trained = checkpoint.load(flags.workdir)
    untrained = build_model(
        config.model, resolution=config.data.resolution, seed=config.seed
    )
    source = registry.build(config.data, "validation")
    batch = source.batch(np.arange(min(flags.images, len(source))))
    image = as_float(jnp.asarray(batch["image"]))
    solver = Picard(max_steps=config.model.solver.max_steps)
    curves, quality, where = {}, {}, {}
    cases = {
        name: build_case(model, image)
        for name, model in (("untrained", untrained), ("trained", trained))
    }
    for name, case in cases.items():
        where[name] = spectra(case, solver)
        print(
            f"{name}: median spectral radius "
            f"{np.median(where[name]['spectral_radius']):.2f}, norm "
            f"{np.median(where[name]['spectral_norm']):.2f}",
            flush=True,
        )
        curves[name] = compare_forward(case, forward, flags.steps)
    settings = [
        ("untrained", solver),
        ("trained", solver),
        ("trained", Picard(max_steps=flags.steps)),
    ]
    for name, forward_solver in settings:
        judged = cases[name].first(flags.judged)
        setting = f"{name}, {forward_solver.max_steps} iterations"
        quality[setting] = {}
        for adjoint_name, adjoint in adjoints.items():
            values = gradient_quality(judged, adjoint, forward_solver)
            quality[setting][adjoint_name] = values
            error = np.median(values["relative_error"])
            print(f"{setting}: {adjoint_name}: gradient error {error:.2e}", flush=True)
    # Of the trained model: time and memory depend on shapes, and on a solve's steps.
    cost = costs(cases["trained"], adjoints, solver, flags.rounds)

    about = {
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "run": {
            "name": config.name,
            "steps": config.num_steps,
            "slots": [config.model.num_slots, config.model.slot_size],
            "iterations": config.model.solver.max_steps,
        },
        "flags": {
            k: str(v) for k, v in vars(flags).items() if k not in ("workdir", "out")
        },
    }
    tables = forward_table(curves) + "\n\n" + backward_table(quality, cost) + "\n"
    print("\n" + tables)
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "solver_comparison.md").write_text(tables)
    numbers = about | {
        "spectra": where,
        "forward": {
            model: {n: np.median(curve, axis=0).tolist() for n, curve in by.items()}
            for model, by in curves.items()
        },
        "backward": quality,
        "cost": cost,
    }
    (flags.out / "solver_comparison.json").write_text(json.dumps(numbers))
    draw(curves, quality, cost, flags.out / "solver_comparison.png")
    print(f"wrote {flags.out}/solver_comparison.png, .md and .json")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
