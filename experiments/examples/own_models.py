"""The solver core and slot attention in models of your own, in four frameworks.

    python -m experiments.examples.own_models

Trains each in seconds and prints its loss; Equinox has to be installed. The first two
fit a wave with a layer that is applied until nothing changes. The other two find
clusters of points: each point is told again by the slots that attend to it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from implicit_slots import SlotAttention, fixed_point


def plain_jax():
    """Returns a loss of (parameters, key), and parameters to begin with."""

    def layer(params, x, z):
        return jnp.tanh(z @ params["w"] + x @ params["u"])

    def loss(params, key):
        x = jax.random.normal(key, (64, 4))
        z = fixed_point(layer, params, x, jnp.zeros((64, 16))).value
        return jnp.mean((z @ params["out"] - wave(x)) ** 2)

    shapes = {"w": (16, 16), "u": (4, 16), "out": (16, 1)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draw = {
        name: 0.2 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return loss, draw


def equinox():
    """The same with a GRU cell of Equinox."""
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0))
    modules = eqx.nn.GRUCell(4, 16, key=keys[0]), eqx.nn.Linear(16, 1, key=keys[1])
    arrays, static = eqx.partition(modules, eqx.is_array)

    def layer(cell, x, z):
        return jax.vmap(eqx.combine(cell, static[0]))(x, z)

    def loss(arrays, key):
        x = jax.random.normal(key, (64, 4))
        z = fixed_point(layer, arrays[0], x, jnp.zeros((64, 16))).value
        read_out = eqx.combine(arrays[1], static[1])
        return jnp.mean((jax.vmap(read_out)(z) - wave(x)) ** 2)

    return loss, arrays


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


def wave(x):
    """What is fitted: [batch, 4] to [batch, 1]."""
    return jnp.sin(jnp.sum(x, axis=1, keepdims=True))


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


EXAMPLES = (plain_jax, equinox, flax_nnx, flax_linen)

if __name__ == "__main__":
    for example in EXAMPLES:
        losses = train(*example())
        print(f"{example.__name__}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
