"""Which slot covers which object, and how well: intersections over unions."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from implicit_slots.data.source import IGNORED

# Intersection over union above which an object is found. Masks that do not overlap
# have at most one partner beyond a half (Kirillov et al. 2019, section 4.1).
FOUND = 0.5


def overlap_table(
    true_ids: Int[Array, "batch *pixels"],
    predicted_ids: Int[Array, "batch *pixels"],
    *,
    max_true: int,
    num_predicted: int,
) -> Float[Array, "batch masks {num_predicted}"]:
    """Counts the pixels that each true mask shares with each predicted one.

    Args:
      true_ids: true segmentation, 0 to max_true; pixels of any other id count nowhere.
      predicted_ids: predicted segmentation, 0 to num_predicted − 1.
      max_true: the largest true id.
      num_predicted: the number of predicted ids.

    Returns:
      A row per true id, the ground's first. Exact up to 2^24 pixels.
    """
    flat = true_ids.reshape(len(true_ids), -1)
    # Zeros and ones are exact in any matmul precision.
    true = jax.nn.one_hot(flat, max_true + 1, dtype=jnp.float32)
    flat = predicted_ids.reshape(len(predicted_ids), -1)
    predicted = jax.nn.one_hot(flat, num_predicted, dtype=jnp.float32)
    return jnp.einsum("bnt,bnp->btp", true, predicted)


def table_iou(
    table: Float[Array, "batch masks slots"], counts: Float[Array, "batch slots"]
) -> Float[Array, "batch masks slots"]:
    """Intersection over union of masks (Jaccard 1901) from the pixels they share.

    Args:
      table: rows of `overlap_table`, whole or summed.
      counts: pixels of each slot.

    Returns:
      From 0 (apart) to 1 (equal); 0 for a mask or slot without pixels.
    """
    either = table.sum(axis=2, keepdims=True) + counts[:, None] - table
    return table / jnp.maximum(either, 1)


def covering(
    table: Float[Array, "batch masks slots"],
) -> dict[str, Float[Array, " batch"]]:
    """How well slots cover all true masks, the ground among them.

    Of each true mask the largest intersection over union with any slot: `sc` weighs it
    by the mask's area (Arbeláez et al. 2011, section 3.1.1), `msc` all alike (Engelcke
    et al. 2020, section 5). `mbo` is `msc` without the ground.

    Args:
      table: from `overlap_table`.

    Returns:
      From 0 to 1; NaN where no pixel counts.
    """
    area = table.sum(axis=2)
    best = table_iou(table, table.sum(axis=1)).max(axis=2)
    return {
        "sc": jnp.sum(area * best, axis=1) / area.sum(axis=1),
        "msc": mean_over(best, area > 0),
    }


def one_hot_objects(
    true_ids: Int[Array, "batch height width"], max_true: int
) -> Float[Array, "batch {max_true} pixels"]:
    """Returns each object's mask as ones and zeros; object k has id k + 1."""
    flat = true_ids.reshape(len(true_ids), 1, -1)
    ids = jnp.arange(1, max_true + 1)[None, :, None]
    return (flat == ids).astype(jnp.float32)


def drop_ignored(
    weights: Float[Array, "batch slots pixels"],
    true_ids: Int[Array, "batch height width"],
) -> Float[Array, "batch slots pixels"]:
    """Takes from slots the pixels that count in no metric, as objects do not have them.

    Args:
      weights: of the slots.
      true_ids: true segmentation; `IGNORED` where nothing counts.
    """
    return weights * (true_ids != IGNORED).reshape(len(true_ids), 1, -1)


def intersection_over_union(
    objects: Float[Array, "batch objects pixels"],
    weights: Float[Array, "batch slots pixels"],
) -> Float[Array, "batch objects slots"]:
    """How well each slot covers each object: Σ min / Σ max over pixels.

    Of masks of ones and zeros that is the intersection over the union (Jaccard 1901),
    of soft ones its usual extension (Ružička 1958).

    Args:
      objects: true masks, ones and zeros.
      weights: of the slots, in [0, 1].

    Returns:
      From 0 (apart) to 1 (equal); 0 for an object or slot without pixels.
    """
    # Where one of two numbers is 0 or 1 their product is their minimum, and
    # a + b - min(a, b) is the maximum.
    both = jnp.einsum(
        "bon,bsn->bos", objects, weights, precision=jax.lax.Precision.HIGHEST
    )
    either = objects.sum(axis=2)[:, :, None] + weights.sum(axis=2)[:, None] - both
    return jnp.where(both > 0, both / jnp.where(either > 0, either, 1), 0)


def match(
    scores: Float[Array, "batch objects slots"],
) -> Int[Array, "batch objects"]:
    """Gives each object a slot of its own so that the total score is largest.

    Objects may outnumber slots; an object that gets none, or one that it shares
    nothing with, is without.

    Args:
      scores: of each pair, from 0; of an object that is not there 0 throughout.

    Returns:
      The slot of each object, −1 for none (Kuhn 1955; `optax.assignment`).
    """

    def assign(scores):
        rows, columns = optax.assignment.hungarian_algorithm(-scores)
        slots = jnp.full(scores.shape[0], -1, jnp.int32)
        return slots.at[rows].set(columns.astype(jnp.int32))

    slots = jax.vmap(assign)(scores)
    return jnp.where(score_of(scores, slots) > 0, slots, -1)


def score_of(
    scores: Float[Array, "batch objects slots"], slots: Int[Array, "batch objects"]
) -> Float[Array, "batch objects"]:
    """Returns each object's score with its slot; 0 for those without one."""
    taken = jnp.take_along_axis(scores, jnp.maximum(slots, 0)[..., None], axis=2)
    return jnp.where(slots >= 0, taken[..., 0], 0)


def mean_iou(
    scores: Float[Array, "batch objects slots"], present: Bool[Array, "batch objects"]
) -> Float[Array, " batch"]:
    """Mean intersection over union of the objects and their slots (mIoU).

    Args:
      scores: from `intersection_over_union`.
      present: which objects are to be seen; one without a slot counts 0.

    Returns:
      From 0 to 1; NaN without objects.
    """
    return mean_over(score_of(scores, match(scores)), present)


def mean_best_overlap(
    scores: Float[Array, "batch objects slots"], present: Bool[Array, "batch objects"]
) -> Float[Array, " batch"]:
    """Mean over objects of the best intersection over union with any slot (mBO).

    One slot may be the best of several objects (Pont-Tuset et al. 2017).

    Args:
      scores: from `intersection_over_union`.
      present: which objects are to be seen.

    Returns:
      From 0 to 1; NaN without objects.
    """
    return mean_over(scores.max(axis=2), present)


def merge_classes(
    objects: Float[Array, "batch objects pixels"],
    classes: Int[Array, "batch objects"],
) -> Float[Array, "batch objects pixels"]:
    """Unites the masks of objects of one class, in the place of the first of them.

    Args:
      objects: true masks; one without pixels belongs to no class.
      classes: of each object.

    Returns:
      The masks of classes; the places of further objects are empty.
    """
    present = objects.any(axis=2)
    same = (classes[:, :, None] == classes[:, None]) & present[:, None]
    # Place k takes its class's objects if no object before it has that class.
    earlier = jnp.tril(jnp.ones((objects.shape[1],) * 2, bool), -1)
    first = present & ~jnp.any(same & earlier[None], axis=2)
    united = jnp.einsum("bij,bjn->bin", same.astype(objects.dtype), objects)
    return united * first[:, :, None]


def scorable(
    attention: Float[Array, "batch slots rows columns"],
    true_ids: Int[Array, "batch height width"],
    max_true: int,
) -> Bool[Array, " batch"]:
    """Whether all attention of an image is finite and all its ids are in range.

    Else comparisons would take NaN for a slot, and one-hot masks drop the pixels.
    `IGNORED` is in range: those pixels are meant to be dropped.
    """
    in_range = (true_ids == IGNORED) | (true_ids >= 0) & (true_ids <= max_true)
    return jnp.isfinite(attention).all(axis=(1, 2, 3)) & in_range.all(axis=(1, 2))


def mean_over(
    values: Float[Array, "batch objects"], present: Bool[Array, "batch objects"]
) -> Float[Array, " batch"]:
    """Mean over the objects that are there; NaN without any."""
    total = jnp.sum(jnp.where(present, values, 0), axis=1)
    return total / present.sum(axis=1).astype(values.dtype)
