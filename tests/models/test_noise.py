"""Hashed random numbers: their distributions, and that nothing in them repeats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from implicit_slots.models import noise

pytestmark = pytest.mark.usefixtures("strict_promotion")

COUNT = 2**18
# Below the chance of a false alarm of any single test; keys are fixed, so a pass stays.
UNLIKELY = 1e-4


def words(seed=0, count=COUNT):
    return np.asarray(noise.random_bits(jax.random.key(seed), (count,)))


def as_bits(words):
    return np.unpackbits(words.view(np.uint8)).reshape(len(words), 32)


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform(shift):
    counts = np.bincount((words() >> shift) & 255, minlength=256)
    assert stats.chisquare(counts).pvalue > UNLIKELY


def test_bits_are_fair_and_uncorrelated_with_each_other():
    bits = as_bits(words()) - 0.5
    assert np.abs(bits.mean(0)).max() < 5 * 0.5 / COUNT**0.5
    correlation = np.corrcoef(bits.T) - np.eye(32)
    assert np.abs(correlation).max() < 5 / COUNT**0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 16, 64, 192, 256, 1024, 4096])
def test_neighbours_in_any_axis_are_uncorrelated(lag):
    bits = as_bits(words()) - 0.5
    products = 4 * bits[:-lag].T @ bits[lag:] / (COUNT - lag)
    assert np.abs(products).max() < 6 / COUNT**0.5


def test_keys_of_successive_steps_give_unrelated_words():
    key = jax.random.key(0)
    streams = [
        np.asarray(noise.random_bits(jax.random.fold_in(key, step), (COUNT,)))
        for step in range(4)
    ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            products = 4 * (as_bits(one) - 0.5).T @ (as_bits(other) - 0.5) / COUNT
            assert np.abs(products).max() < 6 / COUNT**0.5
            # By chance 2^36 / 2^32 = 16 words are found in both streams.
            assert len(np.intersect1d(one, other)) < 50


def test_no_two_keys_shuffle_the_same_words():
    """As they would if the key only changed the positions that are hashed."""
    draw = jax.jit(lambda key: noise.random_bits(key, (2**20,)))
    keys = jax.random.split(jax.random.key(0), 200)
    smallest = {tuple(np.sort(np.partition(draw(key), 4)[:4])) for key in keys}
    assert len(smallest) == len(keys)


def test_words_depend_on_the_key_and_the_position_alone():
    key = jax.random.key(3)
    flat = noise.random_bits(key, (24,))
    assert np.array_equal(noise.random_bits(key, (2, 3, 4)), flat.reshape(2, 3, 4))
    assert np.array_equal(
        jax.jit(noise.random_bits, static_argnums=1)(key, (24,)), flat
    )
    with pytest.raises(ValueError, match=r"at most 2\^32"):
        jax.eval_shape(lambda k: noise.random_bits(k, (2**17, 2**16)), key)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
def test_a_mask_keeps_the_share_it_should(rate):
    kept = np.asarray(noise.keep_mask(jax.random.key(1), rate, (COUNT,))).sum()
    assert stats.binomtest(int(kept), COUNT, 1 - rate).pvalue > UNLIKELY


def test_nothing_is_dropped_at_rate_zero():
    assert np.asarray(noise.keep_mask(jax.random.key(1), 0.0, (COUNT,))).all()


def test_gumbel_noise_has_gumbels_distribution():
    found = np.asarray(noise.gumbel(jax.random.key(0), (COUNT,)))
    assert np.isfinite(found).all()
    assert stats.kstest(found, stats.gumbel_r.cdf).pvalue > UNLIKELY


@pytest.mark.parametrize("classes", [2, 7, 12, 64])
def test_categorical_draws_the_softmax(classes):
    """Of a prime number of classes in one stage, of others in two."""
    logits = np.random.default_rng(classes).normal(size=classes).astype("f4")
    rows = jnp.broadcast_to(jnp.asarray(logits) + 500, (COUNT // 4, 4, classes))
    drawn = np.asarray(noise.categorical(jax.random.key(2), rows)).reshape(-1)
    expected = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum()
    counts = np.bincount(drawn, minlength=classes)
    assert stats.chisquare(counts, COUNT * expected).pvalue > UNLIKELY


def test_categorical_never_draws_what_has_no_weight():
    logits = jnp.full((COUNT, 6), -jnp.inf).at[:, jnp.array([1, 4])].set(0.0)
    drawn = np.asarray(noise.categorical(jax.random.key(0), logits))
    assert set(np.unique(drawn)) == {1, 4}
