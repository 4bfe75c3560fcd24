"""Segmentation scores against scikit-learn, and the laws they obey."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from implicit_slots.evaluation.metrics.iou import overlap_table
from implicit_slots.evaluation.metrics.rand_index import (
    adjusted_rand_index,
    rand_indices,
)
from implicit_slots.evaluation.metrics.segmentation import attention_to_masks

ATOL = 1e-6  # a few float32 roundings of a number of size one


def score(true, predicted, max_true=10, num_predicted=11, foreground_only=False):
    scores = jax.jit(
        adjusted_rand_index,
        static_argnames=("max_true", "num_predicted", "foreground_only"),
    )(
        jnp.asarray(true, jnp.int32),
        jnp.asarray(predicted, jnp.int32),
        max_true=max_true,
        num_predicted=num_predicted,
        foreground_only=foreground_only,
    )
    return np.asarray(scores)


def noisy_partitions(seed, size=128, objects=10):
    """Scenes of boxes, and a prediction of them with ever more wrong pixels."""
    rng = np.random.default_rng(seed)
    true = np.zeros((6, size, size), np.int32)
    for image in true:
        for object_id in range(1, objects + 1):
            row, column = rng.integers(0, size, 2)
            sides = rng.integers(1, 1 + size // 3, 2)
            image[row : row + sides[0], column : column + sides[1]] = object_id
    wrong = rng.random(true.shape) < np.linspace(0, 1, 6)[:, None, None]
    return true, np.where(wrong, rng.integers(0, objects + 1, true.shape), true)


@pytest.mark.parametrize("size", [4, 32, 128])
def test_equals_scikit_learn(size):
    true, predicted = noisy_partitions(size, size)
    expected = [
        adjusted_rand_score(t.ravel(), p.ravel())
        for t, p in zip(true, predicted, strict=True)
    ]
    np.testing.assert_allclose(score(true, predicted), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("size", [32, 128])
def test_foreground_equals_scikit_learn_on_the_foreground(size):
    true, predicted = noisy_partitions(size + 1, size)
    expected = [
        adjusted_rand_score(t[t > 0], p[t > 0])
        for t, p in zip(true, predicted, strict=True)
    ]
    actual = score(true, predicted, foreground_only=True)
    np.testing.assert_allclose(actual, expected, atol=ATOL, rtol=0)


def test_one_wrong_pixel_among_many_is_seen():
    # With binomials in float32 the score of this pair is off by 1e-4.
    true = np.zeros((1, 128, 128), np.int32)
    true[0, :2, :2] = 1
    predicted = true.copy()
    predicted[0, 0, 0] = 0
    expected = adjusted_rand_score(true.ravel(), predicted.ravel())
    np.testing.assert_allclose(score(true, predicted), [expected], atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("true", "predicted"),
    [
        ([1, 1, 1, 1], [2, 2, 2, 2]),  # one cluster in both
        ([1, 1, 1, 1], [0, 0, 1, 1]),  # one object, two slots
        ([1, 1, 2, 2], [3, 3, 3, 3]),  # two objects, one slot
        ([0, 1, 2, 3], [3, 2, 1, 0]),  # every pixel its own
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([0, 0, 1, 1], [0, 1, 0, 1]),  # below chance
        ([1], [0]),  # a single pixel
    ],
)
def test_degenerate_partitions_equal_scikit_learn(true, predicted):
    expected = adjusted_rand_score(true, predicted)
    np.testing.assert_allclose(score([true], [predicted]), [expected], atol=ATOL)


def test_precision_is_of_merged_masks_and_recall_of_split_ones():
    true = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2]])
    halves = jnp.array([[0, 0, 1, 1, 2, 2, 3, 3]])
    for predicted, low in ((true, None), (halves, "recall"), (0 * true, "precision")):
        table = overlap_table(true, predicted, max_true=2, num_predicted=4)
        found = rand_indices(table)._asdict()
        for name in ("precision", "recall"):
            assert (found[name] == 1) == (name != low)
    # A third of an object's pairs are together; of all pairs, by chance, a seventh.
    table = overlap_table(true, halves, max_true=2, num_predicted=4)
    assert np.isclose(rand_indices(table).recall[0], 2 / 9)


def test_names_of_predicted_clusters_do_not_matter():
    true, predicted = noisy_partitions(3, 32)
    renamed = np.random.default_rng(0).permutation(11)[predicted]
    np.testing.assert_allclose(score(true, renamed), score(true, predicted), atol=ATOL)


def test_an_example_does_not_depend_on_its_batch():
    true, predicted = noisy_partitions(4, 32)
    alone = [score(t[None], p[None])[0] for t, p in zip(true, predicted, strict=True)]
    np.testing.assert_allclose(score(true, predicted), alone, atol=ATOL)


def test_no_foreground_is_undefined():
    background = np.zeros((1, 4, 4), np.int32)
    assert np.isnan(score(background, background, foreground_only=True)).all()
    assert score(background, background) == 1


@pytest.mark.parametrize(("true", "predicted"), [(3, 0), (-2, 0), (0, 2), (0, -1)])
def test_an_id_out_of_range_is_not_dropped_in_silence(true, predicted):
    true_ids, predicted_ids = np.array([[0, 1, 2, true]]), np.array([[0, 1, 1, 0]])
    predicted_ids[0, 3] = predicted
    scores = score(true_ids, predicted_ids, max_true=2, num_predicted=2)
    assert np.isnan(scores).all()


def test_masks_are_the_argmax_of_upsampled_attention():
    # A straight edge between two slots at 2.5 positions of 4 lies at 20 of 32 pixels.
    attention = jnp.array([[[1.0, 1.0, 0.5, 0.0]] * 4, [[0.0, 0.0, 0.5, 1.0]] * 4])
    masks = np.asarray(attention_to_masks(attention[None], 32, 32))
    assert masks.shape == (1, 32, 32)
    expected = np.broadcast_to(np.arange(32) >= 20, (32, 32))
    np.testing.assert_array_equal(masks[0], expected)


def test_ties_go_to_the_first_slot():
    assert not attention_to_masks(jnp.full((1, 3, 4, 4), 1 / 3), 8, 8).any()
