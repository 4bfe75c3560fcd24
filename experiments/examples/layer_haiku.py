"""A layer applied until nothing changes: Haiku, as any pair of pure functions."""

import haiku as hk  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp

from implicit_slots import fixed_point

x, z0 = jax.random.normal(jax.random.key(0), (64, 4)), jnp.zeros((64, 16))
y = jnp.sin(x.sum(axis=1))


def layer(x, z):
    return jnp.tanh(hk.Linear(16)(x) + 0.5 * hk.Linear(16)(z))


init, f = hk.without_apply_rng(hk.transform(layer))
params = init(jax.random.key(1), x, z0)


def loss(params):
    z = fixed_point(f, params, x, z0).value  # z = f(params, x, z)
    return jnp.mean((z[:, 0] - y) ** 2)


gradient = jax.jit(jax.grad(loss))
print(f"loss {loss(params):.3f}")
for _ in range(100):
    params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient(params))
print(f"loss {loss(params):.3f}")
