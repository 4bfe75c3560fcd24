"""Average precision of predicted sets of objects, as Locatello et al. (2020) count it.

A prediction is right if all its discrete attributes are an object's and its position is
near enough, and if no more confident prediction has found that object before.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jaxtyping import Array, Bool, Float, Int

from implicit_slots.evaluation.metrics.iou import mean_over

# Distances within which a position counts as right, in CLEVR's units (images show about
# 6 of them); by the name that the metric has in logs.
THRESHOLDS: Mapping[str, float] = {
    "inf": math.inf,
    "1": 1.0,
    "0_5": 0.5,
    "0_25": 0.25,
    "0_125": 0.125,
}


class Detections(NamedTuple):
    """Which predictions are right, in the order of `THRESHOLDS`.

    Attributes:
      confidence: that a slot shows an object.
      hits: whether its prediction is right.
      objects: how many there are.
    """

    confidence: Float[Array, "batch slots"]
    hits: Bool[Array, "batch slots thresholds"]
    objects: Float[Array, " batch"]


def detect(
    predicted: Float[Array, "batch slots properties"],
    target: Float[Array, "batch objects properties"],
    classes: Mapping[str, int],
    reach: float,
) -> Detections:
    """Compares each image's predictions with its objects.

    Args:
      predicted: position scaled to [0, 1], scores of each attribute's classes in turn,
        confidence.
      target: the same of objects, one-hot; zeros throughout for none.
      classes: how many classes each attribute has.
      reach: half the range of positions, which are scaled by it.
    """
    confidence = predicted[..., -1]
    real = target[..., -1] > 0
    same = real[:, None]
    start = 3
    for size in classes.values():
        part = slice(start, start + size)
        said = predicted[..., part].argmax(axis=-1)
        true = target[..., part].argmax(axis=-1)
        same = same & (said[:, :, None] == true[:, None])
        start += size
    apart = 2 * reach * (predicted[:, :, None, :3] - target[:, None, :, :3])
    distance = jnp.where(same, jnp.linalg.norm(apart, axis=-1), jnp.inf)
    nearest, found = distance.argmin(axis=-1), same.any(axis=-1)
    limits = jnp.array(list(THRESHOLDS.values()))
    near = distance.min(axis=-1)[..., None] < limits
    within = found[..., None] & (near | jnp.isinf(limits))
    # Of those that found the same object, the most confident one counts; of equally
    # confident ones the first.
    order = jnp.arange(confidence.shape[1])
    before = (confidence[:, None] > confidence[:, :, None]) | (
        (confidence[:, None] == confidence[:, :, None])
        & (order[None, None] < order[None, :, None])
    )
    rivals = before & (nearest[:, :, None] == nearest[:, None])
    taken = jnp.einsum(
        "bsr,brt->bst", rivals.astype(jnp.float32), within.astype(jnp.float32)
    )
    return Detections(
        confidence, within & (taken == 0), real.sum(axis=1, dtype=jnp.float32)
    )


def attribute_scores(
    predicted: Float[Array, "batch slots properties"],
    target: Float[Array, "batch slots properties"],
    matched: Int[Array, "batch slots"],
    classes: Mapping[str, int],
    reach: float,
) -> dict[str, Float[Array, " batch"]]:
    """Says what is right of the slots that are matched with objects.

    Args:
      predicted: see `detect`.
      target: as many vectors, zeros for no object.
      matched: for each slot its place among the targets.
      classes: see `detect`.
      reach: see `detect`.

    Returns:
      Per image: `position_error`, in CLEVR's units, and of each attribute
      `<name>_accuracy`, means over objects (NaN without any); `count_error`, by how
      many the slots that are more likely an object than not miss the true count.
    """
    true = jnp.take_along_axis(target, matched[..., None], axis=1)
    real = true[..., -1] > 0
    apart = 2 * reach * (predicted[..., :3] - true[..., :3])
    scores = {"position_error": mean_over(jnp.linalg.norm(apart, axis=-1), real)}
    start = 3
    for name, size in classes.items():
        part = slice(start, start + size)
        said = predicted[..., part].argmax(axis=-1)
        right = said == true[..., part].argmax(axis=-1)
        scores[f"{name}_accuracy"] = mean_over(right.astype(jnp.float32), real)
        start += size
    counted = jnp.sum(predicted[..., -1] > 0.5, axis=1, dtype=jnp.float32)
    miss = counted - real.sum(axis=1, dtype=jnp.float32)
    return scores | {"count_error": jnp.abs(miss)}


class PrecisionRecall(NamedTuple):
    """A curve, a point for each prediction, the most confident first.

    Attributes:
      recall: share of the objects that are found.
      precision: share of the predictions that are right, or the largest at this or a
        larger recall.
    """

    recall: Float[np.ndarray, " predictions"]
    precision: Float[np.ndarray, " predictions"]


def precision_recall(
    confidence: Float[np.ndarray, " predictions"],
    hits: Bool[np.ndarray, " predictions"],
    objects: float,
) -> PrecisionRecall:
    """Returns the curve of predictions of all images together.

    Args:
      confidence: of each; equal ones stay in their order.
      hits: which are right.
      objects: how many there are.
    """
    order = np.argsort(-np.asarray(confidence, np.float64), kind="stable")
    right = np.cumsum(np.asarray(hits)[order], dtype=np.float64)
    precision = right / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return PrecisionRecall(right / objects, best)


def average_precision(curve: PrecisionRecall) -> float:
    """Returns the area under a curve of precision over recall, from 0 to 1."""
    steps = np.diff(curve.recall, prepend=0.0)
    return float(np.sum(steps * curve.precision))


@flax.struct.dataclass
class AveragePrecision(metrics.Metric):
    """Average precision over all images; keeps every prediction until it is computed.

    Predictions of padded examples have no confidence (−∞) and are left out.
    """

    confidence: Any
    hits: Any
    objects: Any

    @classmethod
    def of(
        cls, detections: Detections, mask: Bool[Array, " batch"], place: int
    ) -> "AveragePrecision":
        """Measures a batch.

        Args:
          detections: of the batch.
          mask: False for examples that only pad the batch.
          place: of the distance, in `THRESHOLDS`.
        """
        shown = mask[:, None]
        return cls(
            jnp.where(shown, detections.confidence, -jnp.inf),
            detections.hits[..., place] & shown,
            jnp.where(mask, detections.objects, 0),
        )

    def merge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, other: "AveragePrecision"
    ) -> "AveragePrecision":
        """Returns the metric over both sets of images."""
        return type(self)(
            np.concatenate([self.confidence, other.confidence]),
            np.concatenate([self.hits, other.hits]),
            np.concatenate([self.objects, other.objects]),
        )

    def compute(self) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """From 0 to 1; NaN without objects, or where a confidence is not a number."""
        confidence, hits = np.ravel(self.confidence), np.ravel(self.hits)
        kept = confidence != -np.inf
        objects = float(np.sum(self.objects))
        if objects == 0 or np.isnan(confidence).any():
            return math.nan
        curve = precision_recall(confidence[kept], hits[kept], objects)
        return average_precision(curve)


def average_precisions(
    detections: Detections, mask: Bool[Array, " batch"]
) -> dict[str, AveragePrecision]:
    """Measures a batch at each of `THRESHOLDS`, by the name of the metric."""
    return {
        f"ap_{name}": AveragePrecision.of(detections, mask, place)
        for place, name in enumerate(THRESHOLDS)
    }
