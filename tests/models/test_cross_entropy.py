"""Cross-entropy against NumPy float64 and against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32, relative_error

from implicit_slots.models.cross_entropy import cross_entropy

pytestmark = pytest.mark.usefixtures("strict_promotion")

SHAPE = (3, 5, 11)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(4 * rng.normal(size=SHAPE), jnp.float32),
        jnp.asarray(rng.integers(0, SHAPE[-1], SHAPE[:-1])),
        jnp.asarray(rng.normal(size=SHAPE[:-1]), jnp.float32),
    )


def test_values_equal_numpy(arrays):
    logits, targets, _ = arrays
    probabilities = np.exp(np.float64(logits))
    probabilities /= probabilities.sum(-1, keepdims=True)
    chosen = np.take_along_axis(probabilities, np.asarray(targets)[..., None], -1)
    want = -np.log(chosen[..., 0])
    assert relative_error(cross_entropy(logits, targets), want) < FLOAT32
    # The largest logits of float32 overflow nothing.
    assert np.allclose(cross_entropy(logits + 1e4, targets), want, atol=1e-2)


def test_gradient_is_softmax_minus_one_hot(arrays):
    logits, targets, weights = arrays

    def by_jax(logits):
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, targets[..., None], -1)
        return -(chosen[..., 0] * weights).sum()

    got = jax.grad(lambda x: (cross_entropy(x, targets) * weights).sum())(logits)
    assert relative_error(got, jax.grad(by_jax)(logits)) < FLOAT32
    # A shift of all logits changes nothing, so each row of the gradient sums to zero.
    assert np.abs(np.asarray(got).sum(-1)).max() < 1e-5
