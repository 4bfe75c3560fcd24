"""The set predictor: published sizes, matching, and the loss's laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.optimize import linear_sum_assignment

from configs import set_prediction_clevr
from implicit_slots.models import set_prediction
from implicit_slots.models.build import build_model, count_parameters, split_model
from implicit_slots.models.set_prediction import (
    NUM_PROPERTIES,
    encode_objects,
    match_sets,
    pairwise_distance,
    set_distance,
)

TOLERANCE = 1e-6


def sets(seed, slots=4, batch=3):
    keys = jax.random.split(jax.random.key(seed))
    shape = (batch, slots, NUM_PROPERTIES)
    return tuple(jax.random.uniform(key, shape) for key in keys)


def objects():
    return {
        "present": np.array([[True, True, False]]),
        "position": np.array([[[-3.0, 0, 0.35], [1.5, 3, 0.7], [9, 9, 9]]], np.float32),
        "size": np.array([[1, 0, 1]]),
        "material": np.array([[0, 1, 1]]),
        "shape": np.array([[2, 0, 1]]),
        "color": np.array([[7, 3, 1]]),
    }


def huber(x, y):
    """In float64, entry by entry, from the definition."""
    error = np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))
    return np.where(error <= 1, 0.5 * error**2, error - 0.5).mean()


def test_parameters_and_shapes_are_the_published_models():
    config = set_prediction_clevr.get_config("vanilla").model
    built = nnx.eval_shape(lambda: build_model(config, resolution=128, seed=0))
    graphdef, params = split_model(built)
    by_part = {name: count_parameters(part) for name, part in params.items()}
    assert by_part == {
        "encoder": 4_864 + 3 * 102_464 + 320 + 128 + 2 * 4_160,
        "slot_attention": 3 * 128 + 128 + 3 * 4_096 + 24_960 + 8_320 + 8_256,
        "enter": 64 * 64 + 64,
        "leave": 64 * 19 + 19,
    }
    image = jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.float32)

    def run(params, image):
        model = nnx.merge(graphdef, params)
        encoded = model.encode(image, key=jax.random.key(0))
        return model.predict(encoded.slots), encoded.attention

    predicted, attention = jax.eval_shape(run, params, image)
    assert predicted.shape == (2, 10, 19)
    assert attention.shape == (2, 10, 32, 32)


def test_objects_become_vectors_in_the_published_order():
    (rows,) = np.asarray(encode_objects(objects(), 4))
    first = [0, 0.5, (0.35 + 3) / 6, 0, 1, 1, 0, 0, 0, 1, *[0] * 7, 1, 1]
    second = [0.75, 1, (0.7 + 3) / 6, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, *[0] * 4, 1]
    np.testing.assert_allclose(rows, [first, second, [0] * 19, [0] * 19], atol=1e-6)
    with pytest.raises(ValueError, match="num_slots=3"):
        encode_objects(objects(), 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_matching_is_scipys_optimum(seed):
    costs = jax.random.uniform(jax.random.key(seed), (20, 10, 10))
    # Ties too: slots that predict the same, and several empty targets.
    costs = costs.at[:5, :, 6:].set(costs[:5, :, 6:7])
    matched = np.asarray(jax.jit(match_sets)(costs))
    for cost, columns in zip(np.asarray(costs, np.float64), matched, strict=True):
        rows, best = linear_sum_assignment(cost)
        assert sorted(columns) == list(range(10))
        found = cost[np.arange(10), columns].sum()
        assert found == pytest.approx(cost[rows, best].sum(), rel=1e-6)


def test_distances_are_huber_of_every_pair():
    predicted, target = sets(0)
    found = np.asarray(pairwise_distance(3 * predicted, target))
    for b, i, j in itertools.product(range(3), range(4), range(4)):
        wanted = huber(3 * predicted[b, i], target[b, j])
        assert found[b, i, j] == pytest.approx(wanted, rel=1e-5)


def test_the_loss_is_the_least_over_all_orders():
    predicted, target = sets(1)
    found = np.asarray(set_distance(predicted, target))
    for b in range(3):
        least = min(
            sum(huber(predicted[b, i], target[b, j]) for i, j in enumerate(order))
            for order in itertools.permutations(range(4))
        )
        assert found[b] == pytest.approx(least, rel=1e-5)


def test_the_order_of_neither_set_changes_the_loss_and_gradients_follow():
    predicted, target = sets(2)
    order = np.array([2, 0, 3, 1])

    def of(predicted, target):
        value, slope = jax.value_and_grad(lambda p: set_distance(p, target).sum())(
            predicted
        )
        return float(value), np.asarray(slope)

    value, slope = of(predicted, target)
    for other in (target[:, order], target[:, ::-1]):
        again, same = of(predicted, other)
        assert again == pytest.approx(value, rel=TOLERANCE)
        np.testing.assert_allclose(same, slope, atol=TOLERANCE)
    again, permuted = of(predicted[:, order], target)
    assert again == pytest.approx(value, rel=TOLERANCE)
    np.testing.assert_allclose(permuted, slope[:, order], atol=TOLERANCE)


def test_the_loss_is_zero_for_equal_sets_alone():
    _, target = sets(3)
    assert np.all(np.asarray(set_distance(target[:, ::-1], target)) == 0)
    assert np.all(np.asarray(set_distance(target + 0.1, target)) > 0)


def test_properties_are_clevrs():
    assert sum(set_prediction.CLASSES.values()) == 15
    assert NUM_PROPERTIES == 19
