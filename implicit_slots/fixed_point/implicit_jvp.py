"""`ImplicitJVP`: the implicit function theorem as a tangent, for both modes of JAX."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import zero_from_primal
from jaxtyping import PyTree

from implicit_slots.fixed_point import vectors
from implicit_slots.fixed_point.adjoints import Implicit
from implicit_slots.fixed_point.iteration import Solved, Solver
from implicit_slots.fixed_point.linear import Affine, Vector


@dataclass(frozen=True, kw_only=True)
class ImplicitJVP(Implicit):
    """`Implicit` by a rule for tangents, which JAX transposes and differentiates.

    The tangent of the solution solves ż = ∂f·(θ̇, ẋ) + Jż. So forward mode (`jax.jvp`,
    `jax.jacfwd`), reverse mode and derivatives of any order (`jax.hessian`, a gradient
    of a gradient) are had; a first gradient is `Implicit`'s of the same solver. Each
    order solves further systems, and is as exact as the solution and these solves.
    Memory is flat in the number of forward steps, as `Implicit`'s is.

    JAX makes the backward pass, so that it can report nothing: no probe. An example
    gets the solver's result or one term there as `Implicit`'s does, uncounted.

    Attributes:
      solver: of the linear systems; see `Implicit`.
    """

    measures: ClassVar[bool] = False


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def solution(
    f, solver: Solver, adjoint: ImplicitJVP, params: PyTree, x: PyTree, z0: PyTree
) -> tuple[PyTree, Any, Solved]:
    """Returns f(params, x, z_T), its auxiliary output, and the solver's result z_T."""
    solved = solver.solve(lambda z: f(params, x, z)[0], z0)
    value, aux = f(params, x, solved.z)
    return value, aux, solved


@solution.defjvp
def _tangent(f, solver, adjoint: ImplicitJVP, primals, tangents):
    # The call of itself, so that the next order sees how z_T moves.
    value, aux, solved = solution(f, solver, adjoint, *primals)
    params, x, _ = primals
    _, (explicit, aux_explicit) = jax.jvp(
        lambda params, x: f(params, x, solved.z), (params, x), tangents[:2]
    )
    _, push = jax.linearize(lambda z: f(params, x, z), solved.z)
    # All arithmetic on tangents is done on vectors in float32 or wider.
    right, unravel = vectors.ravel(explicit)

    def product(v: Vector) -> Vector:
        return vectors.ravel(push(unravel(v))[0])[0]

    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(value))

    def solve(system, b: Vector) -> Vector:
        def linear(v):
            return v - system(v)

        phi = Affine(lambda v: b + linear(v), linear, lambda: b, eps)
        return adjoint.cotangent(phi, b)[0]

    moved = unravel(
        jax.lax.custom_linear_solve(lambda v: v - product(v), right, solve, solve)
    )
    aux_moved = jax.tree.map(_sum, aux_explicit, push(moved)[1])
    still = jax.tree.map(zero_from_primal, solved)
    return (value, aux, solved), (moved, aux_moved, still._replace(z=moved))


def _sum(a, b):
    # Tangents of integers are of dtype float0, which jax.numpy rejects.
    return a if a.dtype == jax.dtypes.float0 else a + b
