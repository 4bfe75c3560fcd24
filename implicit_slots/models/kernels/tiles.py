"""Tiles of arrays within a kernel: what lies beyond an array's end reads as zero."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Num

# JAX 0.12 says that it will give up this way from Pallas to a GPU.
try:
    from jax.experimental.pallas import triton
except ImportError:
    triton: Any = None

# What Pallas gives a kernel of an array.
Ref = Any
# Where a tile starts, its side, the length of the axis.
Range = tuple[Any, int, int]
# The least side of a tile in a product.
SMALLEST = 16


def side(length: int, most: int) -> int:
    """The side of a tile for an axis: a power of two."""
    return min(most, max(SMALLEST, pl.next_power_of_2(length)))


def padded(length: int, tile: int) -> int:
    """The length of an axis in whole tiles."""
    return pl.cdiv(length, tile) * tile


def dot(
    one: Num[Array, "rows inner"], other: Num[Array, "inner columns"]
) -> Num[Array, "rows columns"]:
    """Returns the product of two tiles in float32."""
    return jax.lax.dot_general(
        one, other, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def load_matrix(
    ref: Ref,
    rows: Range,
    columns: Range,
    part: int | None = None,
) -> Num[Array, "rows columns"]:
    """Loads a tile of a matrix.

    Args:
      ref: the matrix.
      rows: where the tile starts, its side, the matrix's length.
      columns: the same.
      part: between rows and columns, which of several matrices.
    """
    at, inside = _places(rows, columns, part)
    return triton.load(ref.at[at], mask=inside, other=0)


def store_matrix(
    ref: Ref,
    rows: Range,
    columns: Range,
    x: Num[Array, "rows columns"],
    part: int | None = None,
) -> None:
    """Stores a tile of a matrix, as `load_matrix` loads it, in the matrix's dtype."""
    at, inside = _places(rows, columns, part)
    triton.store(ref.at[at], x.astype(ref.dtype), mask=inside)


def load_vector(ref: Ref, entries: Range) -> Num[Array, " entries"]:
    """Loads a part of a vector; `entries` as the rows of `load_matrix`."""
    start, size, length = entries
    inside = start + jnp.arange(size) < length
    return triton.load(ref.at[pl.ds(start, size)], mask=inside, other=0)


def store_vector(
    ref: Ref,
    entries: Range,
    x: Num[Array, " entries"],
) -> None:
    """Stores a part of a vector, as `load_vector` loads it, in the vector's dtype."""
    start, size, length = entries
    inside = start + jnp.arange(size) < length
    triton.store(ref.at[pl.ds(start, size)], x.astype(ref.dtype), mask=inside)


def _places(rows, columns, part):
    (first, height, length), (left, width, breadth) = rows, columns
    inside = (first + jnp.arange(height) < length)[:, None] & (
        left + jnp.arange(width) < breadth
    )[None]
    middle = () if part is None else (jnp.int32(part),)
    return (pl.ds(first, height), *middle, pl.ds(left, width)), inside
