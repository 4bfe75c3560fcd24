"""Errors between images against NumPy and scikit-image, and the laws they obey."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32, relative_error
from skimage.metrics import structural_similarity

from implicit_slots.evaluation.metrics.reconstruction import compare

# Of a number of size one, where float32's variances are rounding.
FLAT = 1e-3

NAMES = {"mse", "mse_per_pixel", "psnr", "ssim"}

compiled = jax.jit(compare)


def measured(image, other):
    found = compiled(jnp.asarray(image, jnp.float32), jnp.asarray(other, jnp.float32))
    assert found.keys() == NAMES
    for values in found.values():
        assert values.shape == (len(image),) and values.dtype == jnp.float32
    return {name: np.asarray(values) for name, values in found.items()}


def pairs(seed=0, batch=4, height=16, width=20):
    """Smooth pictures, each with noise of another strength."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = rng.uniform(0.1, 0.6, (2, batch, 1, 1, 3))
    image = 0.5 + 0.4 * np.sin(
        waves[0] * rows[..., None] + waves[1] * columns[..., None]
    )
    strength = np.linspace(0.02, 0.4, batch)[:, None, None, None]
    return image, np.clip(image + strength * rng.normal(size=image.shape), 0, 1)


def structural(image, other) -> Any:
    return structural_similarity(
        image,
        other,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=-1,
    )


def test_numbers_are_their_definitions():
    image, other = pairs()
    got = measured(image, other)
    squares = [
        sum((a - b) ** 2 for a, b in zip(i.flat, o.flat, strict=True))
        for i, o in zip(image, other, strict=True)
    ]
    per_pixel = np.array(squares) / (16 * 20 * 3)
    assert relative_error(got["mse"], squares) < FLOAT32
    assert relative_error(got["mse_per_pixel"], per_pixel) < FLOAT32
    assert relative_error(got["psnr"], 10 * np.log10(1 / per_pixel)) < FLOAT32


def test_ssim_is_that_of_scikit_image():
    image, other = pairs()
    want = [structural(*pair) for pair in zip(image, other, strict=True)]
    assert min(want) < 0.5 < 0.9 < max(want)
    assert relative_error(measured(image, other)["ssim"], want) < FLOAT32


def test_ssim_of_flat_images():
    """Where float32 loses most: the variances are differences of equal numbers."""
    image = np.full((3, 16, 20, 3), 0.9)
    other = image.copy()
    other[1] -= 0.1
    other[2, ::2] += 0.01
    want = [structural(*pair) for pair in zip(image, other, strict=True)]
    np.testing.assert_allclose(measured(image, other)["ssim"], want, atol=FLAT)


def test_equal_images():
    image, _ = pairs()
    got = measured(image, image)
    want = {"mse": 0, "mse_per_pixel": 0, "psnr": 100, "ssim": 1}
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-6, err_msg=name)


def test_black_and_white():
    got = measured(np.zeros((1, 12, 12, 3)), np.ones((1, 12, 12, 3)))
    assert got["mse"] == 12 * 12 * 3 and got["mse_per_pixel"] == 1 and got["psnr"] == 0
    np.testing.assert_allclose(got["ssim"], 1e-4, rtol=0.01)  # the formula's K1²


def test_the_two_images_may_be_exchanged():
    image, other = pairs()
    got, exchanged = measured(image, other), measured(other, image)
    for name in NAMES:
        assert relative_error(exchanged[name], got[name]) < FLOAT32, name


def test_more_noise_is_worse():
    image, other = pairs()  # sorted by strength
    got = measured(image, other)
    for name, sign in {"mse": 1, "mse_per_pixel": 1, "psnr": -1, "ssim": -1}.items():
        assert (np.diff(sign * got[name]) > 0).all(), name


@pytest.mark.parametrize(("height", "width"), [(10, 20), (20, 10), (4, 4)])
def test_an_image_smaller_than_the_window_has_no_ssim(height, width):
    image, other = pairs(height=height, width=width)
    got = measured(image, other)
    assert np.isnan(got["ssim"]).all()
    assert np.isfinite([got[name] for name in NAMES - {"ssim"}]).all()


def test_an_image_of_the_window_has_ssim():
    image, other = pairs(height=11, width=11)
    want = [structural(*pair) for pair in zip(image, other, strict=True)]
    assert relative_error(measured(image, other)["ssim"], want) < FLOAT32


def test_a_broken_reconstruction_is_nan_alone():
    image, other = pairs()
    other[1, 8, 8, 0] = np.nan
    for name, values in measured(image, other).items():
        assert np.isnan(values).tolist() == [False, True, False, False], name
