"""Attention that keeps its weights in registers, for NVIDIA GPUs.

The plain path stores a matrix of [target, source] for every head about twenty times,
forward and backward: half of all bytes that a train step of SLATE moved. These kernels
go over it tile by tile (Dao 2023, arXiv 2307.08691) and make the dropout of the weights
inside, from the same hash of key and position, so that what is dropped is the same bit
for bit.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, UInt32

from implicit_slots.models import noise
from implicit_slots.models.kernels import tiles
from implicit_slots.models.kernels.split import over_batch

Heads = Float[Array, "batch _ heads head_dim"]
Words = tuple[UInt32[Array, "batch heads target"], UInt32[Array, " source"]]

# Queries, and keys, of a tile at most.
TILE = 64


class _Static(NamedTuple):
    """What kernels are built for, beside shapes."""

    rate: float
    causal: bool
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attend(
    q: Heads,
    k: Heads,
    v: Heads,
    words: Words | None,
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
    static = _Static(rate if words else 0.0, causal, interpret)
    read, log_sums = _read(static, bool(words))(q, k, v, *(words or ()))
    return read, (q, k, v, words, read, log_sums)


def _backward(rate, causal, interpret, kept, d_read):
    q, k, v, words, read, log_sums = kept
    static = _Static(rate if words else 0.0, causal, interpret)
    cotangents = _cotangents(static, bool(words))(
        q, k, v, read, log_sums, d_read.astype(q.dtype), *(words or ())
    )
    return *cotangents, None


attend.defvjp(_forward, _backward)


class _Problem(NamedTuple):
    """One head's attention: its lengths, and how it is cut."""

    target: int
    source: int
    head_dim: int
    static: _Static

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def wide(self) -> int:
        return tiles.side(self.head_dim, 256)

    @property
    def rows(self) -> int:
        return tiles.side(self.target, TILE)

    @property
    def columns(self) -> int:
        return tiles.side(self.source, TILE)

    def of_rows(self, start):
        return start, self.rows, self.target

    def of_columns(self, at):
        return at, self.columns, self.source

    @property
    def features(self):
        return 0, self.wide, self.head_dim

    def specs(self):
        """Blocks of queries, of keys, of a number a query and of a word a key."""
        target = tiles.padded(self.target, self.rows)
        source = tiles.padded(self.source, self.columns)

        def heads(length):
            shape = None, length, None, self.wide
            return pl.BlockSpec(shape, lambda i, h, b: (b, 0, h, 0))

        return (
            heads(target),
            heads(source),
            pl.BlockSpec((None, None, target), lambda i, h, b: (b, h, 0)),
            pl.BlockSpec((source,), lambda i, h, b: (0,)),
        )


def _problem(static, q, k):
    return _Problem(q.shape[1], k.shape[1], q.shape[3], static)


_WORDS = ", b h t, s"


@functools.cache
def _read(static, dropped):
    def run(q, k, v, *words):
        p = _problem(static, q, k)
        batch, _, heads, _ = q.shape
        rows, columns, numbers, key_words = p.specs()
        return pl.pallas_call(
            functools.partial(_read_kernel, p),
            grid=(pl.cdiv(p.target, p.rows), heads, batch),
            in_specs=[rows, columns, columns] + [numbers, key_words][: len(words)],
            out_specs=[rows, numbers],
            out_shape=[
                jax.ShapeDtypeStruct(q.shape, q.dtype),
                jax.ShapeDtypeStruct((batch, heads, p.target), jnp.float32),
            ],
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=static.interpret,
            name="attention",
        )(q, k, v, *words)

    rule = "b t h d, b s h d, b s h d" + (_WORDS if dropped else "")
    return over_batch(run, f"{rule} -> b t h d, b h t")


@functools.cache
def _cotangents(static, dropped):
    def run(q, k, v, read, log_sums, d_read, *words):
        p = _problem(static, q, k)
        batch, _, heads, _ = q.shape
        rows, columns, numbers, key_words = p.specs()
        blocks = max(pl.cdiv(p.target, p.rows), pl.cdiv(p.source, p.columns))
        return pl.pallas_call(
            functools.partial(_cotangents_kernel, p),
            grid=(blocks, heads, batch),
            in_specs=[rows, columns, columns, rows, numbers, rows]
            + [numbers, key_words][: len(words)],
            out_specs=[rows, columns, columns],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=static.interpret,
            name="attention_backward",
        )(q, k, v, read, log_sums, d_read, *words)

    rule = "b t h d, b s h d, b s h d, b t h d, b h t, b t h d"
    rule += _WORDS if dropped else ""
    return over_batch(run, f"{rule} -> b t h d, b s h d, b s h d")


def _read_kernel(p, q_ref, k_ref, v_ref, *refs):
    *word_refs, read_ref, log_sums_ref = refs
    start = pl.program_id(0) * p.rows
    q = _scaled(p, tiles.load_matrix(q_ref, p.of_rows(start), p.features))
    row_words = _row_words(p, word_refs, start)

    def add(j, carry):
        read, most, total = carry
        at = j * p.columns
        k, v, column_words = _load_columns(p, (k_ref, v_ref), word_refs, at)
        logits = _masked(p, tiles.dot(q, k.T), start, at)
        more = jnp.maximum(most, logits.max(axis=1))
        weights = jnp.exp(logits - more[:, None])
        shrunk = jnp.exp(most - more)
        total = total * shrunk + weights.sum(axis=1)
        weights = _dropped(p, weights, row_words, column_words).astype(v.dtype)
        return read * shrunk[:, None] + tiles.dot(weights, v), more, total

    zeros = jnp.zeros(p.rows, jnp.float32)
    empty = jnp.zeros((p.rows, p.wide), jnp.float32), zeros - jnp.inf, zeros
    read, most, total = jax.lax.fori_loop(0, _last(p, start), add, empty)
    read = read / total[:, None]
    tiles.store_matrix(read_ref, p.of_rows(start), p.features, read)
    tiles.store_vector(log_sums_ref, p.of_rows(start), most + jnp.log(total))


def _cotangents_kernel(p, *refs):
    *refs, dq_ref, dk_ref, dv_ref = refs
    q_ref, k_ref, v_ref, read_ref, log_sums_ref, d_read_ref, *word_refs = refs

    def load_rows(start):
        q, read, d_read = (
            tiles.load_matrix(ref, p.of_rows(start), p.features)
            for ref in (q_ref, read_ref, d_read_ref)
        )
        log_sums = tiles.load_vector(log_sums_ref, p.of_rows(start))
        means = (read.astype(jnp.float32) * d_read.astype(jnp.float32)).sum(axis=1)
        return _scaled(p, q), d_read, log_sums, means, _row_words(p, word_refs, start)

    def load_columns(at):
        return _load_columns(p, (k_ref, v_ref), word_refs, at)

    def meet(start, rows, at, columns):
        """The dropped weights of a tile, and the cotangents of its logits."""
        q, d_read, log_sums, means, row_words = rows
        k, v, column_words = columns
        logits = _masked(p, tiles.dot(q, k.T), start, at)
        weights = jnp.exp(logits - log_sums[:, None])
        # Rows beyond the last one have no sum.
        inside = start + jnp.arange(p.rows) < p.target
        weights = jnp.where(inside[:, None], weights, 0.0)
        dropped = _dropped(p, weights, row_words, column_words)
        d_weights = _dropped(p, tiles.dot(d_read, v.T), row_words, column_words)
        d_logits = weights * (d_weights - means[:, None])
        return dropped.astype(v.dtype), d_logits.astype(q.dtype)

    block = pl.program_id(0)

    @pl.when(block * p.columns < p.source)
    def _():
        at = block * p.columns
        columns = load_columns(at)

        def add(i, carry):
            dk, dv = carry
            rows = load_rows(i * p.rows)
            weights, d_logits = meet(i * p.rows, rows, at, columns)
            dv += tiles.dot(weights.T, rows[1])
            return dk + tiles.dot(d_logits.T, rows[0]), dv

        zeros = jnp.zeros((p.columns, p.wide), jnp.float32)
        first = at // p.rows if p.static.causal else 0
        last = pl.cdiv(p.target, p.rows)
        dk, dv = jax.lax.fori_loop(first, last, add, (zeros, zeros))
        tiles.store_matrix(dk_ref, p.of_columns(at), p.features, dk)
        tiles.store_matrix(dv_ref, p.of_columns(at), p.features, dv)

    @pl.when(block * p.rows < p.target)
    def _():
        start = block * p.rows
        rows = load_rows(start)

        def add(j, dq):
            columns = load_columns(j * p.columns)
            _, d_logits = meet(start, rows, j * p.columns, columns)
            return dq + tiles.dot(d_logits, columns[0])

        zeros = jnp.zeros((p.rows, p.wide), jnp.float32)
        dq = jax.lax.fori_loop(0, _last(p, start), add, zeros)
        tiles.store_matrix(dq_ref, p.of_rows(start), p.features, dq * p.scale)


def _scaled(p, q):
    # Rounded as the plain path rounds it.
    return (q * jnp.asarray(p.scale, q.dtype)).astype(q.dtype)


def _last(p, start):
    """How many tiles of keys the queries of a tile meet."""
    end = jnp.minimum(start + p.rows, p.source) if p.static.causal else p.source
    return pl.cdiv(end, p.columns)


def _load_columns(p, refs, word_refs, at):
    k, v = (tiles.load_matrix(ref, p.of_columns(at), p.features) for ref in refs)
    words = word_refs[1:]
    return k, v, tiles.load_vector(words[0], p.of_columns(at)) if words else None


def _row_words(p, refs, start):
    return tiles.load_vector(refs[0], p.of_rows(start)) if refs else None


def _masked(p, logits, start, at):
    columns = at + jnp.arange(p.columns)[None]
    seen = columns < p.source
    if p.static.causal:
        seen = seen & (start + jnp.arange(p.rows)[:, None] >= columns)
    return jnp.where(seen, logits, -jnp.inf)


def _dropped(p, x, row_words, column_words):
    if row_words is None:
        return x
    kept = noise.kept_of_grid(row_words, column_words, p.static.rate)
    return jnp.where(kept, x / (1 - p.static.rate), 0.0)
