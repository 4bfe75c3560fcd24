"""Attention that keeps its weights in registers: kernels in Pallas, for NVIDIA GPUs.

The plain path stores a matrix of [target, source] for every head about twenty times,
forward and backward: half of all bytes that a train step of SLATE moved. These kernels
go over it tile by tile (Dao 2023, arXiv 2307.08691) and make the dropout of the weights
inside, from the same hash of key and position, so that what is dropped is the same bit
for bit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, UInt32

from implicit_slots.models import noise

Heads = Float[Array, "batch _ heads head_dim"]

# Queries and keys of a tile; its sides in a kernel are powers of two.
TILE = 64


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is known of the arrays when the kernels are built."""

    heads: int
    target: int
    source: int
    head_dim: int
    rate: float
    causal: bool

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def padded(self) -> int:
        """Features of a tile; Triton's products have 16 or more."""
        return max(16, pl.next_power_of_2(self.head_dim))

    @property
    def rows(self) -> int:
        """Queries of a tile."""
        return min(TILE, max(16, pl.next_power_of_2(self.target)))

    @property
    def columns(self) -> int:
        """Keys of a tile."""
        return min(TILE, max(16, pl.next_power_of_2(self.source)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attend(
    q: Heads,
    k: Heads,
    v: Heads,
    words: tuple[UInt32[Array, "batch heads target"], UInt32[Array, " source"]] | None,
    rate: float,
    causal: bool,
    interpret: bool = False,
) -> Heads:
    """Returns softmax(q kᵀ / √d) v, with dropout on the softmax.

    Args:
      q: queries.
      k: keys.
      v: values.
      words: of rows and columns, see `noise.grid_words`; None for no dropout.
      rate: of the dropout.
      causal: query t sees the keys 0 … t.
      interpret: run the kernels as JAX operations, on any device.
    """
    return _forward(q, k, v, words, rate, causal, interpret)[0]


def _forward(q, k, v, words, rate, causal, interpret):
    problem = _problem(q, k, rate if words is not None else 0.0, causal)
    read, log_sums = _run_forward(problem, interpret, q, k, v, *(words or ()))
    return read, (q, k, v, words, read, log_sums)


def _backward(rate, causal, interpret, kept, d_read):
    q, k, v, words, read, log_sums = kept
    problem = _problem(q, k, rate if words is not None else 0.0, causal)
    grads = _run_backward(
        problem, interpret, q, k, v, read, log_sums, d_read, *(words or ())
    )
    return *grads, None


attend.defvjp(_forward, _backward)


def _problem(q, k, rate, causal):
    return _Problem(q.shape[2], q.shape[1], k.shape[1], q.shape[3], rate, causal)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_forward(problem, interpret, q, k, v, *words):
    p = problem
    of_rows, of_columns, row_numbers, column_words = _specs(p)
    return pl.pallas_call(
        functools.partial(_forward_kernel, p),
        grid=(pl.cdiv(p.target, p.rows), p.heads, len(q)),
        in_specs=[of_rows, of_columns, of_columns]
        + [row_numbers, column_words][: len(words)],
        out_specs=[of_rows, row_numbers],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((len(q), p.heads, p.target), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention",
    )(q, k, v, *words)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_backward(problem, interpret, q, k, v, read, log_sums, d_read, *words):
    p = problem
    of_rows, of_columns, row_numbers, column_words = _specs(p)
    blocks = max(pl.cdiv(p.target, p.rows), pl.cdiv(p.source, p.columns))
    return pl.pallas_call(
        functools.partial(_backward_kernel, p),
        grid=(blocks, p.heads, len(q)),
        in_specs=[of_rows, of_columns, of_columns, of_rows, row_numbers, of_rows]
        + [row_numbers, column_words][: len(words)],
        out_specs=[of_rows, of_columns, of_columns],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention_backward",
    )(q, k, v, read, log_sums, d_read.astype(q.dtype), *words)


def _specs(p: _Problem):
    """One head's queries, its keys, a number of each query, a word of each key."""
    rows, columns = _round_up(p.target, p.rows), _round_up(p.source, p.columns)

    def of_head(length):
        return pl.BlockSpec(
            (None, length, None, p.padded), lambda i, h, b: (b, 0, h, 0)
        )

    return (
        of_head(rows),
        of_head(columns),
        pl.BlockSpec((None, None, rows), lambda i, h, b: (b, h, 0)),
        pl.BlockSpec((columns,), lambda i, h, b: (0,)),
    )


def _forward_kernel(p, q_ref, k_ref, v_ref, *refs):
    *word_refs, read_ref, log_sums_ref = refs
    start = pl.program_id(0) * p.rows
    q = _scaled(p, _rows(p, q_ref, start, p.rows, p.target))
    row_words = _row_words(p, word_refs, start)

    def add(j, carry):
        read, most, total = carry
        at = j * p.columns
        k, v = (_rows(p, x, at, p.columns, p.source) for x in (k_ref, v_ref))
        logits = _masked(p, pl.dot(q, k, trans_b=True), start, at)
        more = jnp.maximum(most, logits.max(axis=1))
        weights = jnp.exp(logits - more[:, None])
        shrunk = jnp.exp(most - more)
        total = total * shrunk + weights.sum(axis=1)
        weights = _dropped(p, weights, row_words, _column_words(p, word_refs, at))
        read = read * shrunk[:, None] + pl.dot(weights.astype(v.dtype), v)
        return read, more, total

    empty = (
        jnp.zeros((p.rows, p.padded), jnp.float32),
        jnp.full(p.rows, -jnp.inf, jnp.float32),
        jnp.zeros(p.rows, jnp.float32),
    )
    read, most, total = jax.lax.fori_loop(0, _last(p, start), add, empty)
    _store(p, read_ref, start, read / total[:, None], p.target)
    inside = start + jnp.arange(p.rows) < p.target
    at = pl.ds(start, p.rows)
    triton.store(log_sums_ref.at[at], most + jnp.log(total), mask=inside)


def _backward_kernel(p, *refs):
    *refs, dq_ref, dk_ref, dv_ref = refs
    q_ref, k_ref, v_ref, read_ref, log_sums_ref, d_read_ref, *word_refs = refs

    def of_rows(start):
        q, read, d_read = (
            _rows(p, x, start, p.rows, p.target) for x in (q_ref, read_ref, d_read_ref)
        )
        log_sums = _entries(log_sums_ref, start, p.rows, p.target)
        products = read.astype(jnp.float32) * d_read.astype(jnp.float32)
        means = products.sum(axis=1)
        return _scaled(p, q), d_read, log_sums, means, _row_words(p, word_refs, start)

    def of_columns(at):
        k, v = (_rows(p, x, at, p.columns, p.source) for x in (k_ref, v_ref))
        return k, v, _column_words(p, word_refs, at)

    def meet(start, rows, at, columns):
        """The dropped weights of a tile, and the cotangents of its logits."""
        q, d_read, log_sums, means, row_words = rows
        k, v, column_words = columns
        logits = _masked(p, pl.dot(q, k, trans_b=True), start, at)
        weights = jnp.exp(logits - log_sums[:, None])
        # Rows beyond the last one have no sum.
        inside = start + jnp.arange(p.rows) < p.target
        weights = jnp.where(inside[:, None], weights, 0.0)
        dropped = _dropped(p, weights, row_words, column_words)
        d_weights = pl.dot(d_read, v, trans_b=True)
        d_weights = _dropped(p, d_weights, row_words, column_words)
        d_logits = weights * (d_weights - means[:, None])
        return dropped.astype(v.dtype), d_logits.astype(q.dtype)

    block = pl.program_id(0)

    @pl.when(block * p.columns < p.source)
    def _():
        at = block * p.columns
        columns = of_columns(at)

        def add(i, carry):
            dk, dv = carry
            rows = of_rows(i * p.rows)
            weights, d_logits = meet(i * p.rows, rows, at, columns)
            dv = dv + pl.dot(weights, rows[1], trans_a=True)
            return dk + pl.dot(d_logits, rows[0], trans_a=True), dv

        zeros = jnp.zeros((p.columns, p.padded), jnp.float32)
        first = at // p.rows if p.causal else 0
        last = pl.cdiv(p.target, p.rows)
        dk, dv = jax.lax.fori_loop(first, last, add, (zeros, zeros))
        _store(p, dk_ref, at, dk, p.source)
        _store(p, dv_ref, at, dv, p.source)

    @pl.when(block * p.rows < p.target)
    def _():
        start = block * p.rows
        rows = of_rows(start)

        def add(j, dq):
            columns = of_columns(j * p.columns)
            _, d_logits = meet(start, rows, j * p.columns, columns)
            return dq + pl.dot(d_logits, columns[0])

        zeros = jnp.zeros((p.rows, p.padded), jnp.float32)
        dq = jax.lax.fori_loop(0, _last(p, start), add, zeros)
        _store(p, dq_ref, start, dq * p.scale, p.target)


def _scaled(p, q):
    # Rounded as the plain path rounds it.
    return (q * jnp.asarray(p.scale, q.dtype)).astype(q.dtype)


def _last(p, start):
    """How many tiles of keys the queries of a tile meet."""
    end = jnp.minimum(start + p.rows, p.source) if p.causal else p.source
    return pl.cdiv(end, p.columns)


def _features(p):
    return (jnp.arange(p.padded) < p.head_dim)[None]


def _rows(p, ref, start, size, length):
    """Loads rows of a matrix, zeros beyond its length."""
    inside = (start + jnp.arange(size) < length)[:, None] & _features(p)
    return triton.load(ref.at[pl.ds(start, size), :], mask=inside, other=0.0)


def _entries(ref, start, size, length):
    inside = start + jnp.arange(size) < length
    return triton.load(ref.at[pl.ds(start, size)], mask=inside, other=0)


def _store(p, ref, start, x, length):
    inside = (start + jnp.arange(len(x)) < length)[:, None] & _features(p)
    triton.store(ref.at[pl.ds(start, len(x)), :], x.astype(ref.dtype), mask=inside)


def _round_up(length, tile):
    return pl.cdiv(length, tile) * tile


def _row_words(p, refs, start):
    return _entries(refs[0], start, p.rows, p.target) if refs else None


def _column_words(p, refs, at):
    return _entries(refs[1], at, p.columns, p.source) if refs else None


def _masked(p, logits, start, at):
    columns = at + jnp.arange(p.columns)[None]
    seen = columns < p.source
    if p.causal:
        seen = seen & (start + jnp.arange(p.rows)[:, None] >= columns)
    return jnp.where(seen, logits, -jnp.inf)


def _dropped(p, x, row_words, column_words):
    if row_words is None:
        return x
    kept = noise.kept_of_grid(row_words, column_words, p.rate)
    return jnp.where(kept, x / (1 - p.rate), 0.0)
