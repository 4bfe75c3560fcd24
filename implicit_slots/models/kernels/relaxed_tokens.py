"""The dVAE's relaxed tokens, from the encoder's last layer to the decoder's first.

Three arrays of [50, 576, 4096] lay between two matrices of 64 features: logits, noisy
logits, their softmax. Together the three steps are attention over the vocabulary, with
Gumbel noise on its logits, so that tile by tile none of them is stored; and the
decoder's targets, a second sample, fall off on the way.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, UInt32

from implicit_slots.models import noise
from implicit_slots.models.kernels import tiles
from implicit_slots.models.kernels.split import numbers, over_batch

ROWS, COLUMNS = 64, 64


class _Sizes(NamedTuple):
    length: int
    entering: int
    vocab: int
    leaving: int

    @property
    def wide_in(self) -> int:
        return tiles.side(self.entering, 256)

    @property
    def wide_out(self) -> int:
        return tiles.side(self.leaving, 256)


def _sizes(x, to_logits, of_tokens):
    entering, vocab = to_logits.shape
    return _Sizes(x.shape[1], entering, vocab, of_tokens.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def relax(
    x: Float[Array, "batch tokens entering"],
    to_logits: Float[Array, "entering vocab"],
    bias: Float[Array, " vocab"],
    of_tokens: Float[Array, "vocab leaving"],
    temperature: Float[Array, ""],
    seeds: UInt32[Array, "2 2"],
    interpret: bool = False,
) -> tuple[Float[Array, "batch tokens leaving"], Int[Array, "batch tokens"]]:
    """Returns softmax((ℓ + g) / τ) · of_tokens for ℓ = x · to_logits + bias.

    Args:
      x: what the last layer reads, in the precision of the products.
      to_logits: its kernel; gradients of parameters have their own precision.
      bias: its bias.
      of_tokens: the kernel of the layer that reads the tokens.
      temperature: τ, which gets no gradient.
      seeds: of the Gumbel noise g, as `noise.gumbel` draws it for all logits, and of
        the noise that a token is drawn with.
      interpret: run the kernels as JAX operations, on any device.

    Returns:
      What the reading layer makes, in x's precision; and an independent sample of the
      tokens: the largest of ℓ and noise of its own.
    """
    return _forward(x, to_logits, bias, of_tokens, temperature, seeds, interpret)[0]


def _forward(x, to_logits, bias, of_tokens, temperature, seeds, interpret):
    halves = [kernel.astype(x.dtype) for kernel in (to_logits, of_tokens)]
    temperature = jnp.asarray(temperature, jnp.float32)
    y, tokens, sums = _read(interpret)(
        x, halves[0], bias, halves[1], temperature[None], seeds, numbers(x)
    )
    kept = x, to_logits, bias, of_tokens, temperature, seeds, y, sums
    return (y, tokens), kept


def _backward(interpret, kept, cotangents):
    x, to_logits, bias, of_tokens, temperature, seeds, y, sums = kept
    halves = [kernel.astype(x.dtype) for kernel in (to_logits, of_tokens)]
    d_x, *parts = _cotangents(interpret)(
        x,
        halves[0],
        bias,
        halves[1],
        temperature[None],
        seeds,
        numbers(x),
        y,
        sums,
        cotangents[0],
    )
    of_examples = zip(parts, (to_logits, bias, of_tokens), strict=True)
    d_kernel, d_bias, d_tokens = (
        part.sum(axis=0).astype(whole.dtype) for part, whole in of_examples
    )
    return d_x, d_kernel, d_bias, d_tokens, jnp.zeros_like(temperature), None


relax.defvjp(_forward, _backward)


_RULE = "b t d, d v, v, v e, i, j k, b t"


@functools.cache
def _read(interpret):
    def run(x, to_logits, bias, of_tokens, *rest):
        s = _sizes(x, to_logits, of_tokens)
        specs = _specs(s)
        batch = len(x)
        return pl.pallas_call(
            functools.partial(_read_kernel, s),
            grid=(pl.cdiv(s.length, ROWS), batch),
            in_specs=specs.arguments,
            out_specs=[specs.leaving, specs.numbers, specs.numbers],
            out_shape=[
                jax.ShapeDtypeStruct((batch, s.length, s.leaving), x.dtype),
                jax.ShapeDtypeStruct((batch, s.length), jnp.int32),
                jax.ShapeDtypeStruct((batch, s.length), jnp.float32),
            ],
            compiler_params=tiles.triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name="relaxed_tokens",
        )(x, to_logits, bias, of_tokens, *rest)

    return over_batch(run, f"{_RULE} -> b t e, b t, b t")


@functools.cache
def _cotangents(interpret):
    def run(x, to_logits, bias, of_tokens, *rest):
        s = _sizes(x, to_logits, of_tokens)
        specs = _specs(s)
        batch = len(x)

        def of_examples(*shape):
            return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

        blocks = max(pl.cdiv(s.length, ROWS), pl.cdiv(s.vocab, COLUMNS))
        return pl.pallas_call(
            functools.partial(_cotangents_kernel, s),
            grid=(blocks, batch),
            in_specs=[
                *specs.arguments,
                specs.leaving,
                specs.numbers,
                specs.leaving,
            ],
            out_specs=[specs.entering, *specs.of_examples],
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype),
                of_examples(s.entering, s.vocab),
                of_examples(s.vocab),
                of_examples(s.vocab, s.leaving),
            ],
            compiler_params=tiles.triton.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
            name="relaxed_tokens_backward",
        )(x, to_logits, bias, of_tokens, *rest)

    return over_batch(run, f"{_RULE}, b t e, b t, b t e -> b t d, b d v, b v, b v e")


class _Specs(NamedTuple):
    arguments: list
    entering: pl.BlockSpec
    leaving: pl.BlockSpec
    numbers: pl.BlockSpec
    of_examples: list


def _specs(s: _Sizes) -> _Specs:
    length, vocab = tiles.padded(s.length, ROWS), tiles.padded(s.vocab, COLUMNS)

    def shared(*shape):
        return pl.BlockSpec(shape, lambda i, b: (0,) * len(shape))

    def of_example(*shape):
        return pl.BlockSpec((None, *shape), lambda i, b: (b, *(0,) * len(shape)))

    entering, leaving = (of_example(length, n) for n in (s.wide_in, s.wide_out))
    numbers = of_example(length)
    shapes = (s.wide_in, vocab), (vocab,), (vocab, s.wide_out)
    matrices = [shared(*shape) for shape in shapes]
    return _Specs(
        arguments=[entering, *matrices, shared(1), shared(2, 2), numbers],
        entering=entering,
        leaving=leaving,
        numbers=numbers,
        of_examples=[of_example(*shape) for shape in shapes],
    )


def _load_columns(s, refs, at):
    columns = at, COLUMNS, s.vocab
    return (
        tiles.load_matrix(refs[0], (0, s.wide_in, s.entering), columns),
        tiles.load_vector(refs[1], columns),
        tiles.load_matrix(refs[2], columns, (0, s.wide_out, s.leaving)),
    )


def _logits(s, x, numbers, kernel, bias, at):
    """A tile of logits, and the positions of its entries among all."""
    classes = at + jnp.arange(COLUMNS)
    logits = tiles.dot(x, kernel) + bias[None]
    logits = jnp.where((classes < s.vocab)[None], logits, -jnp.inf)
    positions = numbers[:, None] * jnp.uint32(s.vocab) + classes.astype(jnp.uint32)
    return logits, positions, classes


def _noisy(logits, positions, seed):
    return logits + noise.gumbel_of(noise.words_at(positions, *seed))


def _seed(seeds_ref, which):
    return seeds_ref[which, 0], seeds_ref[which, 1]


def _read_kernel(s, x_ref, *refs):
    *weights, temperature_ref, seeds_ref, numbers_ref = refs[:6]
    y_ref, tokens_ref, sums_ref = refs[6:]
    start = pl.program_id(0) * ROWS
    rows = start, ROWS, s.length
    x = tiles.load_matrix(x_ref, rows, (0, s.wide_in, s.entering))
    numbers = tiles.load_vector(numbers_ref, rows)
    temperature = temperature_ref[0]
    relaxed, drawn = _seed(seeds_ref, 0), _seed(seeds_ref, 1)

    def add(j, carry):
        y, most, total, best, token = carry
        kernel, bias, of_tokens = _load_columns(s, weights, j * COLUMNS)
        logits, positions, classes = _logits(s, x, numbers, kernel, bias, j * COLUMNS)
        noisy = _noisy(logits, positions, relaxed) / temperature
        more = jnp.maximum(most, noisy.max(axis=1))
        soft = jnp.exp(noisy - more[:, None])
        shrunk = jnp.exp(most - more)
        y = y * shrunk[:, None] + tiles.dot(soft.astype(x.dtype), of_tokens)
        total = total * shrunk + soft.sum(axis=1)
        other = _noisy(logits, positions, drawn)
        largest = other.max(axis=1)
        last = jnp.where(other == largest[:, None], classes[None], -1).max(axis=1)
        token = jnp.where(largest > best, last, token)
        return y, more, total, jnp.maximum(best, largest), token

    zeros = jnp.zeros(ROWS, jnp.float32)
    empty = (
        jnp.zeros((ROWS, s.wide_out), jnp.float32),
        zeros - jnp.inf,
        zeros,
        zeros - jnp.inf,
        jnp.zeros(ROWS, jnp.int32),
    )
    count = pl.cdiv(s.vocab, COLUMNS)
    y, most, total, _, token = jax.lax.fori_loop(0, count, add, empty)
    y = y / total[:, None]
    tiles.store_matrix(y_ref, rows, (0, s.wide_out, s.leaving), y)
    tiles.store_vector(tokens_ref, rows, token)
    tiles.store_vector(sums_ref, rows, most + jnp.log(total))


def _cotangents_kernel(s, x_ref, *refs):
    *weights, temperature_ref, seeds_ref, numbers_ref = refs[:6]
    y_ref, sums_ref, d_y_ref, d_x_ref, *of_weights = refs[6:]
    temperature, seed = temperature_ref[0], _seed(seeds_ref, 0)
    entering, leaving = (0, s.wide_in, s.entering), (0, s.wide_out, s.leaving)

    def load_rows(start):
        rows = start, ROWS, s.length
        x = tiles.load_matrix(x_ref, rows, entering)
        y, d_y = (tiles.load_matrix(ref, rows, leaving) for ref in (y_ref, d_y_ref))
        means = (y.astype(jnp.float32) * d_y.astype(jnp.float32)).sum(axis=1)
        sums, numbers = (
            tiles.load_vector(ref, rows) for ref in (sums_ref, numbers_ref)
        )
        inside = start + jnp.arange(ROWS) < s.length
        return x, d_y, means, sums, numbers, inside

    def meet(rows, columns, at):
        """A tile of the relaxed tokens, and of the cotangents of the logits."""
        x, d_y, means, sums, numbers, inside = rows
        kernel, bias, of_tokens = columns
        logits, positions, _ = _logits(s, x, numbers, kernel, bias, at)
        noisy = _noisy(logits, positions, seed) / temperature
        soft = jnp.where(inside[:, None], jnp.exp(noisy - sums[:, None]), 0.0)
        d_soft = tiles.dot(d_y, of_tokens.T)
        return soft, soft * (d_soft - means[:, None]) / temperature

    block = pl.program_id(0)

    @pl.when(block * ROWS < s.length)
    def _():
        start = block * ROWS
        rows = load_rows(start)

        def add(j, d_x):
            columns = _load_columns(s, weights, j * COLUMNS)
            _, d_logits = meet(rows, columns, j * COLUMNS)
            return d_x + tiles.dot(d_logits.astype(rows[0].dtype), columns[0].T)

        zeros = jnp.zeros((ROWS, s.wide_in), jnp.float32)
        d_x = jax.lax.fori_loop(0, pl.cdiv(s.vocab, COLUMNS), add, zeros)
        tiles.store_matrix(d_x_ref, (start, ROWS, s.length), entering, d_x)

    @pl.when(block * COLUMNS < s.vocab)
    def _():
        at = block * COLUMNS
        columns = _load_columns(s, weights, at)

        def add(i, carry):
            d_kernel, d_bias, d_tokens = carry
            rows = load_rows(i * ROWS)
            x, d_y = rows[:2]
            soft, d_logits = meet(rows, columns, at)
            d_kernel += tiles.dot(x.T, d_logits.astype(x.dtype))
            d_tokens += tiles.dot(soft.astype(x.dtype).T, d_y)
            return d_kernel, d_bias + d_logits.sum(axis=0), d_tokens

        empty = (
            jnp.zeros((s.wide_in, COLUMNS), jnp.float32),
            jnp.zeros(COLUMNS, jnp.float32),
            jnp.zeros((COLUMNS, s.wide_out), jnp.float32),
        )
        count = pl.cdiv(s.length, ROWS)
        d_kernel, d_bias, d_tokens = jax.lax.fori_loop(0, count, add, empty)
        of_kernel, of_bias, of_tokens = of_weights
        here = at, COLUMNS, s.vocab
        tiles.store_matrix(of_kernel, entering, here, d_kernel)
        tiles.store_vector(of_bias, here, d_bias)
        tiles.store_matrix(of_tokens, here, leaving, d_tokens)
