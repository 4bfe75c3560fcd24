"""What a model returns: named arrays, each with its batch first."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from implicit_slots.fixed_point import Stats


class SlotsOutput(NamedTuple):
    """What slot attention returns.

    Attributes:
      slots: the slots.
      attention: of the last application, summed over heads; sums to one over slots.
      stats: of the forward solve, per example.
      coupling: how much the slots depend on each other, where asked for:
        ‖J‖²_F without the slots' own blocks, J = ∂f/∂z at the slots, over the number
        of their entries, as `coupling_norm` estimates it from one sample. The slots
        are a constant in it, the step's parameters and the inputs are not.
    """

    slots: Float[Array, "batch slots dim"]
    attention: Float[Array, "batch slots inputs"]
    stats: Stats
    coupling: Float[Array, " batch"] | None = None


class Output(NamedTuple):
    """What a training or validation pass of any model returns, per example.

    Attributes:
      losses: by name; the training loss is their sum, averaged over the batch. Each
        model's `__call__` says what they are.
      attention: each slot's share of each position; sums to one over slots.
      stats: of the slots' forward solve.
      reconstruction: the image as the model was trained to make it, where it makes one
        (SLATE: from relaxed tokens, or a codebook's).
      masks: the decoder's masks, where a pass makes them (SLATE: in validation); sum to
        one over slots.
      predicted: each slot's properties, where the model says them.
      coupling: see `SlotsOutput`; where the call was given a `coupling_key`.
      tokens: the decoder's targets, where it has some.
    """

    losses: dict[str, Float[Array, " batch"]]
    attention: Float[Array, "batch slots rows columns"]
    stats: Stats
    reconstruction: Float[Array, "batch height width 3"] | None = None
    masks: Float[Array, "batch slots height width"] | None = None
    predicted: Float[Array, "batch slots properties"] | None = None
    coupling: Float[Array, " batch"] | None = None
    tokens: Int[Array, "batch tokens"] | None = None


class Mixture(NamedTuple):
    """What a spatial broadcast decoder makes of slots.

    Attributes:
      image: the slots' images, mixed by the masks; [0, 1] is what images have.
      images: each slot's.
      masks: each slot's share of each pixel; sums to one over slots.
    """

    image: Float[Array, "batch height width 3"]
    images: Float[Array, "batch slots height width 3"]
    masks: Float[Array, "batch slots height width"]


class Reconstruction(NamedTuple):
    """An image taken apart and rendered again, without noise in the tokens.

    Attributes:
      dvae: the image from its own most probable tokens, in [0, 1]; None without any.
      slots: the image that the decoder makes of the slots alone; None without one.
      attention: each slot's share of each position; sums to one over slots.
      masks: the decoder's, where rendering makes them.
    """

    dvae: Float[Array, "batch height width 3"] | None
    slots: Float[Array, "batch height width 3"] | None
    attention: Float[Array, "batch slots rows columns"]
    masks: Float[Array, "batch slots height width"] | None = None


class Encoded(NamedTuple):
    """What the model knows of an image, without noise in the tokens.

    Attributes:
      tokens: the most probable ones, or what else the decoder reads of an image beside
        the slots: of frozen features those; None without any.
      slots: of the fixed point.
      attention: each slot's share of each position; sums to one over slots.
      stats: of the slots' forward solve.
    """

    tokens: (
        Int[Array, "batch rows columns"] | Float[Array, "batch cells features"] | None
    )
    slots: Float[Array, "batch slots dim"]
    attention: Float[Array, "batch slots rows columns"]
    stats: Stats


class Reading(NamedTuple):
    """How the decoder reads the slots of an image.

    Attributes:
      cross_entropy: of each token given those before it and the slots, in nats; None
        without tokens.
      attention: the decoder's masks: each slot's share of a position. Sums to one over
        slots. SLATE: of what the prediction of a token reads of the slots, mean over
        blocks and heads.
    """

    cross_entropy: Float[Array, "batch rows columns"] | None
    attention: Float[Array, "batch slots rows columns"]


def attention_entropy(
    attention: Float[Array, "batch slots rows columns"],
) -> Float[Array, " batch"]:
    """Returns the entropy over the slots, mean over positions, in nats.

    From 0, each position one slot's, to log(slots). Unlike `jax.scipy.special.entr` its
    gradient is finite where a share is 0, as sharp masks have them: there entr's is
    infinite, and the softmax multiplies it by 0.
    """
    attention = attention.astype(jnp.promote_types(attention.dtype, jnp.float32))
    smallest = jnp.finfo(attention.dtype).tiny
    nats = -attention * jnp.log(jnp.maximum(attention, smallest))
    return nats.sum(axis=1).mean(axis=(1, 2))
