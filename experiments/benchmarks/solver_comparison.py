"""Which solver, which backward pass? Measured on trained and untrained slot attention.

    python -m experiments.benchmarks.solver_comparison --workdir=runs/scenes

Needs `pip install -e '.[experiments]'` and a finished run; takes about twenty minutes
on one core. Forward: residual against evaluations of f. Backward: error of the
parameter gradient against the exact solution of the linear system at the same slots (an
LU of each image's Jacobian), with time and memory. The cotangent is that of the
decoder's cross-entropy; the slots are those after the run's own number of iterations,
and for the trained model also after --steps, where most images have converged.

Time is the median of rounds that take each adjoint in turn, forward and backward pass;
memory is XLA's own account of temporary buffers. Writes OUT.png, OUT.md and OUT.json.
"""

import functools
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from experiments.benchmarks import harness
from experiments.benchmarks.harness import markdown, positive
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
from implicit_slots.models.autoencoder import Autoencoder
from implicit_slots.models.build import build_model
from implicit_slots.models.images import as_float
from implicit_slots.models.set_prediction import (
    SetPredictor,
    encode_objects,
    set_distance,
)
from implicit_slots.models.slot_attention import Problem
from implicit_slots.models.token_decoder import with_bos
from implicit_slots.runtime.files import expand
from implicit_slots.training.pretrained import load

# Tolerance zero: every solver goes on to --steps, or until nothing improves any more.
FORWARD: dict[str, tuple[type[Solver], dict[str, Any]]] = {
    "Picard": (Picard, {}),
    "Picard, damped by half": (Picard, {"damping": 0.5}),
    "Anderson": (Anderson, {}),
    "Anderson, no restart": (Anderson, {"restart": False}),
    "Broyden": (Broyden, {}),
}
# Named as families, with a number where there are several of one.
BACKWARD: dict[str, Adjoint] = {
    "Unrolled": Unrolled(),
    "Unrolled, remat": Unrolled(remat=True),
    **{f"Truncated {k}": Truncated(steps=k) for k in (2, 4, 8)},
    **{f"Neumann {k}": Neumann(terms=k) for k in (1, 2, 4, 8, 16, 32)},
    **{f"Phantom {k}": Phantom(steps=k, damping=0.5) for k in (4, 16, 64)},
    **{f"Adaptive {t:g}": Adaptive(max_terms=64, rtol=t) for t in (1e-1, 1e-2)},
}
SOLVERS = {
    **{f"GMRES {k}": GMRES(max_steps=k, rtol=0.0) for k in (4, 8, 16, 32)},
    **{f"BiCGSTAB {k}": BiCGSTAB(max_steps=k, rtol=0.0) for k in (8, 32)},
    **{f"Anderson {k}": Anderson(max_steps=k, depth=5, restart=False) for k in (8, 32)},
    **{f"Broyden {k}": Broyden(max_steps=k, memory=k) for k in (7, 32)},
    "Dense": Dense(),
}
BACKWARD |= {name: Implicit(solver=solver) for name, solver in SOLVERS.items()}
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


def build_case(model: Any, image: jax.Array, objects: Any = None) -> Case:
    """The fixed-point problem of images, and what the decoder asks of the slots there.

    Args:
      model: any whose slots are a fixed point.
      image: in [0, 1].
      objects: those to be seen, which a set predictor is asked for.
    """
    graphdef, params = nnx.split(model)
    (step_params, x, z0), g = asked_of(graphdef)(params, image, objects)
    f = model.slot_problem(image[:1], jax.random.key(0)).f
    return Case(Problem(f, step_params, x, z0), g)


@functools.lru_cache
def asked_of(graphdef: nnx.GraphDef) -> Any:
    """The compiled function of `build_case`: one for all checkpoints of a run."""

    def build(params, image, objects):
        model = nnx.merge(graphdef, params)
        problem = model.slot_problem(image, jax.random.key(0))
        solver = model.slot_attention.solver
        slots = fixed_point(*problem, solver=solver, adjoint=Neumann()).value
        asked = jax.grad(lambda slots: objective(model, image, objects, slots))
        return problem[1:], asked(slots)

    return jax.jit(build)


def objective(model: Any, image: jax.Array, objects: Any, slots: jax.Array):
    """What a model is trained for, of slots, summed over images."""
    if isinstance(model, SetPredictor):
        target = encode_objects(objects, slots.shape[1])
        return set_distance(model.predict(slots), target).sum()
    if isinstance(model, Autoencoder):
        return jnp.sum((image - model.mix(slots).image) ** 2)
    ids = model.dvae.encode(image).argmax(axis=-1).reshape(len(image), -1)
    embedded = model.embed(with_bos(ids))[:, :-1]
    logits = nnx.log_softmax(model.decode(embedded, slots), axis=-1)
    return -jnp.take_along_axis(logits, ids[..., None], axis=-1).sum()


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
    found = spectra_at(case.problem.f, solver)(*case.problem[1:])
    return {name: np.asarray(values).tolist() for name, values in found.items()}


@functools.lru_cache
def spectra_at(f: Any, solver: Solver) -> Any:
    """The compiled function of `spectra`."""

    def measure(params, x, z0):
        found = fixed_point(f, params, x, z0, solver=solver, adjoint=Neumann())
        at = f, params, x, found.value, jax.random.key(1)
        return {
            "spectral_radius": diagnostics.spectral_radius(*at),
            "spectral_norm": diagnostics.spectral_norm(*at),
            "residual": found.stats.residual,
        }

    return jax.jit(measure)


def gradient_quality(case: Case, adjoint: Adjoint, solver: Solver) -> dict[str, Any]:
    """Relative error and cosine of the parameter gradient, and backward failures."""
    how: Any = {"solver": solver, "adjoint": adjoint}
    error = judge(case.problem.f, solver, adjoint)(*case.problem[1:], case.g)
    quality = {
        "relative_error": error.params_error,
        "cosine": error.params_cosine,
        "ratio": error.params_ratio,
    }
    if adjoint.measures:

        def loss(probe):
            found = fixed_point(*case.problem, **how, probe=probe)
            return jnp.sum(found.value * case.g)

        probe = backward_probe(len(case.problem.z0))
        quality |= jax.jit(jax.grad(loss))(probe)._asdict()
    return {name: np.asarray(values).tolist() for name, values in quality.items()}


@functools.lru_cache
def judge(f: Any, solver: Solver, adjoint: Adjoint) -> Any:
    """The compiled function of `gradient_quality`."""
    how: Any = {"solver": solver, "adjoint": adjoint}
    return jax.jit(functools.partial(diagnostics.gradient_error, f, **how))


def costs(
    case: Case, adjoints: dict[str, Adjoint], solver: Solver, rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds and temporary megabytes of forward and backward pass together."""
    f, arguments = case.problem.f, (*case.problem[1:], case.g)
    compiled, found = {}, {}
    for name, adjoint in adjoints.items():

        def loss(params, x, z0, g, adjoint=adjoint):
            value = fixed_point(f, params, x, z0, solver=solver, adjoint=adjoint).value
            return jnp.sum(value * g)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        compiled[name] = gradient.lower(*arguments).compile()
        memory: Any = compiled[name].memory_analysis()
        found[name] = {"megabytes": memory.temp_size_in_bytes / 2**20}
    seconds: dict[str, list[float]] = {name: [] for name in adjoints}
    for turn in range(rounds + 1):
        for name, gradient in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(gradient(*arguments))
            if turn:  # The first one warms up.
                seconds[name].append(time.perf_counter() - begin)
    for name, values in seconds.items():
        found[name]["milliseconds"] = 1e3 * statistics.median(values)
    return found


def forward_table(curves: dict[str, dict[str, np.ndarray]]) -> str:
    """Median evaluations to a residual, and the share of images that get there."""
    header = ["model", "solver", "evaluations to 1e-2", "to 1e-4", "images at 1e-4"]
    rows = []
    for model, by_solver in curves.items():
        for name, curve in by_solver.items():
            reach = []
            for level in (1e-2, 1e-4):
                met = curve <= level
                median = np.median(np.where(met.any(1), met.argmax(1) + 1.0, np.inf))
                reach.append(f"{median:.0f}" if np.isfinite(median) else "never")
            middle = np.median(curve, axis=0)
            at_7 = middle[min(6, len(middle) - 1)]
            share = f"{(curve[:, -1] <= 1e-4).mean():.0%}"
            rows.append(
                [model, name, *reach, share, f"{at_7:.1e}", f"{middle[-1]:.1e}"]
            )
    return markdown([*header, "residual at 7", "at the end"], rows)


def backward_table(quality: dict[str, Any], cost: dict[str, Any]) -> str:
    """One row per adjoint: error and cosine for both models, time, memory."""
    header = ["adjoint"]
    for model in quality:
        header += [f"error, {model}", f"cosine, {model}"]
    rows = []
    for name, spent in cost.items():
        cells = [name]
        for found in quality.values():
            cells.append(f"{np.median(found[name]['relative_error']):.1e}")
            cells.append(f"{np.median(found[name]['cosine']):.4f}")
        cells += [f"{spent['milliseconds']:.1f}", f"{spent['megabytes']:.1f}"]
        rows.append(cells)
    return markdown([*header, "ms", "MB"], rows)


def draw(curves, quality, cost) -> Figure:
    """Residual against evaluations above, gradient error against cost below."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    above, below = figure.subplots(2, 2)
    for axis, (model, by_solver) in zip(above, curves.items(), strict=True):
        for name, curve in by_solver.items():
            evaluations = np.arange(1, curve.shape[1] + 1)
            low, middle, high = np.quantile(curve, [0.25, 0.5, 0.75], axis=0)
            (line,) = axis.plot(evaluations, middle, label=name)
            colour = line.get_color()
            axis.fill_between(evaluations, low, high, color=colour, alpha=0.15, lw=0)
        axis.set(
            yscale="log",
            xlabel="evaluations of f",
            ylabel="least ‖f(z) − z‖ / ‖f(z)‖ so far",
            title=f"Forward, {model}: median and quartiles of images",
        )
        axis.grid(alpha=0.3)
    above[0].legend(frameon=False)
    families: dict[str, list[str]] = {}
    for name in cost:
        families.setdefault(name.partition(" ")[0].strip(",").lower(), []).append(name)
    trained = list(quality)[1]
    for axis, key, label in (
        (below[0], "milliseconds", "milliseconds, forward and backward"),
        (below[1], "megabytes", "temporary memory, megabytes"),
    ):
        for marker, (family, names) in zip(
            harness.MARKERS, families.items(), strict=False
        ):
            xs = [cost[name][key] for name in names]
            errors = [np.median(quality[trained][n]["relative_error"]) for n in names]
            ys = np.maximum(errors, ROUNDING)
            axis.plot(xs, ys, marker=marker, linewidth=0.8, label=family)
            # The first and the last number of each family.
            for place in {0, len(names) - 1}:
                text, point = names[place].rpartition(" ")[2], (xs[place], ys[place])
                axis.annotate(
                    text, point, (4, 3), textcoords="offset points", fontsize=7
                )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel=label,
            ylabel="parameter gradient's relative error to the exact one",
            title=f"Backward, {trained}",
        )
        axis.xaxis.set_major_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axis.grid(alpha=0.3)
    below[1].legend(frameon=False, fontsize=8, ncols=2)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Prints both tables and writes them, the picture and the numbers."""
    parser = harness.build_parser(__doc__, "solver_comparison")
    parser.add_argument("--workdir", type=expand, default=Path("runs/scenes"))
    parser.add_argument("--images", type=positive, default=32, help="forward part's")
    parser.add_argument("--judged", type=positive, default=8, help="backward part's")
    parser.add_argument("--steps", type=positive, default=60, help="evaluations of f")
    parser.add_argument("--rounds", type=positive, default=15, help="of the timing")
    parser.add_argument("--smoke", action="store_true", help="a few of each, quickly")
    flags = parser.parse_args(arguments)
    wanted = SMOKE if flags.smoke else (*FORWARD, *BACKWARD)
    forward = [name for name in FORWARD if name in wanted]
    adjoints = {name: one for name, one in BACKWARD.items() if name in wanted}

    config, trained = load(flags.workdir)
    untrained = build_model(
        config.model, resolution=config.data.resolution, seed=config.seed
    )
    source = registry.build(config.data, "validation")
    batch = source.batch(np.arange(min(flags.images, len(source))))
    image = as_float(jnp.asarray(batch["image"]))
    solver = Picard(max_steps=config.model.solver.max_steps)
    models = {"untrained": untrained, "trained": trained}
    cases = {name: build_case(model, image) for name, model in models.items()}
    curves = {n: compare_forward(c, forward, flags.steps) for n, c in cases.items()}
    quality: dict[str, Any] = {}
    for name, forward_solver in (
        ("untrained", solver),
        ("trained", solver),
        ("trained", Picard(max_steps=flags.steps)),
    ):
        setting = f"{name}, {forward_solver.max_steps} iterations"
        print(setting, flush=True)
        judged = cases[name].first(flags.judged)
        quality[setting] = {
            n: gradient_quality(judged, adjoint, forward_solver)
            for n, adjoint in adjoints.items()
        }
    # Of the trained model: time and memory depend on shapes, and on a solve's steps.
    cost = costs(cases["trained"], adjoints, solver, flags.rounds)
    results = {
        "run": {
            "name": config.name,
            "steps": config.num_steps,
            "slots": [config.model.num_slots, config.model.slot_size],
            "iterations": config.model.solver.max_steps,
        },
        "spectra": {name: spectra(case, solver) for name, case in cases.items()},
        "forward": {
            model: {n: np.median(curve, axis=0).tolist() for n, curve in by.items()}
            for model, by in curves.items()
        },
        "backward": quality,
        "cost": cost,
    }
    text = forward_table(curves) + "\n\n" + backward_table(quality, cost)
    picture = draw(curves, quality, cost)
    harness.write(flags, [harness.jax_facts()], results, text, picture)


if __name__ == "__main__":
    harness.script(main)
