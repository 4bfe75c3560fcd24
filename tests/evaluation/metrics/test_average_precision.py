"""Average precision against the published definition, prediction by prediction."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from implicit_slots.evaluation.metrics.average_precision import (
    THRESHOLDS,
    AveragePrecision,
    attribute_scores,
    average_precision,
    detect,
    precision_recall,
)
from implicit_slots.models.set_prediction import CLASSES, REACH

LIMITS = list(THRESHOLDS.values())


def random_sets(seed, images=6, slots=5, noise=0.08):
    """Objects, and predictions that are right here and there; some are duplicates."""
    rng = np.random.default_rng(seed)
    target = np.zeros((images, slots, 19), np.float32)
    for b in range(images):
        for i in range(rng.integers(0, slots + 1)):
            target[b, i, :3] = rng.uniform(size=3)
            start = 3
            for size in CLASSES.values():
                # Few classes, so that objects of one image look alike.
                target[b, i, start + rng.integers(0, 2)] = 1
                start += size
            target[b, i, 18] = 1
    source = rng.integers(0, slots, (images, slots))
    predicted = np.take_along_axis(target, source[..., None], axis=1)
    predicted = predicted + rng.normal(scale=noise, size=predicted.shape)
    wrong = rng.uniform(size=(images, slots)) < 0.3
    predicted[wrong, 3:18] = rng.uniform(size=(wrong.sum(), 15))
    predicted[..., 18] = rng.permutation(images * slots).reshape(images, slots)
    return predicted.astype(np.float32), target


def published(predicted, target, limit):
    """Locatello et al. (2020), one prediction after the other, in float64."""
    slots = predicted.shape[1]
    flat = predicted.reshape(-1, 19).astype(np.float64)

    def classes(vector):
        ends = np.cumsum([3, *CLASSES.values()])
        return [int(np.argmax(vector[a:b])) for a, b in itertools.pairwise(ends)]

    seen, right = set(), []
    for place in np.argsort(-flat[:, 18], kind="stable"):
        image = place // slots
        best, closest = None, np.inf
        for index, true in enumerate(target[image].astype(np.float64)):
            if not true[18] or classes(true) != classes(flat[place]):
                continue
            distance = np.linalg.norm(6 * (true[:3] - flat[place, :3]))
            if distance < closest:
                best, closest = index, distance
        hit = best is not None and (closest < limit or limit == np.inf)
        right.append(hit and (image, best) not in seen)
        if hit:
            seen.add((image, best))
    found = np.cumsum(right)
    recall = [0, *(found / target[..., 18].sum()), 1]
    precision = [0, *(found / np.arange(1, len(found) + 1)), 0]
    for i in range(len(precision) - 1, 0, -1):
        precision[i - 1] = max(precision[i - 1], precision[i])
    return sum(
        precision[i + 1] * (recall[i + 1] - recall[i]) for i in range(len(recall) - 1)
    )


def measured(predicted, target):
    compiled = jax.jit(lambda p, t: detect(p, t, CLASSES, REACH))
    found = compiled(predicted, target)
    return [
        average_precision(
            precision_recall(
                np.ravel(found.confidence),
                np.ravel(found.hits[..., place]),
                float(found.objects.sum()),
            )
        )
        for place in range(len(LIMITS))
    ]


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_is_the_published_one(seed):
    predicted, target = random_sets(seed)
    wanted = [published(predicted, target, limit) for limit in LIMITS]
    assert measured(predicted, target) == pytest.approx(wanted, abs=1e-6)
    assert 0 < wanted[0] < 1


@pytest.mark.parametrize("seed", range(3))
def test_it_falls_with_the_distance_and_with_noise(seed):
    predicted, target = random_sets(seed)
    found = measured(predicted, target)
    assert found == sorted(found, reverse=True)
    exact, _ = random_sets(seed, noise=0)
    # Without noise in the position no distance is too near.
    values = measured(exact, target)
    assert values == pytest.approx([values[0]] * len(values))


def test_perfect_predictions_have_one_and_wrong_ones_zero():
    _, target = random_sets(0)
    order = np.array([3, 0, 4, 2, 1])
    assert measured(target[:, order], target) == pytest.approx([1] * len(LIMITS))
    wrong = target.copy()
    wrong[..., 10:18] = np.roll(wrong[..., 10:18], 4, axis=-1)
    assert measured(wrong, target) == [0] * len(LIMITS)


def test_only_the_most_confident_of_duplicates_counts():
    _, target = random_sets(0)
    image = int(np.argmax(target[..., 18].sum(axis=1) > 0))
    twice = np.stack([target[image, 0]] * 2)[None]
    twice[0, :, 18] = 0.2, 0.9
    found = detect(jnp.asarray(twice), jnp.asarray(target[image][None]), CLASSES, REACH)
    assert found.hits[0, :, 0].tolist() == [False, True]


def test_batches_merge_to_the_whole_and_padding_weighs_nothing():
    predicted, target = random_sets(1)
    whole = measured(predicted, target)
    for place in range(len(THRESHOLDS)):
        parts = []
        for start in (0, 4):
            chunk = np.minimum(np.arange(start, start + 4), 5)
            found = detect(
                jnp.asarray(predicted[chunk]),
                jnp.asarray(target[chunk]),
                CLASSES,
                REACH,
            )
            mask = jnp.arange(start, start + 4) < 6
            parts.append(AveragePrecision.of(found, mask, place))
        merged = jax.device_get(parts[0]).merge(jax.device_get(parts[1]))
        assert merged.compute() == pytest.approx(whole[place])


def test_attributes_are_scored_by_the_matching():
    _, target = random_sets(2)
    order = np.array([3, 0, 4, 2, 1])
    predicted = target[:, order].copy()
    predicted[..., 0] += 1 / 6  # one of CLEVR's units to the right
    predicted[..., 3:5] = predicted[..., 4:2:-1]  # the other size
    matched = jnp.broadcast_to(jnp.asarray(order), predicted.shape[:2])
    scores = attribute_scores(
        jnp.asarray(predicted), jnp.asarray(target), matched, CLASSES, REACH
    )
    has = target[..., 18].sum(axis=1) > 0
    np.testing.assert_allclose(scores["position_error"][has], 1, atol=1e-5)
    np.testing.assert_allclose(scores["size_accuracy"][has], 0)
    np.testing.assert_allclose(scores["color_accuracy"][has], 1)
    np.testing.assert_allclose(scores["count_error"], 0)
    assert np.isnan(np.asarray(scores["position_error"])[~has]).all()
