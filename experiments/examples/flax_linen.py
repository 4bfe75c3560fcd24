"""The model of flax_nnx.py in Flax Linen, through `nnx.bridge`.

python -m experiments.examples.flax_linen
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.examples.flax_nnx import points
from implicit_slots import SlotAttention


class Clusters(nn.Module):
    """Each point is told again by the slots that attend to it."""

    @nn.compact
    def __call__(self, points, key):
        """Maps points [batch, points, 2] to their reconstruction."""
        attend = nnx.bridge.to_linen(SlotAttention, 32, num_slots=3, slot_size=32)
        output = attend(nn.Dense(32)(points), key=key)
        return jnp.einsum("bkn,bkd->bnd", output.attention, nn.Dense(2)(output.slots))


def main(steps: int = 200) -> list[float]:
    """Trains on a new batch every step; returns the losses."""
    model, optimizer, key = Clusters(), optax.adam(2e-3), jax.random.key(0)
    variables = model.init(key, points(key), key)
    state = optimizer.init(variables)

    @jax.jit
    def step(variables, state, key):
        x = points(key)

        def loss(variables):
            told: Any = model.apply(variables, x, key)
            return jnp.mean((told - x) ** 2)

        value, gradient = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state, value

    losses = []
    for i in range(steps):
        variables, state, value = step(variables, state, jax.random.key(i))
        losses.append(float(value))
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
