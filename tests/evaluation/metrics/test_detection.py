"""Slots as detections: average precision by pycocotools, the rest by their words."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32

from implicit_slots.data.source import IGNORED
from implicit_slots.evaluation.metrics.detection import (
    detect_objects,
    mean_over_objects,
    score_detections,
)
from implicit_slots.evaluation.metrics.segmentation import score_masks

SIDE, SLOTS, MOST, IMAGES = 12, 5, 4, 12
OVER_OBJECTS = ("miou", "mbo", "bo_recall")


@jax.jit
def compiled(attention, true):
    found = detect_objects(attention, true, max_true=MOST)
    scores = score_masks(attention, true, max_true=MOST)
    return found._asdict(), {name: scores[name] for name in OVER_OBJECTS}


def measure(attention, true):
    found, of_image = jax.device_get(compiled(jnp.asarray(attention), true))
    scores = score_detections(found)
    for name in OVER_OBJECTS:
        scores[name] = mean_over_objects(of_image[name], found["objects"])
    return scores


@pytest.fixture(scope="module")
def scene():
    """Boxes, masks that follow them more or less, and which pixels are left open."""
    rng = np.random.default_rng(0)
    true = np.zeros((IMAGES, SIDE, SIDE), np.int32)
    for image in true:
        for object_id in range(1, 1 + rng.integers(0, MOST + 1)):
            row, column, height, width = rng.integers(1, 7, 4)
            image[row : row + height, column : column + width] = object_id
    logits = 5 * np.eye(SLOTS)[true] * rng.uniform(0, 1, (IMAGES, 1, 1, 1))
    logits += rng.normal(size=logits.shape)
    weights = np.exp(np.moveaxis(logits, -1, 1))
    attention = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return attention, true, rng.random(true.shape) < 0.15


def by_hand(attention, true):
    """The definitions: a list of (confidence, overlap), and the number of objects."""
    predictions, objects = [], 0
    for weights, ids in zip(attention, true, strict=True):
        known = ids != IGNORED
        winners = weights.argmax(axis=0)
        masks = [(ids == i) for i in range(1, MOST + 1) if (ids == i).any()]
        objects += len(masks)
        for slot in range(SLOTS):
            own = (winners == slot) & known

            def iou(mask, own=own):
                return (mask & own).sum() / (mask | own).sum()

            if own.any() and iou(ids == 0) <= 0.5:
                overlap = max([iou(mask) for mask in masks], default=0.0)
                confidence = weights[slot][own].mean(dtype=np.float64)
                predictions.append((confidence, overlap if overlap > 0.5 else 0.0))
    return predictions, objects


@pytest.mark.parametrize("ignored", [False, True])
def test_counts_are_those_of_the_definitions(scene, ignored):
    attention, true, open_ = scene
    if ignored:
        true = np.where(open_, IGNORED, true)
    got = measure(attention, true)
    predictions, objects = by_hand(attention, true)
    overlaps = [overlap for _, overlap in predictions if overlap]
    hits, wrong = len(overlaps), len(predictions) - len(overlaps)
    missed = objects - hits
    assert 0 < hits < objects and wrong
    want = {
        "mask_precision": hits / (hits + wrong),
        "mask_recall": hits / objects,
        "mask_f1": hits / (hits + wrong / 2 + missed / 2),
        "panoptic_quality": sum(overlaps) / (hits + wrong / 2 + missed / 2),
    }
    for name, value in want.items():
        assert abs(got[name] - value) < FLOAT32, name
    # Best-overlap recovery over objects, not over images, is recall.
    assert abs(got["bo_recall"] - got["mask_recall"]) < FLOAT32


@pytest.mark.parametrize("ignored", [False, True])
def test_average_precision_is_that_of_pycocotools(scene, ignored):
    coco = pytest.importorskip("pycocotools.coco", reason="compares with pycocotools")
    from pycocotools import mask as rle
    from pycocotools.cocoeval import COCOeval

    attention, true, open_ = scene
    if ignored:
        true = np.where(open_, IGNORED, true)

    def encode(mask):
        return rle.encode(np.asfortranarray(mask.astype(np.uint8)))

    truth, said = [], []
    for image, (weights, ids) in enumerate(zip(attention, true, strict=True)):
        shared = {"image_id": image, "category_id": 1}
        for object_id in set(ids.ravel().tolist()) - {0, IGNORED}:
            mask = ids == object_id
            extra = {"iscrowd": 0, "area": int(mask.sum()), "id": len(truth) + 1}
            truth.append({**shared, **extra, "segmentation": encode(mask)})
        winners = np.where(ids == IGNORED, -1, weights.argmax(axis=0))
        ground = ids == 0
        for slot in range(SLOTS):
            own = winners == slot
            if own.any() and (own & ground).sum() <= (own | ground).sum() / 2:
                score = float(weights[slot][own].mean(dtype=np.float64))
                one = {**shared, "score": score, "segmentation": encode(own)}
                said.append(one | {"area": int(own.sum()), "id": len(said) + 1})
    with contextlib.redirect_stdout(io.StringIO()):
        sets = []
        for annotations in (truth, said):
            data = coco.COCO()
            size = {"height": SIDE, "width": SIDE}
            data.dataset = {
                "images": [{"id": image, **size} for image in range(IMAGES)],
                "categories": [{"id": 1}],
                "annotations": annotations,
            }
            data.createIndex()
            sets.append(data)
        evaluation = COCOeval(sets[0], sets[1], "segm")
        # Above a half, where COCO takes a half too; and the area under the curve: its
        # mean between each recall and the next.
        evaluation.params.iouThrs = np.array([0.5 + 1e-9])
        evaluation.params.recThrs = (np.arange(len(truth)) + 0.5) / len(truth)
        evaluation.evaluate()
        evaluation.accumulate()
    # [threshold, recall, category, all areas, 100 detections]
    want = evaluation.eval["precision"][0, :, 0, 0, -1].mean()
    got = measure(attention, true)["mask_ap"]
    assert 0.05 < got < 0.95
    assert abs(got - want) < 1e-9


def test_perfect_masks_find_everything_and_the_order_of_slots_is_nothing(scene):
    attention, true, _ = scene
    masks = np.moveaxis(np.eye(SLOTS, dtype=np.float32)[true], -1, 1)
    assert all(abs(value - 1) < FLOAT32 for value in measure(masks, true).values())
    got = measure(attention, true)
    turned = measure(attention[:, [3, 0, 4, 2, 1]], true)
    for name, value in got.items():
        assert abs(turned[name] - value) < FLOAT32, name


def test_predictions_within_ignored_pixels_change_nothing(scene):
    attention, true, open_ = scene
    wild = np.where(open_[:, None], attention[::-1], attention)
    known = np.where(open_, IGNORED, true)
    got, again = measure(attention, known), measure(wild, known)
    assert got == again
    assert measure(wild, true)["mask_ap"] != measure(attention, true)["mask_ap"]


def test_what_is_not_there_is_undefined():
    attention = np.ones((IMAGES, SLOTS, SIDE, SIDE), np.float32) / SLOTS
    ground = np.zeros((IMAGES, SIDE, SIDE), np.int32)
    # One slot wins all: it is the ground, and there is neither prediction nor object.
    assert all(np.isnan(value) for value in measure(attention, ground).values())
    # An image that cannot be scored is left out.
    for broken in (attention * np.nan, attention):
        ids = ground + (MOST + 1) * np.isfinite(broken[:, 0]).astype(np.int32)
        assert all(np.isnan(value) for value in measure(broken, ids).values())


def test_objects_weigh_alike_over_objects_and_images_over_images():
    values, objects = np.array([0.5, np.nan, 1.0]), np.array([3.0, 0.0, 1.0])
    assert mean_over_objects(values, objects) == 0.625
    assert np.nanmean(values) == 0.75
