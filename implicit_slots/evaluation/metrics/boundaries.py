"""Whether the borders between masks are where the true ones are."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from implicit_slots.data.source import IGNORED

# Share of the image's diagonal within which two borders are the same.
TOLERANCE = 0.008


def boundary_f1(
    true_ids: Int[Array, "batch height width"],
    predicted_ids: Int[Array, "batch height width"],
) -> Float[Array, " batch"]:
    """F1 score of the borders of a partition (Perazzi et al. 2016, section 5.1).

    A pixel is on the border if the one to its right, below it or both belongs to
    another mask: of the whole partition, ground included, and not object by object.
    Precision is the share of predicted border pixels with a true one within a disc of
    0.8 % of the image's diagonal, rounded up; recall the converse. A pixel is left out
    where it or one of those neighbours is `IGNORED`: whether a border is there nobody
    knows.

    Args:
      true_ids: true segmentation.
      predicted_ids: predicted segmentation.

    Returns:
      From 0 to 1; NaN where the truth has no border, 0 where the prediction has none.
    """
    radius = math.ceil(TOLERANCE * math.hypot(*true_ids.shape[1:]))
    known = ~_at_or_before(true_ids == IGNORED)
    true, predicted = borders(true_ids) & known, borders(predicted_ids) & known

    def share(part, whole):
        hit = jnp.sum(part & _dilate(whole, radius), axis=(1, 2), dtype=jnp.float32)
        count = jnp.sum(part, axis=(1, 2), dtype=jnp.float32)
        return hit / jnp.maximum(count, 1)

    precision, recall = share(predicted, true), share(true, predicted)
    total = precision + recall
    f1 = jnp.where(
        total > 0, 2 * precision * recall / jnp.where(total > 0, total, 1), 0
    )
    return jnp.where(true.any(axis=(1, 2)), f1, jnp.nan)


def borders(ids: Int[Array, "batch height width"]) -> Bool[Array, "batch height width"]:
    """Returns the pixels whose right, lower or lower right neighbour is another's."""
    right, below, across = _neighbours(ids)
    return (ids != right) | (ids != below) | (ids != across)


def _at_or_before(mask: jax.Array) -> jax.Array:
    """True at pixels that are, or whose right, lower or lower right neighbour is."""
    right, below, across = _neighbours(mask)
    return mask | right | below | across


def _neighbours(ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is to the right of each pixel, below it, and both; the edge repeats."""
    padded = jnp.pad(ids, ((0, 0), (0, 1), (0, 1)), mode="edge")
    return padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]


def _dilate(mask: jax.Array, radius: int) -> jax.Array:
    """True within a disc around each pixel that is."""
    reach = np.arange(-radius, radius + 1)
    rows, columns = np.nonzero(reach[:, None] ** 2 + reach**2 <= radius**2)
    padded = jnp.pad(mask, ((0, 0), (radius, radius), (radius, radius)))
    height, width = mask.shape[1:]
    found = jnp.zeros_like(mask)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        found |= padded[:, row : row + height, column : column + width]
    return found
