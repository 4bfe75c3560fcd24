"""What SLATE's slots may read, and decoder inputs that are dropped: laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_slate import RESOLUTION, Compiled, section

from implicit_slots.models.build import build_model
from implicit_slots.models.official import to_official
from implicit_slots.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("strict_promotion")

BATCH = 3


def model_of(**changes):
    return Compiled(build_model(section(**changes), resolution=RESOLUTION, seed=0))


@pytest.fixture(scope="module")
def reads_image():
    return model_of(inputs="image", encoder_features=6, encoder_strides=(2, 1))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    shape = (BATCH, RESOLUTION, RESOLUTION, 3)
    return jnp.asarray(rng.uniform(size=shape), jnp.float32)


def losses(model, image, key=0, deterministic=False):
    return model(
        {"image": image},
        temperature=0.5,
        key=jax.random.key(key),
        deterministic=deterministic,
    )


@pytest.mark.slow
def test_slots_that_read_the_image_have_its_encoders_grid(reads_image, images):
    output = reads_image(losses, images)
    side = RESOLUTION // 2
    assert output.attention.shape == (BATCH, 3, side, side)
    np.testing.assert_allclose(output.attention.sum(axis=1), 1, atol=1e-5)
    assert set(reads_image.params) == {
        *("dvae", "embedding", "positions", "image_encoder", "slot_attention"),
        *("slot_projection", "decoder", "out"),
    }
    key = jax.random.key(0)
    encoded = reads_image(lambda m, x: m.encode(x, key=key), images)
    read = reads_image(lambda m, e: m.read(e.tokens, e.slots), encoded)
    # The decoder's masks are of the tokens.
    assert encoded.attention.shape[-1] == side
    assert read.attention.shape[-1] == RESOLUTION // 4


@pytest.mark.slow
def test_positions_apart_are_read_and_only_their_coordinates_compared(images):
    """The cosines of a cell reach the slots through the values, never the attention."""
    compiled = model_of(
        inputs="image",
        encoder_features=6,
        encoder_strides=(2, 1),
        encoder_positions="apart",
    )
    encoder = compiled.model.image_encoder
    assert (encoder.key_size, encoder.size) == (8, 8 + 15)
    inputs = np.asarray(compiled(lambda m, x: m.image_encoder(x), images))
    side = RESOLUTION // 2
    assert inputs.shape == (BATCH, side**2, 23)
    line = np.linspace(-1, 1, side)
    gate = float(encoder.gate[...])
    np.testing.assert_allclose(inputs[0, :, 6], gate * np.repeat(line, side), atol=1e-6)
    np.testing.assert_allclose(inputs[0, :, 7], gate * np.tile(line, side), atol=1e-6)
    # Orthogonal over the grid, each but the constant one of mean zero.
    waves = inputs[1, :, 8:]
    products = waves.T @ waves
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-4)
    np.testing.assert_allclose(waves.sum(axis=0), 0, atol=1e-4)

    def first_attention(model, inputs):
        slots = model.slot_attention.initial(len(inputs), jax.random.key(0))
        return model.slot_attention.step(inputs, slots)

    other = inputs.copy()
    other[..., 8:] = 0
    (read, seen), (other_read, other_seen) = (
        compiled(first_attention, jnp.asarray(x)) for x in (inputs, other)
    )
    np.testing.assert_array_equal(seen, other_seen)
    assert not np.allclose(read, other_read)


@pytest.mark.parametrize("kernels", [(2, 1), (4, 3), (2, 3)])
def test_with_edges_repeated_a_flipped_image_has_flipped_features(images, kernels):
    """Each cell sees as far to the left as to the right, and no border."""
    compiled = model_of(
        inputs="image",
        encoder_features=6,
        encoder_kernels=kernels,
        encoder_padding="edge",
        encoder_positions="apart",
    )
    params = jax.tree.map(jnp.copy, compiled.params)
    for convolution in params["image_encoder"]["convolutions"].values():
        kernel = convolution["kernel"]
        convolution["kernel"] = kernel + kernel[:, ::-1]
    side = RESOLUTION // 2

    def features(image):
        found = jax.jit(lambda p, x: compiled.merge(p).image_encoder(x))(params, image)
        return np.asarray(found)[..., :6].reshape(BATCH, side, side, 6)

    flipped = features(images[:, :, ::-1])[:, :, ::-1]
    np.testing.assert_allclose(flipped, features(images), atol=1e-4)
    flat = features(jnp.full_like(images, 0.3))
    np.testing.assert_allclose(flat, np.broadcast_to(flat[:1, :1, :1], flat.shape))


def test_slots_that_read_the_image_do_not_depend_on_the_dvae(reads_image, images):
    """Those of a model that reads tokens do."""

    def slots(model, image):
        return model.encode(image, key=jax.random.key(0)).slots

    for compiled, depends in ((reads_image, False), (model_of(), True)):
        other = jax.tree.map(jnp.copy, compiled.params)
        other["dvae"] = jax.tree.map(lambda leaf: -leaf, other["dvae"])
        found = [
            jax.jit(lambda p, x, c=compiled: slots(c.merge(p), x))(params, images)
            for params in (compiled.params, other)
        ]
        assert (not np.allclose(*found)) == depends


@pytest.mark.slow
def test_the_gradient_of_every_part_is_there(reads_image, images):
    def loss(params):
        output = losses(reads_image.merge(params), images)
        return sum(x.mean() for x in output.losses.values())

    gradient = jax.jit(jax.grad(loss))(reads_image.params)
    for part in ("image_encoder", "slot_attention", "dvae", "decoder"):
        norms = [float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient[part])]
        assert max(norms) > 0 and np.isfinite(norms).all()


def test_dropped_tokens_leave_their_positions_and_bos(images):
    model = model_of(drop_tokens=1.0)
    embedded = jnp.asarray(np.random.default_rng(1).normal(size=(2_000, 16, 8)), "f4")
    dropped = model(lambda m, e: m.dropped(e, jax.random.key(0)), embedded)
    positions = np.asarray(model.model.positions[...])[:16]
    kept = np.isclose(dropped, embedded).all(axis=-1)
    gone = np.isclose(dropped, positions[None]).all(axis=-1)
    kept, gone = np.asarray(kept), np.asarray(gone)
    assert (kept ^ gone).all() and kept[:, 0].all()
    # Rates are uniform from 0 to 1: mean 1/2, standard deviation √(1/12) over images.
    shares = np.mean(gone[:, 1:], axis=1)
    assert abs(shares.mean() - 0.5) < 0.03
    assert 0.25 < shares.std() < 0.35


@pytest.mark.slow
def test_tokens_are_dropped_in_training_alone(images):
    """In evaluation, and with a rate of 0, nothing changes."""
    whole, dropping = model_of(), model_of(drop_tokens=1.0)

    def cross_entropy(compiled, deterministic):
        found = compiled(lambda m, x: losses(m, x, 0, deterministic), images)
        return np.asarray(found.losses["cross_entropy"])

    assert np.array_equal(cross_entropy(whole, True), cross_entropy(dropping, True))
    assert not np.allclose(cross_entropy(whole, False), cross_entropy(dropping, False))


def test_noise_on_initial_slots_is_for_training_alone(images):
    model = model_of(initial_slots="learned", straight_through=True)

    def attention(noise, deterministic):
        def call(m, x):
            return m(
                {"image": x},
                temperature=0.5,
                key=jax.random.key(0),
                deterministic=deterministic,
                initial_noise=noise,
            ).attention

        return np.asarray(model(call, images))

    assert np.array_equal(attention(None, True), attention(1.0, True))
    assert not np.allclose(attention(None, False), attention(1.0, False))


def test_official_weights_have_no_place_for_an_image_encoder(reads_image):
    with pytest.raises(UserError, match=r"config\.model\.inputs must be \"tokens\""):
        to_official(reads_image.params)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"inputs": "pixels"}, "inputs must be one of"),
        ({"inputs": "image", "encoder_positions": "far"}, "positions must be one of"),
        (
            {"inputs": "image", "encoder_padding": "mirror"},
            "padding must be one of",
        ),
        (
            {"inputs": "image", "encoder_kernels": (5, 5, 5)},
            "must be one, or as many as encoder_strides",
        ),
        (
            {"inputs": "image", "encoder_kernels": (0, 1)},
            "encoder_kernels must be positive integers",
        ),
        (
            {"inputs": "image", "encoder_padding": "edge"},
            "as large as its stride or larger by an even number, got 5 and 2",
        ),
        ({"drop_tokens": 1.5}, r"drop_tokens must be in \[0, 1\]"),
        ({"normalizer": "sum"}, "normalizer must be one of"),
    ],
)
def test_what_is_no_choice_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(section(**changes), resolution=RESOLUTION, seed=0)
