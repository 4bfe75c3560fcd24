"""What the decoder reads of the slots, and what it makes of some of them alone."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from reference import FLOAT32, relative_error
from small_slate import HEADS, RESOLUTION, VOCAB, WIDTH, Compiled, section

from implicit_slots.models.build import build_model

pytestmark = pytest.mark.usefixtures("strict_promotion")

BATCH, SLOTS, SIZE, SIDE = 2, 3, 6, RESOLUTION // 4
PRESENT = np.array([[True, False, True], [False, True, True]])


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled(build_model(section(), resolution=RESOLUTION, seed=1))


@pytest.fixture(scope="module")
def slots():
    rng = np.random.default_rng(0)
    return jnp.asarray(4 * rng.normal(size=(BATCH, SLOTS, SIZE)), jnp.float32)


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, VOCAB, size=(BATCH, SIDE, SIDE)))


def forced(model, tokens, slots, present=None):
    return model.read(tokens, slots, present=present)


@pytest.fixture(scope="module")
def whole(compiled, tokens, slots):
    return compiled(forced, tokens, slots)


def test_reading_gives_what_attention_gives_and_the_weights_of_numpy(compiled, slots):
    memory = np.asarray(compiled(lambda m, s: m.slot_projection(s), slots))
    x = np.random.default_rng(2).normal(size=(BATCH, 5, WIDTH)).astype(np.float32)
    attention = compiled.model.decoder.blocks[1].cross_attention

    def read(model, x, memory):
        attention = model.decoder.blocks[1].cross_attention
        return *attention.read(x, memory), attention(x, memory)

    got, weights, want = compiled(read, jnp.asarray(x), jnp.asarray(memory))
    assert relative_error(got, want) < FLOAT32
    q, k = (
        data @ np.asarray(projection.kernel[...], np.float64)
        for data, projection in (
            (x, attention.project_q),
            (memory, attention.project_k),
        )
    )
    depth = WIDTH // HEADS
    by_head = [
        reference.softmax(
            q[:, :, part] @ k[:, :, part].swapaxes(1, 2) / np.sqrt(depth), axis=-1
        )
        for part in (slice(h * depth, (h + 1) * depth) for h in range(HEADS))
    ]
    assert relative_error(weights, np.mean(by_head, axis=0)) < FLOAT32


def test_teacher_forcing_is_the_cross_entropy_of_the_decoder(
    compiled, tokens, slots, whole
):
    targets = tokens.reshape(BATCH, -1)

    def logits(model, targets, slots):
        padded = jnp.pad(targets + 1, ((0, 0), (1, 0)))
        return model.decode(model.embed(padded)[:, :-1], slots)

    want = optax.softmax_cross_entropy_with_integer_labels(
        compiled(logits, targets, slots), targets
    )
    assert relative_error(whole.cross_entropy.reshape(BATCH, -1), want) < FLOAT32
    assert whole.attention.shape == (BATCH, SLOTS, SIDE, SIDE)
    assert np.allclose(whole.attention.sum(axis=1), 1, atol=FLOAT32)
    assert np.asarray(whole.attention).std() > 1e-3


@pytest.mark.slow
def test_an_absent_slot_is_as_if_it_were_not_there(compiled, tokens, slots, whole):
    present = jnp.asarray(PRESENT)
    # What an absent slot holds must not matter.
    masked = jnp.where(present[..., None], slots, 1e6)
    kept = slots[PRESENT].reshape(BATCH, SLOTS - 1, SIZE)
    got = compiled(forced, tokens, masked, present)
    want = compiled(forced, tokens, kept)
    assert relative_error(got.cross_entropy, want.cross_entropy) < FLOAT32
    shares = np.moveaxis(np.asarray(got.attention), 1, -1)
    for image in range(BATCH):
        seen = shares[image][..., PRESENT[image]]
        assert relative_error(np.moveaxis(seen, -1, 0), want.attention[image]) < FLOAT32
        assert not shares[image][..., ~PRESENT[image]].any()
    assert relative_error(got.cross_entropy, whole.cross_entropy) > 1e-2

    def generate(model, slots, present):
        return model.generate(slots, present=present)

    drawn = compiled(generate, masked, present)
    alone = compiled(lambda m, s: m.generate(s), kept)
    assert np.array_equal(drawn, alone)
    all_there = compiled(generate, slots, jnp.ones((BATCH, SLOTS), bool))
    assert np.array_equal(all_there, compiled(lambda m, s: m.generate(s), slots))
    assert not np.array_equal(all_there, alone)
