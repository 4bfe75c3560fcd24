"""A batch of pytrees as a batch of vectors: one vector per example, over all leaves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Key, PyTree

_HIGHEST = jax.lax.Precision.HIGHEST


def batch_size(z: PyTree) -> int:
    """Returns the length of the leading axis that all leaves of `z` share."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(z)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "every leaf of z0 needs the same leading batch axis, got shapes "
            f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(z)]}"
        )
    (size,) = sizes.pop()
    if size == 0:
        raise ValueError("z0 must hold at least one example, its batch axis is empty")
    return size


def shapes(z: PyTree) -> PyTree:
    """Returns shapes and dtypes alone: weak types and shardings may differ."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), z
    )


def working_dtype(z: PyTree) -> jnp.dtype:
    """Returns float64 if any leaf has it, else float32: never half precision."""
    double = any(jnp.result_type(leaf) == jnp.float64 for leaf in jax.tree.leaves(z))
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def ravel(
    z: PyTree,
) -> tuple[Float[Array, "batch dim"], Callable[[Float[Array, "batch dim"]], PyTree]]:
    """Returns one vector per example, in the working dtype, and the way back."""
    leaves, structure = jax.tree.flatten(z)
    dtype = working_dtype(z)
    batch = batch_size(z)
    flat = [leaf.reshape(batch, -1).astype(dtype) for leaf in leaves]
    ends = [0]
    for part in flat:
        ends.append(ends[-1] + part.shape[1])
    like = [(leaf.shape, leaf.dtype) for leaf in leaves]

    def unravel(vector: Float[Array, "batch dim"]) -> PyTree:
        return jax.tree.unflatten(
            structure,
            [
                vector[:, begin:end].reshape(shape).astype(dtype)
                for begin, end, (shape, dtype) in zip(
                    ends[:-1], ends[1:], like, strict=True
                )
            ],
        )

    return jnp.concatenate(flat, axis=1), unravel


class Place(NamedTuple):
    """Where the batch lies, as far as JAX's types say.

    Attributes:
      varying: mesh axes of `jax.shard_map` over which values may differ.
      rows: mesh axes that the batch axis is split over under explicit sharding.
    """

    varying: frozenset
    rows: Any


def place_of(tree: PyTree) -> Place:
    """Returns what the leaves, each with a leading batch axis, have together."""
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]
    rows = [kind.sharding.spec[0] for kind in types]
    return Place(
        frozenset().union(*(kind.mat.varying for kind in types)),
        next(filter(None, rows), None),
    )


def placed(tree: PyTree, place: Place) -> PyTree:
    """Returns the leaves, scalars or with a leading batch axis, where z lies.

    A loop has to begin with the types that it goes on with, and what is made of
    constants is everywhere the same.
    """

    def move(leaf):
        missing = place.varying - jax.typeof(leaf).mat.varying
        if missing:
            leaf = jax.lax.pcast(leaf, tuple(missing), to="varying")
        if leaf.ndim and place.rows and not jax.typeof(leaf).sharding.spec[0]:
            leaf = jax.reshard(leaf, PartitionSpec(place.rows))
        return leaf

    return jax.tree.map(move, tree)


def normal(key: Key[Array, ""], like: Array) -> Array:
    """Draws a standard normal array of the shape, dtype and mesh axes of another."""
    return placed(jax.random.normal(key, like.shape, like.dtype), place_of(like))


def binary_scale(a: Float[Array, "batch dim"]) -> Float[Array, "batch 1"]:
    """Returns the power of two that brings each vector's largest entry near one.

    Times it, squares neither under- nor overflow, and mantissas stay as they are. It
    carries no gradient: what is computed with it must not depend on it.
    """
    info = jnp.finfo(a.dtype)
    largest = jax.lax.stop_gradient(jnp.abs(a).max(axis=1, keepdims=True))
    power = jax.lax.reduce_precision(largest, info.nexp, 0)
    return 1 / jnp.clip(power, info.tiny, 1 / info.tiny)


def norm(z: PyTree) -> Float[Array, " batch"]:
    """Returns the 2-norm of each example, over all leaves, whatever its size."""
    a, _ = ravel(z)
    scale = binary_scale(a)
    return jnp.sqrt(jnp.sum(jnp.square(a * scale), axis=1)) / scale[:, 0]


def residual_norms(
    z: PyTree, fz: PyTree
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Returns ‖f(z) − z‖ and ‖f(z)‖ per example, over all leaves.

    Half-precision leaves are accumulated in float32.
    """
    a, b = ravel(z)[0], ravel(fz)[0]
    return norm(b - a), norm(b)


def relative(
    error: Float[Array, " batch"], size: Float[Array, " batch"]
) -> Float[Array, " batch"]:
    """Returns `error` / `size`, zero where both are zero."""
    return error / (size + jnp.finfo(size.dtype).tiny)


def select(flag: Bool[Array, " batch"], new: PyTree, old: PyTree) -> PyTree:
    """Takes the examples of `new` where the flag is set, of `old` elsewhere."""

    def pick(a, b):
        return jnp.where(flag.reshape(flag.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)


def dot(
    a: Float[Array, "batch dim"], b: Float[Array, "batch dim"]
) -> Float[Array, " batch"]:
    """Returns the inner product of each example's two vectors."""
    return jnp.einsum("bn,bn->b", a, b, precision=_HIGHEST)


def coefficients(
    rows: Float[Array, "batch count dim"], a: Float[Array, "batch dim"]
) -> Float[Array, "batch count"]:
    """Returns the inner products of each example's rows with its vector."""
    return jnp.einsum("bmn,bn->bm", rows, a, precision=_HIGHEST)


def combine(
    weights: Float[Array, "batch count"], rows: Float[Array, "batch count dim"]
) -> Float[Array, "batch dim"]:
    """Returns the weighted sum of each example's rows."""
    return jnp.einsum("bm,bmn->bn", weights, rows, precision=_HIGHEST)


def divide(
    a: Float[Array, "batch dim"], length: Float[Array, " batch"]
) -> Float[Array, "batch dim"]:
    """Returns each vector over its length, zero where that is zero."""
    safe = jnp.where(length > 0, length, 1)[:, None]
    return jnp.where(length[:, None] > 0, a / safe, 0)


def put(
    rows: Float[Array, "batch count *dim"], index: jax.typing.ArrayLike, row: Array
) -> Float[Array, "batch count *dim"]:
    """Replaces each example's row number `index`.

    By selection and not by `.at[].set`, whose scatter has no sharding rule under
    explicit sharding. The rows are read whole anyway wherever this is used.
    """
    number = jnp.arange(rows.shape[1], dtype=jnp.int32)
    here = (number == index).reshape((1, -1) + (1,) * (rows.ndim - 2))
    return jnp.where(here, row[:, None], rows)
