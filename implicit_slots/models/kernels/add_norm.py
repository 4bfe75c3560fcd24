"""A residual branch, its dropout, its addition and the norm of the sum, in one kernel.

XLA makes a dozen kernels of them and of their gradients, which read and write the
stream of residuals five times as often as they must.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt32

from implicit_slots.models import noise
from implicit_slots.models.kernels import tiles
from implicit_slots.models.kernels.split import numbers, over_batch

# Tokens of a program, and of those that it holds at a time.
TOKENS, ROWS = 64, 16


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def add_norm(
    x: Float[Array, "batch tokens dim"],
    branch: Float[Array, "batch tokens dim"],
    seed: UInt32[Array, "2"] | None,
    scale: Float[Array, " dim"],
    bias: Float[Array, " dim"],
    rate: float,
    epsilon: float,
    interpret: bool = False,
) -> tuple[Float[Array, "batch tokens dim"], Float[Array, "batch tokens dim"]]:
    """Returns x + dropout(branch), and its layer normalisation.

    Args:
      x: the stream of residuals, in float32.
      branch: what is added, in the precision of the products.
      seed: of the dropout, as `noise.keep_mask` takes it; None for none.
      scale: of the norm.
      bias: of the norm.
      rate: of the dropout.
      epsilon: of the norm.
      interpret: run the kernels as JAX operations, on any device.

    Returns:
      The sum in x's precision, the normalised one in the branch's.
    """
    return _forward(x, branch, seed, scale, bias, rate, epsilon, interpret)[0]


def _forward(x, branch, seed, scale, bias, rate, epsilon, interpret):
    run = _join(0.0 if seed is None else rate, epsilon, interpret)
    total, normed, means, roots = run(x, branch, _words(seed), numbers(x), scale, bias)
    return (total, normed), (total, branch[:0], seed, scale, means, roots)


def _backward(rate, epsilon, interpret, kept, cotangents):
    total, like_branch, seed, scale, means, roots = kept
    d_total, d_normed = cotangents
    rate = 0.0 if seed is None else rate
    run = _cotangents(rate, like_branch.dtype, interpret)
    d_x, d_branch, parts = run(
        total, _words(seed), numbers(total), scale, means, roots, d_total, d_normed
    )
    d_scale, d_bias = parts.sum(axis=(0, 1))
    return d_x, d_branch, None, d_scale, d_bias


add_norm.defvjp(_forward, _backward)


def _words(seed):
    return jnp.zeros(2, jnp.uint32) if seed is None else seed


def _specs(x):
    _, length, dim = x.shape
    padded, wide = tiles.padded(length, TOKENS), _wide(dim)
    return (
        pl.BlockSpec((None, padded, wide), lambda i, b: (b, 0, 0)),
        pl.BlockSpec((None, padded), lambda i, b: (b, 0)),
        pl.BlockSpec((2,), lambda i, b: (0,)),
        pl.BlockSpec((wide,), lambda i, b: (0,)),
    )


def _wide(dim):
    return tiles.side(dim, 4096)


@functools.cache
def _join(rate, epsilon, interpret):
    def run(x, branch, seed, numbers, scale, bias):
        stream, of_tokens, two, features = _specs(x)
        batch, length, _ = x.shape
        statistics = jax.ShapeDtypeStruct((batch, length), jnp.float32)
        return pl.pallas_call(
            functools.partial(_join_kernel, x.shape, rate, epsilon),
            grid=(pl.cdiv(length, TOKENS), batch),
            in_specs=[stream, stream, two, of_tokens, features, features],
            out_specs=[stream, stream, of_tokens, of_tokens],
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype),
                jax.ShapeDtypeStruct(x.shape, branch.dtype),
                statistics,
                statistics,
            ],
            compiler_params=tiles.triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name="add_norm",
        )(x, branch, seed, numbers, scale, bias)

    rule = "b t d, b t d, i, b t, d, d -> b t d, b t d, b t, b t"
    return over_batch(run, rule)


@functools.cache
def _cotangents(rate, branch_dtype, interpret):
    def run(total, seed, numbers, scale, means, roots, d_total, d_normed):
        stream, of_tokens, two, features = _specs(total)
        batch, length, dim = total.shape
        blocks = pl.cdiv(length, TOKENS)
        part = pl.BlockSpec((None, None, 2, _wide(dim)), lambda i, b: (b, i, 0, 0))
        return pl.pallas_call(
            functools.partial(_cotangents_kernel, total.shape, rate),
            grid=(blocks, batch),
            in_specs=[
                *(stream, two, of_tokens, features, of_tokens, of_tokens),
                *(stream, stream),
            ],
            out_specs=[stream, stream, part],
            out_shape=[
                jax.ShapeDtypeStruct(total.shape, total.dtype),
                jax.ShapeDtypeStruct(total.shape, branch_dtype),
                jax.ShapeDtypeStruct((batch, blocks, 2, dim), jnp.float32),
            ],
            compiler_params=tiles.triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name="add_norm_backward",
        )(total, seed, numbers, scale, means, roots, d_total, d_normed)

    rule = "b t d, i, b t, d, b t, b t, b t d, b t d -> b t d, b t d, b n j d"
    return over_batch(run, rule)


def _kept(shape, rate, seed_ref, numbers):
    dim = shape[2]
    columns = jnp.arange(_wide(dim)).astype(jnp.uint32)
    positions = numbers[:, None] * jnp.uint32(dim) + columns[None]
    words = noise.words_at(positions, seed_ref[0], seed_ref[1])
    return noise.is_kept(words, rate)


def _join_kernel(shape, rate, epsilon, x_ref, branch_ref, seed_ref, *refs):
    numbers_ref, scale_ref, bias_ref, total_ref, normed_ref, means_ref, roots_ref = refs
    _, length, dim = shape
    first = pl.program_id(0) * TOKENS
    features = 0, _wide(dim), dim
    scale, bias = (tiles.load_vector(ref, features) for ref in (scale_ref, bias_ref))
    inside = jnp.arange(_wide(dim))[None] < dim

    def join(i, nothing):
        rows = first + i * ROWS, ROWS, length
        x, branch = (
            tiles.load_matrix(ref, rows, features) for ref in (x_ref, branch_ref)
        )
        branch = branch.astype(jnp.float32)
        if rate:
            kept = _kept(shape, rate, seed_ref, tiles.load_vector(numbers_ref, rows))
            branch = jnp.where(kept, branch / (1 - rate), 0.0)
        total = x + branch
        means = total.sum(axis=1) / dim
        centred = jnp.where(inside, total - means[:, None], 0.0)
        roots = jax.lax.rsqrt((centred * centred).sum(axis=1) / dim + epsilon)
        normed = centred * roots[:, None] * scale[None] + bias[None]
        tiles.store_matrix(total_ref, rows, features, total)
        tiles.store_matrix(normed_ref, rows, features, normed)
        tiles.store_vector(means_ref, rows, means)
        tiles.store_vector(roots_ref, rows, roots)
        return nothing

    jax.lax.fori_loop(0, TOKENS // ROWS, join, 0)


def _cotangents_kernel(shape, rate, total_ref, seed_ref, *refs):
    numbers_ref, scale_ref, means_ref, roots_ref, d_total_ref, *refs = refs
    d_normed_ref, d_x_ref, d_branch_ref, parts_ref = refs
    _, length, dim = shape
    first = pl.program_id(0) * TOKENS
    features = 0, _wide(dim), dim
    scale = tiles.load_vector(scale_ref, features)
    inside = jnp.arange(_wide(dim))[None] < dim

    def add(i, parts):
        rows = first + i * ROWS, ROWS, length
        total, d_total, d_normed = (
            tiles.load_matrix(ref, rows, features).astype(jnp.float32)
            for ref in (total_ref, d_total_ref, d_normed_ref)
        )
        means, roots = (tiles.load_vector(ref, rows) for ref in (means_ref, roots_ref))
        white = jnp.where(inside, (total - means[:, None]) * roots[:, None], 0.0)
        scaled = d_normed * scale[None]
        along = (scaled * white).sum(axis=1) / dim
        centred = scaled - (scaled.sum(axis=1) / dim)[:, None] - white * along[:, None]
        d_x = d_total + centred * roots[:, None]
        tiles.store_matrix(d_x_ref, rows, features, d_x)
        if rate:
            kept = _kept(shape, rate, seed_ref, tiles.load_vector(numbers_ref, rows))
            d_x = jnp.where(kept, d_x / (1 - rate), 0.0)
        tiles.store_matrix(d_branch_ref, rows, features, d_x)
        of_scale, of_bias = parts
        return of_scale + (d_normed * white).sum(axis=0), of_bias + d_normed.sum(axis=0)

    zeros = jnp.zeros(_wide(dim), jnp.float32)
    parts = jax.lax.fori_loop(0, TOKENS // ROWS, add, (zeros, zeros))
    for index, part in enumerate(parts):
        inside = jnp.arange(_wide(dim)) < dim
        tiles.triton.store(
            parts_ref.at[jnp.int32(index), pl.ds(0, _wide(dim))], part, mask=inside
        )
