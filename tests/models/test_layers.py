"""Layers against NumPy float64, and their initialisation against PyTorch's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from reference import FLOAT32, relative_error

from implicit_slots.models import layers
from implicit_slots.models.build import split_model

pytestmark = pytest.mark.usefixtures("strict_promotion")


def test_gru_cell_is_pytorchs():
    cell = layers.GRUCell(6, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    _, params = split_model(cell)
    # Zero biases would hide where the reset gate is applied.
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
    )
    nnx.update(cell, params)
    x, h = rng.normal(size=(2, 4, 6)).astype("f4")
    params = jax.tree.map(np.float64, params)
    want = reference.gru(np.float64(x), np.float64(h), params)
    assert relative_error(cell(jnp.asarray(x), jnp.asarray(h)), want) < FLOAT32


def test_gru_is_initialised_on_the_stacked_matrices():
    cell = layers.GRUCell(32, rngs=nnx.Rngs(0))
    recurrent = np.asarray(cell.recurrent.kernel[...])
    assert np.allclose(recurrent @ recurrent.T, np.eye(32), atol=1e-5)
    bound = np.sqrt(6 / (32 + 96))
    assert_uniform(cell.input.kernel[...], bound)
    biases = [cell.input.bias, cell.recurrent.bias]
    assert not any(np.any(jax.tree.leaves(bias)) for bias in biases)


@pytest.mark.parametrize(
    ("init", "bound"),
    [
        (layers.xavier_uniform(), np.sqrt(6 / (40 + 80))),
        (layers.xavier_uniform(0.5), 0.5 * np.sqrt(6 / (40 + 80))),
        (layers.kaiming_uniform, np.sqrt(6 / 40)),
    ],
)
def test_initialisers_have_pytorchs_bounds(init, bound):
    assert_uniform(init(jax.random.key(0), (40, 80)), bound)


def assert_uniform(values, bound):
    """Uniform in ±bound: extremes and standard deviation."""
    values = np.asarray(values)
    assert bound * 0.98 < np.abs(values).max() <= bound
    assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    assert abs(values.mean()) < 0.05 * bound


def test_layer_norm_uses_pytorchs_epsilon():
    norm = layers.LayerNorm(8)
    x = 1e-3 * np.random.default_rng(0).normal(size=(3, 8)).astype("f4")
    want = reference.layer_norm(np.float64(x), {"scale": 1, "bias": 0})
    assert relative_error(norm(jnp.asarray(x)), want) < FLOAT32


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    x = jnp.ones((200, 200))
    dropped = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert layers.dropout(x, 0.25, None) is x
