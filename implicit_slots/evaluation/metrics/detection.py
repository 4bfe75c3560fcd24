"""Slots as detections of objects, over all images together: precision, recall, AP, PQ.

As Yang and Yang (2022, "Promising or Elusive? Unsupervised Object Segmentation from
Real-world Single Images") count them. A slot that wins a pixel is a prediction, unless
it is the ground: its intersection over union with that is above a half. A prediction
finds an object where theirs is above a half (`iou.FOUND`), hence at most one.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from implicit_slots.evaluation.metrics import iou
from implicit_slots.evaluation.metrics.average_precision import (
    average_precision,
    precision_recall,
)
from implicit_slots.evaluation.metrics.segmentation import upsample


class Detected(NamedTuple):
    """What the slots of each image find.

    Attributes:
      predicted: which slots are predictions.
      confidence: the slot's mean weight within its own mask.
      overlap: intersection over union with the object that it finds, 0 for none.
      objects: how many there are to be seen.
    """

    predicted: Bool[Array, "batch slots"]
    confidence: Float[Array, "batch slots"]
    overlap: Float[Array, "batch slots"]
    objects: Float[Array, " batch"]


def detect_objects(
    attention: Float[Array, "batch slots rows columns"],
    segmentation: Int[Array, "batch height width"],
    *,
    max_true: int,
) -> Detected:
    """Compares each slot's mask with the objects, one image at a time.

    Args:
      attention: see `segmentation.score_masks`; so are the masks.
      segmentation: the same. `IGNORED` pixels count nowhere.
      max_true: the largest true id.

    Returns:
      Neither predictions nor objects where attention is not finite or an id is out of
      range.
    """
    weights = upsample(attention, *segmentation.shape[1:])
    winners = jnp.argmax(weights, axis=1)
    num_slots = attention.shape[1]
    table = iou.overlap_table(
        segmentation, winners, max_true=max_true, num_predicted=num_slots
    )
    counts = table.sum(axis=1)
    overlaps = iou.table_iou(table, counts)
    best = overlaps[:, 1:].max(axis=1)
    valid = iou.scorable(attention, segmentation, max_true)
    predicted = (counts > 0) & (overlaps[:, 0] <= iou.FOUND) & valid[:, None]
    flat = weights.reshape(len(weights), num_slots, -1)
    own = winners.reshape(len(winners), 1, -1) == jnp.arange(num_slots)[None, :, None]
    inside = jnp.sum(iou.drop_ignored(jnp.where(own, flat, 0), segmentation), axis=2)
    objects = table[:, 1:].any(axis=2).sum(axis=1)
    return Detected(
        predicted,
        jnp.where(predicted, inside / jnp.maximum(counts, 1), 0),
        jnp.where(predicted & (best > iou.FOUND), best, 0),
        jnp.where(valid, objects, 0).astype(jnp.float32),
    )


def score_detections(found: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of all images together, on the host.

    Args:
      found: `Detected` of them by field.

    Returns:
      With true positives TP (predictions that find an object), false positives FP (the
      other predictions) and false negatives FN (objects that are not found), from 0 to
      1, NaN where there is nothing to divide by:

      - `mask_precision` TP / (TP + FP), `mask_recall` TP / (TP + FN), and `mask_f1`
        TP / (TP + FP/2 + FN/2).
      - `panoptic_quality`: the same with the overlaps' sum for TP above the fraction
        (Kirillov et al. 2019, equation 1), of one class, the ground left out.
      - `mask_ap`: area under precision over recall, the most confident predictions
        first; precision is the largest at this or a larger recall.
    """
    predicted = np.asarray(found["predicted"])
    overlap = np.asarray(found["overlap"], np.float64)[predicted]
    objects = float(np.sum(found["objects"], dtype=np.float64))
    hits, count = float(np.sum(overlap > 0)), float(len(overlap))
    return {
        "mask_precision": _share(hits, count),
        "mask_recall": _share(hits, objects),
        "mask_f1": _share(2 * hits, count + objects),
        "panoptic_quality": _share(2 * float(overlap.sum()), count + objects),
        "mask_ap": average_precision(
            precision_recall(
                np.asarray(found["confidence"])[predicted], overlap > 0, objects
            )
        )
        if objects
        else math.nan,
    }


def mean_over_objects(
    values: Float[np.ndarray, " images"], objects: Float[np.ndarray, " images"]
) -> float:
    """Returns the mean over all objects of a value that is their mean in each image.

    Args:
      values: NaN where there is none.
      objects: how many each image has.
    """
    defined = ~np.isnan(values)
    weight = objects[defined].astype(np.float64)
    return _share(float(np.sum(values[defined] * weight)), float(weight.sum()))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
