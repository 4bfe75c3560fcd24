"""What a model returns: named arrays, each with its batch first."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from implicit_slots.fixed_point import Stats


class SlateOutput(NamedTuple):
    """What a training or validation pass returns, per example.

    Attributes:
      losses: "mse", the dVAE's squared error summed over pixels and channels (images
        in [0, 1]), and "cross_entropy", the decoder's, summed over the tokens, in
        nats. The training loss is the sum of the two, averaged over the batch.
      reconstruction: the dVAE's image from relaxed tokens.
      attention: each slot's share of each token; sums to one over slots.
      stats: of the slots' forward solve.
    """

    losses: dict[str, Float[Array, " batch"]]
    reconstruction: Float[Array, "batch height width 3"]
    attention: Float[Array, "batch slots rows columns"]
    stats: Stats


class Reconstruction(NamedTuple):
    """An image taken apart and rendered again, without noise in the tokens.

    Attributes:
      dvae: the image from its own most probable tokens, in [0, 1].
      slots: the image from tokens that the decoder generated from the slots alone.
      attention: each slot's share of each token; sums to one over slots.
    """

    dvae: Float[Array, "batch height width 3"]
    slots: Float[Array, "batch height width 3"]
    attention: Float[Array, "batch slots rows columns"]


class Encoded(NamedTuple):
    """What the model knows of an image, without noise in the tokens.

    Attributes:
      tokens: the most probable ones.
      slots: of the fixed point.
      attention: each slot's share of each token; sums to one over slots.
      stats: of the slots' forward solve.
    """

    tokens: Int[Array, "batch rows columns"]
    slots: Float[Array, "batch slots dim"]
    attention: Float[Array, "batch slots rows columns"]
    stats: Stats


class TeacherForced(NamedTuple):
    """How the decoder predicts an image's own tokens.

    Attributes:
      cross_entropy: of each token given those before it and the slots, in nats.
      attention: each slot's share of what the prediction of a token reads of the slots
        (mean over blocks and heads): the decoder's masks. Sums to one over slots.
    """

    cross_entropy: Float[Array, "batch rows columns"]
    attention: Float[Array, "batch slots rows columns"]
