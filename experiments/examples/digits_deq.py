"""A deep-equilibrium classifier of handwritten digits: the solver core without slots.

    python -m experiments.examples.digits_deq

Needs `pip install -e '.[experiments]'`; one minute on one core. One layer applied to
its own output until it stops changing, z = tanh(z W + x U + b), then a linear
read-out: the idea of Bai et al. 2019 at its smallest. It is trained once with each
backward pass, from the same parameters on the same batches of scikit-learn's 8x8
digits, 1,297 to train on and 500 to test. Prints accuracy, time of a step, what the
solvers did, and ρ(J). One seed: differences of a percent mean nothing.
"""

import argparse
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from implicit_slots.fixed_point import (
    GMRES,
    Adaptive,
    Adjoint,
    Anderson,
    BackwardStats,
    Implicit,
    Neumann,
    Phantom,
    Unrolled,
    backward_probe,
    diagnostics,
    fixed_point,
    jacobian_norm,
)

WIDTH, CLASSES, BATCH = 64, 10, 64
SOLVER = Anderson(max_steps=30, depth=5, rtol=1e-4)
EXACT = Implicit(solver=GMRES(max_steps=20, rtol=1e-5))
# Each with the weight of a penalty on the Jacobian.
ADJOINTS: dict[str, tuple[Adjoint, float]] = {
    "Unrolled()": (Unrolled(), 0.0),
    "Neumann(terms=1)": (Neumann(terms=1), 0.0),
    "Neumann(terms=5)": (Neumann(terms=5), 0.0),
    "Phantom(steps=5, damping=0.5)": (Phantom(steps=5, damping=0.5), 0.0),
    "Adaptive(max_terms=30)": (Adaptive(max_terms=30), 0.0),
    "Implicit(solver=GMRES(max_steps=20, rtol=1e-5))": (EXACT, 0.0),
    "the same, loss + ‖J‖² / width": (EXACT, 1.0),
}


def layer(params, x, z):
    """The map whose fixed point is the hidden state."""
    return jnp.tanh(z @ params["w"] + x @ params["u"] + params["b"])


def initial_parameters(key):
    """W is small, so that the layer contracts to begin with."""
    key_w, key_u, key_out = jax.random.split(key, 3)
    return {
        "layer": {
            "w": 0.5 * jax.random.normal(key_w, (WIDTH, WIDTH)) / WIDTH**0.5,
            "u": jax.random.normal(key_u, (64, WIDTH)) / 8,
            "b": jnp.zeros(WIDTH),
        },
        "out": jax.random.normal(key_out, (WIDTH, CLASSES)) / WIDTH**0.5,
    }


def forward(params, x, adjoint, probe=None):
    """Logits and the fixed point behind them."""
    z0 = jnp.zeros((len(x), WIDTH))
    found = fixed_point(
        layer, params["layer"], x, z0, solver=SOLVER, adjoint=adjoint, probe=probe
    )
    return found.value @ params["out"], found


class Fitted(NamedTuple):
    """A classifier that was trained.

    Attributes:
      params: its parameters.
      x: pixels; the last 500 rows were not trained on.
      y: digits.
      seconds: of each step.
      steps: of the last step's forward solves.
      backward: what its backward solves did, if the adjoint says.
    """

    params: Any
    x: np.ndarray
    y: np.ndarray
    seconds: list[float]
    steps: jax.Array
    backward: BackwardStats | None


def fit(adjoint: Adjoint, penalty: float, steps: int) -> Fitted:
    """Trains one classifier."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    x = (digits.data[order] / 16).astype(np.float32)
    y = digits.target[order]
    optimizer = optax.adam(3e-3)
    params = initial_parameters(jax.random.key(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, y, key):
        def loss(params, probe):
            logits, found = forward(params, x, adjoint, probe)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            if penalty:
                z = jax.lax.stop_gradient(found.value)
                size = jacobian_norm(layer, params["layer"], x, z, key)
                loss += penalty * size.mean() / WIDTH
            return loss, found.stats

        # The probe's gradient is what the backward solve did.
        probe = backward_probe(BATCH) if adjoint.measures else None
        (gradient, backward), stats = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            params, probe
        )
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, stats, backward

    rng = np.random.default_rng(1)
    stats: Any = None
    backward: Any = None
    seconds = []
    for number in range(steps):
        rows = rng.integers(0, len(x) - 500, BATCH)
        begin = time.perf_counter()
        params, state, stats, backward = jax.block_until_ready(
            step(params, state, x[rows], y[rows], jax.random.key(number))
        )
        seconds.append(time.perf_counter() - begin)
    return Fitted(params, x, y, seconds, stats.steps, backward)


def train(adjoint: Adjoint, penalty: float, steps: int) -> list[str]:
    """Trains one classifier; returns a row of the table, without the adjoint."""
    params, x, y, seconds, forward_steps, backward = fit(adjoint, penalty, steps)
    logits, found = forward(params, x[-500:], adjoint)
    radius = diagnostics.spectral_radius(
        layer, params["layer"], x[-500:], found.value, jax.random.key(0)
    )
    accuracy = float((logits.argmax(1) == y[-500:]).mean())
    milliseconds = 1e3 * statistics.median(seconds)
    cells = [f"{accuracy:.3f}", f"{milliseconds:.1f}", f"{forward_steps.mean():.1f}"]
    for values in (backward.steps, backward.failed) if backward else ():
        cells.append(f"{values.mean():.1f}")
    return [*cells, *[""] * (5 - len(cells)), f"{radius.mean():.2f}"]


def main(arguments: list[str] | None = None) -> None:
    """Prints one row per backward pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    flags = parser.parse_args(arguments)
    print(
        "| adjoint | test accuracy | ms a step | forward steps | backward steps "
        "| missed | ρ(J) |\n|---|---|---|---|---|---|---|"
    )
    for name, (adjoint, penalty) in ADJOINTS.items():
        cells = train(adjoint, penalty, flags.steps)
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
