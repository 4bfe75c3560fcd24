"""Generation with kept keys and values against generation without, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_slate import RESOLUTION, VOCAB, Compiled, section

from implicit_slots.models.build import build_model
from implicit_slots.models.dvae import most_probable
from implicit_slots.models.generation import BOS

pytestmark = pytest.mark.usefixtures("strict_promotion")

BATCH, SLOTS, SIZE = 3, 3, 6


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    # Slots far from zero, or every image is generated the same.
    return Compiled(build_model(section(), resolution=RESOLUTION, seed=1))


@pytest.fixture(scope="module")
def slots():
    rng = np.random.default_rng(0)
    return jnp.asarray(4 * rng.normal(size=(BATCH, SLOTS, SIZE)), jnp.float32)


@pytest.fixture(scope="module")
def greedy(compiled, slots):
    return np.asarray(compiled(lambda m, s: m.generate(s), slots))


def recompute(model, slots):
    """Greedy generation that decodes the whole sequence again for every token."""

    def extend(tokens, position):
        chosen = model.decode(model.embed(tokens), slots)[:, position].argmax(-1)
        return tokens.at[:, position + 1].set(chosen + 1, mode="drop"), chosen

    start = jnp.full((len(slots), model.side**2), BOS, jnp.int32)
    _, ids = jax.lax.scan(extend, start, jnp.arange(model.side**2))
    return ids.T.reshape(len(slots), model.side, model.side)


def test_tokens_equal_those_of_recomputing_the_prefix(compiled, slots, greedy):
    assert np.array_equal(greedy, compiled(recompute, slots))
    # Or the test would say little.
    assert len(np.unique(greedy)) > 3 and not np.array_equal(greedy[0], greedy[1])


def test_images_do_not_depend_on_their_neighbours(compiled, slots, greedy):
    alone = compiled(lambda m, s: m.generate(s), slots[1:2])
    assert np.array_equal(alone, greedy[1:2])


def test_every_step_gives_what_the_whole_sequence_gives(compiled, slots):
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, VOCAB + 1, size=(BATCH, 5)))

    def both(model, slots, tokens):
        embedded = model.embed(tokens)
        memory = model.slot_projection(slots)
        kept = model.decoder.make_room(model.decoder.start(memory), 5)
        one_by_one = []
        for position in range(5):
            x = embedded[:, position]
            features, kept = model.decoder.extend(x, kept, position)
            one_by_one.append(features)
        return jnp.stack(one_by_one, axis=1), model.decoder(embedded, memory)

    got, want = compiled(both, slots, tokens)
    assert np.abs(got - want).max() < 1e-5


def test_the_most_probable_of_one_is_greedy(compiled, slots, greedy):
    key = jax.random.key(5)
    drawn = compiled(lambda m, s, k: m.generate(s, key=k, top_k=1), slots, key)
    assert np.array_equal(drawn, greedy)
    cold = compiled(lambda m, s, k: m.generate(s, key=k, temperature=1e-4), slots, key)
    assert np.array_equal(cold, greedy)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 3])
def test_first_tokens_are_drawn_from_the_tempered_distribution(compiled, slots, top_k):
    count, temperature = 4096, 0.5
    same = jnp.broadcast_to(slots[:1], (count, *slots.shape[1:]))
    drawn = compiled(
        lambda m, s, k: m.generate(s, key=k, temperature=temperature, top_k=top_k),
        same,
        jax.random.key(0),
    )
    bos = jnp.full((1, 1), BOS, jnp.int32)
    logits = compiled(lambda m, s, t: m.decode(m.embed(t), s), slots[:1], bos)
    weights = np.exp(np.float64(logits[0, 0]) / temperature)
    if top_k is not None:
        weights[weights < np.sort(weights)[-top_k]] = 0
    expected = count * weights / weights.sum()
    counts = np.bincount(np.asarray(drawn)[:, 0, 0], minlength=VOCAB)
    possible = expected > 0
    assert not counts[~possible].any()
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-4
    # What follows is drawn anew for each image.
    assert len(np.unique(np.asarray(drawn).reshape(count, -1), axis=0)) > count / 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": 0}, "top_k must be between 1 and 7, got 0"),
        ({"top_k": VOCAB + 1}, "top_k must be between 1 and 7, got 8"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0"),
    ],
)
def test_misuse_is_a_sentence(compiled, slots, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        compiled.model.generate(slots, key=jax.random.key(0), **options)
    with pytest.raises(ValueError, match="top_k" if "top_k" in options else "give a"):
        compiled.model.generate(slots, **options)


def test_most_probable_is_argmax():
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 4, (50, 9)), jnp.float32)
    assert np.array_equal(most_probable(logits), logits.argmax(-1))
    assert most_probable(jnp.full((1, 4), jnp.nan)) == 3  # a valid index all the same
