"""A layer applied until nothing changes: Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx

from implicit_slots import fixed_point

x, z0 = jax.random.normal(jax.random.key(0), (64, 4)), jnp.zeros((64, 16))
y = jnp.sin(x.sum(axis=1))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.u, self.w = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x, z):
        return jnp.tanh(self.u(x) + 0.5 * self.w(z))


graphdef, params = nnx.split(Layer(nnx.Rngs(0)))


def f(params, x, z):
    return nnx.merge(graphdef, params)(x, z)


def loss(params):
    z = fixed_point(f, params, x, z0).value  # z = f(params, x, z)
    return jnp.mean((z[:, 0] - y) ** 2)


gradient = jax.jit(jax.grad(loss))
print(f"loss {loss(params):.3f}")
for _ in range(100):
    params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient(params))
print(f"loss {loss(params):.3f}")
