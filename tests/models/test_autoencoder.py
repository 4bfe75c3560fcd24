"""The autoencoder: published sizes, laws of the mixture, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import autoencoder_clevr6, autoencoder_scenes, base
from implicit_slots.models.build import build_model, count_parameters, split_model
from implicit_slots.models.layers import TransposedConv

TOLERANCE = 1e-5


def section(**changes):
    model = base.autoencoder("test", base.scenes()).model
    model.update(
        features=6,
        encoder_strides=(1, 2),
        decoder_features=5,
        decoder_strides=(2, 2),
        num_slots=3,
        slot_size=8,
        slot_mlp_size=7,
    )
    model.update(changes)
    return model


@pytest.fixture(scope="module")
def model():
    return build_model(section(), resolution=16, seed=0)


@pytest.fixture(scope="module")
def slots():
    return jax.random.normal(jax.random.key(1), (2, 3, 8))


@pytest.fixture(scope="module")
def mix(model):
    graphdef, params = split_model(model)

    @jax.jit
    def compiled(slots, present=None):
        return nnx.merge(graphdef, params).mix(slots, present=present)

    return compiled


@pytest.mark.parametrize(
    ("kernel", "stride"), [(5, 1), (5, 2), (3, 1), (3, 2), (5, 3), (1, 2), (7, 4)]
)
def test_transposed_convolution_is_laxs(kernel, stride):
    layer = TransposedConv(2, 3, kernel=kernel, stride=stride, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 2))
    wanted = jax.lax.conv_transpose(
        x,
        layer.kernel[...],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    got = layer(x)
    assert got.shape == (2, 5 * stride, 4 * stride, 3)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("config", [autoencoder_clevr6, autoencoder_scenes])
def test_parameters_and_shapes_are_the_published_models(config):
    config = config.get_config("vanilla" if config is autoencoder_clevr6 else "full")
    built = nnx.eval_shape(lambda: build_model(config.model, resolution=128, seed=0))
    graphdef, params = split_model(built)
    by_part = {name: count_parameters(part) for name, part in params.items()}
    convolution = 5 * 5 * 64 * 64 + 64
    assert by_part == {
        # First convolution, three more, positions, LayerNorm, MLP.
        "encoder": 4_864 + 3 * convolution + 320 + 128 + 2 * 4_160,
        # Three LayerNorms, mean and scale, q k v, GRU of two biases, MLP.
        "slot_attention": 3 * 128 + 128 + 3 * 4_096 + 24_960 + 8_320 + 8_256,
        # Positions, five transposed convolutions, the last one to four channels.
        "decoder": 320 + 5 * convolution + 3 * 3 * 64 * 4 + 4,
    }
    assert sum(by_part.values()) == 890_308

    image = jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.float32)
    made = jax.eval_shape(
        lambda params, image: nnx.merge(graphdef, params).reconstruct(
            image, key=jax.random.key(0)
        ),
        params,
        image,
    )
    assert made.slots.shape == (2, 128, 128, 3)
    assert made.masks.shape == (2, 7, 128, 128) or config.model.num_slots != 7
    assert made.attention.shape[2:] == (128, 128)


def test_masks_share_every_pixel_out_and_mix_the_slots_images(mix, slots):
    mixture = mix(slots)
    np.testing.assert_allclose(mixture.masks.sum(axis=1), 1, atol=TOLERANCE)
    mixed = np.einsum(
        "bkhw,bkhwc->bhwc",
        np.asarray(mixture.masks, np.float64),
        np.asarray(mixture.images, np.float64),
    )
    np.testing.assert_allclose(mixture.image, mixed, atol=TOLERANCE)


def test_the_order_of_slots_changes_the_order_of_masks_alone(mix, slots):
    order = np.array([2, 0, 1])
    one, other = mix(slots), mix(slots[:, order])
    np.testing.assert_allclose(other.image, one.image, atol=TOLERANCE)
    np.testing.assert_allclose(other.masks, one.masks[:, order], atol=TOLERANCE)
    np.testing.assert_allclose(other.images, one.images[:, order], atol=TOLERANCE)


def test_an_absent_slot_is_one_that_is_not_there(mix, slots):
    present = jnp.array([[True, False, True]] * 2)
    left = mix(slots, present)
    np.testing.assert_allclose(left.image, mix(slots[:, [0, 2]]).image, atol=TOLERANCE)
    assert np.all(left.masks[:, 1] == 0)


def test_equal_slots_share_alike_and_make_one_slots_image(mix, slots):
    same = jnp.repeat(slots[:, :1], 3, axis=1)
    mixture = mix(same)
    np.testing.assert_allclose(mixture.masks, 1 / 3, atol=TOLERANCE)
    np.testing.assert_allclose(mixture.image, mixture.images[:, 0], atol=TOLERANCE)


def test_the_loss_is_the_mean_squared_error_of_images_in_minus_one_to_one(model):
    image = jax.random.uniform(jax.random.key(2), (2, 16, 16, 3))
    output = model({"image": image}, key=jax.random.key(0))
    scaled = 2 * np.asarray(image, np.float64) - 1
    made = 2 * np.asarray(output.reconstruction, np.float64) - 1
    wanted = ((scaled - made) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(output.losses["reconstruction"], wanted, rtol=TOLERANCE)


def gradient(**changes):
    graphdef, params = split_model(
        build_model(section(**changes), resolution=16, seed=0)
    )
    image = jax.random.uniform(jax.random.key(2), (2, 16, 16, 3))

    def loss(params):
        output = nnx.merge(graphdef, params)({"image": image}, key=jax.random.key(0))
        return output.losses["reconstruction"].mean()

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("name", ["neumann", "unrolled", "implicit", "phantom"])
def test_every_backward_pass_trains_encoder_step_and_decoder(name):
    adjoint = base.adjoint()
    adjoint.name = name
    found = gradient(adjoint=adjoint)
    for part in ("encoder", "decoder"):
        for leaf in jax.tree.leaves(found[part]):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    initial = np.abs(found["slot_attention"]["slot_mean"]).max()
    assert (initial > 0) == (name == "unrolled")


def test_learned_initial_slots_are_trained_straight_through():
    found = gradient(initial_slots="learned", straight_through=True)
    moved = np.abs(found["slot_attention"]["slot_vectors"]).max(axis=1)
    assert (moved > 0).all()


@pytest.mark.parametrize(
    "kind", [base.autoencoder, base.set_prediction, base.get_config]
)
def test_the_variant_learned_is_that(kind):
    config = base.set_variant(kind("test", base.scenes()), "learned")
    model = config.model
    assert (model.initial_slots, model.straight_through) == ("learned", True)
    assert config.name == "test-learned"


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="decoder makes images of 32 pixels"):
        build_model(section(broadcast_side=8), resolution=16, seed=0)
    with pytest.raises(ValueError, match="encoder_strides"):
        build_model(section(encoder_strides=(3,)), resolution=16, seed=0)


@pytest.mark.parametrize("name", ["autoencoder", "set_prediction"])
def test_keys_of_the_encoder_reach_it(name):
    """With 2x2 kernels at stride two a cell is of its own four pixels, and no others.

    Attention of two cells then differs where their pixels differ alone.
    """
    model_section = base.model(name)
    model_section.update(
        features=6,
        encoder_strides=(2, 1),
        encoder_kernels=(2, 1),
        encoder_padding="edge",
        encoder_positions="apart",
        position_scale=0.25,
        num_slots=2,
        slot_size=8,
        slot_mlp_size=7,
    )
    if name == "autoencoder":
        model_section.update(decoder_features=5, decoder_strides=(2,))
    found = build_model(model_section, resolution=8, seed=0)
    assert float(found.encoder.gate[...]) == 0.25
    assert found.slot_attention.step.key_size == found.encoder.key_size == 8
    assert found.encoder.borders == ((0, 0), (0, 0))  # None where zeros are padded.

    graphdef, params = split_model(found)
    encode = jax.jit(lambda image: nnx.merge(graphdef, params).encoder(image))
    image = jax.random.uniform(jax.random.key(2), (1, 8, 8, 3))
    moved = np.abs(encode(image.at[0, 2:4, 4:6].set(0.0)) - encode(image)).sum(-1)
    np.testing.assert_array_equal(np.flatnonzero(moved), [4 * 1 + 2])
