"""A layer that is applied until nothing changes, as an Equinox module.

python -m experiments.examples.with_equinox    (needs `pip install equinox`)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from implicit_slots import fixed_point


class Equilibrium(eqx.Module):
    """A GRU cell applied to its own state until it settles, and a linear read-out."""

    cell: eqx.nn.GRUCell
    out: eqx.nn.Linear

    def __init__(self, key):
        key_cell, key_out = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(4, 16, key=key_cell)
        self.out = eqx.nn.Linear(16, 1, key=key_out)

    def __call__(self, x):
        """Maps a batch of inputs."""
        params, static = eqx.partition(self.cell, eqx.is_array)

        def step(params, x, z):
            return jax.vmap(eqx.combine(params, static))(x, z)

        z = fixed_point(step, params, x, jnp.zeros((len(x), 16))).value
        return jax.vmap(self.out)(z)


def main(steps: int = 100) -> list[float]:
    """Fits a quadratic; returns the losses."""
    x = jax.random.normal(jax.random.key(0), (64, 4))
    y = jnp.sum(x**2, axis=1, keepdims=True) / 4
    model, optimizer = Equilibrium(jax.random.key(1)), optax.adam(1e-2)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state):
        value, gradient = eqx.filter_value_and_grad(
            lambda model: jnp.mean((model(x) - y) ** 2)
        )(model)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for _ in range(steps):
        model, state, value = step(model, state)
        losses.append(float(value))
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
