"""Agreement of two partitions over pairs of pixels, and its two halves."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from implicit_slots.data.source import IGNORED
from implicit_slots.evaluation.metrics.iou import overlap_table


class RandIndices(NamedTuple):
    """The adjusted Rand index and what it is the harmonic mean of.

    The halves are the adjusted Wallace coefficients (Severiano et al., 2011,
    "Adjusted Wallace Coefficient as a Measure of Congruence between Typing Methods"):
    the share (Wallace 1983) of the pairs that are together in one partition that are
    together in the other too, less what chance gives, over the most that it can be
    beyond that.

    Attributes:
      adjusted: the index of Hubert and Arabie (1985).
      precision: of pairs together in the prediction: low where a slot holds several
        masks (under-segmentation).
      recall: of pairs together in the truth: low where a mask has several slots
        (over-segmentation).
    """

    adjusted: Float[Array, " batch"]
    precision: Float[Array, " batch"]
    recall: Float[Array, " batch"]


def rand_indices(table: Float[Array, "batch true predicted"]) -> RandIndices:
    """Returns the indices of tables of how many pixels masks share.

    The textbook form subtracts sums of binomials; at 128 x 128 those pass 2^24 and
    float32 loses pixels. Here each of the four kinds of ordered pairs is counted as
    a sum of non-negative products of exact counts, so nothing cancels, and the one
    difference left costs an absolute error of a few float32 roundings.

    Args:
      table: pixels that are of a true mask and of a predicted one.

    Returns:
      Per image, each at most 1. Partitions that agree on every pair score 1, also
      where all pixels form one cluster; a half is 1 where no pair is wrong for it.
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
    difference = together * apart - split * merged
    recall_scale = (together + split) * (split + apart)
    precision_scale = (together + merged) * (merged + apart)

    def ratio(difference, scale, right):
        return jnp.where(right, 1.0, difference / jnp.where(right, 1.0, scale))

    same = (split == 0) & (merged == 0)
    return RandIndices(
        ratio(2 * difference, recall_scale + precision_scale, same),
        ratio(difference, precision_scale, merged == 0),
        ratio(difference, recall_scale, split == 0),
    )


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
    table = overlap_table(
        true_ids, predicted_ids, max_true=max_true, num_predicted=num_predicted
    )
    if foreground_only:
        table = table[:, 1:]
    score = rand_indices(table).adjusted

    in_range = (true_ids >= 0) & (true_ids <= max_true)
    in_range &= (predicted_ids >= 0) & (predicted_ids < num_predicted)
    in_range |= true_ids == IGNORED
    defined = jnp.all(in_range, axis=1) & (jnp.sum(table, axis=(1, 2)) > 0)
    return jnp.where(defined, score, jnp.nan)
