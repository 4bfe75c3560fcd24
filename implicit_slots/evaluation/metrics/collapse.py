"""How slots share an image, and tokens a vocabulary: numbers that show a collapse."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from implicit_slots.evaluation.metrics.iou import FOUND
from implicit_slots.evaluation.metrics.rand_index import adjusted_rand_index
from implicit_slots.evaluation.metrics.segmentation import USED

Attention = Float[Array, "batch slots rows columns"]


def largest_slot(attention: Attention) -> Float[Array, " batch"]:
    """Returns the share of an image that its largest slot takes, without a unit.

    Each position goes to the slot of largest weight, on a tie to the first; this is
    the share of positions that the most successful slot wins. From 1/slots (all equally
    large) to 1 (one slot takes all and the others are idle). An image that is mostly
    background may well be high.
    """
    return _shares(attention).max(axis=1)


def dead_slots(attention: Attention) -> Float[Array, " batch"]:
    """Returns how many slots win less than 0.5 % of an image's positions.

    From 0 to slots − 1. Without true masks, as all of this file: over all positions.
    """
    dead = _shares(attention) < USED
    return jnp.sum(dead, axis=1, dtype=jnp.float32)


def doubled_slots(attention: Attention) -> Float[Array, " batch"]:
    """Returns how many slots have another one that looks at the same.

    Two do where the intersection over union of their maps, Σ min / Σ max over positions
    (Ružička 1958), is above a half, and each has at least 0.5 % of all attention. From
    0 to the number of slots; never 1. Slots that share an object or the ground evenly
    are doubled though one of them may win every position.
    """
    maps = attention.reshape(*attention.shape[:2], -1)
    total = maps.sum(axis=2)
    both = jnp.minimum(maps[:, :, None], maps[:, None]).sum(axis=3)
    alike = both > FOUND * (total[:, :, None] + total[:, None] - both)
    live = total >= USED * total.sum(axis=1, keepdims=True)
    pairs = alike & live[:, :, None] & live[:, None]
    pairs &= ~jnp.eye(maps.shape[1], dtype=bool)[None]
    return jnp.sum(pairs.any(axis=2), axis=1, dtype=jnp.float32)


def mask_similarity(
    attention: Attention, mask: Bool[Array, " batch"]
) -> Float[Array, " batch"]:
    """Returns whether an image is divided like the next one of the batch.

    The adjusted Rand index between the two partitions (each position to the slot of
    largest weight). 1: masks depend on position alone and not on what is seen there.
    About 0: they share nothing. Slightly below 0 is possible. Which slot is which does
    not matter.

    NaN where there is no pair. The last image has no next one. An image that one slot
    takes whole is in no pair: it has no boundary to compare (the index would be 1 or 0
    whatever the other slots would have done), and `largest_slot` reports it. Images of
    different batches are not compared, so the mean depends on how batches are cut.

    Args:
      attention: per slot, its weight at each position; sums to one over slots.
      mask: False for examples that only pad the batch: they are in no pair.
    """
    batch, slots = attention.shape[:2]
    counted = mask & (jnp.sum(_shares(attention) > 0, axis=1) > 1)
    # Rolled rather than sliced: a batch that is split over devices stays whole.
    counted &= jnp.roll(counted, -1) & (jnp.arange(batch) < batch - 1)
    winners = _winners(attention)
    similarity = adjusted_rand_index(
        winners,
        jnp.roll(winners, -1, axis=0),
        max_true=slots - 1,
        num_predicted=slots,
    )
    return jnp.where(counted, similarity, jnp.nan)


def token_perplexity(
    tokens: Int[Array, "batch tokens"], mask: Bool[Array, " batch"], vocab_size: int
) -> Float[Array, " batch"]:
    """Returns how many tokens of the vocabulary a batch uses, for each of its images.

    The exponential of the entropy of the tokens' shares: from 1 (every token is the
    same) to the vocabulary's size (all are equally frequent). It grows with the batch.

    Args:
      tokens: ids from 0 to vocab_size − 1.
      mask: False for examples that only pad the batch.
      vocab_size: number of tokens that there are.
    """
    counted = jnp.broadcast_to(mask[:, None], tokens.shape).astype(jnp.float32)
    counts = jnp.zeros(vocab_size).at[tokens.reshape(-1)].add(counted.reshape(-1))
    shares = counts / jnp.maximum(counts.sum(), 1)
    perplexity = jnp.exp(jax.scipy.special.entr(shares).sum())
    return jnp.broadcast_to(perplexity, mask.shape)


def _winners(attention: Attention) -> Int[Array, "batch rows columns"]:
    return jnp.argmax(attention, axis=1)


def _shares(attention: Attention) -> Float[Array, "batch slots"]:
    """The share of positions that each slot wins."""
    won = jax.nn.one_hot(_winners(attention), attention.shape[1], axis=1)
    return won.mean(axis=(2, 3))
