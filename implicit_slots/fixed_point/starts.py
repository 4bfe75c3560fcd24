"""Where an iteration begins: the best of several starts, and learned starts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from implicit_slots.fixed_point import vectors
from implicit_slots.fixed_point.adjoints import Neumann
from implicit_slots.fixed_point.api import fixed_point
from implicit_slots.fixed_point.iteration import Solver


def best_start(
    f: Callable[[PyTree, PyTree, PyTree], Any],
    params: PyTree,
    x: PyTree,
    starts: PyTree,
    *,
    solver: Solver,
    has_aux: bool = False,
) -> PyTree:
    """Returns for each example the start whose solution has the least residual.

    Where f has several fixed points the residual says which starts arrived (Huang,
    Geng and Kolter 2026, arXiv 2605.21488, choose so among random starts at test
    time). `fixed_point` from the start that is returned, with the same solver, has no
    larger residual than from any other. All solves are made at once and none is
    differentiated.

    Args:
      f: (params, x, z) -> z, or -> (z, aux) with `has_aux`.
      params: pytree that is shared by the batch and the starts.
      x: pytree of inputs.
      starts: like `fixed_point`'s z0 with one more leading axis, [starts, batch, …].
      solver: how to iterate.
      has_aux: whether f returns an auxiliary output.
    """
    starts = jax.tree.map(jnp.asarray, starts)
    constant = jax.lax.stop_gradient((params, x, starts))

    def residual(z0):
        options = {"solver": solver, "adjoint": Neumann(), "has_aux": has_aux}
        return fixed_point(f, *constant[:2], z0, **options).stats.residual

    residuals = jax.vmap(residual)(constant[2])
    # One that is not finite is taken where all are.
    finite = jnp.where(jnp.isfinite(residuals), residuals, jnp.inf)
    best = jnp.argmin(finite, axis=0)

    def keep(leaf):
        index = best.reshape((1, -1) + (1,) * (leaf.ndim - 2))
        return jnp.take_along_axis(leaf, index, axis=0)[0]

    return jax.tree.map(keep, starts)


def start_error(start: PyTree, value: PyTree) -> Float[Array, " batch"]:
    """Returns ‖start − value‖² / ‖value‖² per example; `value` gets no gradient.

    Added to the loss it trains a start that is predicted from the inputs towards the
    solution ("preheating"), and the solver then needs fewer steps. It moves neither f
    nor the solution.

    Args:
      start: the z0 that was predicted.
      value: the solution that was found.
    """
    value, _ = vectors.ravel(jax.lax.stop_gradient(value))
    apart = vectors.ravel(start)[0] - value
    return vectors.relative(vectors.dot(apart, apart), vectors.dot(value, value))
