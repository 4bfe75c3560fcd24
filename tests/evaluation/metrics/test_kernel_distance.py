"""Kernel distances against loops over pairs in float64, and their laws."""

import itertools

import numpy as np
import pytest
from reference import FLOAT64

from implicit_slots.evaluation.metrics.kernel_distance import kernel_distance


def by_definition(a, b):
    """Bińkowski et al.'s estimator, pair by pair; scikit-learn has no unbiased one."""

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(x):
        pairs = itertools.permutations(x.tolist(), 2)
        return sum(kernel(*pair) for pair in pairs) / (len(x) * (len(x) - 1))

    across = itertools.product(a.tolist(), b.tolist())
    mean = sum(kernel(*pair) for pair in across) / (len(a) * len(b))
    return within(a) + within(b) - 2 * mean


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    return rng.normal(size=(15, 4)), rng.normal(size=(15, 4)) ** 2 + 0.5


def test_is_the_estimator_pair_by_pair(sets):
    want = by_definition(*sets)
    assert abs(kernel_distance(*sets) - want) < FLOAT64 * abs(want)
    # Also of features in float32, which are those of a network.
    a, b = (x.astype(np.float32) for x in sets)
    want = by_definition(a, b)
    assert abs(kernel_distance(a, b) - want) < FLOAT64 * abs(want)


def test_subsets_have_the_mean_of_all_and_are_the_same_each_time(sets):
    a, b = sets
    got = kernel_distance(a, b, subset=6, subsets=1000)
    assert got == kernel_distance(a, b, subset=6, subsets=1000)
    assert got != kernel_distance(a, b)
    # Of unbiased estimates the mean is the estimate from all.
    assert abs(got - kernel_distance(a, b)) < 0.1 * kernel_distance(a, b)
    # Two of three from each set: every subset is one of nine.
    few = [x[:3] for x in sets]
    pairs = [list(itertools.combinations(range(3), 2)) for _ in few]
    every = [
        by_definition(few[0][list(i)], few[1][list(j)])
        for i, j in itertools.product(*pairs)
    ]
    one = kernel_distance(*few, subset=2, subsets=1)
    assert min(abs(one - value) for value in every) < FLOAT64 * abs(one)
    # A smaller set limits both.
    assert np.isfinite(kernel_distance(a, b[:5]))


def test_laws(sets):
    a, b = sets
    want = kernel_distance(a, b)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    for got in (
        kernel_distance(b, a),
        kernel_distance(a[::-1], b),
        kernel_distance(a @ turn, b @ turn),
    ):
        assert abs(got - want) < FLOAT64 * want
    # Unlike the Fréchet distance it is right on average from few examples.
    rng = np.random.default_rng(2)
    alike = [kernel_distance(*rng.normal(size=(2, 8, 4))) for _ in range(400)]
    spread = np.std(alike) / np.sqrt(len(alike))
    assert abs(np.mean(alike)) < 3 * spread < want / 20
    assert min(alike) < 0


def test_what_has_no_distance():
    two = np.zeros((2, 3))
    with pytest.raises(ValueError, match="at least 2 examples in each set and subset"):
        kernel_distance(two[:1], two)
    with pytest.raises(ValueError, match="at least 2 examples in each set and subset"):
        kernel_distance(two, two, subset=1)
    assert kernel_distance(two, two) == 0
    assert np.isnan(kernel_distance(two, np.array([[np.nan, 0, 0], [0, 0, 0]])))
