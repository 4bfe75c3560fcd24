"""What a fixed point is like: how fast the iteration contracts, how good a gradient is.

All of it is batched, compiles, and runs on any device; nothing needs J as a matrix but
`dense_jacobian` and the oracle of `gradient_error`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from implicit_slots.fixed_point import vectors
from implicit_slots.fixed_point.adjoints import Adjoint, Implicit
from implicit_slots.fixed_point.api import fixed_point
from implicit_slots.fixed_point.checks import whole
from implicit_slots.fixed_point.iteration import Solver
from implicit_slots.fixed_point.krylov import orthogonalise
from implicit_slots.fixed_point.linear import Dense, dense_matrix

Map = Callable[[PyTree, PyTree, PyTree], PyTree]
_SQUARINGS = 24


def spectral_radius(
    f: Map,
    params: PyTree,
    x: PyTree,
    z: PyTree,
    key: Key[Array, ""],
    *,
    krylov: int = 40,
    powers: int = 20,
) -> Float[Array, " batch"]:
    """Estimates ρ(J), J = ∂f/∂z at z: the factor by which far iterations contract.

    Arnoldi's method from a random vector, then the radius of the small Hessenberg
    matrix H as ‖H^k‖^(1/k), k = 2²⁴, by repeated squaring: that neither lies for
    complex pairs, as power iteration does, nor needs an eigensolver, which TPUs lack.
    Exact to rounding once `krylov` reaches the number of entries of an example's z.

    Args:
      f: (params, x, z) -> z.
      params: pytree that is shared by the batch.
      x: pytree of inputs.
      z: where J is taken; the fixed point, for the meaning above.
      key: of the random start.
      krylov: products with J, and vectors of the size of z that are kept.
      powers: products made before, which turn the start towards the dominant
        eigenvectors: for spectra with many eigenvalues near the largest.

    Raises:
      ValueError: if `krylov` is below one or `powers` negative.
    """
    flat, product = _jacobian_product(f, params, x, z)
    return _matrix_radius(_hessenberg(product, flat, key, krylov, powers))


def spectral_norm(
    f: Map,
    params: PyTree,
    x: PyTree,
    z: PyTree,
    key: Key[Array, ""],
    *,
    krylov: int = 20,
    powers: int = 0,
) -> Float[Array, " batch"]:
    """Estimates σ_max(J), J = ∂f/∂z at z: the most that one step can stretch an error.

    The Krylov space of JᵀJ from a random vector: what power iteration on JᵀJ sees, and
    all the vectors that it forgets; never above the true norm but for rounding.

    Args:
      f: (params, x, z) -> z.
      params: pytree that is shared by the batch.
      x: pytree of inputs.
      z: where J is taken.
      key: of the random start.
      krylov: products with JᵀJ, and vectors of the size of z that are kept.
      powers: products made before.

    Raises:
      ValueError: if `krylov` is below one or `powers` negative.
    """
    flat, unravel = vectors.ravel(z)
    g = lambda z: f(params, x, z)  # noqa: E731
    _, transpose = jax.vjp(g, z)

    def product(v):
        _, tangent = jax.jvp(g, (z,), (unravel(v),))
        return vectors.ravel(transpose(tangent)[0])[0]

    return jnp.sqrt(_matrix_radius(_hessenberg(product, flat, key, krylov, powers)))


def dense_jacobian(
    f: Map, params: PyTree, x: PyTree, z: PyTree, *, block: int = 64
) -> Float[Array, "batch dim dim"]:
    """Returns each example's J, [b, i, j] = ∂f_i/∂z_j, over the flattened leaves of z.

    Args:
      f: (params, x, z) -> z.
      params: pytree that is shared by the batch.
      x: pytree of inputs.
      z: where J is taken.
      block: how many columns are made at a time.
    """
    flat, product = _jacobian_product(f, params, x, z)
    return dense_matrix(product, flat, block)


class GradientError(NamedTuple):
    """An adjoint's gradient against the exact one, one entry per example.

    Attributes:
      cotangent_cosine: of the cotangents that reach f's output, u.
      cotangent_ratio: ‖u‖ over the exact one's.
      cotangent_error: ‖u − exact‖ / ‖exact‖.
      params_cosine: of the parameter gradients.
      params_ratio: of their norms.
      params_error: their relative error.
    """

    cotangent_cosine: Float[Array, " batch"]
    cotangent_ratio: Float[Array, " batch"]
    cotangent_error: Float[Array, " batch"]
    params_cosine: Float[Array, " batch"]
    params_ratio: Float[Array, " batch"]
    params_error: Float[Array, " batch"]


def gradient_error(
    f: Map,
    params: PyTree,
    x: PyTree,
    z0: PyTree,
    g: PyTree,
    *,
    solver: Solver,
    adjoint: Adjoint,
    oracle: Solver | None = None,
) -> GradientError:
    """Compares an adjoint's gradient of Σ g·value with the implicit function theorem's.

    The oracle is `Implicit(solver=Dense())`: costly, see there. The backward passes
    are run once per example, so that parameter gradients are not summed over the batch.

    Args:
      f: (params, x, z) -> z.
      params: pytree that is shared by the batch.
      x: pytree of inputs.
      z0: where the solvers start.
      g: cotangent of the value, a pytree like z0.
      solver: the forward solver of the adjoint.
      adjoint: what is judged.
      oracle: the forward solver of the exact gradient; `solver` if not given, which
        leaves the error of an unconverged solution out.
    """
    pulled = _pull_backs(f, params, x, z0, solver, adjoint)
    exact = _pull_backs(
        f, params, x, z0, oracle or solver, Implicit(solver=Dense(block=64))
    )
    batch = vectors.batch_size(z0)

    def compare(index):
        mask = jnp.arange(batch) == index
        alone = vectors.select(mask, g, jax.tree.map(jnp.zeros_like, g))
        ours, theirs = pulled(alone), exact(alone)
        pairs = zip(ours, theirs, strict=True)
        return [_compare(got, want) for got, want in pairs]

    of_params, of_cotangent = jax.lax.map(compare, jnp.arange(batch))
    return GradientError(*of_cotangent, *of_params)


@dataclasses.dataclass(frozen=True)
class _Offset:
    """Adds an input to f's output: its cotangent is what reaches that output."""

    f: Map

    def __call__(self, params: PyTree, x: Any, z: PyTree) -> PyTree:
        x, offset = x
        return jax.tree.map(jnp.add, self.f(params, x, z), offset)


def _pull_backs(f, params, x, z0, solver, adjoint):
    def value(params, offset):
        return fixed_point(
            _Offset(f), params, (x, offset), z0, solver=solver, adjoint=adjoint
        ).value

    # Inside shard_map the gradients of one device's examples are its own.
    params = vectors.placed(params, vectors.place_of(z0)._replace(rows=None))
    return jax.vjp(value, params, jax.tree.map(jnp.zeros_like, z0))[1]


def _compare(got: PyTree, want: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cosine, ratio of norms, relative error, over all leaves."""
    # As a batch of one.
    ours, theirs = (
        vectors.ravel(jax.tree.map(lambda leaf: leaf[None], tree))[0]
        for tree in (got, want)
    )
    length, right_length = vectors.norm(ours), vectors.norm(theirs)
    cosine = vectors.dot(
        vectors.divide(ours, length), vectors.divide(theirs, right_length)
    )
    ratio = vectors.relative(length, right_length)
    error = vectors.relative(vectors.norm(ours - theirs), right_length)
    return cosine[0], ratio[0], error[0]


def _jacobian_product(f: Map, params: PyTree, x: PyTree, z: PyTree):
    """Returns z as vectors, and v ↦ J v on vectors like them."""
    flat, unravel = vectors.ravel(z)

    def product(v):
        _, tangent = jax.jvp(lambda z: f(params, x, z), (z,), (unravel(v),))
        return vectors.ravel(tangent)[0]

    return flat, product


def _hessenberg(
    product: Callable[[jax.Array], jax.Array],
    like: jax.Array,
    key: Key[Array, ""],
    krylov: int,
    powers: int,
) -> Float[Array, "batch krylov krylov"]:
    """Arnoldi's matrix of a linear map on a batch of vectors."""
    batch, dim = like.shape
    count = min(whole("krylov", krylov), dim)
    powers = whole("powers", powers, least=0)

    def unit(v):
        return vectors.divide(v, vectors.norm(v))

    start = vectors.normal(key, like)
    start = jax.lax.fori_loop(0, powers, lambda _, v: unit(product(v)), unit(start))
    basis = jnp.zeros((batch, count + 1, dim), like.dtype)
    matrix = jnp.zeros((batch, count, count + 1), like.dtype)
    carry = vectors.put(basis, 0, start), matrix

    def step(j, carry):
        basis, matrix = carry
        new, column, _ = orthogonalise(basis, product(basis[:, j]), j + 1)
        # An exhausted space leaves zeros, and adds the eigenvalue zero.
        # Column by column: the rows of the transpose.
        return vectors.put(basis, j + 1, new), vectors.put(matrix, j, column)

    carry = vectors.placed(carry, vectors.place_of(like))
    _, matrix = jax.lax.fori_loop(0, count, step, carry)
    return matrix[:, :, :count].swapaxes(1, 2)


def _matrix_radius(matrix: Float[Array, "batch n n"]) -> Float[Array, " batch"]:
    """Gelfand's formula, ρ = lim ‖H^k‖^(1/k), in logarithms."""

    def square(_, carry):
        matrix, log_norm = carry  # the true power is matrix · exp(log_norm)
        size = vectors.norm(matrix)
        matrix = matrix / jnp.where(size > 0, size, 1)[:, None, None]
        log_norm = log_norm + jnp.log(size)
        squared = jnp.matmul(matrix, matrix, precision=jax.lax.Precision.HIGHEST)
        return squared, 2 * log_norm

    start = matrix, jnp.zeros_like(matrix[:, 0, 0])
    matrix, log_norm = jax.lax.fori_loop(0, _SQUARINGS, square, start)
    return jnp.exp((log_norm + jnp.log(vectors.norm(matrix))) / 2.0**_SQUARINGS)
