"""Every solver and every backward pass on slots of frozen features."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base, dinosaur_scenes
from implicit_slots.models.build import (
    ADJOINTS,
    LINEAR_SOLVERS,
    SOLVERS,
    build_model,
    split_model,
)

STEPS = 60  # until nothing moves: the small weights below make a contraction
# Each as exact as the steps allow.
EXACT: dict[str, dict[str, Any]] = {
    "unrolled": {},
    "truncated": {"steps": STEPS},
    "neumann": {"terms": STEPS},
    "phantom": {"steps": STEPS, "damping": 1.0},
    "adaptive": {"max_terms": 2 * STEPS, "rtol": 1e-6},
    "implicit": {},
}


def section(solver: str, adjoint: str, linear: str = "gmres"):
    config = dinosaur_scenes.get_config("smoke").model
    # Whose gradient is zero at a fixed point.
    config.update(initial_slots="gaussian", straight_through=False)
    config.solver = base.solver(solver, max_steps=STEPS)
    config.adjoint.name = adjoint
    config.adjoint.update(EXACT[adjoint])
    config.adjoint.solver = base.solver(linear, max_steps=STEPS)
    return config


@functools.cache
def gradient(solver: str, adjoint: str, linear: str = "gmres"):
    """Of the loss of two images, and the residual of the slots."""
    config = section(solver, adjoint, linear)
    graphdef, shapes = split_model(
        nnx.eval_shape(lambda: build_model(config, resolution=16, seed=0))
    )
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.15 * generator.standard_normal(leaf.shape), "f"),
        shapes,
    )
    image = jnp.asarray(generator.uniform(size=(2, 16, 16, 3)), "f")

    @jax.jit
    def run(params):
        def loss(params):
            model = nnx.merge(graphdef, params)
            output = model({"image": image}, key=jax.random.key(0))
            return output.losses["feature_mse"].mean(), output.stats.residual

        return jax.grad(loss, has_aux=True)(params)

    found, residual = run(params)
    return jax.tree.map(np.asarray, found), np.asarray(residual)


CASES = [
    *(("picard", adjoint, "gmres") for adjoint in ADJOINTS if adjoint != "unrolled"),
    *(("picard", "implicit", linear) for linear in LINEAR_SOLVERS if linear != "gmres"),
    *((solver, "implicit", "gmres") for solver in SOLVERS if solver != "picard"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "adjoint", "linear"), CASES)
def test_at_a_fixed_point_every_gradient_is_that_of_unrolling(solver, adjoint, linear):
    want, residual = gradient("picard", "unrolled")
    assert residual.max() < 1e-6
    found, residual = gradient(solver, adjoint, linear)
    assert residual.max() < 1e-5
    assert not any(map(np.any, jax.tree.leaves(found["vit"])))
    for name in found.keys() - {"vit"}:
        one, other = jax.tree.leaves(found[name]), jax.tree.leaves(want[name])
        size = np.sqrt(sum(np.sum(leaf**2) for leaf in other))
        error = np.sqrt(
            sum(np.sum((a - b) ** 2) for a, b in zip(one, other, strict=True))
        )
        assert np.isfinite(size) and size > 0
        assert error < 1e-3 * size, (name, error / size)
