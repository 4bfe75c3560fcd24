"""Means of values per image: by hand, in parts, with padding and undefined values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from implicit_slots.evaluation.metrics.image_mean import ImageMean, image_means
from implicit_slots.evaluation.metrics.segmentation import score_masks

ATOL = 1e-6  # a few float32 roundings of a number of size one


def test_padding_and_undefined_values_weigh_nothing():
    values = jnp.array([1.0, jnp.nan, 4.0, 100.0])
    mean = ImageMean.of(values, jnp.array([True, True, True, False]))
    assert (float(mean.compute()), int(mean.count)) == (2.5, 2)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_parts_merge_to_the_whole_in_any_order(cut):
    values = jnp.asarray(np.random.default_rng(cut).normal(size=8), jnp.float32)
    values = values.at[2].set(jnp.nan)
    shown = jnp.ones(8, bool)
    parts = [ImageMean.of(values[p], shown[p]) for p in (slice(cut), slice(cut, 8))]
    expected = np.nanmean(np.asarray(values, np.float64))
    for order in (parts, parts[::-1]):
        merged = ImageMean.empty().merge(order[0]).merge(order[1])
        assert merged.count == 7
        np.testing.assert_allclose(merged.compute(), expected, atol=ATOL)


def test_the_mean_of_no_image_is_nan_also_on_the_host():
    with np.errstate(invalid="ignore"):
        assert np.isnan(jax.device_get(ImageMean.empty()).compute())


@pytest.mark.slow
def test_foreground_ari_is_the_mean_over_images_that_have_a_foreground():
    rng = np.random.default_rng(5)
    true = rng.integers(0, 5, (8, 16, 16)).astype(np.int32)
    true[[2, 5]] = 0
    predicted = np.where(rng.random(true.shape) < 0.5, true, 0)
    attention = jnp.asarray(np.eye(5, dtype=np.float32)[predicted])
    scores = score_masks(attention.transpose(0, 3, 1, 2), jnp.asarray(true), max_true=4)
    mean = image_means(scores, jnp.arange(8) < 6)["fg_ari"]
    expected = np.mean(
        [
            adjusted_rand_score(true[i][true[i] > 0], predicted[i][true[i] > 0])
            for i in (0, 1, 3, 4)
        ]
    )
    assert mean.count == 4
    np.testing.assert_allclose(mean.compute(), expected, atol=ATOL)
