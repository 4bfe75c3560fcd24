"""What a loss can add so that the fixed point stays easy to find."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from implicit_slots.fixed_point import vectors
from implicit_slots.fixed_point.checks import whole


def jacobian_norm(
    f: Callable[[PyTree, PyTree, PyTree], PyTree],
    params: PyTree,
    x: PyTree,
    z: PyTree,
    key: Key[Array, ""],
    *,
    samples: int = 1,
) -> Float[Array, " batch"]:
    """Hutchinson's estimate of ‖J‖²_F, J = ∂f/∂z at z, per example.

    The mean of ‖εᵀJ‖² over standard normal ε: unbiased, one product with J per sample.
    Added to the loss it keeps J small and the solver quick (Bai et al. 2021, arXiv
    2106.14342, who divide by the number of entries of z and weigh by 0.1 to 1, on a
    share of the steps). Differentiable with respect to everything; they hold z
    constant: pass `jax.lax.stop_gradient(solution.value)`.

    Args:
      f: (params, x, z) -> z, without auxiliary output.
      params: pytree that is shared by the batch.
      x: pytree of inputs.
      z: where J is taken, each leaf with a leading batch axis.
      key: of the random directions.
      samples: how many directions are averaged; the standard deviation falls like
        1/√samples.

    Raises:
      ValueError: if `samples` is below one.
    """
    whole("samples", samples)
    fz, transpose = jax.vjp(lambda z: f(params, x, z), z)
    flat, unravel = vectors.ravel(fz)

    def square(key):
        direction = vectors.normal(key, flat)
        product, _ = vectors.ravel(transpose(unravel(direction))[0])
        return vectors.dot(product, product)

    return jnp.mean(jax.lax.map(square, jax.random.split(key, samples)), axis=0)


def coupling_norm(
    f: Callable[[PyTree, PyTree, PyTree], PyTree],
    params: PyTree,
    x: PyTree,
    z: Float[Array, "batch blocks dim"],
    key: Key[Array, ""],
    *,
    samples: int = 1,
) -> Float[Array, " batch"]:
    """Hutchinson's estimate of ‖J‖²_F without the blocks on J's diagonal, per example.

    J = ∂f/∂z at z, and its block (k, l) is what f's block k feels of z's block l, so
    this says how much the blocks of z depend on each other: zero where each goes its
    own way. A sample draws one block k and a standard normal ε on that block alone:
    the blocks l ≠ k of εᵀJ, squared, summed and times the number of blocks, are
    unbiased. A direction on all blocks at once would not do: a block of εᵀJ then sums
    over all k and the diagonal cannot be told apart.

    Args:
      f: (params, x, z) -> z, without auxiliary output.
      params: pytree that is shared by the batch.
      x: pytree of inputs.
      z: where J is taken; held constant or not as in `jacobian_norm`.
      key: of the blocks and directions, drawn for each example.
      samples: as in `jacobian_norm`.

    Raises:
      ValueError: if `samples` is below one.
    """
    whole("samples", samples)
    _, transpose = jax.vjp(lambda z: f(params, x, z), z)
    batch, blocks, _ = z.shape
    dtype = vectors.working_dtype(z)
    number = jnp.arange(blocks, dtype=jnp.int32)[:, None]

    def square(key):
        key_block, key_direction = jax.random.split(key)
        drawn = jax.random.randint(key_block, (batch, 1, 1), 0, blocks, jnp.int32)
        direction = vectors.normal(key_direction, z[:, :1].astype(dtype))
        own = number[None] == drawn
        (product,) = transpose(jnp.where(own, direction, 0).astype(z.dtype))
        others = jnp.where(own, 0, product.astype(dtype)).reshape(batch, -1)
        return blocks * vectors.dot(others, others)

    return jnp.mean(jax.lax.map(square, jax.random.split(key, samples)), axis=0)
