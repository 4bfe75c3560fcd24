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
from jaxtyping import Array, Float, UInt32

from implicit_slots.models import noise
from implicit_slots.models.kernels import tiles
from implicit_slots.models.kernels.split import over_batch

Words = tuple[UInt32[Array, "batch heads target"], UInt32[Array, " source"]]

# Queries, and keys, of a tile at most.
TILE = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend(
    target: Float[Array, "batch target parts heads head_dim"],
    source: Float[Array, "batch source 2 heads head_dim"] | None,
    words: Words | None,
    rate: float,
    interpret: bool = False,
) -> Float[Array, "batch target heads head_dim"]:
    """Returns softmax(q kᵀ / √d) v, with dropout on the softmax.

    Queries, keys and values come as one product of matrices makes them, side by side.

    Args:
      target: the queries q. Without a source q, k and v, and query t sees the keys
        0 … t.
      source: keys k and values v, all of which a query sees.
      words: of rows and columns, see `noise.grid_words`; None for no dropout.
      rate: of the dropout.
      interpret: run the kernels as JAX operations, on any device.
    """
    return _forward(target, source, words, rate, interpret)[0]


def _forward(target, source, words, rate, interpret):
    static = _static(source, words, rate, interpret)
    arrays = [target] if source is None else [target, source]
    read, log_sums = _read(static)(*arrays, *(words or ()))
    return read, (target, source, words, read, log_sums)


def _backward(rate, interpret, kept, d_read):
    target, source, words, read, log_sums = kept
    static = _static(source, words, rate, interpret)
    arrays = [target] if source is None else [target, source]
    d_target, *d_source = _cotangents(static)(
        *arrays, read, log_sums, d_read.astype(read.dtype), *(words or ())
    )
    return d_target, d_source[0] if d_source else None, None


attend.defvjp(_forward, _backward)


class _Static(NamedTuple):
    """What kernels are built for, beside shapes."""

    rate: float
    causal: bool
    dropped: bool
    interpret: bool

    def rule(self, *others):
        """Axes of the arguments, see `over_batch`."""
        arrays = ["b t n h d"] if self.causal else ["b t n h d", "b s m h d"]
        words = ["b h t", "s"] if self.dropped else []
        return ", ".join([*arrays, *others, *words])


def _static(source, words, rate, interpret):
    dropped = words is not None
    return _Static(rate if dropped else 0.0, source is None, dropped, interpret)


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

    def parts(self, refs):
        """Where queries, keys and values lie: an array, and which of its parts."""
        if self.static.causal:
            return [(refs[0], part) for part in range(3)]
        return [(refs[0], 0), (refs[1], 0), (refs[1], 1)]

    def specs(self):
        """Blocks of the arrays, of what is read, of words and of a number a query."""
        target = tiles.padded(self.target, self.rows)
        source = tiles.padded(self.source, self.columns)

        def heads(*shape):
            zeros = (0,) * (len(shape) - 1)
            return pl.BlockSpec(
                (None, *shape, None, self.wide),
                lambda i, h, b: (b, 0, *zeros, h, 0),
            )

        numbers = pl.BlockSpec((None, None, target), lambda i, h, b: (b, h, 0))
        arrays = [heads(target, 3)]
        if not self.static.causal:
            arrays = [heads(target, 1), heads(source, 2)]
        words = []
        if self.static.dropped:
            words = [numbers, pl.BlockSpec((source,), lambda i, h, b: (0,))]
        return arrays, heads(target), words, numbers


def _problem(static, target, *others):
    length = target.shape[1]
    source = length if static.causal else others[0].shape[1]
    return _Problem(length, source, target.shape[4], static)


@functools.cache
def _read(static):
    def run(*inputs):
        p = _problem(static, *inputs)
        batch, _, _, heads, dim = inputs[0].shape
        arrays, rows, words, numbers = p.specs()
        return pl.pallas_call(
            functools.partial(_read_kernel, p),
            grid=(pl.cdiv(p.target, p.rows), heads, batch),
            in_specs=[*arrays, *words],
            out_specs=[rows, numbers],
            out_shape=[
                jax.ShapeDtypeStruct((batch, p.target, heads, dim), inputs[0].dtype),
                jax.ShapeDtypeStruct((batch, heads, p.target), jnp.float32),
            ],
            compiler_params=tiles.triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=static.interpret,
            name="attention",
        )(*inputs)

    return over_batch(run, f"{static.rule()} -> b t h d, b h t")


@functools.cache
def _cotangents(static):
    def run(*inputs):
        p = _problem(static, *inputs)
        batch, _, _, heads, _ = inputs[0].shape
        arrays, rows, words, numbers = p.specs()
        blocks = max(pl.cdiv(p.target, p.rows), pl.cdiv(p.source, p.columns))
        return pl.pallas_call(
            functools.partial(_cotangents_kernel, p),
            grid=(blocks, heads, batch),
            in_specs=[*arrays, rows, numbers, rows, *words],
            out_specs=arrays,
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[: len(arrays)]
            ],
            compiler_params=tiles.triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=static.interpret,
            name="attention_backward",
        )(*inputs)

    rule = static.rule("b t h d", "b h t", "b t h d")
    return over_batch(
        run, f"{rule} -> {_Static(0, static.causal, False, False).rule()}"
    )


def _read_kernel(p, *refs):
    *refs, read_ref, log_sums_ref = refs
    word_refs = refs[-2:] if p.static.dropped else ()
    q_part, *key_parts = p.parts(refs)
    start = pl.program_id(0) * p.rows
    q = _scaled(p, _load(p, q_part, p.of_rows(start)))
    row_words = _row_words(p, word_refs, start)

    def add(j, carry):
        read, most, total = carry
        at = j * p.columns
        k, v, column_words = _load_columns(p, key_parts, word_refs, at)
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
    count = 1 if p.static.causal else 2
    q_part, *key_parts = p.parts(refs[:count])
    dq_part, dk_part, dv_part = p.parts(refs[-count:])
    read_ref, log_sums_ref, d_read_ref, *word_refs = refs[count:-count]

    def load_rows(start):
        rows = p.of_rows(start)
        q = _load(p, q_part, rows)
        read, d_read = (
            tiles.load_matrix(ref, rows, p.features) for ref in (read_ref, d_read_ref)
        )
        log_sums = tiles.load_vector(log_sums_ref, p.of_rows(start))
        means = (read.astype(jnp.float32) * d_read.astype(jnp.float32)).sum(axis=1)
        return _scaled(p, q), d_read, log_sums, means, _row_words(p, word_refs, start)

    def load_columns(at):
        return _load_columns(p, key_parts, word_refs, at)

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
        _store(p, dk_part, p.of_columns(at), dk)
        _store(p, dv_part, p.of_columns(at), dv)

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
        _store(p, dq_part, p.of_rows(start), dq * p.scale)


def _load(p, part, rows):
    return tiles.load_matrix(part[0], rows, p.features, part[1])


def _store(p, part, rows, x):
    tiles.store_matrix(part[0], rows, p.features, x, part[1])


def _scaled(p, q):
    # Rounded as the plain path rounds it.
    return (q * jnp.asarray(p.scale, q.dtype)).astype(q.dtype)


def _last(p, start):
    """How many tiles of keys the queries of a tile meet."""
    end = jnp.minimum(start + p.rows, p.source) if p.static.causal else p.source
    return pl.cdiv(end, p.columns)


def _load_columns(p, parts, word_refs, at):
    k, v = (_load(p, part, p.of_columns(at)) for part in parts)
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
