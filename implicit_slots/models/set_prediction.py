"""The set predictor of Locatello et al. 2020 (arXiv 2006.15055): objects' properties.

Images are encoded by convolutions, taken apart by slot attention, and every slot says
what object it is: position, size, material, shape, colour, and whether it is one.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from implicit_slots.fixed_point import BackwardStats
from implicit_slots.models import layers
from implicit_slots.models.image_encoder import (
    KERNEL,
    ImageEncoder,
    ImageSlots,
    on_grid,
)
from implicit_slots.models.outputs import Output, Reconstruction
from implicit_slots.models.slot_attention import SlotAttention
from implicit_slots.runtime.errors import InvalidValue

# How a vector of an object's properties is laid out: CLEVR's attributes, one-hot, in
# the order of tensorflow-datasets; positions are scaled from [−3, 3] to [0, 1].
CLASSES: Mapping[str, int] = {"size": 2, "material": 2, "shape": 3, "color": 8}
REACH = 3.0
NUM_PROPERTIES = 3 + sum(CLASSES.values()) + 1

Properties = Float[Array, f"batch objects {NUM_PROPERTIES}"]


class SetPredictor(ImageSlots):
    """The whole model, for square images of one resolution.

    The defaults are those of Locatello et al. 2020 for CLEVR.

    Args:
      resolution: image side in pixels, 128 as published.
      features: channels of the encoder's convolutions.
      encoder_strides: of those.
      encoder_kernels: of the same, their sides; one for all, or as many.
      encoder_padding: "zeros" or "edge", see `ImageEncoder`.
      encoder_positions: "added" or "apart", see `ImageEncoder`.
      position_scale: of the encoder's positions, see `ImageEncoder`.
      head_size: hidden width of the MLP that reads a slot.
      slots: makes slot attention from (features, rngs=…), with no fewer slots than
        an image may have objects.
      rngs: source of the initial parameters.
    """

    # Its parameters' top-level names in the order in which a pass uses them.
    stages = ("encoder", "slot_attention", "enter", "leave")
    losses = ("huber",)
    reads = ("image", "objects")

    def __init__(
        self,
        resolution: int,
        *,
        features: int = 64,
        encoder_strides: Sequence[int] = (1, 2, 2, 1),
        encoder_kernels: Sequence[int] = (KERNEL,),
        encoder_padding: str = "zeros",
        encoder_positions: str = "added",
        position_scale: float = 1.0,
        head_size: int = 64,
        slots: Callable[..., SlotAttention] = partial(SlotAttention, num_slots=10),
        rngs: nnx.Rngs,
    ):
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
        self.enter = layers.Linear(self.slot_attention.slot_size, head_size, rngs=rngs)
        self.leave = layers.Linear(
            head_size, NUM_PROPERTIES, full_output=True, rngs=rngs
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

        The loss "huber" is the Huber distance of each slot's properties from those of
        the object that it is matched with, mean over properties, summed over slots. A
        slot without an object is matched with zeros.

        Args:
          batch: of which `image` and `objects` are read.
          key: for the initial slots.
          deterministic: no noise on the initial slots; the model has no dropout.
          initial_noise: on learned initial slots, see `SlotAttention.initial`.
          probe: see `SlotAttention`.
          coupling_key: the same.
        """
        noise = None if deterministic else initial_noise
        slots = self.attend(
            batch["image"], key, noise=noise, probe=probe, coupling_key=coupling_key
        )
        predicted = self.predict(slots.slots)
        target = encode_objects(batch["objects"], predicted.shape[1])
        return Output(
            {"huber": set_distance(predicted, target)},
            on_grid(slots.attention, self.encoder.side),
            slots.stats,
            predicted=predicted,
            coupling=slots.coupling,
        )

    def predict(
        self, slots: Float[Array, "batch slots dim"]
    ) -> Float[Array, f"batch slots {NUM_PROPERTIES}"]:
        """Returns each slot's properties, each in (0, 1): see `encode_objects`."""
        hidden = nnx.relu(self.enter(slots))
        return nnx.sigmoid(self.leave(hidden)).astype(slots.dtype)

    def reconstruct(
        self, image: Float[Array, "batch height width 3"], *, key: Key[Array, ""]
    ) -> Reconstruction:
        """Returns slot attention's shares alone: this model draws no images."""
        return Reconstruction(None, None, self.encode(image, key=key).attention)


def encode_objects(objects: Mapping[str, Any], count: int) -> Properties:
    """Returns objects as vectors: position, one-hot attributes, 1; zeros for no object.

    Args:
      objects: of a batch, see `data.source.Source.batch`: `position` in CLEVR's units,
        the codes of `CLASSES`, and `present`.
      count: how many vectors an image gets.

    Raises:
      ValueError: if that is fewer than the objects' arrays hold.
    """
    most = objects["present"].shape[1]
    if most > count:
        raise InvalidValue(
            f"the model has {count} slots for up to {most} objects: set "
            f"--config.model.num_slots={most}"
        )
    present = objects["present"][..., None].astype(jnp.float32)
    parts = [(objects["position"] + REACH) / (2 * REACH)]
    parts += [jax.nn.one_hot(objects[name], size) for name, size in CLASSES.items()]
    vectors = jnp.concatenate([*parts, jnp.ones_like(present)], axis=-1) * present
    return jnp.pad(vectors, ((0, 0), (0, count - most), (0, 0)))


def set_distance(predicted: Properties, target: Properties) -> Float[Array, " batch"]:
    """Returns the least sum of Huber distances of two sets of equal size.

    The distance of two vectors is the mean over entries of the Huber loss (δ = 1).
    The order of neither set matters. The gradient is that of the best matching.
    """
    costs = pairwise_distance(predicted, target)
    matched = match_sets(jax.lax.stop_gradient(costs))
    return jnp.take_along_axis(costs, matched[..., None], axis=2).sum(axis=(1, 2))


def pairwise_distance(
    predicted: Properties, target: Properties
) -> Float[Array, "batch slots objects"]:
    """Returns the Huber distance of each prediction from each target."""
    loss = optax.losses.huber_loss(predicted[:, :, None], target[:, None])
    return loss.mean(axis=-1)


def match_sets(
    costs: Float[Array, "batch slots slots"],
) -> Int[Array, "batch slots"]:
    """Gives each row a column of its own so that the total cost is least (Kuhn 1955).

    On the accelerator, inside the compiled step. Equal costs are broken either way.
    """

    def assign(costs):
        rows, columns = optax.assignment.hungarian_algorithm(costs)
        return jnp.zeros(len(costs), jnp.int32).at[rows].set(columns.astype(jnp.int32))

    return jax.vmap(assign)(costs)
