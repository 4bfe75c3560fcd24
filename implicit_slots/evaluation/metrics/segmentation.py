"""How well slots divide an image into its objects."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from implicit_slots.data.source import IGNORED
from implicit_slots.evaluation.metrics import iou
from implicit_slots.evaluation.metrics.boundaries import boundary_f1

# Share of an image's pixels from which on a slot counts as used.
USED = 0.005


def attention_to_masks(
    attention: Float[Array, "batch slots rows columns"], height: int, width: int
) -> Int32[Array, "batch {height} {width}"]:
    """Gives each pixel to the slot that attends to it most.

    The soft attention is brought to the size of the image first and the largest
    taken second, so that borders between slots are not blocks of the feature grid.

    Args:
      attention: Per slot, its weight at each position of the feature grid.
      height: Rows of the masks, in pixels.
      width: Columns of the masks, in pixels.

    Returns:
      The winning slot's index at each pixel; on a tie, the lowest index.
    """
    return jnp.argmax(upsample(attention, height, width), axis=1).astype(jnp.int32)


def upsample(
    attention: Float[Array, "batch slots rows columns"], height: int, width: int
) -> Float[Array, "batch slots {height} {width}"]:
    """Brings attention to the size of the image, bilinearly; sums over slots stay."""
    shape = (*attention.shape[:2], height, width)
    return jax.image.resize(attention.astype(jnp.float32), shape, "bilinear")


def score_masks(
    attention: Float[Array, "batch slots rows columns"],
    segmentation: Int[Array, "batch height width"],
    *,
    max_true: int,
    classes: Int[Array, "batch {max_true}"] | None = None,
) -> dict[str, Float[Array, " batch"]]:
    """Compares the masks of slots with the true ones, in every usual way.

    An object is a true id from 1 on with a pixel to be seen. Slots in another order
    have the same numbers. Pixels of the id `IGNORED` count nowhere: whatever the slots
    do there, the numbers are the same.

    Args:
      attention: Per slot, its weight at each position of the feature grid.
      segmentation: True segmentation; 0 is the background, `IGNORED` counts nowhere.
      max_true: The largest true id, which is the largest number of objects.
      classes: Of each object, in the order of the ids from 1.

    Returns:
      Per image, all but `slots_used` from 0 (ARI: below) to 1; NaN throughout where
      attention is not finite or an id is out of range:

      - `ari`, `fg_ari`: see `adjusted_rand_index`; ARI has the background too, and is
        defined without objects.
      - `miou`, `mbo` and, with classes, `mbo_class`: see iou.py.
      - `soft_iou`: mIoU of the upsampled weights, before each pixel goes to one slot.
      - `boundary_f1`: see boundaries.py; NaN where the truth has no border.
      - `slots_used`: how many slots win at least 0.5 % of the pixels that count; NaN
        where none does.
    """
    height, width = segmentation.shape[1:]
    weights = upsample(attention, height, width)
    predicted = jnp.argmax(weights, axis=1).astype(jnp.int32)
    num_slots = attention.shape[1]
    objects = iou.one_hot_objects(segmentation, max_true)
    flat = predicted.reshape(len(predicted), 1, -1)
    won = (flat == jnp.arange(num_slots)[None, :, None]).astype(jnp.float32)
    won = iou.drop_ignored(won, segmentation)
    weights = iou.drop_ignored(weights.reshape(*won.shape), segmentation)
    share = won.sum(axis=2) / won.sum(axis=(1, 2))[:, None]
    present = objects.any(axis=2)
    hard = iou.intersection_over_union(objects, won)
    soft = iou.intersection_over_union(objects, weights)

    def rand_index(foreground_only):
        return adjusted_rand_index(
            segmentation,
            predicted,
            max_true=max_true,
            num_predicted=num_slots,
            foreground_only=foreground_only,
        )

    values = {
        "ari": rand_index(False),
        "fg_ari": rand_index(True),
        "miou": iou.mean_iou(hard, present),
        "mbo": iou.mean_best_overlap(hard, present),
        "soft_iou": iou.mean_iou(soft, present),
        "boundary_f1": boundary_f1(segmentation, predicted),
        "slots_used": jnp.where(
            jnp.isnan(share[:, 0]),
            jnp.nan,
            jnp.sum(share >= USED, axis=1, dtype=jnp.float32),
        ),
    }
    if classes is not None:
        merged = iou.merge_classes(objects, classes)
        values["mbo_class"] = iou.mean_best_overlap(
            iou.intersection_over_union(merged, won), merged.any(axis=2)
        )
    valid = iou.scorable(attention, segmentation, max_true)
    return {name: jnp.where(valid, value, jnp.nan) for name, value in values.items()}


def adjusted_rand_index(
    true_ids: Int[Array, "batch *pixels"],
    predicted_ids: Int[Array, "batch *pixels"],
    *,
    max_true: int,
    num_predicted: int,
    foreground_only: bool = False,
) -> Float[Array, " batch"]:
    """Agreement of two partitions of each image's pixels, corrected for chance.

    The index of Hubert and Arabie (1985) from the counts of pixel pairs, in the
    form of scikit-learn's `adjusted_rand_score`, which it equals in the degenerate
    cases too: partitions that agree on every pair score 1, also where all pixels
    form one cluster; one true object that is predicted as several scores 0.

    Args:
      true_ids: True segmentation; 0 is the background, `IGNORED` counts nowhere.
      predicted_ids: Predicted segmentation. Only its partition counts, not which
        id a cluster bears.
      max_true: The largest true id, which is the largest number of objects.
      num_predicted: The number of predicted ids, 0 to num_predicted - 1.
      foreground_only: Whether to score only the pixels of true objects (FG-ARI;
        Greff et al., 2019, "Multi-Object Representation Learning with Iterative
        Variational Inference", section 4.1).

    Returns:
      Per image, at most 1 (the same partition), 0 on average for a partition drawn
      at random, below 0 for less than chance. NaN where nothing is left to score
      (`foreground_only` without foreground) and where an id that counts is out of
      range.
    """
    batch = true_ids.shape[0]
    true_ids = true_ids.reshape(batch, -1)
    predicted_ids = predicted_ids.reshape(batch, -1)

    # Zeros and ones are exact in any matmul precision, their sums in float32 are
    # exact up to 2^24 pixels.
    true = jax.nn.one_hot(true_ids, max_true + 1, dtype=jnp.float32)
    predicted = jax.nn.one_hot(predicted_ids, num_predicted, dtype=jnp.float32)
    if foreground_only:
        true = true.at[..., 0].set(0)
    table = jnp.einsum("bnt,bnp->btp", true, predicted)
    score = _score(table)

    in_range = (true_ids >= 0) & (true_ids <= max_true)
    in_range &= (predicted_ids >= 0) & (predicted_ids < num_predicted)
    in_range |= true_ids == IGNORED
    defined = jnp.all(in_range, axis=1) & (jnp.sum(table, axis=(1, 2)) > 0)
    return jnp.where(defined, score, jnp.nan)


def _score(
    table: Float[Array, "batch true predicted"],
) -> Float[Array, " batch"]:
    """The adjusted Rand index of contingency tables of pixel counts.

    The textbook form subtracts sums of binomials; at 128 x 128 those pass 2^24 and
    float32 loses pixels. Here each of the four kinds of ordered pairs is counted as
    a sum of non-negative products of exact counts, so nothing cancels, and the one
    difference left costs an absolute error of a few float32 roundings.
    """
    rows = jnp.sum(table, axis=2, keepdims=True)
    columns = jnp.sum(table, axis=1, keepdims=True)
    pixels = jnp.sum(table, axis=(1, 2), keepdims=True)

    def pairs(others: Float[Array, "batch true predicted"]) -> Float[Array, " batch"]:
        return jnp.sum(table * others, axis=(1, 2))

    together = pairs(jnp.maximum(table - 1, 0))  # in both partitions
    split = pairs(rows - table)  # together in the true partition only
    merged = pairs(columns - table)  # together in the predicted one only
    apart = pairs(pixels - rows - columns + table)  # in both partitions

    difference = 2 * (together * apart - split * merged)
    scale = (together + split) * (split + apart) + (together + merged) * (
        merged + apart
    )
    same = (split == 0) & (merged == 0)
    return jnp.where(same, 1.0, difference / jnp.where(same, 1.0, scale))
