"""How slots share an image: numbers that need no true masks and show a collapse."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics
from jaxtyping import Array, Bool, Float, Int

from implicit_slots.evaluation.metrics.segmentation import adjusted_rand_index
from implicit_slots.models.outputs import attention_entropy

Attention = Float[Array, "batch slots rows columns"]


@flax.struct.dataclass
class _ImageMean(metrics.Average):
    """A sum and a count of images, so batches and hosts merge in any order."""

    # Any: JAX rebuilds a pytree of whatever it is mapped to, not only of arrays.
    total: Any
    count: Any

    @classmethod
    def from_model_output(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        attention: Attention,
        mask: Bool[Array, " batch"] | None = None,
        **_: object,
    ) -> "_ImageMean":
        """Measures a batch.

        Args:
          attention: Per slot, its weight at each position; sums to one over slots.
          mask: False for examples that only pad the batch; all count by default.
          **_: Other outputs of the model, ignored.

        Returns:
          The state of this batch, to be merged and then computed.
        """
        if mask is None:
            mask = jnp.ones(len(attention), bool)
        values, counted = cls._measure(attention, mask)
        return cls(
            total=jnp.sum(jnp.where(counted, values, 0)),
            count=jnp.sum(counted, dtype=jnp.int32),
        )

    @classmethod
    def _measure(
        cls, attention: Attention, counted: Bool[Array, " batch"]
    ) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
        """Returns a value of each image, and which of those that count have one."""
        raise NotImplementedError

    def compute(self) -> Float[Array, ""]:
        """The mean; NaN where nothing counted."""
        return jnp.asarray(self.total) / jnp.asarray(self.count).astype(jnp.float32)


@flax.struct.dataclass
class AttentionEntropy(_ImageMean):
    """How evenly attention is spread over the slots, from 0 to 1, without a unit.

    The entropy of a position's distribution over the slots divided by its largest
    value, log(slots); mean over positions and images. 1: every slot attends to every
    position alike, so that none stands for anything, as at the beginning of a run.
    0: each position belongs to one slot. A single slot shares with nobody: 0.
    """

    @classmethod
    def _measure(
        cls, attention: Attention, counted: Bool[Array, " batch"]
    ) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
        largest = math.log(max(attention.shape[1], 2))
        return attention_entropy(attention) / largest, counted


@flax.struct.dataclass
class LargestSlot(_ImageMean):
    """The share of an image that its largest slot takes, without a unit.

    Each position goes to the slot of largest weight, on a tie to the first; the share
    of positions that the most successful slot wins, mean over images. From 1/slots
    (all equally large) to 1 (one slot takes all and the others are idle). An image
    that is mostly background may well be high.
    """

    @classmethod
    def _measure(
        cls, attention: Attention, counted: Bool[Array, " batch"]
    ) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
        return _shares(attention).max(axis=1), counted


@flax.struct.dataclass
class MaskSimilarity(_ImageMean):
    """Whether different images are divided alike, without a unit.

    The adjusted Rand index between the partition of one image (each position to the
    slot of largest weight) and that of the next in the batch; mean over such pairs.
    1: masks depend on position alone and not on what is seen there. About 0: they
    share nothing. Slightly below 0 is possible. Which slot is which does not matter.

    A pair counts if both images do. An image that one slot takes whole is in no pair:
    it has no boundary to compare (the index would be 1 or 0 whatever the other slots
    would have done), and `LargestSlot` reports it. The last image has no next one, so
    that a batch of one image weighs nothing. Images of different batches are not
    compared, so the pairs, and with them the mean, depend on how batches are cut.
    """

    @classmethod
    def _measure(
        cls, attention: Attention, counted: Bool[Array, " batch"]
    ) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
        batch, slots = attention.shape[:2]
        counted &= jnp.sum(_shares(attention) > 0, axis=1) > 1
        # Rolled rather than sliced: a batch that is split over devices stays whole.
        counted &= jnp.roll(counted, -1) & (jnp.arange(batch) < batch - 1)
        winners = _winners(attention)
        similarity = adjusted_rand_index(
            winners,
            jnp.roll(winners, -1, axis=0),
            max_true=slots - 1,
            num_predicted=slots,
        )
        return similarity, counted


def _winners(attention: Attention) -> Int[Array, "batch rows columns"]:
    return jnp.argmax(attention, axis=1)


def _shares(attention: Attention) -> Float[Array, "batch slots"]:
    """The share of positions that each slot wins."""
    won = jax.nn.one_hot(_winners(attention), attention.shape[1], axis=1)
    return won.mean(axis=(2, 3))
