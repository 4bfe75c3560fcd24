"""Random numbers for masks and noise of the size of an activation, made in passing.

JAX's own generator (threefry) is a loop that writes every intermediate word to memory:
on a CPU it took a quarter of a train step. Here each number is a hash of its position
and of the key, so it fuses with whatever uses it and is never stored. Keys are JAX's,
and the hash is no cryptographic generator: it is for dropout and Gumbel noise.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from implicit_slots.runtime.errors import InvalidValue

# Uniform numbers have 23 bits and lie in the middle of their interval: never 0 or 1.
_STEP = 2.0**-23
# Positions are 32 bits wide.
MOST_WORDS = 2**32


# A key of JAX's, or the two words that threefry makes of one.
Seed = Key[Array, ""] | UInt32[Array, "2"]


def seeds(key: Key[Array, ""], *shape: int) -> UInt32[Array, "... 2"]:
    """Returns a seed for each place of a shape, all made at once."""
    return jax.random.bits(key, (*shape, 2), jnp.uint32)


def random_bits(key: Seed, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Returns independent uniform 32-bit words, a pure function of (key, position).

    Two rounds of a 32-bit integer hash (multiply, xor-shift; constants found by
    C. Wellons' hash prospector), each entered with 32 bits that threefry makes of the
    key.
    """
    if math.prod(shape) > MOST_WORDS:
        raise InvalidValue(f"at most 2^32 random words at a time, got shape {shape}")
    seed = key if key.dtype == jnp.uint32 else seeds(key)
    position = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return words_at(position, seed[0], seed[1])


def words_at(
    position: UInt32[Array, "..."],
    first: UInt32[Array, ""],
    second: UInt32[Array, ""],
) -> UInt32[Array, "..."]:
    """Returns the words of some positions, from both words of a seed."""
    return _mix(_mix(position ^ first) + second)


def keep_mask(key: Seed, rate: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Returns which entries dropout keeps: each with probability 1 − rate."""
    return is_kept(random_bits(key, shape), rate)


def is_kept(words: UInt32[Array, "..."], rate: float) -> Bool[Array, "..."]:
    """Returns which of uniform words dropout keeps."""
    # 31 bits, for not every compiler of kernels can compare unsigned numbers.
    threshold = min(round((1 - rate) * 2**31), 2**31 - 1)
    return (words >> 1).astype(jnp.int32) < threshold


def grid_words(
    rows_key: Seed, columns_key: Seed, shape: tuple[int, ...]
) -> tuple[UInt32[Array, "..."], UInt32[Array, " columns"]]:
    """Returns words of the rows and of the columns of a grid, for `kept_of_grid`.

    Args:
      rows_key: for the rows: all axes but the last.
      columns_key: for the columns: the last axis.
      shape: of the grid.
    """
    *rows, columns = shape
    return random_bits(rows_key, tuple(rows)), random_bits(columns_key, (columns,))


def kept_of_grid(
    rows: UInt32[Array, "*rows"], columns: UInt32[Array, " columns"], rate: float
) -> Bool[Array, "*rows columns"]:
    """Returns which entries of a grid dropout keeps, as `keep_mask` does.

    One round of the hash an entry, of its row's word and its column's: any part of the
    grid can be made by itself, within a kernel too.
    """
    words = rows[..., None] ^ jnp.expand_dims(columns, range(rows.ndim))
    return kept_of_words(words, rate)


def kept_of_words(words: UInt32[Array, "*grid"], rate: float) -> Bool[Array, "*grid"]:
    """Returns the same of the exclusive or of each entry's row's and column's word."""
    return is_kept(_mix(words), rate)


def gumbel(key: Seed, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns standard Gumbel noise, −log(−log u)."""
    return gumbel_of(random_bits(key, shape))


def gumbel_of(words: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Returns the Gumbel noise that uniform words stand for."""
    # By way of signed numbers, which kernels can convert.
    words = (words >> 9).astype(jnp.int32).astype(jnp.float32)
    uniform = words * jnp.float32(_STEP) + jnp.float32(_STEP / 2)
    return -jnp.log(-jnp.log(uniform))


def categorical(
    key: Key[Array, ""], logits: Float[Array, "*grid classes"]
) -> Int[Array, "*grid"]:
    """Draws a class of each row of unnormalised log-probabilities.

    By inversion in two stages, first a group of classes and then one of the group:
    two uniform numbers a row and one pass over the logits, where adding Gumbel noise
    and taking the largest needs a number per class and an argmax, on a CPU twenty
    times slower.
    """
    classes = logits.shape[-1]
    # The divisor nearest to the root from below; 1 for a prime: then one stage.
    groups = next(n for n in range(math.isqrt(classes), 0, -1) if classes % n == 0)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights.reshape(*logits.shape[:-1], groups, classes // groups)
    uniform = jax.random.uniform(key, (2, *logits.shape[:-1], 1), logits.dtype)
    group = _invert(weights.sum(axis=-1), uniform[0])
    of_group = jnp.take_along_axis(weights, group[..., None, None], axis=-2)
    within = _invert(of_group.squeeze(-2), uniform[1])
    return group * (classes // groups) + within


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index at which the running sum exceeds its share of the total."""
    # A prefix sum made in parallel may fall by a rounding where a weight is zero.
    running = jax.lax.cummax(jnp.cumsum(weights, axis=-1), axis=weights.ndim - 1)
    # Below one by more than rounding: the last index is chosen only if it weighs.
    share = uniform * (1 - 2.0**-22) * running[..., -1:]
    index = (running <= share).sum(axis=-1, dtype=jnp.int32)
    return jnp.minimum(index, weights.shape[-1] - 1)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)
