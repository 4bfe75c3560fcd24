"""Codes found before the first step: the same for every process, and kept."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import scenes
from implicit_slots.data import registry
from implicit_slots.models.build import build, split_model
from implicit_slots.models.dvae import patches
from implicit_slots.models.images import as_float
from implicit_slots.training.codebook import draw_patches, with_codebook
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import first_state


def smoke():
    config = scenes.get_config("smoke")
    config.data.cache = ""
    config.optimizer.ema_decay = 0.9
    return config


def test_drawn_patches_are_those_of_training_images():
    train = registry.build(smoke().data, "train")
    drawn = draw_patches(train, 40, seed=3)
    assert drawn.shape == (40, 48)
    assert np.array_equal(drawn, draw_patches(train, 40, seed=3))
    images = as_float(jnp.asarray(train.batch(np.arange(len(train)))["image"]))
    every = {row.tobytes() for row in np.asarray(patches(images)).reshape(-1, 48)}
    assert all(row.tobytes() in every for row in drawn)
    # No more than there are.
    assert len(draw_patches(train, 10**6, seed=3)) == 64 * 16


def test_codes_take_their_place_in_parameters_and_average():
    config = smoke()
    train = registry.build(config.data, "train")
    shapes = split_model(nnx.eval_shape(lambda: build(config)))[1]
    optimizer = build_optimizer(config.optimizer, shapes, num_steps=1)
    before = first_state(config, optimizer)
    after = with_codebook(before, train, seed=0)
    again = with_codebook(before, train, seed=0)
    for params in (after.params, after.ema):
        codes = np.asarray(params["dvae"]["codes"])
        assert np.array_equal(codes, again.params["dvae"]["codes"])
        assert not np.array_equal(codes, before.params["dvae"]["codes"])
        assert float(params["dvae"]["shares"].sum()) == np.float32(1)
    same = jax.tree.map(
        np.array_equal, before.params["decoder"], after.params["decoder"]
    )
    assert all(jax.tree.leaves(same))
    # Nearer to the images than any codes drawn at random.
    points = draw_patches(train, 500, seed=1)[:, None]

    def error(state):
        codes = np.asarray(state.params["dvae"]["codes"])
        return np.square(points - codes).sum(axis=-1).min(axis=-1).mean()

    assert error(after) < error(before) / 10
