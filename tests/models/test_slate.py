"""SLATE's parts against NumPy float64, and the laws of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from ml_collections import ConfigDict
from reference import FLOAT32, relative_error

from configs import base
from implicit_slots.fixed_point import Neumann, Picard, Unrolled
from implicit_slots.models import dvae
from implicit_slots.models.build import build_model
from implicit_slots.models.slate import SLATE, with_bos
from implicit_slots.models.transformer import TransformerDecoder
from implicit_slots.training.state import split_model

pytestmark = pytest.mark.usefixtures("strict_promotion")

RESOLUTION, VOCAB, WIDTH, HEADS = 16, 7, 8, 2


def section(**changes) -> ConfigDict:
    config = base.get_config("test", base.scenes()).model
    config.update(
        vocab_size=VOCAB,
        dvae_features=4,
        width=WIDTH,
        num_blocks=2,
        num_heads=HEADS,
        num_slots=3,
        slot_size=6,
        slot_mlp_size=5,
    )
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def model() -> SLATE:
    return build_model(section(), resolution=RESOLUTION, seed=0)


@pytest.fixture(scope="module")
def params(model):
    return split_model(model)[1]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(size=(2, RESOLUTION, RESOLUTION, 3)), jnp.float32)


@pytest.fixture(scope="module")
def output(model, images):
    return model(images, temperature=1.0, key=jax.random.key(0), deterministic=True)


def test_dvae_encoder_equals_numpy(model, params, images):
    got = model.dvae.encode(images)
    assert np.allclose(jnp.exp(got).sum(-1), 1, atol=1e-5)
    for image, ours in zip(images, got, strict=True):
        want = reference.dvae_encode(np.float64(image), params["dvae"])
        assert relative_error(ours, want) < FLOAT32


def test_dvae_decoder_equals_numpy(model, params):
    z = np.random.default_rng(0).dirichlet(np.ones(VOCAB), size=(2, 4, 4))
    got = model.dvae.decode(jnp.asarray(z, jnp.float32))
    for tokens, ours in zip(z, got, strict=True):
        assert (
            relative_error(ours, reference.dvae_decode(tokens, params["dvae"]))
            < FLOAT32
        )


def test_decoding_ids_is_decoding_one_hot(model):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, size=(2, 4, 4)))
    one_hot = jnp.asarray(np.eye(VOCAB, dtype="f4")[ids])
    assert relative_error(model.dvae.decode_ids(ids), model.dvae.decode(one_hot)) < 1e-6


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
    tokens = dvae.sample_tokens(log_probs, jax.random.key(1))
    assert np.allclose(np.bincount(tokens) / 4000, probabilities, atol=0.03)


def test_hard_gumbel_softmax_passes_the_soft_gradient():
    log_probs = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    weights = jnp.array([[1.0, 2.0, 5.0]])

    def loss(log_probs, hard):
        sample = dvae.gumbel_softmax(log_probs, 0.5, jax.random.key(0), hard=hard)
        return jnp.sum(sample * weights)

    soft, hard = (jax.grad(loss)(log_probs, hard) for hard in (False, True))
    assert relative_error(hard, soft) < 1e-6 and np.any(soft)


def test_transformer_equals_numpy(model, params):
    rng = np.random.default_rng(0)
    x, memory = rng.normal(size=(2, 5, WIDTH)), rng.normal(size=(2, 3, WIDTH))
    got = model.decoder(*(jnp.asarray(v, jnp.float32) for v in (x, memory)))
    for i in range(2):
        want = reference.transformer(x[i], memory[i], params["decoder"], heads=HEADS)
        assert relative_error(got[i], want) < FLOAT32


def test_decoder_is_causal_by_its_gradients(model, images):
    ids = jnp.arange(16, dtype=jnp.int32).reshape(1, 16) % VOCAB
    embedded = model.embed(with_bos(ids))[:, :-1]
    slots = model.attend(model.embed(with_bos(ids))[:, 1:], jax.random.key(0)).slots

    def logits_at(position, embedded):
        return model.decode(embedded, slots)[0, position].sum()

    for position in (0, 6, 15):
        reach = jax.grad(logits_at, argnums=1)(position, embedded)[0]
        seen = np.abs(np.asarray(reach)).sum(-1) > 0
        assert np.array_equal(seen, np.arange(16) <= position)


def test_losses_are_sums_in_the_units_of_the_docstring(params, images):
    """Cross-entropy and squared error from the tokens and the noise, in NumPy."""
    model = build_model(section(), resolution=RESOLUTION, seed=0)
    key = jax.random.key(3)
    output = model(images, temperature=0.5, key=key, deterministic=True)
    squared = (np.float64(images) - np.asarray(output.reconstruction)) ** 2
    assert relative_error(output.losses["mse"], squared.sum((1, 2, 3))) < FLOAT32

    key_hard, key_slots = jax.random.split(key, 5)[1:3]
    p = params
    for i, image in enumerate(images):
        log_probs = reference.dvae_encode(np.float64(image), p["dvae"])
        # Which tokens were drawn is the random number generator's business; what
        # they cost is not.
        drawn = dvae.sample_tokens(model.dvae.encode(images), key_hard)[i].reshape(-1)
        assert log_probs.shape == (4, 4, VOCAB)
        tokens = np.concatenate([[0], np.asarray(drawn) + 1])
        embedded = p["embedding"]["embedding"][tokens] + p["positions"]
        inputs = reference.mlp(
            reference.layer_norm(np.float64(embedded[1:]), p["encoder_norm"]),
            p["encoder_mlp"],
        )
        start = model.slot_attention.initial(2, key_slots)[i]
        slots, _ = reference.slot_attention(
            inputs, np.float64(start), p["slot_attention"], iterations=8, heads=1
        )
        memory = reference.linear(slots, p["slot_projection"])
        features = reference.transformer(
            np.float64(embedded[:-1]), memory, p["decoder"], heads=HEADS
        )
        probabilities = reference.softmax(reference.linear(features, p["out"]), -1)
        want = -np.log(probabilities[np.arange(16), drawn]).sum()
        assert abs(output.losses["cross_entropy"][i] - want) < FLOAT32 * want


def test_transformer_loss_never_trains_the_dvae(model, images):
    graphdef, params = split_model(model)

    def cross_entropy(params):
        losses = nnx.merge(graphdef, params)(
            images, temperature=1.0, key=jax.random.key(0)
        ).losses
        return losses["cross_entropy"].mean()

    gradient = jax.grad(cross_entropy)(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["dvae"]))
    assert np.any(gradient["slot_attention"]["project_k"]["kernel"])


def test_noise_is_a_function_of_the_key(model, images):
    def losses(seed, deterministic):
        return model(
            images,
            temperature=1.0,
            key=jax.random.key(seed),
            deterministic=deterministic,
        ).losses["cross_entropy"]

    assert np.array_equal(losses(0, False), losses(0, False))
    assert not np.array_equal(losses(0, False), losses(1, False))
    assert not np.array_equal(losses(0, False), losses(0, True))


def test_generation_is_greedy_token_by_token(model, images):
    slots = model.reconstruct(images, key=jax.random.key(0))
    assert slots.slots.shape == images.shape
    ids = model.dvae.encode(images).argmax(-1).reshape(2, -1)
    found = model.attend(model.embed(with_bos(ids))[:, 1:], jax.random.key(0)).slots
    tokens = np.zeros((2, 1), np.int32)
    for _ in range(16):
        logits = model.decode(model.embed(jnp.asarray(tokens)), found)
        tokens = np.concatenate([tokens, logits[:, -1:].argmax(-1) + 1], axis=1)
    got = model.generate(found)
    assert np.array_equal(got.reshape(2, -1), tokens[:, 1:] - 1)
    assert np.allclose(
        slots.slots, jnp.clip(model.dvae.decode_ids(got), 0, 1), atol=1e-5
    )


def test_shapes_and_attention(output):
    assert output.attention.shape == (2, 3, 4, 4)
    assert np.allclose(output.attention.sum(1), 1, atol=1e-5)
    assert output.reconstruction.shape == (2, RESOLUTION, RESOLUTION, 3)
    assert np.all(np.isfinite(output.stats.residual))


def test_variants_start_from_the_same_parameters_and_give_the_same_values(images):
    implicit = build_model(section(), resolution=RESOLUTION, seed=0)
    unrolled = section()
    unrolled.adjoint.name = "unrolled"
    unrolled.solver.max_steps = 8  # an implicit adjoint applies the step once more
    vanilla = build_model(unrolled, resolution=RESOLUTION, seed=0)
    assert implicit.slot_attention.adjoint == Neumann(terms=1)
    assert vanilla.slot_attention.adjoint == Unrolled()
    assert implicit.slot_attention.solver == Picard(max_steps=7)
    losses = [
        model(images, temperature=1.0, key=jax.random.key(0)).losses["cross_entropy"]
        for model in (implicit, vanilla)
    ]
    assert relative_error(*losses) < FLOAT32


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
    model = nnx.eval_shape(lambda: build_model(config, resolution=64, seed=0))
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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "slaet"}, "model.name must be one of slate, got 'slaet'"),
        ({"num_heads": 3}, "width must be a multiple of its heads, got 8 and 3"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"solver": {"name": "newton"}}, "model.solver.name must be one of picard"),
        ({"adjoint": {"name": "none"}}, "must be one of neumann, unrolled"),
    ],
)
def test_misuse_is_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(section(**change), resolution=RESOLUTION, seed=0)


def test_image_size_must_be_divisible_by_four():
    with pytest.raises(ValueError, match="divisible by 4, got 18"):
        build_model(section(), resolution=18, seed=0)


def test_decoder_dropout_needs_a_key():
    decoder = TransformerDecoder(1, WIDTH, HEADS, dropout=0.5, rngs=nnx.Rngs(0))
    x, memory = jnp.ones((1, 4, WIDTH)), jnp.ones((1, 2, WIDTH))
    assert np.array_equal(decoder(x, memory), decoder(x, memory))
    first, second = (decoder(x, memory, key=jax.random.key(s)) for s in (0, 1))
    assert not np.array_equal(first, second)
