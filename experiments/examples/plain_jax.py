"""A layer that is applied until nothing changes, in plain JAX: the solver core alone.

python -m experiments.examples.plain_jax
"""

import jax
import jax.numpy as jnp

from implicit_slots import fixed_point


def layer(params, x, z):
    """The map whose fixed point is the layer's output."""
    return jnp.tanh(z @ params["w"] + x @ params["u"])


@jax.value_and_grad
def loss(params, x, y):
    """Squared error of a linear read-out of the fixed point."""
    z = fixed_point(layer, params, x, jnp.zeros((len(x), 16))).value
    return jnp.mean((z @ params["out"] - y) ** 2)


def main(steps: int = 100) -> list[float]:
    """Fits a quadratic by gradient descent; returns the losses."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (64, 4))
    y = jnp.sum(x**2, axis=1, keepdims=True) / 4
    shapes = {"w": (16, 16), "u": (4, 16), "out": (16, 1)}
    params = {
        name: 0.2 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys[1:], shapes.items(), strict=True)
    }
    losses = []
    for _ in range(steps):
        value, gradient = jax.jit(loss)(params, x, y)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        losses.append(float(value))
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
