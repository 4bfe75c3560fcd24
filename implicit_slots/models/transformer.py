"""The autoregressive transformer decoder of SLATE."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from implicit_slots.models import layers

Heads = Float[Array, "batch _ heads head_dim"]

# Groups of queries in causal attention; see `MultiHeadAttention`.
CAUSAL_GROUPS = 4


class MultiHeadAttention(nnx.Module):
    """Attention without biases; dropout on the weights and on the output.

    Args:
      width: features of queries, memory and output.
      num_heads: must divide `width`.
      dropout: rate of both dropouts.
      gain: of the output projection's Xavier-uniform initialiser.
      rngs: source of the initial parameters.
    """

    def __init__(
        self, width: int, num_heads: int, *, dropout: float, gain: float, rngs: nnx.Rngs
    ):
        if num_heads < 1 or width % num_heads:
            raise ValueError(
                f"the transformer's width must be a multiple of its heads, got {width} "
                f"and {num_heads}"
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.project_q = layers.linear(width, width, bias=False, rngs=rngs)
        self.project_k = layers.linear(width, width, bias=False, rngs=rngs)
        self.project_v = layers.linear(width, width, bias=False, rngs=rngs)
        self.project_o = layers.linear(
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
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch target dim"]:
        """Reads `memory` from `x`; no dropout without a key.

        Without a memory it is causal self-attention: token t reads the tokens 0 … t.
        """
        key_weights, key_output = _split(key, 2)
        if memory is None:
            read = self._attend_causally(*self._project_all(x), key_weights)
        else:
            q = self._split_heads(self.project_q(x))
            read = self._attend(q, *self.keys_values(memory), key=key_weights)
        output = self.project_o(read.reshape(x.shape))
        return layers.dropout(output, self.dropout, key_output)

    def keys_values(
        self, memory: Float[Array, "batch source dim"]
    ) -> tuple[Heads, Heads]:
        """Returns what is read from a memory."""
        return (
            self._split_heads(self.project_k(memory)),
            self._split_heads(self.project_v(memory)),
        )

    def _project_all(self, x: jax.Array) -> list[jax.Array]:
        # One product instead of three: on a CPU faster forward and backward.
        layers_ = (self.project_q, self.project_k, self.project_v)
        kernel = jnp.concatenate([layer.kernel[...] for layer in layers_], axis=1)
        parts = jnp.split(x.reshape(-1, x.shape[-1]) @ kernel, 3, axis=-1)
        return [self._split_heads(part.reshape(x.shape)) for part in parts]

    def _attend_causally(
        self, q: jax.Array, k: jax.Array, v: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Attention in which position t sees 0 … t, in groups of queries.

        Each group meets only the keys up to its end: four groups save 3/8 of the work.
        """
        length = q.shape[1]
        groups = min(CAUSAL_GROUPS, length)
        ends = [length * (i + 1) // groups for i in range(groups)]
        read = []
        for start, end, group_key in zip(
            [0, *ends[:-1]], ends, _split(key, groups), strict=True
        ):
            past = jnp.tri(end - start, end, start, dtype=bool)
            read.append(
                self._attend(
                    q[:, start:end], k[:, :end], v[:, :end], mask=past, key=group_key
                )
            )
        return jnp.concatenate(read, axis=1)

    def _attend(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        *,
        mask: Bool[Array, "target source"] | None = None,
        key: jax.Array | None = None,
    ) -> Heads:
        logits = jnp.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
        if mask is not None:
            logits = jnp.where(mask, logits, -jnp.inf)
        weights = layers.dropout(nnx.softmax(logits, axis=-1), self.dropout, key)
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class Block(nnx.Module):
    """Causal self-attention, attention to the slots, feed-forward; pre-LayerNorm.

    Args:
      width: features of a token.
      num_heads: attention heads.
      dropout: rate, everywhere.
      gain: of the residual branches' last layers.
      is_first: normalise the input itself and add the self-attention to that, as
        official SLATE does in its first block.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dropout: float,
        gain: float,
        is_first: bool,
        rngs: nnx.Rngs,
    ):
        self.is_first = is_first
        self.dropout = dropout
        self.norm_self = layers.LayerNorm(width)
        self.self_attention = MultiHeadAttention(
            width, num_heads, dropout=dropout, gain=gain, rngs=rngs
        )
        self.norm_cross = layers.LayerNorm(width)
        self.cross_attention = MultiHeadAttention(
            width, num_heads, dropout=dropout, gain=gain, rngs=rngs
        )
        self.norm_mlp = layers.LayerNorm(width)
        self.mlp = layers.MLP(width, 4 * width, gain=gain, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        slots: Float[Array, "batch slots dim"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Maps tokens to tokens; token t sees the tokens 0 … t and every slot."""
        key_self, key_cross, key_mlp = _split(key, 3)
        normed = self.norm_self(x)
        if self.is_first:
            x = normed
        x = x + self.self_attention(normed, key=key_self)
        x = x + self.cross_attention(self.norm_cross(x), slots, key=key_cross)
        mlp = self.mlp(self.norm_mlp(x))
        return x + layers.dropout(mlp, self.dropout, key_mlp)


class TransformerDecoder(nnx.Module):
    """A stack of blocks and a last LayerNorm.

    Args:
      num_blocks: how many blocks, at least one.
      width: features of a token.
      num_heads: attention heads.
      dropout: rate, everywhere.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        num_blocks: int,
        width: int,
        num_heads: int,
        *,
        dropout: float,
        rngs: nnx.Rngs,
    ):
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.blocks = nnx.List(
            Block(
                width,
                num_heads,
                dropout=dropout,
                gain=(3 * num_blocks) ** -0.5,
                is_first=index == 0,
                rngs=rngs,
            )
            for index in range(num_blocks)
        )
        self.norm = layers.LayerNorm(width)

    def __call__(
        self,
        x: Float[Array, "batch tokens dim"],
        slots: Float[Array, "batch slots dim"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Maps embedded tokens to features; causal; no dropout without a key."""
        for block, block_key in zip(
            self.blocks, _split(key, len(self.blocks)), strict=True
        ):
            x = block(x, slots, key=block_key)
        return self.norm(x)


def _split(key: jax.Array | None, count: int) -> list:
    return [None] * count if key is None else list(jax.random.split(key, count))
