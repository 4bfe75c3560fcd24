"""How well slots divide an image into its objects."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from implicit_slots.evaluation.metrics import iou
from implicit_slots.evaluation.metrics.boundaries import boundary_f1
from implicit_slots.evaluation.metrics.rand_index import RandIndices, rand_indices

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


def matched_slots(
    attention: Float[Array, "batch slots rows columns"],
    segmentation: Int[Array, "batch height width"],
    *,
    max_true: int,
) -> Int[Array, "batch {max_true}"]:
    """Gives each object to be seen a slot, by the soft intersection over union.

    Args:
      attention: see `score_masks`.
      segmentation: the same.
      max_true: the largest true id.

    Returns:
      The slot of each object, −1 for none (`iou.match`).
    """
    objects = iou.one_hot_objects(segmentation, max_true)
    weights = upsample(attention, *segmentation.shape[1:])
    flat = weights.reshape(*weights.shape[:2], -1)
    flat = iou.drop_ignored(flat, segmentation)
    return iou.match(iou.intersection_over_union(objects, flat))


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

      - `ari`, `fg_ari` and of each `_precision` and `_recall`: see rand_index.py; ARI
        has the background too, and is defined without objects.
      - `miou`, `mbo`, `bo_recall` and, with classes, `miou_class`, `mbo_class`: see
        iou.py. `corloc`: 1 where any object is recovered.
      - `sc`, `msc`: see `iou.covering`.
      - `soft_iou`: mIoU of the upsampled weights, before each pixel goes to one slot.
      - `boundary_f1`: see boundaries.py; NaN where the truth has no border.
      - `slots_used`: how many slots win at least 0.5 % of the pixels that count; NaN
        where none does.
    """
    height, width = segmentation.shape[1:]
    weights = upsample(attention, height, width)
    predicted = jnp.argmax(weights, axis=1).astype(jnp.int32)
    num_slots = attention.shape[1]
    table = iou.overlap_table(
        segmentation, predicted, max_true=max_true, num_predicted=num_slots
    )
    counts = table.sum(axis=1)
    share = counts / counts.sum(axis=1, keepdims=True)
    present = table[:, 1:].any(axis=2)
    seen = present.any(axis=1)
    hard = iou.table_iou(table[:, 1:], counts)
    objects = iou.one_hot_objects(segmentation, max_true)
    weights = weights.reshape(len(weights), num_slots, -1)
    soft = iou.intersection_over_union(objects, iou.drop_ignored(weights, segmentation))
    recovered = hard.max(axis=2) > iou.FOUND
    values = {
        **_named("ari", rand_indices(table), ~jnp.isnan(share[:, 0])),
        **_named("fg_ari", rand_indices(table[:, 1:]), seen),
        "miou": iou.mean_iou(hard, present),
        "mbo": iou.mean_best_overlap(hard, present),
        "bo_recall": iou.mean_over(recovered.astype(jnp.float32), present),
        "corloc": jnp.where(seen, recovered.any(axis=1).astype(jnp.float32), jnp.nan),
        **iou.covering(table),
        "soft_iou": iou.mean_iou(soft, present),
        "boundary_f1": boundary_f1(segmentation, predicted),
        "slots_used": jnp.where(
            jnp.isnan(share[:, 0]),
            jnp.nan,
            jnp.sum(share >= USED, axis=1, dtype=jnp.float32),
        ),
    }
    if classes is not None:
        merged = iou.merge_classes(table[:, 1:], classes)
        of_class, there = iou.table_iou(merged, counts), merged.any(axis=2)
        values["miou_class"] = iou.mean_iou(of_class, there)
        values["mbo_class"] = iou.mean_best_overlap(of_class, there)
    valid = iou.scorable(attention, segmentation, max_true)
    return {name: jnp.where(valid, value, jnp.nan) for name, value in values.items()}


def _named(
    name: str, indices: RandIndices, defined: Bool[Array, " batch"]
) -> dict[str, Float[Array, " batch"]]:
    """An index and its halves by name; NaN where no pixel counts."""
    by_name = zip((name, f"{name}_precision", f"{name}_recall"), indices, strict=True)
    return {key: jnp.where(defined, value, jnp.nan) for key, value in by_name}
