"""A layer applied until nothing changes: Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp

from implicit_slots import fixed_point

x, z0 = jax.random.normal(jax.random.key(0), (64, 4)), jnp.zeros((64, 16))
y = jnp.sin(x.sum(axis=1))
cell = eqx.nn.GRUCell(4, 16, key=jax.random.key(1))
params, static = eqx.partition(cell, eqx.is_array)


def f(params, x, z):
    return jax.vmap(eqx.combine(params, static))(x, z)


def loss(params):
    z = fixed_point(f, params, x, z0).value  # z = f(params, x, z)
    return jnp.mean((z[:, 0] - y) ** 2)


gradient = jax.jit(jax.grad(loss))
print(f"loss {loss(params):.3f}")
for _ in range(100):
    params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient(params))
print(f"loss {loss(params):.3f}")
