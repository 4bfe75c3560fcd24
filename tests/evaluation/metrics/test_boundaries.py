"""Boundary F1 against SciPy's dilation, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32
from scipy import ndimage

from implicit_slots.evaluation.metrics.boundaries import TOLERANCE, borders, boundary_f1

score = jax.jit(boundary_f1)


def reference_f1(true, predicted):
    height, width = true.shape
    radius = int(np.ceil(TOLERANCE * np.sqrt(height**2 + width**2)))
    reach = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius

    def border(ids):
        found = np.zeros(ids.shape, bool)
        for row in range(height):
            for column in range(width):
                for other in ((0, 1), (1, 0), (1, 1)):
                    r = min(row + other[0], height - 1)
                    c = min(column + other[1], width - 1)
                    found[row, column] |= ids[row, column] != ids[r, c]
        return found

    a, b = border(true), border(predicted)
    if not a.any():
        return np.nan
    if not b.any():
        return 0.0
    precision = ndimage.binary_dilation(a, reach)[b].mean()
    recall = ndimage.binary_dilation(b, reach)[a].mean()
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


@pytest.mark.parametrize("shape", [(12, 12), (100, 130)])
def test_equals_scipy(shape):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 3, size=(2, 4, 3, 3))
    rows = np.arange(shape[0]) * 3 // shape[0]
    columns = np.arange(shape[1]) * 3 // shape[1]
    true, predicted = coarse[:, :, rows][:, :, :, columns]
    predicted[1] = np.roll(true[1], 1, axis=1)
    true[2] = 5
    predicted[3] = 0
    got = score(jnp.asarray(true), jnp.asarray(predicted))
    expected = [reference_f1(*pair) for pair in zip(true, predicted, strict=True)]
    assert np.allclose(got, expected, atol=FLOAT32, equal_nan=True)
    assert np.isnan(got[2]) and got[3] == 0 and 0 < got[0] < 1


def test_the_same_borders_score_one_whatever_the_ids():
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 3, size=(1, 8, 8)))
    assert score(ids, 7 - ids)[0] == 1


def test_a_shift_within_the_tolerance_costs_nothing_and_beyond_it_everything():
    true = np.zeros((3, 100, 100), int)
    true[:, :, 50:] = 1
    shifted = np.stack([np.roll(true[0], shift, axis=1) for shift in (1, 2, 9)])
    shifted[:, :, :20], shifted[:, :, 80:] = 0, 1
    got = score(jnp.asarray(true), jnp.asarray(shifted))
    # 0.8 % of 141 pixels, rounded up, are two.
    assert np.allclose(got, [1, 1, 0])


def test_borders_of_one_colour_are_empty():
    assert not np.any(borders(jnp.zeros((1, 5, 5), int)))
