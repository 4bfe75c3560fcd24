"""GMRES and BiCGSTAB for a batch of systems at once. See linear.py.

They are batched like the forward solvers: each example has a Krylov space, a stopping
point and a step count of its own. jax.scipy.sparse.linalg would run the whole
batch as one system, in which each example depends on the others, and does not say how
many steps it took.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from implicit_slots.fixed_point import vectors
from implicit_slots.fixed_point.checks import check_count, check_tolerances
from implicit_slots.fixed_point.iteration import meets
from implicit_slots.fixed_point.linear import Affine, LinearSolved, Vector, measured


@dataclass(frozen=True, kw_only=True)
class _Krylov:
    """What the Krylov solvers share.

    Attributes:
      max_steps: the most products with J.
      rtol: tolerance of ‖φ(u) − u‖ relative to ‖φ(0)‖.
      atol: absolute tolerance.
    """

    max_steps: int
    rtol: float = 0.0
    atol: float = 0.0

    def __post_init__(self):
        check_count(self, "max_steps", self._least)
        check_tolerances(self)

    _least = 1

    def _met(self, error, size):
        return meets(error, size, rtol=self.rtol, atol=self.atol)


@dataclass(frozen=True, kw_only=True)
class GMRES(_Krylov):
    """Generalised minimal residuals without restarts (Saad and Schultz 1986).

    Keeps one vector per step: `max_steps` times the size of z, whatever the number of
    forward steps.

    Attributes:
      max_steps: the most products with J.
      rtol: tolerance of ‖φ(u) − u‖ relative to ‖φ(0)‖.
      atol: absolute tolerance.
    """

    def solve(self, phi: Affine, g: Vector) -> LinearSolved:
        """Solves from u = g."""
        size = vectors.norm(phi.right())
        right = phi.apply(g) - g
        batch, dim = g.shape
        count = min(self.max_steps, dim)
        length = vectors.norm(right)
        basis = jnp.zeros((batch, count + 1, dim), g.dtype)
        basis = vectors.put(basis, 0, vectors.divide(right, length))
        identity = jnp.eye(count + 1, dtype=g.dtype)[None].repeat(batch, axis=0)
        start = _Arnoldi(
            basis=basis,
            columns=identity[:, :count, :count],
            rotation=identity,
            right=vectors.put(jnp.zeros((batch, count + 1), g.dtype), 0, length),
            steps=jnp.zeros(batch, jnp.int32),
            active=~self._met(length, size) & jnp.isfinite(length),
        )

        def step(state: _Arnoldi) -> _Arnoldi:
            state, broken = _arnoldi_step(state, phi.transpose)
            error = jnp.abs(
                jnp.take_along_axis(state.right, state.steps[:, None], axis=1)
            )[:, 0]
            done = self._met(error, size) | broken | ~jnp.isfinite(error)
            return state._replace(active=state.active & ~done)

        state = jax.lax.while_loop(
            lambda state: jnp.any(state.active) & (jnp.max(state.steps) < count),
            step,
            vectors.placed(start, vectors.place_of(g)),
        )
        u = g + _assemble(state)
        return measured(phi, g, u, state.steps, size, self.rtol, self.atol)


class _Arnoldi(NamedTuple):
    """The Krylov space so far and its least-squares problem, triangular already."""

    basis: Float[Array, "batch count_and_1 dim"]
    columns: Float[Array, "batch count count"]
    rotation: Float[Array, "batch count_and_1 count_and_1"]
    right: Float[Array, "batch count_and_1"]
    steps: Int[Array, " batch"]
    active: Bool[Array, " batch"]


def _arnoldi_step(
    state: _Arnoldi, transpose: Callable[[Vector], Vector]
) -> tuple[_Arnoldi, Bool[Array, " batch"]]:
    """Adds one vector to the active examples; says whose space is exhausted."""
    # The active examples all stand at the same, largest step count.
    j = jnp.max(state.steps)
    active = state.active
    vector = state.basis[:, j]
    image = vector - transpose(vector)
    new, column, broken = orthogonalise(state.basis, image, j + 1)
    basis = vectors.select(active, vectors.put(state.basis, j + 1, new), state.basis)
    column = vectors.combine(column, state.rotation.swapaxes(1, 2))
    # A Givens rotation brings the entry below the diagonal to zero.
    a, b = column[:, j], column[:, j + 1]
    radius = jnp.hypot(a, b)
    regular = radius > 0
    safe = jnp.where(regular, radius, 1)
    cosine = jnp.where(regular, a / safe, 1)[:, None]
    sine = jnp.where(regular, b / safe, 0)[:, None]

    def rotate(rows):
        upper, lower = rows[:, j], rows[:, j + 1]
        shape = (-1,) + (1,) * (upper.ndim - 1)
        c, s = cosine.reshape(shape), sine.reshape(shape)
        turned = vectors.put(rows, j, c * upper + s * lower)
        turned = vectors.put(turned, j + 1, c * lower - s * upper)
        return vectors.select(active, turned, rows)

    right = rotate(state.right)
    # A column of zeros takes no part in the solution: its diagonal stays one.
    right = vectors.put(right, j, jnp.where(regular | ~active, right[:, j], 0))
    column = vectors.put(column[:, :-1], j, safe)
    columns = vectors.select(
        active, vectors.put(state.columns, j, column), state.columns
    )
    steps = state.steps + active.astype(state.steps.dtype)
    following = _Arnoldi(basis, columns, rotate(state.rotation), right, steps, active)
    return following, broken


def _assemble(state: _Arnoldi) -> Vector:
    """Returns the correction that the Krylov space holds."""
    count = state.columns.shape[1]
    taken = jnp.arange(count, dtype=jnp.int32)[None] < state.steps[:, None]
    right = jnp.where(taken, state.right[:, :count], 0)
    triangle = state.columns.swapaxes(1, 2)
    weights = jax.scipy.linalg.solve_triangular(triangle, right[..., None])
    return vectors.combine(weights[..., 0], state.basis[:, :count])


def orthogonalise(
    basis: Float[Array, "batch count dim"], image: Vector, index: Int[Array, ""]
) -> tuple[Vector, Float[Array, "batch count"], Bool[Array, " batch"]]:
    """One step of Arnoldi's method: Gram-Schmidt, twice, against all rows of `basis`.

    Args:
      basis: orthonormal rows below `index`, zeros from there on.
      image: what is to be made orthogonal to them.
      index: of the row that the result will be.

    Returns:
      The unit vector, or zero where nothing is left of the image; the image's
      coefficients on the rows and at `index` its remainder's length; whether nothing
      was left.
    """
    first = vectors.coefficients(basis, image)
    rest = image - vectors.combine(first, basis)
    second = vectors.coefficients(basis, rest)
    rest = rest - vectors.combine(second, basis)
    length = vectors.norm(rest)
    broken = ~(length > 4 * jnp.finfo(rest.dtype).eps * vectors.norm(image))
    length = jnp.where(broken, 0, length)
    column = vectors.put(first + second, index, length)
    return vectors.divide(rest, length), column, broken


@dataclass(frozen=True, kw_only=True)
class BiCGSTAB(_Krylov):
    """Stabilised biconjugate gradients (van der Vorst 1992): a few vectors of memory.

    Takes two products a turn, so `max_steps` must be at least 2. Its residual can rise
    and its recurrences can break down; the best iterate is kept.

    Attributes:
      max_steps: the most products with J.
      rtol: tolerance of ‖φ(u) − u‖ relative to ‖φ(0)‖.
      atol: absolute tolerance.
    """

    _least = 2

    def solve(self, phi: Affine, g: Vector) -> LinearSolved:
        """Solves from u = g."""
        size = vectors.norm(phi.right())
        shadow = phi.apply(g) - g
        error = vectors.norm(shadow)
        zero, one = jnp.zeros_like(g), jnp.ones_like(error)
        start = _Biconjugate(
            u=g,
            residual=shadow,
            direction=zero,
            product=zero,
            rho=one,
            alpha=one,
            omega=one,
            best=g,
            error=error,
            steps=jnp.zeros(len(g), jnp.int32),
            active=~self._met(error, size) & jnp.isfinite(error),
        )

        def step(old: _Biconjugate) -> _Biconjugate:
            new, sound = _biconjugate_step(old, shadow, phi.transpose)
            new = vectors.select(old.active, new, old)
            error = vectors.norm(new.residual)
            better = old.active & (error < old.error)  # never where it is NaN
            done = self._met(error, size) | ~sound | ~jnp.isfinite(error)
            return new._replace(
                best=vectors.select(better, new.u, old.best),
                error=jnp.where(better, error, old.error),
                steps=old.steps + 2 * old.active.astype(old.steps.dtype),
                active=old.active & ~done,
            )

        state = jax.lax.while_loop(
            lambda state: (
                jnp.any(state.active) & (jnp.max(state.steps) + 2 <= self.max_steps)
            ),
            step,
            vectors.placed(start, vectors.place_of(g)),
        )
        found = state.best, state.steps
        return measured(phi, g, *found, size, self.rtol, self.atol)


class _Biconjugate(NamedTuple):
    u: Vector
    residual: Vector
    direction: Vector
    product: Vector
    rho: Float[Array, " batch"]
    alpha: Float[Array, " batch"]
    omega: Float[Array, " batch"]
    best: Vector
    error: Float[Array, " batch"]
    steps: Int[Array, " batch"]
    active: Bool[Array, " batch"]


def _biconjugate_step(
    old: _Biconjugate, shadow: Vector, transpose: Callable[[Vector], Vector]
) -> tuple[_Biconjugate, Bool[Array, " batch"]]:
    """One turn, in van der Vorst's letters; says where the recurrences hold."""
    rho = vectors.dot(shadow, old.residual)
    beta = (rho / old.rho) * (old.alpha / old.omega)
    direction = old.residual + beta[:, None] * (
        old.direction - old.omega[:, None] * old.product
    )
    product = direction - transpose(direction)
    slope = vectors.dot(shadow, product)
    alpha = rho / slope
    half = old.residual - alpha[:, None] * product
    image = half - transpose(half)
    square = vectors.dot(image, image)
    omega = jnp.where(
        square > 0, vectors.dot(image, half) / jnp.where(square > 0, square, 1), 0
    )
    sound = (rho != 0) & (slope != 0) & (omega != 0)
    following = old._replace(
        u=old.u + alpha[:, None] * direction + omega[:, None] * half,
        residual=half - omega[:, None] * image,
        direction=direction,
        product=product,
        rho=rho,
        alpha=alpha,
        omega=omega,
    )
    return following, sound
