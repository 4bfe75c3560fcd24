"""The autoencoder of Locatello et al. 2020 (arXiv 2006.15055), for object discovery.

Images are encoded by convolutions, taken apart by slot attention, and put together by
a spatial broadcast decoder: each slot alone becomes an image and a mask, and the masks'
softmax over the slots mixes the images.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from implicit_slots.fixed_point import BackwardStats
from implicit_slots.models import layers
from implicit_slots.models.image_encoder import (
    KERNEL,
    ImageEncoder,
    ImageSlots,
    PositionEmbedding,
    on_grid,
)
from implicit_slots.models.outputs import (
    Mixture,
    Output,
    Reading,
    Reconstruction,
)
from implicit_slots.models.slot_attention import SlotAttention
from implicit_slots.runtime.errors import InvalidValue


class BroadcastDecoder(nnx.Module):
    """Slots to images and masks, each slot on its own (Watters et al. 2019).

    Args:
      side: of the grid that every cell of which begins as the slot.
      slot_size: width of a slot.
      features: channels of the transposed convolutions.
      strides: of the 5x5 transposed convolutions, in order; a 3x3 one to the four
        channels follows them.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        side: int,
        slot_size: int,
        features: int,
        strides: Sequence[int],
        *,
        rngs: nnx.Rngs,
    ):
        self.positions = PositionEmbedding(side, slot_size, rngs=rngs)
        self.convolutions = nnx.List([])
        channels = slot_size
        for out, kernel, stride in (
            *((features, KERNEL, stride) for stride in strides),
            (4, 3, 1),
        ):
            self.convolutions.append(
                layers.TransposedConv(
                    channels, out, kernel=kernel, stride=stride, rngs=rngs
                )
            )
            channels = out

    def __call__(
        self, slots: Float[Array, "batch slots dim"]
    ) -> tuple[
        Float[Array, "batch slots height width 3"],
        Float[Array, "batch slots height width"],
    ]:
        """Returns each slot's image, in [−1, 1] if trained, and its mask's logits."""
        x = self.positions(slots.reshape(-1, 1, 1, slots.shape[-1]))
        *hidden, last = self.convolutions
        for convolution in hidden:
            x = nnx.relu(convolution(x))
        x = last(x).astype(slots.dtype).reshape(*slots.shape[:2], *x.shape[1:3], 4)
        return x[..., :3], x[..., 3]


class Autoencoder(ImageSlots):
    """The whole model, for square images of one resolution.

    The defaults are those of Locatello et al. 2020 for CLEVR6.

    Args:
      resolution: image side in pixels, 128 as published.
      features: channels of the encoder's convolutions.
      encoder_strides: of those.
      encoder_kernels: of the same, their sides; one for all, or as many.
      encoder_padding: "zeros" or "edge", see `ImageEncoder`.
      encoder_positions: "added" or "apart", see `ImageEncoder`.
      position_scale: of the encoder's positions, see `ImageEncoder`.
      decoder_features: channels of the decoder's transposed convolutions.
      decoder_strides: of those; their product times `broadcast_side` is the resolution.
      broadcast_side: of the grid that a slot is broadcast to; 0: what the strides
        leave of the resolution.
      slots: makes slot attention from (features, rngs=…); for other slots
        `functools.partial(SlotAttention, num_slots=5, slot_size=32)`.
      rngs: source of the initial parameters.
    """

    # Its parameters' top-level names in the order in which a pass uses them.
    stages = ("encoder", "slot_attention", "decoder")
    losses = ("reconstruction",)

    def __init__(
        self,
        resolution: int,
        *,
        features: int = 64,
        encoder_strides: Sequence[int] = (1, 1, 1, 1),
        encoder_kernels: Sequence[int] = (KERNEL,),
        encoder_padding: str = "zeros",
        encoder_positions: str = "added",
        position_scale: float = 1.0,
        decoder_features: int = 64,
        decoder_strides: Sequence[int] = (2, 2, 2, 2, 1),
        broadcast_side: int = 0,
        slots: Callable[..., SlotAttention] = SlotAttention,
        rngs: nnx.Rngs,
    ):
        growth = math.prod(decoder_strides)
        side = broadcast_side or resolution // growth
        if side * growth != resolution:
            raise InvalidValue(
                f"the decoder makes images of {side * growth} pixels from "
                f"broadcast_side {side} and decoder_strides {tuple(decoder_strides)}; "
                f"the data has {resolution}"
            )
        encoder = ImageEncoder(
            resolution,
            features,
            encoder_strides,
            kernels=encoder_kernels,
            padding=encoder_padding,
            positions=encoder_positions,
            position_scale=position_scale,
            rngs=rngs,
        )
        super().__init__(encoder, slots, rngs)
        self.decoder = BroadcastDecoder(
            side,
            self.slot_attention.slot_size,
            decoder_features,
            decoder_strides,
            rngs=rngs,
        )

    def __call__(
        self,
        batch: Mapping[str, Any],
        *,
        key: Key[Array, ""],
        deterministic: bool = False,
        initial_noise: Float[Array, ""] | float | None = None,
        probe: BackwardStats | None = None,
        coupling_key: Key[Array, ""] | None = None,
    ) -> Output:
        """Returns the loss of a batch with images in [0, 1].

        The loss "reconstruction" is the mean squared error over pixels and channels of
        images scaled to [−1, 1], as published.

        Args:
          batch: of which `image` is read.
          key: for the initial slots.
          deterministic: no noise on the initial slots; the model has no dropout.
          initial_noise: on learned initial slots, see `SlotAttention.initial`.
          probe: see `SlotAttention`.
          coupling_key: the same.
        """
        noise = None if deterministic else initial_noise
        image = batch["image"]
        slots = self.attend(
            image, key, noise=noise, probe=probe, coupling_key=coupling_key
        )
        mixture = self.mix(slots.slots)
        # Scaled to [−1, 1], differences are twice as large.
        error = jnp.mean((2 * (image - mixture.image)) ** 2, axis=(1, 2, 3))
        return Output(
            {"reconstruction": error},
            on_grid(slots.attention, self.encoder.side),
            slots.stats,
            reconstruction=mixture.image,
            masks=mixture.masks,
            coupling=slots.coupling,
        )

    def mix(
        self,
        slots: Float[Array, "batch slots dim"],
        *,
        present: Bool[Array, "batch slots"] | None = None,
    ) -> Mixture:
        """Decodes slots and mixes what they make.

        Args:
          slots: of each image.
          present: which of them take part, at least one; all if not given.
        """
        images, logits = self.decoder(slots)
        if present is not None:
            logits = jnp.where(present[..., None, None], logits, -jnp.inf)
        masks = nnx.softmax(logits, axis=1)
        images = (images + 1) / 2
        return Mixture(jnp.sum(masks[..., None] * images, axis=1), images, masks)

    def reconstruct(
        self, image: Float[Array, "batch height width 3"], *, key: Key[Array, ""]
    ) -> Reconstruction:
        """Reconstructs images in [0, 1]; the key draws the initial slots."""
        encoded = self.encode(image, key=key)
        mixture = self.mix(encoded.slots)
        return Reconstruction(
            None, jnp.clip(mixture.image, 0, 1), encoded.attention, mixture.masks
        )

    def render(
        self,
        slots: Float[Array, "batch slots slot_dim"],
        *,
        present: Bool[Array, "batch slots"] | None = None,
    ) -> Float[Array, "batch height width 3"]:
        """Returns the image that the decoder makes of slots alone, in [0, 1].

        Args:
          slots: of each image.
          present: which of them the decoder mixes, at least one; all if not given.
        """
        return jnp.clip(self.mix(slots, present=present).image, 0, 1)

    def read(
        self,
        tokens: None,
        slots: Float[Array, "batch slots slot_dim"],
        *,
        present: Bool[Array, "batch slots"] | None = None,
    ) -> Reading:
        """Returns the decoder's masks.

        Args:
          tokens: this model has none.
          slots: of each image.
          present: which of them the decoder mixes, at least one; all if not given.
        """
        del tokens
        return Reading(None, self.mix(slots, present=present).masks)
