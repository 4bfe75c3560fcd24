"""Tokens from a codebook of patches, against NumPy float64, and laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32, relative_error
from small_slate import RESOLUTION, VOCAB, Compiled, section

from implicit_slots.models.build import build_model
from implicit_slots.models.dvae import patches
from implicit_slots.models.official import to_official
from implicit_slots.models.patch_tokenizer import PATCH, fit, unpatched
from implicit_slots.runtime.errors import InvalidValue, UserError

pytestmark = pytest.mark.usefixtures("strict_promotion")

BATCH = 3


def model_of(**changes):
    changes = {"dropout": 0.0, "attention_dropout": 0.0, **changes}
    changes = {"tokenizer": "patches", "inputs": "image", **changes}
    changes.setdefault("encoder_features", 6)
    return Compiled(build_model(section(**changes), resolution=RESOLUTION, seed=0))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    shape = (BATCH, RESOLUTION, RESOLUTION, 3)
    return jnp.asarray(rng.uniform(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def weighted():
    """With token weights, of codes that are not equally frequent."""
    compiled = model_of(token_weighting=0.5)
    shares = jnp.arange(1, VOCAB + 1, dtype=jnp.float32)
    compiled.params["dvae"]["shares"] = shares / shares.sum()
    return compiled


def losses(model, image, deterministic=False):
    return model(
        {"image": image},
        temperature=0.5,
        key=jax.random.key(0),
        deterministic=deterministic,
    )


def read_tokens(model, image):
    """Each token's cross-entropy, with the initial slots of `losses`."""
    key_slots = jax.random.split(jax.random.key(0), 5)[2]
    encoded = model.encode(image, key=key_slots)
    return model.read(encoded.tokens, encoded.slots).cross_entropy


def test_patches_laid_out_again_are_the_image(images):
    assert np.array_equal(unpatched(patches(images)), images)


def test_a_token_is_the_nearest_code(images):
    compiled = model_of()
    ids = np.asarray(compiled(lambda m, x: m.dvae.encode(x).argmax(-1), images))
    codes = np.asarray(compiled.params["dvae"]["codes"], np.float64)
    points = np.asarray(patches(images), np.float64)[..., None, :]
    distances = np.square(points - codes).sum(axis=-1)
    assert np.array_equal(ids, distances.argmin(axis=-1))
    picture = compiled(lambda m, i: m.dvae.decode_ids(i), ids)
    assert np.array_equal(patches(picture), codes.astype(np.float32)[ids])


def test_clusters_that_lie_apart_are_found():
    rng = np.random.default_rng(0)
    centres = rng.uniform(size=(5, PATCH))
    sizes = [400, 200, 100, 50, 10]
    points = np.concatenate(
        [
            centre + 0.01 * rng.normal(size=(size, PATCH))
            for centre, size in zip(centres, sizes, strict=True)
        ]
    )
    found = jax.jit(fit, static_argnums=1)(jnp.float32(points), 5, jax.random.key(0))
    order = np.argsort(-np.asarray(found.shares))
    np.testing.assert_allclose(np.asarray(found.shares)[order], np.divide(sizes, 760))
    means = [part.mean(axis=0) for part in np.split(points, np.cumsum(sizes)[:-1])]
    np.testing.assert_allclose(np.asarray(found.codes)[order], means, atol=1e-5)


def test_more_codes_than_points_leave_some_without(images):
    points = jnp.reshape(patches(images[:1]), (-1, PATCH))
    found = jax.jit(fit, static_argnums=1)(points, 20, jax.random.key(0))
    assert len(points) == 16 and np.isfinite(found.codes).all()
    assert (np.asarray(found.shares) > 0).sum() <= 16
    assert float(found.shares.sum()) == pytest.approx(1)


def test_no_gradient_reaches_the_codes(weighted, images):
    def loss(params):
        output = losses(weighted.merge(params), images)
        return sum(x.mean() for x in output.losses.values())

    gradient = jax.jit(jax.grad(loss))(weighted.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["dvae"]))
    for part in ("image_encoder", "slot_attention", "decoder"):
        assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient[part]))


def test_the_images_error_is_that_of_its_codes(images):
    compiled = model_of()
    output = compiled(losses, images)
    codes = np.asarray(compiled.params["dvae"]["codes"], np.float64)
    points = np.asarray(patches(images), np.float64).reshape(BATCH, -1, 1, PATCH)
    nearest = np.square(points - codes).sum(axis=-1).min(axis=-1)
    assert relative_error(output.losses["mse"], nearest.sum(axis=1)) < FLOAT32


def test_rare_tokens_weigh_more_and_the_mean_weight_is_one(weighted):
    weights = np.asarray(weighted(lambda m: m.weights()), np.float64)
    shares = np.asarray(weighted.params["dvae"]["shares"], np.float64)
    assert np.sum(shares * weights) == pytest.approx(1)
    np.testing.assert_allclose(weights * np.sqrt(shares), weights[0] * shares[0] ** 0.5)


@pytest.mark.slow
def test_training_weighs_and_everything_else_is_corrected(weighted, images):
    """The best logits for weighted losses are log(share · weight): undone elsewhere."""
    rng = np.random.default_rng(1)
    features = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)
    trained, corrected = (
        np.asarray(weighted(lambda m, x, w=w: m.token_logits(x, weighted=w), features))
        for w in (True, False)
    )
    weights = np.asarray(weighted(lambda m: m.weights()))
    assert relative_error(trained - np.log(weights), corrected) < FLOAT32
    # In training each token's nats count by its weight; in evaluation not at all.
    whole = model_of()
    whole.params = weighted.params
    plain, weighed = (
        np.asarray(compiled(losses, images).losses["cross_entropy"])
        for compiled in (whole, weighted)
    )

    def by_hand(model, image):
        key_slots = jax.random.split(jax.random.key(0), 5)[2]
        encoded = model.encode(image, key=key_slots)
        ids = encoded.tokens.reshape(BATCH, -1)
        shown = model.embed(jnp.pad(ids + 1, ((0, 0), (1, 0))))[:, :-1]
        chosen = jax.nn.log_softmax(model.decode(shown, encoded.slots, weighted=True))
        nats = -jnp.take_along_axis(chosen, ids[..., None], axis=-1)[..., 0]
        return nats.sum(axis=1), (nats * model.weights()[ids]).sum(axis=1)

    without, with_weights = map(np.asarray, weighted(by_hand, images))
    assert relative_error(plain, without) < FLOAT32
    assert relative_error(weighed, with_weights) < FLOAT32
    read = weighted(read_tokens, images)
    evaluated = weighted(lambda m, x: losses(m, x, True), images)
    assert (
        relative_error(
            np.asarray(evaluated.losses["cross_entropy"]), read.sum(axis=(1, 2))
        )
        < FLOAT32
    )


@pytest.mark.slow
def test_generated_tokens_are_those_of_corrected_logits(weighted, images):
    """Greedy generation agrees with the logits that a whole pass gives it."""

    def generated(model, image):
        slots = model.encode(image, key=jax.random.key(0)).slots
        ids = model.generate(slots)
        flat = ids.reshape(len(ids), -1)
        shown = model.embed(jnp.pad(flat + 1, ((0, 0), (1, 0))))[:, :-1]
        return flat, model.decode(shown, slots)

    flat, logits = weighted(generated, images)
    assert np.array_equal(flat, np.asarray(logits).argmax(axis=-1))


def test_official_weights_have_no_place_for_a_codebook():
    compiled = model_of(inputs="tokens")
    with pytest.raises(UserError, match=r"config\.model\.tokenizer must be \"dvae\""):
        to_official(compiled.params)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokenizer": "words"}, "tokenizer must be one of"),
        ({"token_weighting": -1.0}, r"token_weighting must be in \[0, 1\]"),
        ({"token_weighting": 0.5}, 'token_weighting needs tokenizer="patches"'),
    ],
)
def test_what_is_no_choice_is_refused(changes, sentence):
    with pytest.raises(InvalidValue, match=sentence):
        build_model(section(**changes), resolution=RESOLUTION, seed=0)
