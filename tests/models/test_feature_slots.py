"""Slots of frozen features: published sizes, laws of the mixture, what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import record_vit
from flax import nnx
from record_official import draw_weights

from configs import base, dinosaur_scenes
from implicit_slots.data.source import Source
from implicit_slots.models.build import build_model, count_parameters, split_model
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.weights import write_weights
from implicit_slots.training.frozen import (
    read_frozen,
    with_frozen,
    with_standardised,
)
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import initial_state

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def config():
    config = dinosaur_scenes.get_config("smoke")
    config.data.cache = ""
    return config


@pytest.fixture(scope="module")
def parts(config):
    """The model's structure, and parameters that nothing had to be compiled for."""
    built = nnx.eval_shape(lambda: build_model(config.model, resolution=16, seed=0))
    graphdef, shapes = split_model(built)
    generator = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.2 * generator.standard_normal(leaf.shape), leaf.dtype)

    return graphdef, jax.tree.map(draw, shapes)


@pytest.mark.slow
def test_parameters_are_the_published_models():
    """Of DINOSAUR on COCO with the MLP decoder: 12.0 million are trained."""
    config = base.feature_slots("test", base.scenes())
    built = nnx.eval_shape(lambda: build_model(config.model, resolution=224, seed=0))
    by_part = {n: count_parameters(part) for n, part in split_model(built)[1].items()}
    size = 256
    assert by_part == {
        "vit": 85_798_656,
        # LayerNorm, MLP.
        "encoder": 2 * 768 + 768 * 769 + size * 769,
        # Three LayerNorms, mean and scale, q k v, GRU of two biases, MLP.
        "slot_attention": 8 * size
        + 3 * size**2
        + 6 * size * (size + 1)
        + size * 1025
        + 1024 * 257,
        # Positions, three hidden layers, features and mask.
        "decoder": 196 * size + 2048 * (size + 1) + 2 * 2048 * 2049 + 769 * 2049,
    }


def test_masks_share_every_patch_out_and_mix_the_slots_features(parts):
    slots = jax.random.normal(jax.random.key(1), (2, 3, 16))

    @jax.jit
    def decode(slots, present=None):
        model = nnx.merge(*parts)
        return model.mix(slots, present=present), model.decoder(slots)

    (features, masks), alone = decode(slots)
    assert features.shape == (2, 16, 64) and masks.shape == (2, 3, 4, 4)
    np.testing.assert_allclose(masks.sum(axis=1), 1, atol=TOLERANCE)
    own, logits = (np.asarray(x, np.float64) for x in alone)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    mixed = (shares[..., None] * own).sum(axis=1)
    np.testing.assert_allclose(features, mixed, atol=TOLERANCE)
    # An absent slot is one that is not there.
    present = jnp.array([[True, False, True]] * 2)
    (left, _), (right, _) = decode(slots, present), decode(slots[:, ::2])
    np.testing.assert_allclose(left[0], right[0], atol=TOLERANCE)
    np.testing.assert_allclose(left[1][:, ::2], right[1], atol=TOLERANCE)


@pytest.mark.slow
def test_the_loss_is_the_features_squared_error_and_leaves_them_as_they_are(parts):
    """The gradient reaches everything but the transformer, and no update that."""
    graphdef, params = parts
    image = jax.random.uniform(jax.random.key(2), (2, 16, 16, 3))

    def loss(params, image):
        model = nnx.merge(graphdef, params)
        output = model({"image": image}, key=jax.random.key(0))
        slots = model.encode(image, key=jax.random.key(0)).slots
        made = model.mix(slots)[0]
        squares = jnp.square(model.vit(image) - made).mean(axis=(1, 2))
        return output.losses["feature_mse"].sum(), (output.losses, squares)

    (gradient, of_image), (losses, squares) = jax.jit(
        jax.grad(loss, argnums=(0, 1), has_aux=True)
    )(params, image)
    np.testing.assert_allclose(losses["feature_mse"], squares, rtol=TOLERANCE)
    assert not any(map(np.any, jax.tree.leaves((gradient.pop("vit"), of_image))))
    assert all(map(np.any, jax.tree.leaves(gradient)))
    settings = base.feature_slots("test", base.scenes()).optimizer
    optimizer = build_optimizer(settings, params, num_steps=4)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    changed = optax.apply_updates(params, updates)
    same = jax.tree.map(np.array_equal, changed, params)
    assert all(jax.tree.leaves(same["vit"]))
    assert not any(jax.tree.leaves([same[name] for name in same if name != "vit"]))


def test_a_run_begins_with_the_weights_of_the_users_file(
    config, parts, monkeypatch, tmp_path
):
    monkeypatch.setattr(record_vit, "WIDTH", 64)
    monkeypatch.setattr(record_vit, "DEPTH", 1)
    weights = draw_weights(record_vit.official_shapes("dino"))
    file = tmp_path / "weights.npz"
    write_weights(file, weights)
    config = config.copy_and_resolve_references()
    config.features.weights = str(file)
    graphdef, params = parts
    frozen = read_frozen(config, graphdef, params, tmp_path / "run")
    optimizer = build_optimizer(config.optimizer, params, num_steps=4)
    state = initial_state(params, optimizer, config.optimizer)
    begun = with_frozen(state, frozen)
    kernel = weights["blocks.0.attn.qkv.weight"].T
    assert np.array_equal(begun.params["vit"]["blocks"][0]["qkv"]["kernel"], kernel)
    assert begun.params["encoder"] is state.params["encoder"]
    # Nothing averages what nothing changes.
    config.optimizer.ema_decay = 0.5
    state = initial_state(params, optimizer, config.optimizer)
    assert state.ema.keys() == params.keys() - {"vit"}
    begun = with_frozen(state, frozen)
    assert np.array_equal(begun.evaluated["vit"]["blocks"][0]["qkv"]["kernel"], kernel)
    moved = begun._replace(ema=jax.tree.map(jnp.zeros_like, begun.ema))
    assert not np.any(moved.evaluated["encoder"]["enter"]["kernel"])
    assert jax.tree.structure(begun) == jax.tree.structure(state)
    file.unlink()
    with pytest.raises(UserError, match=r"weights\.npz cannot be read"):
        read_frozen(config, graphdef, params, tmp_path / "run")
    config.features.weights = ""
    assert read_frozen(config, graphdef, params, tmp_path / "run") is None
    config.model.vit = "dinov2_vits14"
    with pytest.raises(UserError, match=r"dinov2_vits14 are not .*\.weights=FILE"):
        read_frozen(config, graphdef, params, tmp_path / "run")
    # Checkpoints have them from then on.
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert read_frozen(config, graphdef, params, tmp_path / "run") is None


class Pictures(Source):
    """Images that differ in brightness and colour."""

    def __init__(self):
        generator = np.random.default_rng(1)
        shade = generator.uniform(0.2, 1, (12, 16, 16, 1))
        colour = generator.uniform(0.2, 1, (12, 1, 1, 3))
        self.images = (255 * shade * colour).astype(np.uint8)

    def __len__(self):
        return len(self.images)

    def batch(self, indices):  # noqa: D102
        return {"image": self.images[indices]}


def test_a_drawn_transformers_features_are_standardised_on_training_images(
    config, parts
):
    graphdef, params = parts
    # As a LayerNorm begins.
    norm = {"scale": jnp.ones(64), "bias": jnp.zeros(64)}
    params = params | {"vit": params["vit"] | {"norm": norm}}
    optimizer = build_optimizer(config.optimizer, params, num_steps=4)
    state = initial_state(params, optimizer, config.optimizer)
    after = with_standardised(state, graphdef, Pictures(), config)
    image = jnp.asarray(Pictures().images / 255, jnp.float32)
    features = jax.jit(lambda p: nnx.merge(graphdef, p).features(image))(after.params)
    np.testing.assert_allclose(features.mean(axis=(0, 1)), 0, atol=1e-4)
    np.testing.assert_allclose(features.std(axis=(0, 1)), 1, atol=1e-4)
    config = config.copy_and_resolve_references()
    config.model.vit = "dino_vits8"
    assert with_standardised(state, graphdef, Pictures(), config) is state
