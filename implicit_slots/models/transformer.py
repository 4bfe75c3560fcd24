"""The autoregressive transformer decoder of SLATE."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from implicit_slots.models import layers


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
        memory: Float[Array, "batch source dim"],
        *,
        mask: Bool[Array, "target source"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch target dim"]:
        """Reads `memory` from `x`, where `mask` allows it; no dropout without a key."""
        q = self._split_heads(self.project_q(x))
        k = self._split_heads(self.project_k(memory))
        v = self._split_heads(self.project_v(memory))
        logits = jnp.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
        if mask is not None:
            logits = jnp.where(mask, logits, -jnp.inf)
        weights = nnx.softmax(logits, axis=-1)
        key_weights, key_output = _split(key, 2)
        weights = layers.dropout(weights, self.dropout, key_weights)
        read = jnp.einsum("bhts,bshd->bthd", weights, v)
        output = self.project_o(read.reshape(x.shape))
        return layers.dropout(output, self.dropout, key_output)

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
        self.norm_self = layers.layer_norm(width, rngs=rngs)
        self.self_attention = MultiHeadAttention(
            width, num_heads, dropout=dropout, gain=gain, rngs=rngs
        )
        self.norm_cross = layers.layer_norm(width, rngs=rngs)
        self.cross_attention = MultiHeadAttention(
            width, num_heads, dropout=dropout, gain=gain, rngs=rngs
        )
        self.norm_mlp = layers.layer_norm(width, rngs=rngs)
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
        causal = jnp.tri(x.shape[1], dtype=bool)
        normed = self.norm_self(x)
        if self.is_first:
            x = normed
        x = x + self.self_attention(normed, normed, mask=causal, key=key_self)
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
        self.norm = layers.layer_norm(width, rngs=rngs)

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
