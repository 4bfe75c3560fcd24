"""Fréchet distances against closed forms and SciPy, and features of random weights."""

import itertools

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
from reference import FLOAT32, FLOAT64, relative_error

from implicit_slots.evaluation.metrics.frechet import frechet_distance, random_features

FEATURES = 256
# On a CPU, of the image below: every 32nd.
RECORDED = [0.3419168, 0.88940811, 0.23390678, 0.30010921]
RECORDED += [0.03004544, 0.0, 0.25142431, 0.16871069]


def gaussian(mean, covariance, count, seed):
    """A sample that has exactly this mean and covariance."""
    raw = np.random.default_rng(seed).normal(size=(count, len(mean)))
    raw -= raw.mean(axis=0)
    white = np.linalg.qr(raw)[0] * np.sqrt(count - 1)
    values, vectors = np.linalg.eigh(covariance)
    return mean + white @ (vectors * np.sqrt(np.maximum(values, 0))).T


def covariance(seed, size=5, rank=None):
    root = np.random.default_rng(seed).normal(size=(size, rank or 2 * size))
    return root @ root.T


def by_definition(mean_a, covariance_a, mean_b, covariance_b):
    """Heusel et al.'s formula with SciPy's matrix square root."""
    root = np.asarray(scipy.linalg.sqrtm(covariance_a @ covariance_b))
    traces = (
        np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.trace(np.real(root))
    )
    return np.sum((mean_a - mean_b) ** 2) + traces


@pytest.mark.parametrize(("count_a", "count_b"), [(6, 6), (9, 40), (40, 9)])
def test_is_the_formula_of_heusel(count_a, count_b):
    mean_a, mean_b = np.random.default_rng(0).normal(size=(2, 5))
    of_a, of_b = covariance(1), covariance(2)
    got = frechet_distance(
        gaussian(mean_a, of_a, count_a, 3), gaussian(mean_b, of_b, count_b, 4)
    )
    assert relative_error(got, by_definition(mean_a, of_a, mean_b, of_b)) < FLOAT64


def test_of_samples_is_the_formula_with_their_unbiased_moments():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 3)), rng.normal(size=(7, 3)) * [1, 2, 3] + 1
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b)]
    assert (
        relative_error(frechet_distance(a, b), by_definition(*moments[0], *moments[1]))
        < FLOAT64
    )


def test_of_covariances_that_commute_is_that_of_the_deviations():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    # Some directions are flat in one set or in both.
    stds_a, stds_b = np.array([3.0, 1, 0, 0]), np.array([1.0, 2, 5, 0])
    a, b = (
        gaussian(np.zeros(4), basis @ np.diag(stds**2) @ basis.T, 20, seed)
        for seed, stds in enumerate((stds_a, stds_b))
    )
    assert relative_error(frechet_distance(a, b), np.sum((stds_a - stds_b) ** 2)) < 1e-7


def test_of_fewer_examples_than_features():
    """Against the eigenvalues of the product of two singular covariances."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 9)), rng.normal(size=(6, 9))
    product = np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)
    # Of rank 3: the other eigenvalues are rounding, whose roots are not small.
    roots = np.sqrt(np.sort(np.linalg.eigvals(product).real)[-3:]).sum()
    traces = np.var(a, axis=0, ddof=1).sum() + np.var(b, axis=0, ddof=1).sum()
    want = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + traces - 2 * roots
    assert relative_error(frechet_distance(a, b), want) < FLOAT64


def test_of_two_examples_each():
    """Segments: half lengths p and q, whose covariances are 2ppᵀ and 2qqᵀ."""
    rng = np.random.default_rng(0)
    p, q, middle = rng.normal(size=(3, 7))
    got = frechet_distance(np.stack([p, -p]), np.stack([middle + q, middle - q]))
    want = middle @ middle + 2 * (p @ p) + 2 * (q @ q) - 4 * abs(p @ q)
    assert relative_error(got, want) < FLOAT64


@pytest.mark.parametrize("count", [2, 5, 40])
def test_a_set_is_at_no_distance_from_itself(count):
    a = np.random.default_rng(0).normal(size=(count, 8)) + 100
    shuffled = np.random.default_rng(1).permutation(a)
    assert 0 <= frechet_distance(a, shuffled) < FLOAT64
    assert frechet_distance(np.ones((count, 8)), np.ones((count, 8))) == 0


@pytest.mark.parametrize("count", [4, 30])
def test_a_shift_costs_its_square(count):
    a = np.random.default_rng(0).normal(size=(count, 8))
    shift = np.arange(8.0)
    assert relative_error(frechet_distance(a, a + shift), shift @ shift) < FLOAT64


def test_laws():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 6)), rng.normal(size=(11, 6)) ** 2
    want = frechet_distance(a, b)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert relative_error(frechet_distance(b, a), want) < FLOAT64
    assert relative_error(frechet_distance(a @ turn, b @ turn), want) < FLOAT64
    assert relative_error(frechet_distance(3 * a, 3 * b), 9 * want) < FLOAT64
    assert frechet_distance(a.astype(np.float32), b) == pytest.approx(want, rel=1e-5)


def test_one_example_has_no_covariance():
    two = np.zeros((2, 3))
    for sets in ((two[:1], two), (two, two[:0])):
        with pytest.raises(ValueError, match="at least 2 examples in each set, got"):
            frechet_distance(*sets)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_of_features_that_are_not_finite_is_nan(value):
    broken = np.zeros((3, 2))
    broken[1, 1] = value
    assert np.isnan(frechet_distance(broken, np.zeros((3, 2))))


compiled = jax.jit(random_features)


def features(images):
    return np.asarray(compiled(np.asarray(images, np.float32)))


def pictures(count=48, side=32, seed=0):
    """Coloured rectangles on a coloured ground."""
    rng = np.random.default_rng(seed)
    images = np.broadcast_to(rng.uniform(size=(count, 1, 1, 3)), (count, side, side, 3))
    images = images.copy()
    for image in images:
        for _ in range(4):
            row, column = rng.integers(0, side - 6, 2)
            height, width = rng.integers(4, 14, 2)
            image[row : row + height, column : column + width] = rng.uniform(size=3)
    return images


def test_random_features_are_the_same_everywhere():
    rows, columns, channels = np.ogrid[:48, :32, :3]
    image = (5 * rows + 3 * columns * (1 + channels)) % 256 / 255
    got = features(image[None])
    assert got.shape == (1, FEATURES) and got.dtype == np.float32
    assert relative_error(got[0, ::32], RECORDED) < FLOAT32


def test_an_image_has_its_random_features_in_any_batch():
    images = pictures(count=4)
    want = features(images)
    assert relative_error(features(images[::-1]), want[::-1]) < FLOAT32
    assert relative_error(features(images[[2, 2, 2, 2]]), want[[2, 2, 2, 2]]) < FLOAT32


@pytest.mark.parametrize("side", [16, 96])
def test_random_features_of_every_layer_tell_images_apart(side):
    spread = features(pictures(side=side)).std(axis=0)
    for layer in np.split(spread, [32, 64, 128]):
        assert np.mean(layer > 0.01) > 0.8


def worse(images, kind, strength):
    rng = np.random.default_rng(1)
    if kind == "blur":
        return scipy.ndimage.gaussian_filter(images, (0, strength, strength, 0))
    if kind == "noise":
        noise = rng.normal(size=images.shape)
        return np.clip(images + strength / 10 * noise, 0, 1)
    return images * (1 - strength / 3)  # darker


@pytest.mark.parametrize("kind", ["blur", "noise", "dark"])
def test_the_worse_the_images_the_larger_their_distance(kind):
    true = features(pictures(seed=0))
    distances = [
        frechet_distance(true, features(worse(pictures(seed=0), kind, strength)))
        for strength in (0, 0.5, 1, 2)
    ]
    assert distances[0] < 1e-6
    for less, more in itertools.pairwise(distances):
        assert more > 1.5 * less
