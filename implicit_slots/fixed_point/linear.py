"""Linear solvers for the backward pass: u = φ(u), φ affine, a batch of systems at once.

φ(u) = g + Jᵀu + c, where c is what auxiliary outputs add; the matrix of the system is
1 − Jᵀ, its right-hand side g + c. Tolerances are relative to that right-hand side, not
to u: where 1 − Jᵀ is singular u grows without bound, and anything is small beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from implicit_slots.fixed_point import vectors
from implicit_slots.fixed_point.checks import check_count
from implicit_slots.fixed_point.iteration import Solver, meets

Vector = Float[Array, "batch dim"]

# A residual of so many roundings of φ(u) is as good as none.
_ROUNDINGS = 4
# A rounding of u may be this share of the right-hand side, and no more.
_SWALLOWED = 1e-2


class Affine(NamedTuple):
    """The map φ whose fixed point is wanted.

    Attributes:
      apply: u ↦ φ(u).
      transpose: w ↦ Jᵀw, its linear part.
      right: φ(0); a function, because not everyone needs it.
      eps: rounding of one product with Jᵀ: that of z's coarsest dtype.
    """

    apply: Callable[[Vector], Vector]
    transpose: Callable[[Vector], Vector]
    right: Callable[[], Vector]
    eps: float


class LinearSolved(NamedTuple):
    """What a linear solver found, per example.

    Attributes:
      u: the solver's result, or g where that has the smaller residual.
      steps: products with J that it took, without one to begin and one to measure.
      residual: ‖φ(u) − u‖ / ‖φ(0)‖, measured, not what a recurrence says, and at
        least what rounding lets be measured.
      converged: whether the solver's result meets the tolerances, but for a factor of
        two and for rounding; without tolerances, whether it is finite.
    """

    u: Vector
    steps: Int[Array, " batch"]
    residual: Float[Array, " batch"]
    converged: Bool[Array, " batch"]


@dataclass(frozen=True, kw_only=True)
class Dense:
    """The exact oracle: each example's whole Jacobian, then LU.

    Costs as many products with J as an example's z has entries, and that number
    squared in memory per example: for tests, diagnostics and small problems.

    Attributes:
      block: how many products are made at a time.
    """

    block: int = 64

    def __post_init__(self):
        check_count(self, "block")

    def solve(self, phi: Affine, g: Vector) -> LinearSolved:
        """Solves from u = g, whose residual is the right-hand side."""
        matrix = dense_matrix(phi.transpose, g, self.block)
        system = jnp.eye(g.shape[1], dtype=g.dtype)[None] - matrix
        right = phi.apply(g) - g
        u = g + jnp.linalg.solve(system, right[..., None])[..., 0]
        steps = jnp.full(len(g), g.shape[1], jnp.int32)
        size = vectors.norm(phi.right())
        return measured(phi, g, u, steps, size)


def dense_matrix(
    apply: Callable[[Vector], Vector], like: Vector, block: int = 64
) -> Float[Array, "batch dim dim"]:
    """Returns each example's matrix of a linear map, [b, i, j] = ∂out_i/∂in_j.

    Args:
      apply: the map, on a batch of vectors, each example for itself.
      like: a batch of vectors of the same shape and dtype.
      block: how many columns are made at a time.
    """
    units = jnp.eye(like.shape[1], dtype=like.dtype)
    place = vectors.place_of(like)
    columns = jax.lax.map(
        lambda unit: apply(vectors.placed(jnp.broadcast_to(unit, like.shape), place)),
        units,
        batch_size=min(block, like.shape[1]),
    )
    return columns.transpose(1, 2, 0)


def normalised(
    phi: Affine, g: Vector
) -> tuple[Affine, Vector, Float[Array, "batch 1"]]:
    """Brings each example's system to size one, so that no square under- or overflows.

    Returns:
      The map, its start, and what to multiply the solution with, [batch, 1].
    """
    right = phi.right()
    scale = jnp.maximum(jnp.abs(right).max(axis=1), jnp.abs(g).max(axis=1))[:, None]
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
    # The barrier keeps XLA from squaring before it divides, as it else does.
    right, start = jax.lax.optimization_barrier((right / scale, g / scale))
    unit = Affine(
        apply=lambda u: right + phi.transpose(u),
        transpose=phi.transpose,
        right=lambda: right,
        eps=phi.eps,
    )
    return unit, start, scale


def solve_by(solver: Solver, phi: Affine, g: Vector) -> LinearSolved:
    """Solves u = φ(u) with one of the forward solvers, from u = g."""
    size = vectors.norm(phi.right())
    solved = solver.solve(phi.apply, g, size=size)
    return measured(phi, g, solved.z, solved.steps, size, solver.rtol, solver.atol)


def measured(
    phi: Affine,
    g: Vector,
    u: Vector,
    steps: Int[Array, " batch"],
    size: Float[Array, " batch"],
    rtol: float = 0.0,
    atol: float = 0.0,
) -> LinearSolved:
    """Takes, per example, whichever of u and the one term g has the smaller residual.

    Args:
      phi: the map.
      g: where the solver began.
      u: where it ended.
      steps: products with J that it took.
      size: what tolerances are relative to.
      rtol: the solver's.
      atol: the same.
    """
    error, length = _error(phi, u)
    one_term, one_length = _error(phi, g)
    residual = vectors.relative(jnp.maximum(error, phi.eps * length), size)
    of_one_term = vectors.relative(jnp.maximum(one_term, phi.eps * one_length), size)
    better = residual < of_one_term  # never where it is not finite
    if rtol == atol == 0:
        converged = jnp.isfinite(residual)
    else:
        # Twice the tolerance: what a solver stopped at is not to the last bit what is
        # measured afterwards. And no tolerance asks for more than rounding allows.
        converged = meets(error / 2, size, rtol=rtol, atol=atol)
        converged |= error <= _ROUNDINGS * phi.eps * length
        # The endless u of a singular system swallows g, and would seem to solve it.
        converged &= jnp.finfo(u.dtype).eps * length <= _SWALLOWED * size
    return LinearSolved(
        vectors.select(better, u, g),
        steps,
        jnp.where(better, residual, of_one_term),
        converged,
    )


def _error(
    phi: Affine, u: Vector
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Returns ‖φ(u) − u‖ and ‖φ(u)‖."""
    image = phi.apply(u)
    return vectors.norm(image - u), vectors.norm(image)
