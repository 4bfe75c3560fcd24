"""Attention that keeps its weights on the chip: kernels in Pallas, for TPUs.

As `attention`, which is for GPUs: the same function, the same dropout bit for bit. A
program has one image with all its heads. A TPU's registers are 8 by 128, and a head of
24 features would waste four fifths of those 128: here the features of all heads come
in side by side, as the dense layers leave them, are turned once, and lie along the
eight, where any multiple of eight fits. Tiles are [source, target].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jaxtyping import Array, Float, UInt32

from implicit_slots.models import noise
from implicit_slots.models.kernels.split import on_each_device

Heads = Float[Array, "batch _ heads head_dim"]
Words = tuple[UInt32[Array, "batch heads target"], UInt32[Array, " source"]]

# Of a register; queries and keys of a tile.
LANES = 128


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

    See `attention.attend`. Causal attention has as many keys as queries.
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
    """An image's attention: its lengths, and how it is cut."""

    heads: int
    target: int
    source: int
    head_dim: int
    static: _Static

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def columns(self) -> int:
        """Keys of a tile."""
        return min(LANES, _round_up(self.source, 16))

    def turned(self, side, dtype):
        """Room for all of an image's queries (side 0) or keys (side 1)."""
        length = (self.padded_target, self.padded_source)[side]
        return tpu.VMEM((self.heads, self.head_dim, length), dtype)

    @property
    def tiles(self) -> int:
        """Tiles that have something to see."""
        rows, columns = self.padded_target // LANES, self.padded_source // self.columns
        return rows * (rows + 1) // 2 if self.static.causal else rows * columns

    @property
    def padded_target(self) -> int:
        return _round_up(self.target, LANES)

    @property
    def padded_source(self) -> int:
        return _round_up(self.source, self.columns)


def _problem(static, q, k):
    return _Problem(q.shape[2], q.shape[1], k.shape[1], q.shape[3], static)


_WORDS = ", b h t, s"


@functools.cache
def _read(static, dropped):
    def run(q, k, v, *words):
        p = _problem(static, q, k)
        numbers = jax.ShapeDtypeStruct((len(q), p.heads, p.padded_target), jnp.float32)
        scratch = [
            *(p.turned(*x) for x in ((0, q.dtype), (1, k.dtype), (1, v.dtype))),
            p.turned(0, jnp.float32),
            tpu.VMEM(numbers.shape[1:], jnp.float32),
        ]
        arrays = [_packed(x) for x in (q, k, v)]
        read, log_sums = _call(
            p, _read_kernel, arrays, words, [arrays[0], numbers], scratch, 2, 23
        )
        return read.reshape(q.shape), log_sums

    arrays = "b t h d, b s h d, b s h d" + _WORDS * dropped
    return on_each_device(run, f"{arrays} -> b t h d, b h u")


@functools.cache
def _cotangents(static, dropped):
    def run(q, k, v, read, log_sums, d_read, *words):
        p = _problem(static, q, k)
        full = jnp.float32
        kept = (0, q.dtype), (1, k.dtype), (1, v.dtype), (0, q.dtype)
        scratch = [
            *(p.turned(*x) for x in kept),
            tpu.VMEM(log_sums.shape[1:], full),
            *(p.turned(*x) for x in ((0, full), (1, full), (1, full))),
        ]
        q, k, v, read, d_read = map(_packed, (q, k, v, read, d_read))
        arrays = [q, k, v, read, d_read, log_sums]
        found = _call(p, _cotangents_kernel, arrays, words, [q, k, v], scratch, 5, 42)
        return tuple(x.reshape(*x.shape[:2], p.heads, p.head_dim) for x in found)

    arrays = "b t h d, b s h d, b s h d, b t h d, b h u, b t h d" + _WORDS * dropped
    return on_each_device(run, f"{arrays} -> b t h d, b s h d, b s h d")


def _call(p, kernel, arrays, words, results, scratch, products, a_tile):
    """Runs a kernel, an image at a time, and says what it costs.

    A tile's cycles are `a_tile` and 0.83 for each of its keys, and 360 entries come in
    or go out in one: so many instructions libtpu 0.0.41 has in its schedule for a v5e
    (written by LIBTPU_INIT_ARGS="--xla_jf_dump_to=… --xla_jf_dump_llo_text").
    """
    if words:
        rows, columns = words
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, p.padded_target - p.target)))
        words = rows, jnp.pad(columns, (0, p.padded_source - p.source))[None]

    def of_image(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda b: (b, 0, 0))

    specs = [of_image(x) for x in (*arrays, *words[:1])]
    specs += [pl.BlockSpec(x.shape, lambda b: (0, 0)) for x in words[1:]]
    images = len(arrays[0])
    tiles = images * p.heads * p.tiles
    moved = [*arrays, *results]
    cycles = tiles * (a_tile + 0.83 * p.columns) + sum(x.size for x in moved) / 360
    return pl.pallas_call(
        functools.partial(kernel, p),
        grid=(images,),
        in_specs=specs,
        out_specs=[of_image(x) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        scratch_shapes=[*scratch, tpu.VMEM((p.padded_source, LANES), jnp.uint32)],
        interpret=p.static.interpret,
        name=f"attention{kernel.__name__}",
        cost_estimate=pl.CostEstimate(
            flops=2 * products * tiles * LANES * p.columns * p.head_dim,
            transcendentals=tiles * LANES * p.columns,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        ),
        metadata={"kernel_cycles": str(round(cycles))},
    )(*arrays, *words)


def _packed(x):
    return x.reshape(*x.shape[:2], -1)


def _read_kernel(p, q_ref, k_ref, v_ref, *refs):
    *word_refs, read_ref, log_sums_ref, qs, ks, vs, reads, totals, columns = refs
    _turn(p, q_ref, qs, p.scale)
    _turn(p, k_ref, ks)
    _turn(p, v_ref, vs)
    _spread_column_words(word_refs, columns)
    reads[...] = jnp.zeros_like(reads)
    totals[...] = jnp.zeros_like(totals)
    # The largest logits so far, until the end.
    log_sums_ref[...] = jnp.full_like(log_sums_ref, -jnp.inf)

    def meet(rows, start, at):
        seen = _seen(p, start, at)

        def multiply(head):
            return _dot(ks[head, :, at], qs[head, :, rows], 0, 0)

        product = multiply(0)
        for head in range(p.heads):
            of_head = slice(head, head + 1)
            logits = jnp.where(seen, product, -jnp.inf)
            if head + 1 < p.heads:
                product = multiply(head + 1)
            most = log_sums_ref[of_head, rows]
            more = jnp.maximum(most, logits.max(axis=0, keepdims=True))
            weights = jnp.exp(logits - more)
            shrunk = jnp.exp(most - more)
            sums = weights.sum(axis=0, keepdims=True)
            totals[of_head, rows] = totals[of_head, rows] * shrunk + sums
            log_sums_ref[of_head, rows] = more
            if word_refs:
                kept = _kept(p, word_refs[0][of_head, rows], columns[at, :])
                weights = jnp.where(kept, weights, 0.0)
            read = _dot(vs[head, :, at], weights.astype(vs.dtype), 1, 0)
            reads[head, :, rows] = reads[head, :, rows] * shrunk + read

    _for_tiles(p, meet)
    scale = 1 / (totals[...] * (1 - p.static.rate))
    log_sums_ref[...] = log_sums_ref[...] + jnp.log(totals[...])
    _turn_back(p, reads, read_ref, scale[:, None])


def _cotangents_kernel(p, *refs):
    q_ref, k_ref, v_ref, read_ref, d_read_ref, log_sums_ref, *refs = refs
    *word_refs, dq_ref, dk_ref, dv_ref = refs[:-9]
    qs, ks, vs, d_reads, means, dqs, dks, dvs, columns = refs[-9:]
    # This one is not needed yet.
    _turn(p, read_ref, dqs)
    _turn(p, q_ref, qs, p.scale)
    _turn(p, k_ref, ks)
    _turn(p, v_ref, vs)
    _turn(p, d_read_ref, d_reads)
    _spread_column_words(word_refs, columns)
    # The dropout's scale is left to the end.
    means[...] = (dqs[...] * d_reads[...].astype(jnp.float32)).sum(axis=1)
    means[...] = means[...] * (1 - p.static.rate)
    for grads in (dqs, dks, dvs):
        grads[...] = jnp.zeros_like(grads)

    def meet(rows, start, at):
        seen = _seen(p, start, at)

        def multiply(head):
            q, d_read = qs[head, :, rows], d_reads[head, :, rows]
            k, v = ks[head, :, at], vs[head, :, at]
            return _dot(k, q, 0, 0), _dot(v, d_read, 0, 0)

        def add(head, dropped, d_logits):
            q, d_read = qs[head, :, rows], d_reads[head, :, rows]
            k = ks[head, :, at]
            dvs[head, :, at] += _dot(d_read, dropped, 1, 1)
            dks[head, :, at] += _dot(q, d_logits, 1, 1)
            dqs[head, :, rows] += _dot(k, d_logits, 1, 0)

        # The last head's, which wait while this one is weighed: so are products and
        # the rest of the work in one schedule.
        last = None
        products = multiply(0)
        for head in range(p.heads):
            logits, d_weights = products
            if head + 1 < p.heads:
                products = multiply(head + 1)
            of_head = slice(head, head + 1)
            logits = jnp.where(seen, logits, -jnp.inf)
            weights = jnp.exp(logits - log_sums_ref[of_head, rows])
            dropped = weights
            if word_refs:
                kept = _kept(p, word_refs[0][of_head, rows], columns[at, :])
                d_weights = jnp.where(kept, d_weights, 0.0)
                dropped = jnp.where(kept, weights, 0.0)
            d_logits = weights * (d_weights - means[of_head, rows])
            d_logits = d_logits.astype(qs.dtype)
            if last:
                add(*last)
            last = head, dropped.astype(qs.dtype), d_logits
        if last:
            add(*last)

    _for_tiles(p, meet)
    scale = 1 / (1 - p.static.rate)
    _turn_back(p, dqs, dq_ref, p.scale * scale)
    _turn_back(p, dks, dk_ref, scale)
    _turn_back(p, dvs, dv_ref, scale)


def _for_tiles(p, meet):
    """Calls `meet` with the queries and keys of each tile that are not all unseen."""

    def of_rows(i, _):
        start = pl.multiple_of(i * LANES, LANES)
        rows = pl.ds(start, LANES)

        def of_columns(j, _):
            at = pl.multiple_of(j * p.columns, p.columns)
            meet(rows, start, pl.ds(at, p.columns))
            return ()

        if p.padded_source == p.columns:
            meet(rows, start, pl.ds(0, p.columns))
            return ()
        last = i + 1 if p.static.causal else p.padded_source // p.columns
        jax.lax.fori_loop(0, last, of_columns, ())
        return ()

    jax.lax.fori_loop(0, p.padded_target // LANES, of_rows, ())


def _seen(p, start, at):
    """Which keys of a tile its queries see."""
    keys = at.start + jax.lax.broadcasted_iota(jnp.int32, (p.columns, LANES), 0)
    if p.static.causal:
        # Keys beyond the last one come after all queries.
        queries = jax.lax.broadcasted_iota(jnp.int32, (p.columns, LANES), 1)
        return keys <= start + queries
    return keys < p.source


def _kept(p, row_words, column_words):
    return noise.kept_of_words(column_words ^ row_words, p.static.rate)


def _turn(p, ref, turned, scale=None):
    """Writes [length, width] as [heads, head_dim, length], zeros beyond its length."""
    x = ref[...]
    if scale is not None:
        # Rounded as the plain path rounds it.
        x = (x * jnp.asarray(scale, x.dtype)).astype(x.dtype)
    x = x.astype(jnp.float32)
    missing = turned.shape[2] - len(x)
    if missing:
        x = jnp.concatenate([x, jnp.zeros((missing, p.width), x.dtype)])
    x = x.T.reshape(turned.shape)
    turned[...] = x.astype(turned.dtype)


def _turn_back(p, turned, ref, scale):
    x = (turned[...] * scale).reshape(p.width, -1).T
    ref[...] = x[: len(ref)].astype(ref.dtype)


def _spread_column_words(word_refs, columns):
    if word_refs:
        words = word_refs[1][...]
        columns[...] = jnp.broadcast_to(words, (LANES, words.shape[1])).T


def _dot(one, other, of_one, of_other):
    """Sums over an axis of each."""
    return jax.lax.dot_general(
        one,
        other,
        (((of_one,), (of_other,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _round_up(length, tile):
    return pl.cdiv(length, tile) * tile
