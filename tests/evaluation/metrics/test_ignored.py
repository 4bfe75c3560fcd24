"""Pixels that true masks leave open: no number depends on what happens there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32
from sklearn.metrics import adjusted_rand_score, jaccard_score

from configs import scenes
from implicit_slots.data.source import IGNORED, Source
from implicit_slots.evaluation import groups
from implicit_slots.evaluation.findings import Findings, Subject
from implicit_slots.evaluation.metrics.boundaries import boundary_f1
from implicit_slots.evaluation.metrics.deletion import (
    delete_in_turn,
    object_regions,
    random_orders,
    shuffle_slots,
)
from implicit_slots.evaluation.metrics.locality import locality
from implicit_slots.evaluation.metrics.segmentation import score_masks
from implicit_slots.evaluation.steps import EvaluationSteps
from implicit_slots.runtime.devices import build_mesh

SIDE, SLOTS, MOST, IMAGES = 8, 3, 3, 4


def measure(attention, true, shadow):
    """Every number that true masks take part in, of masks as large as the image."""
    classes = jnp.tile(jnp.array([0, 1, 1]), (len(true), 1))
    scores = score_masks(attention, true, max_true=MOST, classes=classes)
    local = locality(attention, true, shadow, max_true=MOST)
    # The one that looks at no true mask.
    return scores | {n: v for n, v in local.items() if n != "token_entropy"}


measured = jax.jit(measure)


def share_out(rng):
    weights = np.exp(2 * rng.normal(size=(IMAGES, SLOTS, SIDE, SIDE)))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def scene():
    """Masks, shadows, and which pixels are left open: a corner and a few within."""
    rng = np.random.default_rng(0)
    true = np.zeros((IMAGES, SIDE, SIDE), np.int32)
    true[:, 1:6, 1:4], true[:, 3:7, 4:7] = 1, 2
    true[1, 5:, :2] = 3
    shadow = np.where(true == 0, np.roll(true, 1, axis=2), 0)
    open_ = rng.random(true.shape) < 0.1
    open_[:, :3, 5:] = True
    return share_out(rng), true, shadow, open_


def test_predictions_within_ignored_pixels_change_no_number(scene):
    attention, true, shadow, open_ = scene
    other = np.where(open_[:, None], share_out(np.random.default_rng(1)), attention)
    known = np.where(open_, IGNORED, true)
    got, again = measured(attention, known, shadow), measured(other, known, shadow)
    # The same change counts, for each of them, where the pixels do.
    free = [measured(a, true, shadow) for a in (attention, other)]
    assert len(got) == 23
    for name, values in got.items():
        np.testing.assert_array_equal(values, again[name], err_msg=name)
        assert np.isfinite(values).all(), name
        if name not in ("slots_used", "corloc", "bo_recall"):
            assert (free[0][name] != free[1][name]).any(), name


def test_what_is_left_is_scored_as_if_the_image_had_no_more(scene):
    attention, true, shadow, open_ = scene
    got = measured(attention, np.where(open_, IGNORED, true), shadow)
    for index in range(IMAGES):
        kept = ~open_[index]
        ids, won = true[index][kept], attention[index].argmax(axis=0)[kept]
        seen = ids > 0
        best = [
            max(jaccard_score(ids == i, won == k) for k in range(SLOTS))
            for i in np.unique(ids[seen])
        ]
        wanted = {
            "ari": adjusted_rand_score(ids, won),
            "fg_ari": adjusted_rand_score(ids[seen], won[seen]),
            "mbo": np.mean(best),
        }
        for name, value in wanted.items():
            assert np.isclose(got[name][index], value, atol=FLOAT32), name


def test_an_image_of_ignored_pixels_has_no_number(scene):
    attention, true, shadow, _ = scene
    nothing = measured(attention, np.full_like(true, IGNORED), 0 * shadow)
    for name, values in nothing.items():
        assert np.isnan(values).all(), name


def test_a_slot_that_wins_ignored_pixels_alone_is_not_used(scene):
    attention, true, shadow, open_ = scene
    attention = np.where(open_[:, None], np.eye(SLOTS)[2][:, None, None], attention)
    attention[:, 2] *= open_
    got = measured(attention.astype(np.float32), np.where(open_, IGNORED, true), shadow)
    assert (got["slots_used"] == 2).all()


def test_a_border_to_ignored_pixels_is_none():
    true = np.zeros((1, 6, 6), np.int32)
    true[0, :, 3:] = 1
    ringed = true.copy()
    ringed[0, :, 2:4] = IGNORED  # void around an object, as in Pascal VOC
    assert np.isnan(boundary_f1(jnp.asarray(ringed), jnp.asarray(true)))
    half = true.copy()
    half[0, :3] = IGNORED
    wrong = true.copy()
    wrong[0, :3] = np.arange(6)
    assert boundary_f1(jnp.asarray(half), jnp.asarray(wrong)) == 1


def test_what_deletions_do_to_ignored_pixels_changes_no_number(scene):
    _, true, shadow, open_ = scene
    known = jnp.asarray(np.where(open_, IGNORED, true))
    matched = jnp.tile(jnp.array([2, 0, -1]), (IMAGES, 1))
    rng = np.random.default_rng(2)
    slots = jnp.asarray(rng.normal(size=(IMAGES, SLOTS, 1)), jnp.float32)
    levels = jnp.asarray(rng.random((SLOTS, SIDE, SIDE, 3)), jnp.float32)
    nats = jnp.asarray(rng.random((SLOTS, SIDE, SIDE)), jnp.float32)

    regions = object_regions(
        known, matched, num_slots=SLOTS, shadow=jnp.asarray(shadow)
    )

    def delete(spoil):
        wild = spoil * jnp.asarray(open_, jnp.float32)

        def render(slots, present):
            image = jnp.tensordot(present * slots[..., 0], levels, 1)
            return image + wild[..., None] * present.sum(axis=1)[:, None, None, None]

        def read(slots, present):
            return render(slots, present)[..., 0] + jnp.tensordot(present, nats, 1)

        found, _ = delete_in_turn(
            render,
            slots,
            regions,
            random_orders(jax.random.key(0), 2, IMAGES, SLOTS),
            read=read,
            image=jnp.zeros((IMAGES, SIDE, SIDE, 3)),
            without=lambda removed: (200 * spoil * open_[..., None]).astype(np.uint8),
            progress=lambda steps, **_: steps,
        )
        return found._asdict()

    plain, spoilt = delete(0.0), delete(1.0)
    for name, values in plain.items():
        assert np.isfinite(values).any(), name
        np.testing.assert_array_equal(values, spoilt[name], err_msg=name)
    # A slot brings along which pixels of its own image count.
    mixed = shuffle_slots(jax.random.key(1), regions)
    assert not (mixed.pixels & ~mixed.counted).any()


class Pictures(Source):
    """Blank pictures with these masks."""

    def __init__(self, true):
        self._true = true

    def __len__(self):
        return len(self._true)

    def batch(self, indices):
        """Those of these indices."""
        true = self._true[indices]
        return {"image": np.zeros((*true.shape, 3), np.uint8), "segmentation": true}


def measure_nothing(*_) -> Any:
    return {}, {}


def test_an_evaluation_says_how_much_is_ignored(scene):
    """What is ignored is no object, of which there may be too many for the slots."""
    _, true, _, open_ = scene
    config = scenes.get_config("smoke")
    config.model.num_slots = 3
    steps = EvaluationSteps(*[measure_nothing] * len(EvaluationSteps._fields))
    for masks in (np.where(open_, IGNORED, true), true):
        source = Pictures(masks[:3])
        subject = Subject(config, steps, {}, build_mesh(2), source, 2, quiet=True)
        findings = Findings()
        groups.masks(subject, findings)
        told = [note for note in findings.notes if "are ignored by the true" in note]
        share = np.mean(masks[:3] == IGNORED)
        assert told == [
            f"{share:.2%} of the pixels are ignored by the true masks (void, crowds): "
            "they count in no comparison with them"
        ] * bool(share)
        more = [note for note in findings.notes if "more masks" in note]
        assert len(more) == 1 and more[0].startswith("1 of 3 images")
