"""The autoregressive transformer decoder of SLATE."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from implicit_slots.models import kernels as pallas
from implicit_slots.models import layers, noise
from implicit_slots.models.attention import KeysValues, MultiHeadAttention
from implicit_slots.runtime.errors import InvalidValue

# Of a block's dropouts: two of the weights of each attention, one of each branch.
SEEDS = 7


class Stream(NamedTuple):
    """The stream of residuals, and the branch that is not yet added to it.

    What adds it makes the next norm too: one kernel, where there are kernels.

    Attributes:
      x: the stream.
      branch: None for none.
      seed: of the branch's dropout; None for no dropout.
    """

    x: Float[Array, "batch tokens dim"]
    branch: Float[Array, "batch tokens dim"] | None = None
    seed: UInt32[Array, "2"] | None = None


class BlockMemory(NamedTuple):
    """What a block keeps while tokens are generated one by one.

    Attributes:
      tokens: keys and values of the tokens so far, with room for the others.
      slots: keys and values of the slots.
      present: which slots are there; None for all.
    """

    tokens: KeysValues
    slots: KeysValues
    present: Bool[Array, "batch slots"] | None


class Block(nnx.Module):
    """Causal self-attention, attention to the slots, feed-forward; pre-LayerNorm.

    Args:
      width: features of a token.
      num_heads: attention heads.
      dropout: rate, on the output of each of the three.
      attention_dropout: rate, on the attention's weights.
      kernels: see `MultiHeadAttention`.
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
        attention_dropout: float,
        kernels: str,
        gain: float,
        is_first: bool,
        rngs: nnx.Rngs,
    ):
        self.is_first = is_first
        self.dropout = dropout
        self.kernels = kernels
        self.norm_self = layers.LayerNorm(width)
        self.self_attention, self.cross_attention = (
            MultiHeadAttention(
                width,
                num_heads,
                attention_dropout=attention_dropout,
                kernels=kernels,
                gain=gain,
                rngs=rngs,
            )
            for _ in range(2)
        )
        self.norm_cross = layers.LayerNorm(width)
        self.norm_mlp = layers.LayerNorm(width)
        self.mlp = layers.MLP(width, 4 * width, gain=gain, rngs=rngs)

    def __call__(
        self,
        stream: Stream,
        slots: Float[Array, "batch slots dim"],
        *,
        seeds: UInt32[Array, "sites 2"] | None = None,
    ) -> Stream:
        """Maps tokens to tokens; token t sees the tokens 0 … t and every slot."""
        of_self = of_cross = None
        of_branches = [None] * 3
        if seeds is not None:
            of_self, of_cross, of_branches = seeds[:2], seeds[2:4], seeds[4:]
        x, normed = self._join(stream, self.norm_self)
        x = normed if self.is_first else x
        branch = self.self_attention(normed, seeds=of_self)
        x, normed = self._join(Stream(x, branch, of_branches[0]), self.norm_cross)
        branch = self.cross_attention(normed, slots, seeds=of_cross)
        x, normed = self._join(Stream(x, branch, of_branches[1]), self.norm_mlp)
        return Stream(x, self.mlp(normed), of_branches[2])

    def _join(
        self, stream: Stream, norm: layers.LayerNorm
    ) -> tuple[jax.Array, jax.Array]:
        return join(stream, norm, self.dropout, self.kernels)

    def watch(
        self,
        x: Float[Array, "batch tokens dim"],
        slots: Float[Array, "batch slots dim"],
        present: Bool[Array, "batch slots"] | None,
    ) -> tuple[Float[Array, "batch tokens dim"], Float[Array, "batch tokens slots"]]:
        """As a call, without dropout; also how each token divides its attention."""
        normed = self.norm_self(x)
        x = normed if self.is_first else x
        x = x + self.self_attention(normed).astype(x.dtype)
        read, shares = self.cross_attention.read(self.norm_cross(x), slots, present)
        x = x + read
        return x + self.mlp(self.norm_mlp(x)), shares

    def extend(
        self,
        x: Float[Array, "batch dim"],
        memory: BlockMemory,
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "batch dim"], BlockMemory]:
        """Maps the token at `position` alone, without dropout."""
        normed = self.norm_self(x)
        x = normed if self.is_first else x
        read, tokens = self.self_attention.extend(normed, memory.tokens, position)
        x = x + read
        x = x + self.cross_attention.recall(
            self.norm_cross(x), memory.slots, memory.present
        )
        return x + self.mlp(self.norm_mlp(x)), memory._replace(tokens=tokens)


def join(
    stream: Stream, norm: layers.LayerNorm, rate: float, kernels: str
) -> tuple[jax.Array, jax.Array]:
    """Adds the branch to the stream; returns that and its norm.

    Args:
      stream: with a branch or without.
      norm: of the sum.
      rate: of the dropout on the branch.
      kernels: see `implicit_slots.models.kernels`, whose norm has the branch's
        precision.
    """
    x, branch, seed = stream
    if branch is None:
        return x, norm(x)
    if pallas.use(kernels):
        from implicit_slots.models.kernels.add_norm import add_norm

        return add_norm(
            x,
            branch,
            seed if rate else None,
            norm.scale[...],
            norm.bias[...],
            rate,
            layers.NORM_EPSILON,
            pallas.interpreted(),
        )
    x = x + layers.dropout(branch.astype(x.dtype), rate, seed)
    return x, norm(x)


class TransformerDecoder(nnx.Module):
    """A stack of blocks and a last LayerNorm.

    Args:
      num_blocks: how many blocks, at least one.
      width: features of a token.
      num_heads: attention heads.
      dropout: rate, on the output of each layer.
      attention_dropout: rate, on the attention's weights.
      kernels: see `MultiHeadAttention`.
      remat: recompute each block in the backward pass instead of keeping what it
        computed: memory of one block instead of all, for a third more work.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        num_blocks: int,
        width: int,
        num_heads: int,
        *,
        dropout: float,
        attention_dropout: float,
        kernels: str,
        remat: bool,
        rngs: nnx.Rngs,
    ):
        if num_blocks < 1:
            raise InvalidValue(f"num_blocks must be at least 1, got {num_blocks}")
        self.remat = remat
        self.dropout = dropout
        self.kernels = kernels
        self.blocks = nnx.List(
            Block(
                width,
                num_heads,
                dropout=dropout,
                attention_dropout=attention_dropout,
                kernels=kernels,
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
        count = len(self.blocks)
        # All at once: a call of threefry is some kernels of its own.
        seeds = [None] * count if key is None else noise.seeds(key, count, SEEDS)
        stream = Stream(x)
        for block, of_block in zip(self.blocks, seeds, strict=True):
            graphdef, params = nnx.split(block)

            def apply(params, stream, slots, seeds, graphdef=graphdef):
                return nnx.merge(graphdef, params)(stream, slots, seeds=seeds)

            apply = jax.checkpoint(apply) if self.remat else apply
            stream = apply(params, stream, slots, of_block)
        return join(stream, self.norm, self.dropout, self.kernels)[1]

    def watch(
        self,
        x: Float[Array, "batch tokens dim"],
        slots: Float[Array, "batch slots dim"],
        present: Bool[Array, "batch slots"] | None = None,
    ) -> tuple[Float[Array, "batch tokens dim"], Float[Array, "batch tokens slots"]]:
        """As a call, without dropout; also where the slots are read.

        Args:
          x: the embedded tokens.
          slots: of each image.
          present: which of them are there, at least one; all if not given.

        Returns:
          The features, and of each token the shares of its attention to the slots,
          which sum to one: the mean over blocks and heads.
        """
        x, shares = self.watch_blocks(x, slots, present)
        return x, functools.reduce(jnp.add, shares) / len(shares)

    def watch_blocks(
        self,
        x: Float[Array, "batch tokens dim"],
        slots: Float[Array, "batch slots dim"],
        present: Bool[Array, "batch slots"] | None = None,
    ) -> tuple[
        Float[Array, "batch tokens dim"], list[Float[Array, "batch tokens slots"]]
    ]:
        """As `watch`, with the shares of each block, which are means over its heads."""
        shares = []
        for block in self.blocks:
            x, of_block = block.watch(x, slots, present)
            shares.append(of_block)
        return self.norm(x), shares

    def start(
        self,
        slots: Float[Array, "batch slots dim"],
        present: Bool[Array, "batch slots"] | None = None,
    ) -> list[BlockMemory]:
        """Returns the memory of no tokens; `make_room` before the first one.

        Args:
          slots: of each image.
          present: which of them are there, at least one; all if not given.
        """
        memory = []
        for block in self.blocks:
            of_slots = block.cross_attention.remember(slots)
            nothing = KeysValues(*(part[:, :, :0] for part in of_slots))
            memory.append(BlockMemory(nothing, of_slots, present))
        return memory

    def make_room(self, memory: list[BlockMemory], length: int) -> list[BlockMemory]:
        """Returns the memory with room for `length` tokens in all."""

        def pad(part: jax.Array) -> jax.Array:
            return jnp.pad(part, ((0, 0), (0, 0), (0, length - part.shape[2]), (0, 0)))

        return [
            block._replace(tokens=KeysValues(*map(pad, block.tokens)))
            for block in memory
        ]

    def extend(
        self,
        x: Float[Array, "batch dim"],
        memory: list[BlockMemory],
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "batch dim"], list[BlockMemory]]:
        """Maps the embedded token at `position`, given the memory of those before.

        Returns:
          What a call with the whole sequence returns at `position`, without dropout;
          and the memory with this token in it.
        """
        extended = []
        for block, of_block in zip(self.blocks, memory, strict=True):
            x, of_block = block.extend(x, of_block, position)
            extended.append(of_block)
        return self.norm(x), extended
