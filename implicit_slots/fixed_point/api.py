"""`fixed_point`: solve z = f(params, x, z), differentiate as the adjoint says."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from implicit_slots.fixed_point.adjoints import Adjoint, Neumann, Unrolled
from implicit_slots.fixed_point.solvers import Picard, batch_size, residual_norms


class Stats(NamedTuple):
    """What the forward solve did, one entry per example. Carries no gradient.

    Attributes:
      steps: steps taken by the solver, without the adjoint's one application more.
      residual: ‖f(z) − z‖ / ‖f(z)‖ of the last application made, over all leaves.
      converged: whether that application met the solver's tolerances.
    """

    steps: Int[Array, " batch"]
    residual: Float[Array, " batch"]
    converged: Bool[Array, " batch"]


class Solution(NamedTuple):
    """A fixed point.

    Attributes:
      value: pytree like z0.
      aux: f's auxiliary output at the last application, or None.
      stats: see `Stats`.
    """

    value: PyTree
    aux: Any
    stats: Stats


def fixed_point(
    f: Callable[[PyTree, PyTree, PyTree], Any],
    params: PyTree,
    x: PyTree,
    z0: PyTree,
    *,
    solver: Picard,
    adjoint: Adjoint,
    has_aux: bool = False,
) -> Solution:
    """Solves z = f(params, x, z) from `z0`, differentiably.

    With an implicit adjoint the solver's result z_T is a constant, f is applied to it
    once more and `value` is f(params, x, z_T): the paper's one extra line. The
    gradient with respect to `z0` is then exactly zero, by the implicit function
    theorem: z* does not depend on where the iteration began. `Unrolled`
    differentiates the solver's applications themselves and returns z_T, so for equal
    `max_steps` it applies f once less.

    Args:
      f: (params, x, z) -> z, or -> (z, aux) with `has_aux`. It must return z in the
        shapes and dtypes it got, treat the examples of the batch independently, and
        close over no traced value.
      params: pytree that is shared by the batch.
      x: pytree of inputs.
      z0: pytree to start from; each leaf has a leading batch axis.
      solver: how to iterate.
      adjoint: how to differentiate.
      has_aux: whether f returns an auxiliary output. Losses may depend on it.

    Returns:
      The fixed point, the auxiliary output of the last application, the statistics.

    Raises:
      ValueError: at trace time, if f changes the structure, a shape or a dtype of z,
        or a leaf of z0 lacks the batch axis.
    """
    if not has_aux:
        value, _, stats = _solve(
            _WithoutAux(f), solver, adjoint, params, x, _checked(f, params, x, z0)
        )
        return Solution(value, None, stats)
    z0 = _checked(lambda *args: f(*args)[0], params, x, z0)
    return Solution(*_solve(f, solver, adjoint, params, x, z0))


class _WithoutAux(NamedTuple):
    """Gives f an empty auxiliary output; hashes and compares as f does."""

    f: Callable

    def __call__(self, params: PyTree, x: PyTree, z: PyTree) -> tuple[PyTree, None]:
        return self.f(params, x, z), None


def _checked(f: Callable, params: PyTree, x: PyTree, z0: PyTree) -> PyTree:
    z0 = jax.tree.map(jnp.asarray, z0)
    batch_size(z0)
    got = jax.eval_shape(f, params, x, z0)
    want = jax.eval_shape(lambda z: z, z0)
    # Compared by shape and dtype alone: weak types and shardings may differ.
    described = [
        (
            jax.tree.structure(tree),
            [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)],
        )
        for tree in (got, want)
    ]
    if described[0] != described[1]:
        raise ValueError(
            f"f must return z as it got it: z0 is {want}, but f returned {got}"
        )
    return z0


def _solve(
    f, solver: Picard, adjoint: Adjoint, params, x, z0
) -> tuple[Any, Any, Stats]:
    if isinstance(adjoint, Unrolled):
        return _unrolled(f, solver, adjoint, params, x, z0)
    return _implicit(f, solver, adjoint, params, x, z0)


def _statistics(solver: Picard, steps, z, fz) -> Stats:
    z, fz = jax.lax.stop_gradient((z, fz))
    error, size = residual_norms(z, fz)
    residual = error / (size + jnp.finfo(size.dtype).tiny)
    return Stats(steps, residual, solver.met(error, size))


def _unrolled(f, solver: Picard, adjoint: Unrolled, params, x, z0):
    def step(iterate):
        fz, aux = f(params, x, iterate.z)
        following = solver.step(iterate, fz)
        return following, aux, _statistics(solver, following.steps, iterate.z, fz)

    if adjoint.remat:
        step = jax.checkpoint(step)
    # The last application stands outside the scan: it alone keeps its auxiliary
    # output.
    iterate, _ = jax.lax.scan(
        lambda iterate, _: (step(iterate)[0], None),
        solver.init(z0),
        length=solver.max_steps - 1,
    )
    iterate, aux, stats = step(iterate)
    return iterate.z, aux, stats


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _implicit(f, solver: Picard, adjoint: Neumann, params, x, z0) -> Any:
    return _implicit_forward(f, solver, adjoint, params, x, z0)[0]


def _implicit_forward(f, solver, adjoint, params, x, z0):
    z, steps, _ = solver.solve(lambda z: f(params, x, z)[0], z0)
    # The linearisation at z_T is all that the backward pass needs: memory is that of
    # one application, however many the solver made.
    (value, aux), pull_back = jax.vjp(f, params, x, z)
    return (value, aux, _statistics(solver, steps, z, value)), (pull_back, z)


def _implicit_backward(f, solver, adjoint: Neumann, residuals, cotangents):
    pull_back, z = residuals
    g, aux_cotangent, _ = cotangents
    no_aux = jax.tree.map(_zeros_like, aux_cotangent)
    u = adjoint.cotangent(
        transpose=lambda w: pull_back((w, no_aux))[2],
        g=g,
        first=lambda: pull_back((g, aux_cotangent))[2],
    )
    params_cotangent, x_cotangent, _ = pull_back((u, aux_cotangent))
    return params_cotangent, x_cotangent, jax.tree.map(jnp.zeros_like, z)


def _zeros_like(cotangent):
    # Integer outputs have cotangents of dtype float0, which jax.numpy rejects.
    if cotangent.dtype == jax.dtypes.float0:
        return cotangent
    return jnp.zeros_like(cotangent)


_implicit.defvjp(_implicit_forward, _implicit_backward)
