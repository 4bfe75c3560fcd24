"""The group of numbers about masks: segmentation, locality, cross-entropy."""

import functools
import json

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from implicit_slots.data import registry
from implicit_slots.data.source import IGNORED, Batch, Source
from implicit_slots.evaluation.findings import Findings, Subject, joined, kept_values
from implicit_slots.evaluation.metrics import detection
from implicit_slots.evaluation.steps import classes_of, starts_of

OF_MASKS = ("segmentation", "shadow")
# Means over an image's objects that are also taken over all objects together.
OVER_OBJECTS = ("miou", "mbo")

NO_MASKS = "the data has no masks"
NO_SHADOWS = "the data does not say where shadows are"
NO_CLASSES = "the data names no class of its objects"


def masks(subject: Subject, findings: Findings) -> None:
    """Segmentation, locality and cross-entropy of both kinds of masks."""
    count = subject.config.evaluation.masks.num_images
    rows, found, more, seen, ignored, absent, true = [], {}, 0, 0, [], {}, None
    slots = subject.config.model.num_slots
    for number, batch, host in subject.batches(count, "masks", scored(subject)):
        values, detected = subject.steps.masks(subject.params, batch, number)
        rows.append(kept_values(values, host))
        for kind, fields in detected.items():
            found.setdefault(kind, []).append(kept_values(fields._asdict(), host))
        if "segmentation" in host:
            true = host["segmentation"][host["mask"]]
            shown = [len(np.unique(ids[ids != IGNORED])) for ids in true]
            more += sum(objects > slots for objects in shown)
            ignored += [np.mean(ids == IGNORED) for ids in true]
        seen += int(host["mask"].sum())
        absent = _missing(host)
    findings.images |= joined(rows, count)
    findings.absent |= absent
    for kind, parts in found.items():
        _tell_objects(findings, kind, joined(parts, count))
    if true is not None:
        height, width = true.shape[1:]
        findings.notes.append(f"masks are scored at {height}×{width} pixels")
        side = subject.config.data.resolution
        if side != height:
            findings.notes[-1] += f", the model sees images of {side}×{side}"
    if (starts := starts_of(subject.config)) > 1:
        findings.notes.append(
            f"masks are those of the best of {starts} initial slots for each image, by "
            "the reconstruction"
        )
    if (share := np.mean(ignored or 0)) > 0:
        findings.notes.append(
            f"{share:.2%} of the pixels are ignored by the true masks (void, crowds): "
            "they count in no comparison with them"
        )
    if more:
        findings.notes.append(
            f"{more:,} of {seen:,} images have more masks (objects and ground) than "
            f"the model has slots ({slots}): an object that gets none counts 0 in mIoU"
        )


class Scored(Source):
    """Images with true masks of another resolution.

    Args:
      images: of which everything else is read.
      masks: the same examples, of that resolution.
    """

    def __init__(self, images: Source, masks: Source):
        self._images = images
        self._masks = masks

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """Those of these indices."""
        masks = self._masks.batch(indices)
        true = {name: masks[name] for name in OF_MASKS if name in masks}
        return self._images.batch(indices) | true


def scored(subject: Subject) -> Source:
    """The subject's images, with true masks of the resolution that they are scored at.

    Raises:
      DataError: there are none.
    """
    config = subject.config
    side = config.evaluation.masks.get("resolution", 0)
    if side in (0, config.data.resolution):
        return subject.source
    data = config.data.copy_and_resolve_references()
    with data.unlocked():
        data.resolution = side
    masks = _open_masks(data.to_json(), subject.split or config.evaluation.split)
    return Scored(subject.source, masks)


@functools.lru_cache(maxsize=1)  # An evaluation in training comes again and again.
def _open_masks(data: str, split: str) -> Source:
    return registry.build(ConfigDict(json.loads(data)), split, OF_MASKS)


def _tell_objects(
    findings: Findings, kind: str, detected: dict[str, np.ndarray]
) -> None:
    """Of one kind of masks what is counted over all objects, whatever their image."""
    objects = detected["objects"]
    told = detection.score_detections(detected)
    for name in OVER_OBJECTS:
        values = findings.images[f"{kind}/{name}"]
        told[f"{name}_objects"] = detection.mean_over_objects(values, objects)
    for name, value in told.items():
        findings.numbers[f"{kind}/{name}"] = value, len(objects)


def _missing(host: Batch) -> dict[str, str]:
    """What cannot be measured on such a batch, and why."""
    if "segmentation" not in host:
        return {"Segmentation": NO_MASKS, "Attention locality": NO_MASKS}
    missing = {}
    if "shadow" not in host:
        missing["on_shadow"] = missing["shadow_contrast"] = NO_SHADOWS
    if classes_of(host) is None:
        missing["mbo_class"] = missing["miou_class"] = NO_CLASSES
    return missing
