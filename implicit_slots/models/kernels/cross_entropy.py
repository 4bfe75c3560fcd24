"""Cross-entropy over a large vocabulary whose logits are never stored.

The logits of SLATE's decoder, [50, 576, 4096], were written once and read a dozen
times, and their labels' gradient scattered. Here a tile of them is a product of small
matrices, made again wherever it is needed; their cotangents alone are stored, in the
precision that they are multiplied in.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from implicit_slots.models.kernels import tiles
from implicit_slots.models.kernels.split import over_batch
from implicit_slots.models.products import row_major

ROWS, COLUMNS, FEATURES = 64, 128, 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
    x: Float[Array, "batch tokens dim"],
    kernel: Float[Array, "dim vocab"],
    targets: Int[Array, "batch tokens"],
    interpret: bool = False,
) -> Float[Array, "batch tokens"]:
    """Returns −log softmax(x · kernel)[target], in nats, in float32.

    Args:
      x: features, in the precision of the product.
      kernel: of the last layer, whose gradient has its own precision.
      targets: the classes that are right.
      interpret: run the kernels as JAX operations, on any device.
    """
    return _forward(x, kernel, targets, interpret)[0]


def _forward(x, kernel, targets, interpret):
    sums, chosen = _losses(interpret)(x, kernel.astype(x.dtype), targets)
    return sums - chosen, (x, kernel, targets, sums)


def _backward(interpret, kept, d_loss):
    x, kernel, targets, sums = kept
    half = kernel.astype(x.dtype)
    (d_logits,) = _cotangents(interpret)(x, half, targets, sums, d_loss)
    rows = d_logits.reshape(-1, d_logits.shape[-1])
    d_x = (rows @ half.T).reshape(x.shape)
    d_kernel = jnp.einsum(
        "nd,nv->dv",
        x.reshape(len(rows), -1),
        rows,
        preferred_element_type=kernel.dtype,
    )
    return d_x, row_major(d_kernel), None


cross_entropy.defvjp(_forward, _backward)


@functools.cache
def _losses(interpret):
    def run(x, kernel, targets):
        batch, length, _ = x.shape
        numbers = _numbers(length)
        return pl.pallas_call(
            functools.partial(_losses_kernel, x.shape, kernel.shape),
            grid=(pl.cdiv(length, ROWS), batch),
            in_specs=[_features(x), _whole(kernel), numbers],
            out_specs=[numbers, numbers],
            out_shape=[jax.ShapeDtypeStruct((batch, length), jnp.float32)] * 2,
            compiler_params=tiles.triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name="cross_entropy",
        )(x, kernel, targets)

    return over_batch(run, "b t d, d v, b t -> b t, b t")


@functools.cache
def _cotangents(interpret):
    def run(x, kernel, targets, sums, d_loss):
        batch, length, _ = x.shape
        vocab = kernel.shape[1]
        numbers = _numbers(length)
        shape = tiles.padded(length, ROWS), tiles.padded(vocab, COLUMNS)
        return pl.pallas_call(
            functools.partial(_cotangents_kernel, x.shape, kernel.shape),
            grid=(pl.cdiv(length, ROWS), batch, pl.cdiv(vocab, COLUMNS)),
            in_specs=[_features(x), _whole(kernel), *[numbers] * 3],
            out_specs=[pl.BlockSpec((None, *shape), lambda i, b, j: (b, 0, 0))],
            out_shape=[jax.ShapeDtypeStruct((batch, length, vocab), x.dtype)],
            compiler_params=tiles.triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name="cross_entropy_backward",
        )(x, kernel, targets, sums, d_loss)

    return over_batch(run, "b t d, d v, b t, b t, b t -> b t v")


def _features(x):
    shape = tiles.padded(x.shape[1], ROWS), tiles.padded(x.shape[2], FEATURES)
    return pl.BlockSpec((None, *shape), lambda i, b, *_: (b, 0, 0))


def _whole(kernel):
    shape = (
        tiles.padded(kernel.shape[0], FEATURES),
        tiles.padded(kernel.shape[1], COLUMNS),
    )
    return pl.BlockSpec(shape, lambda *_: (0, 0))


def _numbers(length):
    shape = (None, tiles.padded(length, ROWS))
    return pl.BlockSpec(shape, lambda i, b, *_: (b, 0))


def _load_features(x_ref, start, length, dim):
    rows = start, ROWS, length
    return [
        tiles.load_matrix(x_ref, rows, (at, FEATURES, dim))
        for at in range(0, dim, FEATURES)
    ]


def _logits(x, kernel_ref, at, dim, vocab):
    """A tile of logits: minus infinity beyond the vocabulary."""
    columns = at, COLUMNS, vocab
    logits = jnp.zeros((ROWS, COLUMNS), jnp.float32)
    for index, part in enumerate(x):
        features = index * FEATURES, FEATURES, dim
        logits += tiles.dot(part, tiles.load_matrix(kernel_ref, features, columns))
    classes = at + jnp.arange(COLUMNS)[None]
    return jnp.where(classes < vocab, logits, -jnp.inf), classes


def _losses_kernel(shape, of_kernel, x_ref, kernel_ref, targets_ref, *out_refs):
    sums_ref, chosen_ref = out_refs
    (_, length, dim), vocab = shape, of_kernel[1]
    start = pl.program_id(0) * ROWS
    rows = start, ROWS, length
    x = _load_features(x_ref, start, length, dim)
    targets = tiles.load_vector(targets_ref, rows)

    def add(j, carry):
        most, total, chosen = carry
        logits, classes = _logits(x, kernel_ref, j * COLUMNS, dim, vocab)
        more = jnp.maximum(most, logits.max(axis=1))
        total = total * jnp.exp(most - more)
        total += jnp.exp(logits - more[:, None]).sum(axis=1)
        is_target = classes == targets[:, None]
        return more, total, chosen + jnp.where(is_target, logits, 0.0).sum(axis=1)

    zeros = jnp.zeros(ROWS, jnp.float32)
    empty = zeros - jnp.inf, zeros, zeros
    most, total, chosen = jax.lax.fori_loop(0, pl.cdiv(vocab, COLUMNS), add, empty)
    tiles.store_vector(sums_ref, rows, most + jnp.log(total))
    tiles.store_vector(chosen_ref, rows, chosen)


def _cotangents_kernel(shape, of_kernel, *refs):
    x_ref, kernel_ref, targets_ref, sums_ref, d_loss_ref, d_logits_ref = refs
    (_, length, dim), vocab = shape, of_kernel[1]
    start, at = pl.program_id(0) * ROWS, pl.program_id(2) * COLUMNS
    rows = start, ROWS, length
    targets, sums, d_loss = (
        tiles.load_vector(ref, rows) for ref in (targets_ref, sums_ref, d_loss_ref)
    )
    x = _load_features(x_ref, start, length, dim)
    logits, classes = _logits(x, kernel_ref, at, dim, vocab)
    d_logits = jnp.exp(logits - sums[:, None]) - jnp.where(
        classes == targets[:, None], 1.0, 0.0
    )
    tiles.store_matrix(
        d_logits_ref, rows, (at, COLUMNS, vocab), d_logits * d_loss[:, None]
    )
