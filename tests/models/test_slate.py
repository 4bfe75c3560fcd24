"""SLATE's parts against NumPy float64, and the laws of the whole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from reference import FLOAT32, relative_error
from small_slate import (
    HEADS,
    RESOLUTION,
    VOCAB,
    WIDTH,
    Compiled,
    section,
)

from implicit_slots.fixed_point import Neumann, Picard, Unrolled
from implicit_slots.models import dvae, layers, noise
from implicit_slots.models.build import build_model, split_model
from implicit_slots.models.token_decoder import with_bos
from implicit_slots.models.transformer import TransformerDecoder

pytestmark = pytest.mark.usefixtures("strict_promotion")


def initial(config):
    """The parameters at 64 × 64; one compilation instead of one for every shape."""
    build = jax.jit(lambda: split_model(build_model(config, resolution=64, seed=0))[1])
    return jax.tree.map(np.asarray, build())


def losses(model, image, key, deterministic):
    return model(
        {"image": image},
        temperature=0.5,
        key=jax.random.key(key),
        deterministic=deterministic,
    )


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled(build_model(section(), resolution=RESOLUTION, seed=0))


@pytest.fixture(scope="module")
def params(compiled):
    """The parameters in NumPy float64."""
    return jax.tree.map(np.float64, compiled.params)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(size=(2, RESOLUTION, RESOLUTION, 3)), jnp.float32)


@pytest.fixture(scope="module")
def output(compiled, images):
    return compiled(lambda m, x: losses(m, x, 3, True), images)


@pytest.fixture(scope="module")
def tokens(compiled, images):
    """Ids [2, 16] that begin no sequence, their embedding and their slots."""
    return compiled(encode, images)


def encode(model, images):
    ids = model.dvae.encode(images).argmax(-1).reshape(len(images), -1)
    embedded = model.embed(with_bos(ids))
    return (
        ids,
        embedded,
        model.slot_attention(
            model.slot_inputs(images, embedded[:, 1:]), key=jax.random.key(0)
        ).slots,
    )


def test_dvae_encoder_equals_numpy(compiled, params, images):
    got = compiled(lambda m, x: m.dvae.encode(x), images)
    for image, ours in zip(images, got, strict=True):
        want = reference.dvae_encode(np.float64(image), params["dvae"])
        assert relative_error(ours, want) < FLOAT32


def test_dvae_decoder_equals_numpy(compiled, params):
    z = np.random.default_rng(0).dirichlet(np.ones(VOCAB), size=(2, 4, 4))
    got = compiled(lambda m, z: m.dvae.decode(z), jnp.asarray(z, jnp.float32))
    for tokens, ours in zip(z, got, strict=True):
        want = reference.dvae_decode(tokens, params["dvae"])
        assert relative_error(ours, want) < FLOAT32


def test_decoding_ids_is_decoding_one_hot(compiled):
    ids = np.random.default_rng(0).integers(0, VOCAB, size=(2, 4, 4))
    one_hot = jnp.asarray(np.eye(VOCAB)[ids], jnp.float32)
    got, want = compiled(
        lambda m, i, z: (m.dvae.decode_ids(i), m.dvae.decode(z)),
        jnp.asarray(ids),
        one_hot,
    )
    assert relative_error(got, want) < 1e-6


def test_pixels_are_those_of_the_layer_after_the_shuffle():
    layer = dvae.ToPixels(5, 3, full_output=True, rngs=nnx.Rngs(0))
    assert layer.bias is not None
    layer.bias[...] = jnp.arange(3.0)
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 20))
    want = layers.Linear.__call__(layer, dvae.pixel_shuffle(x))
    assert jnp.allclose(layer(x), want, atol=1e-6)


def test_pixel_shuffle_is_pytorchs():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 8)).astype("f4")
    want = np.stack([reference.pixel_shuffle(image) for image in x])
    assert np.array_equal(dvae.pixel_shuffle(jnp.asarray(x)), want)


def test_gumbel_softmax_draws_the_distribution():
    probabilities = np.array([0.5, 0.3, 0.2], "f4")
    log_probs = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities)), (4000, 3))
    soft = dvae.gumbel_softmax(log_probs, 0.7, jax.random.key(0))
    hard = dvae.gumbel_softmax(log_probs, 0.7, jax.random.key(0), hard=True)
    assert np.allclose(soft.sum(-1), 1, atol=1e-5)
    assert np.array_equal(hard, np.eye(3)[soft.argmax(-1)])
    assert np.allclose(hard.mean(0), probabilities, atol=0.03)


@pytest.mark.slow
def test_hard_gumbel_softmax_passes_the_soft_gradient():
    log_probs = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    weights = jnp.array([[1.0, 2.0, 5.0]])

    def loss(log_probs, hard):
        sample = dvae.gumbel_softmax(log_probs, 0.5, jax.random.key(0), hard=hard)
        return jnp.sum(sample * weights)

    soft, hard = (jax.grad(loss)(log_probs, hard) for hard in (False, True))
    assert relative_error(hard, soft) < 1e-6 and np.any(soft)


def test_transformer_equals_numpy(compiled, params):
    rng = np.random.default_rng(0)
    x, memory = rng.normal(size=(2, 5, WIDTH)), rng.normal(size=(2, 3, WIDTH))
    got = compiled(
        lambda m, x, y: m.decoder(x, y),
        *(jnp.asarray(v, jnp.float32) for v in (x, memory)),
    )
    for i in range(2):
        want = reference.transformer(x[i], memory[i], params["decoder"], heads=HEADS)
        assert relative_error(got[i], want) < FLOAT32


def test_decoder_is_causal_by_its_gradients(compiled, tokens):
    _, embedded, slots = tokens

    def reach(model, position, embedded, slots):
        def logits_at(embedded):
            return model.decode(embedded, slots)[0, position].sum()

        return jax.grad(logits_at)(embedded)[0]

    for position in (0, 6, 15):
        gradient = compiled(reach, jnp.int32(position), embedded[:, :-1], slots)
        seen = np.abs(np.asarray(gradient)).sum(-1) > 0
        assert np.array_equal(seen, np.arange(16) <= position)


def test_losses_are_sums_in_the_units_of_the_docstring(
    compiled, params, images, output
):
    """Cross-entropy and squared error from the tokens and the noise, in NumPy."""
    squared = (np.float64(images) - np.asarray(output.reconstruction)) ** 2
    assert relative_error(output.losses["mse"], squared.sum((1, 2, 3))) < FLOAT32

    def draws(model, images):
        # Which tokens and initial slots were drawn is the random number generator's
        # business; what they cost is not.
        key_tokens, key_slots = jax.random.split(jax.random.key(3), 5)[1:3]
        return (
            noise.categorical(key_tokens, model.dvae.encode(images)),
            model.slot_attention.initial(2, key_slots),
        )

    p = params
    for i, (drawn, start) in enumerate(zip(*compiled(draws, images), strict=True)):
        drawn = np.asarray(drawn).reshape(-1)
        tokens = np.concatenate([[0], drawn + 1])
        embedded = p["embedding"]["embedding"][tokens] + p["positions"]
        inputs = reference.mlp(
            reference.layer_norm(embedded[1:], p["encoder_norm"]), p["encoder_mlp"]
        )
        slots, _ = reference.slot_attention(
            inputs, np.float64(start), p["slot_attention"], iterations=8, heads=1
        )
        memory = reference.linear(slots, p["slot_projection"])
        features = reference.transformer(
            embedded[:-1], memory, p["decoder"], heads=HEADS
        )
        probabilities = reference.softmax(reference.linear(features, p["out"]), -1)
        want = -np.log(probabilities[np.arange(16), drawn]).sum()
        assert abs(output.losses["cross_entropy"][i] - want) < FLOAT32 * want


def test_transformer_loss_never_trains_the_dvae(compiled, images):
    def gradient(params, images):
        def cross_entropy(params):
            model = nnx.merge(compiled.graphdef, params)
            return losses(model, images, 0, True).losses["cross_entropy"].mean()

        return jax.grad(cross_entropy)(params)

    found = jax.jit(gradient)(compiled.params, images)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found["dvae"]))
    assert np.any(found["slot_attention"]["step"]["project_k"]["kernel"])


def test_noise_is_a_function_of_the_key(compiled, images, output):
    def cross_entropy(deterministic):
        return jax.jit(
            lambda params, key: losses(
                nnx.merge(compiled.graphdef, params), images, key, deterministic
            ).losses["cross_entropy"]
        )

    quiet, noisy = (
        [draw(compiled.params, key) for key in (3, 4)]
        for draw in (cross_entropy(True), cross_entropy(False))
    )
    assert relative_error(quiet[0], output.losses["cross_entropy"]) < FLOAT32
    assert not np.array_equal(quiet[0], quiet[1])
    assert not np.array_equal(quiet[0], noisy[0])
    assert not np.array_equal(noisy[0], noisy[1])


def test_reconstruction_renders_what_is_generated(compiled, images, tokens):
    image = compiled(lambda m, s: m.dvae.decode_ids(m.generate(s)), tokens[2])
    rendered = compiled(lambda m, x: m.reconstruct(x, key=jax.random.key(0)), images)
    assert np.allclose(rendered.slots, jnp.clip(image, 0, 1), atol=1e-5)
    assert rendered.dvae.shape == rendered.slots.shape == images.shape


def test_shapes_and_attention(output):
    assert output.attention.shape == (2, 3, 4, 4)
    assert np.allclose(output.attention.sum(1), 1, atol=1e-5)
    # The decoder's masks, which validation scores beside attention's.
    assert output.masks.shape == (2, 3, 4, 4)
    assert np.allclose(output.masks.sum(1), 1, atol=1e-5)
    assert output.reconstruction.shape == (2, RESOLUTION, RESOLUTION, 3)
    assert np.all(np.isfinite(output.stats.residual))


@pytest.mark.slow
def test_variants_start_from_the_same_parameters_and_give_the_same_values(
    compiled, images, output
):
    unrolled = section()
    unrolled.adjoint.name = "unrolled"
    unrolled.solver.max_steps = 8  # an implicit adjoint applies the step once more
    vanilla = Compiled(build_model(unrolled, resolution=RESOLUTION, seed=0))
    assert compiled.model.slot_attention.adjoint == Neumann(terms=1)
    assert compiled.model.slot_attention.solver == Picard(max_steps=7)
    assert vanilla.model.slot_attention.adjoint == Unrolled()
    got = vanilla(lambda m, x: losses(m, x, 3, True), images)
    for name, want in output.losses.items():
        assert relative_error(got.losses[name], want) < FLOAT32


@pytest.mark.slow
def test_smooth_positions_make_neighbours_alike():
    config = section(initial_positions="smooth", position_scale=0.5, width=32)
    table = initial(config)["positions"]
    assert table.std() == pytest.approx(0.5, rel=0.1)
    grid = table[1:].reshape(16, 16, 32)
    step = np.linalg.norm(grid[1:] - grid[:-1], axis=-1).mean()
    far = np.linalg.norm(grid[8:] - grid[:8], axis=-1).mean()
    assert step < 0.35 * far


def test_parameter_count_is_official_slates():
    """Counted by hand from the official layers, at its 3D Shapes defaults."""
    vocab, d, blocks, features = 1024, 192, 4, 64
    config = section(
        vocab_size=vocab,
        dvae_features=features,
        width=d,
        num_blocks=blocks,
        num_heads=4,
        slot_size=d,
        slot_mlp_size=d,
    )
    model: Any = nnx.eval_shape(lambda: build_model(config, resolution=64, seed=0))
    count = sum(leaf.size for leaf in jax.tree.leaves(split_model(model)[1]))

    def block(fan_in, fan_out):
        return fan_in * fan_out + 2 * fan_out

    encoder = block(48, 64) + 6 * block(64, 64) + 64 * vocab + vocab
    upsample = block(9 * 64, 64) + 2 * block(64, 64) + block(64, 256)
    decoder = block(vocab, 64) + 2 * upsample + 64 * 3 + 3
    norm, mlp = 2 * d, 2 * (d * d + d)
    step = 2 * norm + d * d + 2 * (3 * d * d + 3 * d) + mlp
    slots = norm + mlp + norm + 2 * d * d + step + 2 * d
    transformer = blocks * (3 * norm + 8 * d * d + 2 * 4 * d * d + 5 * d) + norm
    tokens = (vocab + 1) * d + 257 * d + d * d + d * vocab
    assert count == encoder + decoder + slots + transformer + tokens


@pytest.mark.slow
def test_initial_scales_are_official_slates():
    """Bounds of the uniform draws and spread of the normal ones, per tensor."""
    width, blocks = 64, 3
    config = section(
        width=width, num_blocks=blocks, vocab_size=512, slot_size=48, dvae_features=32
    )
    p = initial(config)
    gain = (3 * blocks) ** -0.5
    block = p["decoder"]["blocks"][1]
    xavier = np.sqrt(6 / (2 * width))
    bounds = [
        (block["self_attention"]["project_q"], xavier),
        (block["self_attention"]["project_o"], gain * xavier),
        (block["cross_attention"]["project_o"], gain * xavier),
        (block["mlp"]["enter"], np.sqrt(6 / width)),
        (block["mlp"]["leave"], gain * np.sqrt(6 / (5 * width))),
        (p["encoder_mlp"]["enter"], np.sqrt(6 / width)),
        (p["encoder_mlp"]["leave"], xavier),
        (p["slot_attention"]["step"]["project_k"], np.sqrt(6 / (width + 48))),
        (p["slot_projection"], np.sqrt(6 / (width + 48))),
        (p["out"], np.sqrt(6 / (width + 512))),
        (p["dvae"]["encoder"]["layers"][0]["convolution"], np.sqrt(6 / 48)),
        (p["dvae"]["encoder"]["layers"][7], np.sqrt(6 / (32 + 512))),
        (p["dvae"]["decoder"]["layers"][1]["convolution"], np.sqrt(6 / (9 * 32))),
    ]
    for layer, bound in bounds:
        assert bound * 0.97 < np.abs(layer["kernel"]).max() <= bound
        assert not np.any(layer.get("bias", 0))
    assert p["embedding"]["embedding"].std() == pytest.approx(1, rel=0.02)
    # A normal of σ = 1 cut at ±2 has a standard deviation of 0.88.
    assert p["positions"].std() == pytest.approx(0.88, rel=0.02)
    assert np.abs(p["positions"]).max() <= 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"name": "slaet"},
            "name must be one of autoencoder, feature_slots, set_prediction, slate, "
            "got 'slaet'",
        ),
        ({"initial_positions": "flat"}, "one of normal, smooth, got 'flat'"),
        ({"num_heads": 3}, "width must be a multiple of its heads, got 8 and 3"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"kernels": "flash"}, "kernels must be one of auto, xla, pallas, got 'flash'"),
        ({"solver": {"name": "newton"}}, "model.solver.name must be one of anderson"),
        ({"adjoint": {"name": "none"}}, "model.adjoint.name must be one of adaptive"),
        (
            {"adjoint": {"name": "implicit", "solver": {"name": "lu"}}},
            "model.adjoint.solver.name must be one of anderson, bicgstab",
        ),
        (
            {"solver": {"name": "anderson", "max_steps": 3}},
            r"config.model.solver: depth must be from 1 to max_steps \(3\), got 5",
        ),
        (
            {"solver": {"name": "broyden"}, "adjoint": {"name": "unrolled"}},
            "Broyden cannot be unrolled",
        ),
    ],
)
def test_misuse_is_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(section(**change), resolution=RESOLUTION, seed=0)


def test_image_size_must_be_divisible_by_four():
    with pytest.raises(ValueError, match="divisible by 4, got 18"):
        build_model(section(), resolution=18, seed=0)


@pytest.mark.slow
def test_decoder_dropout_needs_a_key():
    decoder = TransformerDecoder(
        1,
        WIDTH,
        HEADS,
        dropout=0.5,
        attention_dropout=0.5,
        kernels="xla",
        remat=False,
        rngs=nnx.Rngs(0),
    )
    x, memory = jnp.ones((1, 4, WIDTH)), jnp.ones((1, 2, WIDTH))
    assert np.array_equal(decoder(x, memory), decoder(x, memory))
    first, second = (decoder(x, memory, key=jax.random.key(s)) for s in (0, 1))
    assert not np.array_equal(first, second)
