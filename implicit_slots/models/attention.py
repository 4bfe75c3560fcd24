"""Multi-head attention: over a whole sequence at once, or one token at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from implicit_slots.models import kernels as pallas
from implicit_slots.models import layers, noise, products
from implicit_slots.runtime.devices import platform
from implicit_slots.runtime.errors import InvalidValue

Heads = Float[Array, "batch _ heads head_dim"]
CachedHeads = Float[Array, "batch heads length head_dim"]

# Groups of queries in causal attention; see `MultiHeadAttention`.
CAUSAL_GROUPS = 4


class KeysValues(NamedTuple):
    """What is read from a memory, laid out as single tokens read it fastest."""

    keys: CachedHeads
    values: CachedHeads


class MultiHeadAttention(nnx.Module):
    """Attention without biases, with dropout on the weights.

    Args:
      width: features of queries, memory and output.
      num_heads: must divide `width`.
      attention_dropout: rate of the dropout on the weights.
      kernels: whether to use the kernel that never stores the weights; see
        `implicit_slots.models.kernels`.
      gain: of the output projection's Xavier-uniform initialiser.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        attention_dropout: float,
        kernels: str,
        gain: float,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1 or width % num_heads:
            raise InvalidValue(
                f"the transformer's width must be a multiple of its heads, got {width} "
                f"and {num_heads}"
            )
        if kernels not in pallas.KERNELS:
            raise InvalidValue(
                f"kernels must be one of {', '.join(pallas.KERNELS)}, got {kernels!r}"
            )
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.kernels = kernels
        self.project_q, self.project_k, self.project_v = (
            layers.Linear(width, width, bias=False, rngs=rngs) for _ in range(3)
        )
        self.project_o = layers.Linear(
            width,
            width,
            bias=False,
            kernel_init=layers.xavier_uniform(gain),
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "batch target dim"],
        memory: Float[Array, "batch source dim"] | None = None,
        *,
        seeds: UInt32[Array, "2 2"] | None = None,
    ) -> Float[Array, "batch target dim"]:
        """Reads `memory` from `x`; the result has the precision of the products.

        Without a memory it is causal self-attention: token t reads the tokens 0 … t.
        Without seeds there is no dropout.
        """
        source = x if memory is None else memory
        words = None
        if seeds is not None and self.attention_dropout > 0:
            shape = (len(x), self.num_heads, x.shape[1], source.shape[1])
            words = noise.grid_words(seeds[0], seeds[1], shape)
        if platform() == "tpu" and pallas.use_on_tpus(self.kernels, len(x)):
            from implicit_slots.models.kernels import attention_tpu

            read: jax.Array = attention_tpu.attend(
                *self._project(x, source),
                words,
                self.attention_dropout,
                memory is None,
            )
        elif pallas.use(self.kernels):
            read = self._attend_fused(x, memory, words)
        else:
            q, k, v = self._project(x, source)
            attend = self._attend_causally if memory is None else self._attend
            read = attend(q, k, v, words)
        return self.project_o(read.reshape(x.shape))

    def read(
        self,
        x: Float[Array, "batch target dim"],
        memory: Float[Array, "batch source dim"],
        present: Bool[Array, "batch source"] | None = None,
    ) -> tuple[Float[Array, "batch target dim"], Float[Array, "batch target source"]]:
        """Reads `memory` from `x` without dropout, and says from where.

        Args:
          x: what reads.
          memory: what is read.
          present: which entries of the memory are there, at least one; all if not
            given.

        Returns:
          What `__call__` returns, and the weights' mean over the heads.
        """
        q, k, v = self._project(x, memory)
        mask = None if present is None else present[:, None, None]
        weights = self._weigh(q, k, mask)
        read = products.product("bhts,bshd->bthd", weights.astype(v.dtype), v)
        output = self.project_o(read.reshape(x.shape)).astype(x.dtype)
        return output, weights.mean(axis=1)

    def remember(self, memory: Float[Array, "batch source dim"]) -> KeysValues:
        """Returns the keys and values of a memory, to `recall` from."""
        return KeysValues(
            self._split_heads(self.project_k(memory)).swapaxes(1, 2),
            self._split_heads(self.project_v(memory)).swapaxes(1, 2),
        )

    def recall(
        self,
        x: Float[Array, "batch dim"],
        known: KeysValues,
        present: Bool[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch dim"]:
        """Reads what is present of `known`, or all, from one token; no dropout."""
        seen = None if present is None else present[:, None]
        return self._recall(x, self._split_heads(self.project_q(x)), known, seen)

    def extend(
        self,
        x: Float[Array, "batch dim"],
        known: KeysValues,
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "batch dim"], KeysValues]:
        """Causal self-attention of the token at `position` alone; no dropout.

        Args:
          x: the token.
          known: of the tokens before it; what lies at or past the position is not read.
          position: from zero.

        Returns:
          What it reads, and `known` with the token's own keys and values.
        """
        q, k, v = self._project(x, x)
        put = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=2
        )
        known = KeysValues(
            put(known.keys, k[:, :, None]), put(known.values, v[:, :, None])
        )
        seen = (jnp.arange(known.keys.shape[2]) <= position)[None, None]
        return self._recall(x, q, known, seen), known

    def _recall(self, x, q, known, seen=None):
        logits = products.product("bhd,bhsd->bhs", q * q.shape[-1] ** -0.5, known.keys)
        if seen is not None:
            logits = jnp.where(seen, logits, -jnp.inf)
        weights = nnx.softmax(logits, axis=-1).astype(q.dtype)
        read = products.product("bhs,bhsd->bhd", weights, known.values)
        return self.project_o(read.reshape(x.shape)).astype(x.dtype)

    def _project(
        self, x: jax.Array, memory: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return (
            self._split_heads(self.project_q(x)),
            self._split_heads(self.project_k(memory)),
            self._split_heads(self.project_v(memory)),
        )

    def _attend_fused(
        self, x: jax.Array, memory: jax.Array | None, words: tuple | None
    ) -> jax.Array:
        from implicit_slots.models.kernels import attention as fused_attention

        q, k, v = self.project_q, self.project_k, self.project_v
        if memory is None:
            target, source = self._side_by_side(x, q, k, v), None
        else:
            target = self._side_by_side(x, q)
            source = self._side_by_side(memory, k, v)
        rate = self.attention_dropout
        return fused_attention.attend(target, source, words, rate, pallas.interpreted())

    def _side_by_side(self, x: jax.Array, *projections: layers.Linear) -> jax.Array:
        """What several projections make of x, by one product."""
        kernel = jnp.concatenate([one.kernel[...] for one in projections], axis=1)
        dtype = projections[0].dtype or kernel.dtype
        made = products.dense(x.reshape(-1, x.shape[-1]).astype(dtype), kernel)
        return made.reshape(*x.shape[:-1], len(projections), self.num_heads, -1)

    def _attend_causally(
        self, q: jax.Array, k: jax.Array, v: jax.Array, words: tuple | None
    ) -> jax.Array:
        """Attention in which position t sees 0 … t, in groups of queries.

        Each group meets only the keys up to its end: four groups save 3/8 of the work,
        and on a CPU that much time.
        """
        length = q.shape[1]
        groups = min(CAUSAL_GROUPS, length)
        ends = [length * (i + 1) // groups for i in range(groups)]
        read = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            past = jnp.tri(end - start, end, start, dtype=bool)
            of_group = None
            if words is not None:
                rows, columns = words
                of_group = rows[..., start:end], columns[:end]
            read.append(
                self._attend(
                    q[:, start:end], k[:, :end], v[:, :end], of_group, past[None, None]
                )
            )
        return jnp.concatenate(read, axis=1)

    def _attend(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        words: tuple | None,
        mask: Bool[Array, "#batch 1 #target source"] | None = None,
    ) -> Heads:
        weights = self._weigh(q, k, mask)
        if words is not None:
            rows, columns = words
            kept = noise.kept_of_grid(rows, columns, self.attention_dropout)
            weights = jnp.where(kept, weights / (1 - self.attention_dropout), 0)
        return products.product("bhts,bshd->bthd", weights.astype(v.dtype), v)

    def _weigh(self, q: Heads, k: Heads, mask: jax.Array | None) -> jax.Array:
        logits = products.product("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
        if mask is not None:
            logits = jnp.where(mask, logits, -jnp.inf)
        return nnx.softmax(logits, axis=-1)

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)
