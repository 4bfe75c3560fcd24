"""How slots share an image against NumPy and scikit-learn, and the laws it obeys."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from implicit_slots.evaluation.metrics.collapse import (
    dead_slots,
    doubled_slots,
    largest_slot,
    mask_similarity,
    token_perplexity,
)
from implicit_slots.models.outputs import attention_entropy

ATOL = 1e-6  # a few float32 roundings of a number of size one


@jax.jit
def measured(attention, mask):
    """All three at once, so that a shape is compiled once."""
    return jnp.stack(
        [
            attention_entropy(attention),
            largest_slot(attention),
            mask_similarity(attention, mask),
        ]
    )


def by_image(attention, mask=None):
    """Values by image, NaN where there is none; the entropy is over its largest."""
    mask = np.ones(len(attention), bool) if mask is None else np.asarray(mask)
    found = np.array(measured(jnp.asarray(attention, jnp.float32), jnp.asarray(mask)))
    found[0] /= np.log(max(attention.shape[1], 2))
    return np.where(mask, found, np.nan)


def values(attention, mask=None):
    found = by_image(attention, mask)
    count = (~np.isnan(found)).sum(axis=1)
    return np.where(count, np.nansum(found, axis=1) / np.maximum(count, 1), np.nan)


def counts(attention, mask=None):
    return (~np.isnan(by_image(attention, mask))).sum(axis=1).tolist()


def random_attention(seed=0, batch=6, slots=4, size=5, sharpness=3.0):
    """Softmaxes of noise over slots; neighbouring images have half of it in common."""
    noise = np.random.default_rng(seed).normal(size=(batch + 1, slots, size, size))
    weights = np.exp(sharpness * (noise[:-1] + noise[1:]))
    return weights / weights.sum(axis=1, keepdims=True)


def one_hot(winners, slots):
    return np.eye(slots)[np.asarray(winners)].transpose(0, 3, 1, 2)


def expected(attention):
    """The definitions, in float64 and image by image."""
    slots = attention.shape[1]
    winners = [image.argmax(axis=0).ravel() for image in attention]
    entropies = [
        -sum(p * np.log(p) for p in position if p > 0) / np.log(slots)
        for image in attention
        for position in image.reshape(slots, -1).T
    ]
    largest = [np.bincount(w).max() / len(w) for w in winners]
    similar = [
        adjusted_rand_score(a, b)
        for a, b in itertools.pairwise(winners)
        if len(set(a)) > 1 and len(set(b)) > 1
    ]
    return np.array([np.mean(entropies), np.mean(largest), np.mean(similar)])


@pytest.mark.parametrize("sharpness", [0.1, 3.0, 30.0])
def test_equals_the_definitions(sharpness):
    attention = random_attention(sharpness=sharpness)
    np.testing.assert_allclose(values(attention), expected(attention), atol=ATOL)


def test_slots_that_never_parted():
    entropy, _, similarity = values(np.full((6, 4, 5, 5), 0.25))
    np.testing.assert_allclose(entropy, 1, atol=ATOL)
    assert np.isnan(similarity)


def test_one_slot_takes_all():
    attention = one_hot(np.ones((6, 5, 5), int), 4)
    entropy, largest, similarity = values(attention)
    assert (entropy, largest) == (0, 1)
    assert np.isnan(similarity)
    assert counts(attention) == [6, 6, 0]


def test_masks_that_depend_on_position_alone():
    rows = np.array([0, 1, 1, 2, 3])[:, None] * np.ones((1, 5), int)
    rng = np.random.default_rng(1)
    # Another slot each time: only the partition is the same.
    winners = np.stack([rng.permutation(4)[rows] for _ in range(6)])
    np.testing.assert_allclose(values(one_hot(winners, 4)), [0, 0.4, 1], atol=ATOL)


def test_masks_that_share_nothing():
    winners = np.random.default_rng(2).integers(0, 4, (64, 12, 12))
    assert abs(values(one_hot(winners, 4))[2]) < 0.01


def test_an_image_of_one_slot_is_in_no_pair():
    winners = np.random.default_rng(3).integers(0, 4, (6, 5, 5))
    winners[1] = 2
    attention = one_hot(winners, 4)
    np.testing.assert_allclose(values(attention), expected(attention), atol=ATOL)
    assert counts(attention) == [6, 6, 3]


def test_a_single_slot_shares_with_nobody():
    entropy, largest, similarity = values(np.ones((2, 1, 3, 3)))
    assert (entropy, largest) == (0, 1)
    assert np.isnan(similarity)


def test_names_of_slots_do_not_matter():
    attention = random_attention(4)
    rng = np.random.default_rng(4)
    renamed = np.stack([image[rng.permutation(4)] for image in attention])
    np.testing.assert_allclose(values(renamed), values(attention), atol=ATOL)


def test_padding_weighs_nothing():
    attention = random_attention(5)
    padded = attention.copy()
    padded[4:] = np.nan
    mask = jnp.arange(6) < 4
    assert counts(padded, mask) == counts(attention[:4]) == [4, 4, 3]
    np.testing.assert_allclose(values(padded, mask), values(attention[:4]), atol=ATOL)


def test_padding_is_in_no_pair():
    assert counts(random_attention(5), jnp.arange(6) != 2) == [5, 5, 3]


@pytest.mark.parametrize("batch", [1, 6])
def test_one_image_has_no_pair(batch):
    attention, mask = random_attention(6, batch=batch), jnp.arange(batch) < 1
    assert counts(attention, mask) == [1, 1, 0]
    assert np.isnan(values(attention, mask)[2])


def test_token_perplexity_counts_what_a_batch_uses():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, size=(6, 9))
    mask = np.array([True] * 4 + [False] * 2)
    found = token_perplexity(jnp.asarray(tokens), jnp.asarray(mask), 8)
    shares = np.bincount(tokens[:4].ravel(), minlength=5) / 36
    want = np.exp(-np.sum(shares * np.log(shares)))
    np.testing.assert_allclose(found, np.full(6, want), rtol=1e-5)
    one = token_perplexity(jnp.full((2, 3), 7), jnp.ones(2, bool), 8)
    every = token_perplexity(jnp.arange(8).reshape(2, 4), jnp.ones(2, bool), 8)
    np.testing.assert_allclose([one[0], every[0]], [1, 8], rtol=1e-5)


def test_dead_and_doubled_slots_are_counted_as_told():
    """Loops over pairs of slots; two clones, a slot that shares half, an idle pair."""
    base = random_attention(slots=3)
    even = np.full_like(base[:, :1], 1 / 3)
    clones = np.concatenate([base[:, :1] / 2, base[:, :1] / 2, base[:, 1:]], axis=1)
    cases = [clones, random_attention(1), random_attention(2, sharpness=0.3)]
    # All alike, all positions to the first: dead, and doubled at that.
    cases.append(np.repeat(even * 3 / 4, 4, axis=1))
    # Two slots with next to no attention are dead, and doubles of nothing.
    idle = np.full_like(base[:, :2], 1e-5)
    two = random_attention(3, slots=2, sharpness=1.0) * (1 - 2e-5)
    cases.append(np.concatenate([two, idle], axis=1))
    found = []
    for attention in cases:
        got = np.array(counted(jnp.asarray(attention, jnp.float32)))
        found.append(got)
        for image, maps in enumerate(attention.reshape(*attention.shape[:2], -1)):
            winners, live = maps.argmax(axis=0), maps.sum(axis=1) >= 0.005 * maps.sum()
            dead = sum((winners == k).mean() < 0.005 for k in range(4))
            doubled = {
                i
                for i, j in itertools.permutations(range(4), 2)
                if live[i] and live[j]
                if np.minimum(*maps[[i, j]]).sum() > np.maximum(*maps[[i, j]]).sum() / 2
            }
            assert got[:, image].tolist() == [dead, len(doubled)]
    assert (found[0][1] >= 2).all() and (found[3] == [[3], [4]]).all()
    assert (found[4][0] >= 2).all() and (found[4][1] == 0).all()
    turned = counted(jnp.asarray(cases[0][:, [2, 0, 3, 1]], jnp.float32))
    np.testing.assert_array_equal(turned[1], found[0][1])


@jax.jit
def counted(attention):
    return dead_slots(attention), doubled_slots(attention)
