"""Tokens that the decoder reads in random order: laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32, relative_error
from small_slate import RESOLUTION, VOCAB, WIDTH, Compiled, section

from implicit_slots.models.build import build_model
from implicit_slots.models.official import to_official
from implicit_slots.models.token_decoder import with_bos
from implicit_slots.runtime.errors import InvalidValue, UserError

pytestmark = pytest.mark.usefixtures("strict_promotion")

BATCH, TOKENS = 2, (RESOLUTION // 4) ** 2


def model_of(**changes):
    return Compiled(build_model(section(**changes), resolution=RESOLUTION, seed=0))


@pytest.fixture(scope="module")
def shuffled():
    """With places that are not zero, as training leaves them."""
    compiled = model_of(decoder_order="random", dropout=0.0, attention_dropout=0.0)
    rng = np.random.default_rng(0)
    assert not np.any(compiled.params["target_positions"])
    compiled.params["target_positions"] = jnp.asarray(
        rng.normal(size=(TOKENS, WIDTH)), jnp.float32
    )
    return compiled


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(0, VOCAB, (BATCH, TOKENS)), jnp.int32)
    slots = jnp.asarray(rng.normal(size=(BATCH, 3, 6)), jnp.float32)
    order = jnp.asarray(rng.permutation(TOKENS), jnp.int32)
    return ids, slots, order


def decoded(model, ids, slots, order):
    embedded = model.embed(with_bos(ids))
    return model.decode(model.reordered(embedded, order), slots, order=order)


@pytest.mark.slow
def test_row_by_row_is_one_of_the_orders(shuffled, case):
    ids, slots, _ = case
    rows = shuffled(decoded, ids, slots, jnp.arange(TOKENS))
    plain = shuffled(
        lambda m, i, s: m.decode(m.embed(with_bos(i))[:, :-1], s), ids, slots
    )
    assert relative_error(rows, plain) < FLOAT32


def test_a_token_is_predicted_from_those_before_it_in_the_order(shuffled, case):
    ids, slots, order = case
    logits = np.asarray(shuffled(decoded, ids, slots, order))
    middle = TOKENS // 2
    other = ids.at[:, order[middle]].set((ids[:, order[middle]] + 1) % VOCAB)
    changed = np.asarray(shuffled(decoded, other, slots, order))
    assert np.array_equal(changed[:, : middle + 1], logits[:, : middle + 1])
    assert (np.abs(changed - logits)[:, middle + 1 :].max(axis=(1, 2)) > 1e-4).all()


def test_generation_asks_row_by_row(shuffled, case):
    _, slots, _ = case

    def generated(model, slots):
        ids = model.generate(slots).reshape(len(slots), -1)
        return ids, model.decode(model.embed(with_bos(ids))[:, :-1], slots)

    ids, logits = shuffled(generated, slots)
    assert np.array_equal(ids, np.asarray(logits).argmax(axis=-1))


@pytest.mark.slow
def test_the_order_is_drawn_in_training_alone(shuffled):
    images = jnp.asarray(
        np.random.default_rng(2).uniform(size=(BATCH, RESOLUTION, RESOLUTION, 3)),
        jnp.float32,
    )
    still = jax.tree.map(jnp.copy, shuffled.params)
    del still["target_positions"]
    raster = model_of(dropout=0.0, attention_dropout=0.0)
    raster.params = still
    zero = jax.tree.map(jnp.copy, shuffled.params)
    zero["target_positions"] = jnp.zeros_like(zero["target_positions"])

    def cross_entropy(compiled, params, deterministic):
        def call(params, image):
            return compiled.merge(params)(
                {"image": image},
                temperature=0.5,
                key=jax.random.key(0),
                deterministic=deterministic,
            ).losses["cross_entropy"]

        return np.asarray(jax.jit(call)(params, images))

    assert (
        relative_error(
            cross_entropy(shuffled, zero, True), cross_entropy(raster, still, True)
        )
        < FLOAT32
    )
    assert not np.allclose(
        cross_entropy(shuffled, zero, False), cross_entropy(raster, still, False)
    )


def test_official_weights_have_no_place_for_it(shuffled):
    with pytest.raises(UserError, match="decoder_order must be"):
        to_official(shuffled.params)


def test_no_other_order_is_taken():
    with pytest.raises(InvalidValue, match="decoder_order must be one of"):
        build_model(section(decoder_order="spiral"), resolution=RESOLUTION, seed=0)
