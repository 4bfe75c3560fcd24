"""The group of numbers about masks: segmentation, locality, cross-entropy."""

import numpy as np

from implicit_slots.data.source import IGNORED, Batch
from implicit_slots.evaluation.findings import Findings, Subject, joined, kept_values
from implicit_slots.evaluation.metrics import detection
from implicit_slots.evaluation.steps import classes_of, starts_of

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
    for number, batch, host in subject.batches(count, "masks"):
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
