"""A layer applied until nothing changes: Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from implicit_slots import fixed_point

x, z0 = jax.random.normal(jax.random.key(0), (64, 4)), jnp.zeros((64, 16))
y = jnp.sin(x.sum(axis=1))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, z):
        return jnp.tanh(nn.Dense(16)(x) + 0.5 * nn.Dense(16)(z))


params = Layer().init(jax.random.key(1), x, z0)


def f(params, x, z):
    return Layer().apply(params, x, z)


def loss(params):
    z = fixed_point(f, params, x, z0).value  # z = f(params, x, z)
    return jnp.mean((z[:, 0] - y) ** 2)


gradient = jax.jit(jax.grad(loss))
print(f"loss {loss(params):.3f}")
for _ in range(100):
    params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient(params))
print(f"loss {loss(params):.3f}")
