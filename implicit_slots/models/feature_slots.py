"""Slot attention over frozen features: DINOSAUR (Seitzer et al. 2023).

arXiv 2209.14860, with the MLP decoder. A vision transformer that no gradient changes
turns an image into features, slot attention takes them apart, and an MLP makes them
again: each slot alone becomes features and a mask on the grid of patches, and the
masks' softmax over the slots mixes the features.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from implicit_slots.fixed_point import BackwardStats
from implicit_slots.models import layers
from implicit_slots.models.image_encoder import ImageSlots, on_grid
from implicit_slots.models.outputs import Output, Reading, Reconstruction
from implicit_slots.models.slot_attention import SlotAttention
from implicit_slots.models.vit import VisionTransformer, layout_of


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


class FeatureDecoder(nnx.Module):
    """Slots to features and masks of every patch, each slot on its own.

    Args:
      patches: how many.
      slot_size: width of a slot, and of the learned position of a patch.
      features: of a patch.
      hidden: width of the MLP's hidden layers.
      num_layers: how many of those.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        patches: int,
        slot_size: int,
        features: int,
        *,
        hidden: int,
        num_layers: int,
        rngs: nnx.Rngs,
    ):
        positions = jax.random.normal(rngs.params(), (patches, slot_size))
        self.positions = nnx.Param(positions * slot_size**-0.5)
        widths = [slot_size, *[hidden] * num_layers]
        self.hidden = nnx.List(
            [
                layers.Linear(one, other, kernel_init=layers.kaiming_uniform, rngs=rngs)
                for one, other in itertools.pairwise(widths)
            ]
        )
        self.out = layers.Linear(
            widths[-1],
            features + 1,
            kernel_init=layers.kaiming_uniform,
            full_output=True,
            rngs=rngs,
        )

    def __call__(
        self, slots: Float[Array, "batch slots dim"]
    ) -> tuple[
        Float[Array, "batch slots patches features"],
        Float[Array, "batch slots patches"],
    ]:
        """Returns each slot's features, and its mask's logits."""
        x = slots[:, :, None] + self.positions[...][None, None]
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        x = self.out(x)
        return x[..., :-1], x[..., -1]


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
      decoder_features: width of the decoder's hidden layers.
      decoder_layers: how many of those.
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
        decoder_features: int = 2048,
        decoder_layers: int = 3,
        slots: Callable[..., SlotAttention] = partial(
            SlotAttention, num_slots=7, slot_size=256, mlp_size=1024
        ),
        rngs: nnx.Rngs,
    ):
        layout = layout_of(vit)
        self.vit = VisionTransformer(layout, resolution, rngs=rngs)
        self.vit_norm = vit_norm
        # As published, slots read vectors of their own width.
        size = getattr(slots, "keywords", {}).get("slot_size", 64)
        encoder = FeatureEncoder(self.vit.side, layout.width, size, rngs=rngs)
        super().__init__(encoder, slots, rngs)
        self.decoder = FeatureDecoder(
            self.vit.side**2,
            self.slot_attention.slot_size,
            layout.width,
            hidden=decoder_features,
            num_layers=decoder_layers,
            rngs=rngs,
        )

    def features(
        self, image: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch patches features"]:
        """Returns the frozen features of images in [0, 1], row by row."""
        return jax.lax.stop_gradient(self.vit(image, final_norm=self.vit_norm))

    def inputs(
        self, image: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch patches size"]:
        """Returns what slot attention reads of images in [0, 1]."""
        return self.encoder(self.features(image))

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
          batch: of which `image` is read.
          key: for the initial slots.
          deterministic: no noise on the initial slots; the model has no dropout.
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
        made, masks = self.mix(slots.slots)
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
        *,
        present: Bool[Array, "batch slots"] | None = None,
    ) -> tuple[
        Float[Array, "batch patches features"], Float[Array, "batch slots rows columns"]
    ]:
        """Decodes slots; returns the features that they make, and the masks.

        Args:
          slots: of each image.
          present: which of them take part, at least one; all if not given.
        """
        features, logits = self.decoder(slots)
        if present is not None:
            logits = jnp.where(present[..., None], logits, -jnp.inf)
        masks = nnx.softmax(logits, axis=1)
        mixed = jnp.einsum("bkp,bkpf->bpf", masks, features)
        return mixed, on_grid(masks, self.encoder.side)

    def reconstruct(
        self, image: Float[Array, "batch height width 3"], *, key: Key[Array, ""]
    ) -> Reconstruction:
        """Returns the masks of images in [0, 1]; the key draws the initial slots.

        There is no image: the decoder makes features.
        """
        encoded = self.encode(image, key=key)
        return Reconstruction(None, None, encoded.attention, self.mix(encoded.slots)[1])

    def read(
        self,
        tokens: None,
        slots: Float[Array, "batch slots slot_dim"],
        *,
        present: Bool[Array, "batch slots"] | None = None,
    ) -> Reading:
        """Returns the decoder's masks, on the grid of patches.

        Args:
          tokens: this model has none.
          slots: of each image.
          present: which of them the decoder mixes, at least one; all if not given.
        """
        del tokens
        return Reading(None, self.mix(slots, present=present)[1])
