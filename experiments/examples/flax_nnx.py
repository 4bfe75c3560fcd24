"""Slot attention in a Flax NNX model of one's own: points to clusters.

python -m experiments.examples.flax_nnx
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from implicit_slots import SlotAttention


class Clusters(nnx.Module):
    """Each point is told again by the slots that attend to it."""

    def __init__(self, rngs: nnx.Rngs):
        self.encode = nnx.Linear(2, 32, rngs=rngs)
        self.slots = SlotAttention(32, num_slots=3, slot_size=32, rngs=rngs)
        self.decode = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, points, key):
        """Maps points [batch, points, 2] to their reconstruction."""
        output = self.slots(self.encode(points), key=key)
        return jnp.einsum("bkn,bkd->bnd", output.attention, self.decode(output.slots))


def points(key, batch: int = 8):
    """Draws three clusters of ten points each."""
    key_centres, key_points = jax.random.split(key)
    centres = 2 * jax.random.normal(key_centres, (batch, 3, 1, 2))
    spread = 0.1 * jax.random.normal(key_points, (batch, 3, 10, 2))
    return (centres + spread).reshape(batch, 30, 2)


def main(steps: int = 200) -> list[float]:
    """Trains on a new batch every step; returns the losses."""
    model = Clusters(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key):
        x = points(key)
        value, gradient = nnx.value_and_grad(
            lambda model: jnp.mean((model(x, key) - x) ** 2)
        )(model)
        optimizer.update(model, gradient)
        return value

    return [float(step(model, optimizer, jax.random.key(i))) for i in range(steps)]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
