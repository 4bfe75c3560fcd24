"""Slot attention in models of your own, in Flax NNX and in Flax Linen.

    python -m experiments.examples.own_models

Trains each in seconds and prints its loss. They find clusters of points: each point is
told again by the slots that attend to it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from implicit_slots import SlotAttention


class NNXClusters(nnx.Module):
    """Slot attention in Flax NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.encode = nnx.Linear(2, 32, rngs=rngs)
        self.slots = SlotAttention(32, num_slots=3, slot_size=32, rngs=rngs)
        self.decode = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, points, key):
        """Maps points [batch, points, 2] to their reconstruction."""
        output = self.slots(self.encode(points), key=key)
        return jnp.einsum("bkn,bkd->bnd", output.attention, self.decode(output.slots))


class LinenClusters(nn.Module):
    """Slot attention in Flax Linen, through `nnx.bridge`."""

    @nn.compact
    def __call__(self, points, key):
        """Maps points [batch, points, 2] to their reconstruction."""
        attend = nnx.bridge.to_linen(SlotAttention, 32, num_slots=3, slot_size=32)
        output = attend(nn.Dense(32)(points), key=key)
        return jnp.einsum("bkn,bkd->bnd", output.attention, nn.Dense(2)(output.slots))


def flax_nnx():
    """Returns a loss of (parameters, key), and parameters to begin with."""
    graphdef, params = nnx.split(NNXClusters(nnx.Rngs(0)))

    def loss(params, key):
        x = clusters(key)
        return jnp.mean((nnx.merge(graphdef, params)(x, key) - x) ** 2)

    return loss, params


def flax_linen():
    """The same of the Linen module."""
    model, key = LinenClusters(), jax.random.key(0)

    def loss(variables, key):
        x = clusters(key)
        told: Any = model.apply(variables, x, key)
        return jnp.mean((told - x) ** 2)

    return loss, model.init(key, clusters(key), key)


def clusters(key):
    """Draws [8, 30, 2] points: three clusters of ten in each of eight examples."""
    key_centres, key_points = jax.random.split(key)
    centres = 2 * jax.random.normal(key_centres, (8, 3, 1, 2))
    return (centres + 0.1 * jax.random.normal(key_points, (8, 3, 10, 2))).reshape(
        8, 30, 2
    )


def train(loss, params, steps: int = 200) -> list[float]:
    """Trains with Adam on new examples every step; returns the losses."""
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for i in range(steps):
        params, state, value = step(params, state, jax.random.key(i))
        losses.append(float(value))
    return losses


EXAMPLES = (flax_nnx, flax_linen)

if __name__ == "__main__":
    for example in EXAMPLES:
        losses = train(*example())
        print(f"{example.__name__}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
