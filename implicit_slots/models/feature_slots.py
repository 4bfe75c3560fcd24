"""Slot attention over frozen features: DINOSAUR (Seitzer et al. 2023).

arXiv 2209.14860. A vision transformer that no gradient changes turns an image into
features, slot attention takes them apart, and a decoder makes them again. With an MLP
each slot alone becomes features and a mask on the grid of patches, and the masks'
softmax over the slots mixes the features. Or a transformer predicts patch after patch
from the slots and the patches before, and what it reads of the slots are the masks.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from implicit_slots.fixed_point import BackwardStats
from implicit_slots.models import layers
from implicit_slots.models.feature_decoders import (
    AutoregressiveDecoder,
    FeatureDecoder,
    patch_orders,
)
from implicit_slots.models.image_encoder import ImageSlots, on_grid
from implicit_slots.models.outputs import Encoded, Output, Reading, Reconstruction
from implicit_slots.models.slot_attention import SlotAttention
from implicit_slots.models.vit import VisionTransformer, grid_side, layout_of
from implicit_slots.runtime.errors import InvalidValue

DECODERS = ("mlp", "autoregressive")
ORDERS = ("raster", "permuted")


class FeatureEncoder(nnx.Module):
    """What slot attention reads of features: LayerNorm, then an MLP.

    Args:
      side: of the grid of patches.
      features: width of a patch's features, and of the MLP's hidden layer.
      size: width of what slots read.
      rngs: source of the initial parameters.
    """

    def __init__(self, side: int, features: int, size: int, *, rngs: nnx.Rngs):
        self.side = side
        self.size = size
        self.norm = layers.LayerNorm(features)
        self.enter = layers.Linear(
            features, features, kernel_init=layers.kaiming_uniform, rngs=rngs
        )
        self.leave = layers.Linear(
            features, size, kernel_init=layers.kaiming_uniform, rngs=rngs
        )

    def __call__(
        self, features: Float[Array, "batch patches features"]
    ) -> Float[Array, "batch patches size"]:
        """Maps the features of each patch."""
        hidden = nnx.relu(self.enter(self.norm(features)))
        return self.leave(hidden).astype(features.dtype)

    def attended(
        self, slots: Callable[..., SlotAttention], *, rngs: nnx.Rngs
    ) -> SlotAttention:
        """Makes slot attention to the patches from `slots` (input size, rngs=…)."""
        return slots(self.size, rngs=rngs)


class FeatureSlots(ImageSlots):
    """The whole model, for square images of one resolution.

    The defaults are those of Seitzer et al. 2023 for COCO with the MLP decoder. The
    transformer begins as it is drawn: `training.frozen` reads its weights before the
    first step of a run, `vit_weights.from_published` in a program of yours.

    Args:
      resolution: image side in pixels, divisible by the side of a patch; 224 as
        published.
      vit: which transformer, a name of `vit.LAYOUTS`.
      vit_norm: whether features go through the transformer's last LayerNorm; those of
        DINOSAUR do not.
      decoder: "mlp", or "autoregressive": a transformer.
      decoder_features: width of the MLP's hidden layers.
      decoder_layers: how many of those.
      decoder_blocks: of the autoregressive decoder.
      decoder_heads: of its attention.
      decoder_order: in which that one goes through the patches: "raster", row by row,
        or "permuted": in training a step draws one of nine orders, as in SPOT.
      cached_features: whether the model is given features that were made before, in
        the place of images; it then has no vision transformer.
      slots: makes slot attention from (slot_size, rngs=…).
      rngs: source of the initial parameters.
    """

    # Its trained parameters' top-level names in the order in which a pass uses them;
    # those of `vit` are frozen.
    stages = ("encoder", "slot_attention", "decoder")
    losses = ("feature_mse",)

    def __init__(
        self,
        resolution: int,
        *,
        vit: str = "dino_vitb16",
        vit_norm: bool = False,
        decoder: str = "mlp",
        decoder_features: int = 2048,
        decoder_layers: int = 3,
        decoder_blocks: int = 4,
        decoder_heads: int = 8,
        decoder_order: str = "raster",
        cached_features: bool = False,
        slots: Callable[..., SlotAttention] = partial(
            SlotAttention, num_slots=7, slot_size=256, mlp_size=1024
        ),
        rngs: nnx.Rngs,
    ):
        for name, value, known in (
            ("decoder", decoder, DECODERS),
            ("decoder_order", decoder_order, ORDERS),
        ):
            if value not in known:
                raise InvalidValue(f"{name} must be one of {known}, got {value!r}")
        permuted = decoder_order == "permuted"
        if permuted and decoder != "autoregressive":
            raise InvalidValue(
                'decoder_order="permuted" is for decoder="autoregressive"; the MLP '
                "makes all patches at once"
            )
        layout = layout_of(vit)
        side = grid_side(layout, resolution)
        # Drawn in any case, so that all others are drawn alike.
        transformer = VisionTransformer(layout, resolution, rngs=rngs)
        self.vit = None if cached_features else transformer
        self.vit_norm = vit_norm
        # As published, slots read vectors of their own width.
        size = getattr(slots, "keywords", {}).get("slot_size", 64)
        encoder = FeatureEncoder(side, layout.width, size, rngs=rngs)
        super().__init__(encoder, slots, rngs)
        slot_size = self.slot_attention.slot_size
        self.orders = len(patch_orders(1)) if permuted else 1
        self.decoder = (
            AutoregressiveDecoder(
                side,
                slot_size,
                layout.width,
                num_blocks=decoder_blocks,
                num_heads=decoder_heads,
                orders=self.orders,
                rngs=rngs,
            )
            if decoder == "autoregressive"
            else FeatureDecoder(
                side**2,
                slot_size,
                layout.width,
                hidden=decoder_features,
                num_layers=decoder_layers,
                rngs=rngs,
            )
        )

    def features(
        self, image: Float[Array, "batch *seen"]
    ) -> Float[Array, "batch patches features"]:
        """Returns the frozen features of images in [0, 1], row by row.

        Raises:
          ValueError: images, for a model that was built with `cached_features`.
        """
        if self.vit is not None:
            return jax.lax.stop_gradient(self.vit(image, final_norm=self.vit_norm))
        if image.ndim != 3:
            raise InvalidValue(
                "this model has no vision transformer and reads cached features, got "
                f"an array of shape {image.shape}; `load` gives it one"
            )
        return image

    def inputs(
        self, image: Float[Array, "batch *seen"]
    ) -> Float[Array, "batch patches size"]:
        """Returns what slot attention reads of images in [0, 1]."""
        return self.encoder(self.features(image))

    def encode(
        self, image: Float[Array, "batch *seen"], *, key: Key[Array, ""]
    ) -> Encoded:
        """Takes images in [0, 1] apart; the key draws the initial slots.

        What the autoregressive decoder reads beside slots, the features, are `tokens`.
        """
        encoded = super().encode(image, key=key)
        if isinstance(self.decoder, FeatureDecoder):
            return encoded
        return encoded._replace(tokens=self.features(image))

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

        The loss "feature_mse" is the squared error of the features, mean over patches
        and features.

        Args:
          batch: of which `image` is read: images, or their cached features.
          key: for the initial slots and the order of patches.
          deterministic: no noise on the initial slots, and patches row by row; the
            model has no dropout.
          initial_noise: on learned initial slots, see `SlotAttention.initial`.
          probe: see `SlotAttention`.
          coupling_key: the same.
        """
        features = self.features(batch["image"])
        slots = self.slot_attention(
            self.encoder(features),
            key=key,
            noise=None if deterministic else initial_noise,
            probe=probe,
            coupling_key=coupling_key,
        )
        order: Any = 0
        if self.orders > 1 and not deterministic:
            drawn = jax.random.fold_in(key, 1)
            order = jax.random.randint(drawn, (), 0, self.orders, jnp.int32)
        made, masks = self.mix(slots.slots, features, order=order)
        return Output(
            {"feature_mse": jnp.mean(jnp.square(features - made), axis=(1, 2))},
            on_grid(slots.attention, self.encoder.side),
            slots.stats,
            masks=masks,
            coupling=slots.coupling,
        )

    def mix(
        self,
        slots: Float[Array, "batch slots dim"],
        features: Float[Array, "batch patches features"] | None = None,
        *,
        present: Bool[Array, "batch slots"] | None = None,
        order: Int[Array, ""] | int = 0,
    ) -> tuple[
        Float[Array, "batch patches features"], Float[Array, "batch slots rows columns"]
    ]:
        """Decodes slots; returns the features that they make, and the masks.

        Args:
          slots: of each image.
          features: the true ones, which the autoregressive decoder needs.
          present: which of the slots take part, at least one; all if not given.
          order: of the patches, of `patch_orders`; for the same decoder.

        Raises:
          ValueError: the autoregressive decoder is given no features.
        """
        side = self.encoder.side
        if isinstance(self.decoder, AutoregressiveDecoder):
            if features is None:
                raise InvalidValue(
                    "the autoregressive decoder needs the features beside the slots"
                )
            made, masks = self.decoder(slots, features, present=present, order=order)
            return made, on_grid(masks, side)
        own, logits = self.decoder(slots)
        if present is not None:
            logits = jnp.where(present[..., None], logits, -jnp.inf)
        masks = nnx.softmax(logits, axis=1)
        mixed = jnp.einsum("bkp,bkpf->bpf", masks, own)
        return mixed, on_grid(masks, side)

    def reconstruct(
        self, image: Float[Array, "batch *seen"], *, key: Key[Array, ""]
    ) -> Reconstruction:
        """Returns the masks of images in [0, 1]; the key draws the initial slots.

        There is no image: the decoder makes features.
        """
        encoded = self.encode(image, key=key)
        masks = self.mix(encoded.slots, encoded.tokens)[1]
        return Reconstruction(None, None, encoded.attention, masks)

    def read(
        self,
        tokens: Float[Array, "batch patches features"] | None,
        slots: Float[Array, "batch slots slot_dim"],
        *,
        present: Bool[Array, "batch slots"] | None = None,
    ) -> Reading:
        """Returns the decoder's masks, on the grid of patches.

        Args:
          tokens: the features, for the autoregressive decoder.
          slots: of each image.
          present: which of them the decoder reads, at least one; all if not given.
        """
        return Reading(None, self.mix(slots, tokens, present=present)[1])
