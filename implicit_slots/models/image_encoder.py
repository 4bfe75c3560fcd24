"""Images to slots as in Locatello et al. 2020 (arXiv 2006.15055).

Their two models, object discovery and set prediction, read images through one encoder.
Layers begin as in their code (Keras): Glorot-uniform kernels, zero biases.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from implicit_slots.fixed_point import BackwardStats
from implicit_slots.models import layers
from implicit_slots.models.outputs import Encoded, SlotsOutput
from implicit_slots.models.slot_attention import Problem, SlotAttention
from implicit_slots.runtime.errors import InvalidValue

KERNEL = 5
PADDINGS = ("zeros", "edge")
POSITIONS = ("added", "apart")
WAVES = 4  # cosines of each coordinate, the constant one included


class PositionEmbedding(nnx.Module):
    """Adds a linear map of where a cell of a square grid lies.

    Each cell has the four numbers (y, x, 1 − y, 1 − x), from 0 at the first row and
    column to 1 at the last.

    Args:
      side: rows and columns of the grid.
      features: width of what it is added to.
      scale: Xavier's gain of the initial map.
      rngs: source of the initial parameters.
    """

    def __init__(self, side: int, features: int, *, scale: float = 1.0, rngs: nnx.Rngs):
        self.side = side
        self.project = layers.Linear(
            4, features, kernel_init=layers.xavier_uniform(scale), rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "#batch #rows #columns features"]
    ) -> Float[Array, "batch rows columns features"]:
        """Adds to a grid, or to one vector per image that every cell then begins as."""
        line = jnp.linspace(0.0, 1.0, self.side)
        grid = jnp.stack(jnp.meshgrid(line, line, indexing="ij"), axis=-1)
        return x + self.project(jnp.concatenate([grid, 1 - grid], axis=-1))[None]


class ImageEncoder(nnx.Module):
    """Images to a set of vectors, one for each cell of a grid.

    Convolutions with ReLU, position embedding, LayerNorm, MLP.

    Args:
      resolution: image side in pixels, divisible by the product of the strides.
      features: channels of every convolution, and width of the vectors.
      strides: of the convolutions, in order.
      kernels: their sides in pixels, in the same order, or one for all.
      padding: what lies beyond the image: "zeros", as published, which tell a cell
        that it lies at the border; or "edge", the border's own values. With "edge" a
        cell's vector also is of what lies around the cell's centre; zeros are padded
        as TensorFlow's "SAME" does, which looks half a pixel to the lower right where
        kernel minus stride is odd.
      positions: "added" to the features, as published, or "apart": each cell's features
        are followed by its coordinates, times a learned gate, and by cosines of them.
        The first `key_size` numbers, all but the cosines, are for the keys.
      position_scale: of the initial position embedding, 1 as published, or of the gate.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        resolution: int,
        features: int,
        strides: Sequence[int],
        *,
        kernels: Sequence[int] = (KERNEL,),
        padding: str = "zeros",
        positions: str = "added",
        position_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if positions not in POSITIONS:
            raise InvalidValue(
                f"positions must be one of {POSITIONS}, got {positions!r}"
            )
        if padding not in PADDINGS:
            raise InvalidValue(
                f"encoder_padding must be one of {PADDINGS}, got {padding!r}"
            )
        if not all(isinstance(kernel, int) and kernel > 0 for kernel in kernels):
            raise InvalidValue(
                f"encoder_kernels must be positive integers, got {tuple(kernels)}"
            )
        if len(kernels) == 1:
            kernels = (*kernels,) * len(strides)
        if len(kernels) != len(strides):
            raise InvalidValue(
                "encoder_kernels must be one, or as many as encoder_strides, got "
                f"{tuple(kernels)} and {tuple(strides)}"
            )
        self.side = resolution
        self.convolutions = nnx.List([])
        # Pixels beyond each border that a convolution reads; None: what "SAME" pads.
        borders: list[tuple[int, int] | None] = []
        channels = 3
        for kernel, stride in zip(kernels, strides, strict=True):
            if stride < 1 or self.side % stride:
                raise InvalidValue(
                    f"the image size {resolution} must be divisible by the product of "
                    f"encoder_strides {tuple(strides)}"
                )
            if padding == "edge" and not (
                kernel >= stride and kernel % 2 == stride % 2
            ):
                raise InvalidValue(
                    "with encoder_padding=edge a kernel must be as large as its stride "
                    f"or larger by an even number, got {kernel} and {stride}"
                )
            self.side //= stride
            beyond = (kernel - stride) // 2
            borders.append((beyond, beyond) if padding == "edge" else None)
            self.convolutions.append(
                layers.Conv(
                    channels,
                    features,
                    (kernel, kernel),
                    strides=stride,
                    padding="SAME" if padding == "zeros" else "VALID",
                    kernel_init=layers.xavier_uniform(),
                    rngs=rngs,
                )
            )
            channels = features
        self.borders = tuple(borders)
        self.apart = positions == "apart"
        self.key_size = self.size = features
        if self.apart:
            self.gate = nnx.Param(jnp.float32(position_scale))
            self.key_size = features + 2
            self.size = self.key_size + WAVES**2 - 1
        else:
            self.positions = PositionEmbedding(
                self.side, features, scale=position_scale, rngs=rngs
            )
        self.norm = layers.LayerNorm(features)
        self.enter = layers.Linear(features, features, rngs=rngs)
        self.leave = layers.Linear(features, features, rngs=rngs)

    def __call__(
        self, image: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch cells features"]:
        """Encodes images in [0, 1], row by row of the grid."""
        x = 2 * image - 1
        for border, convolution in zip(self.borders, self.convolutions, strict=True):
            if border:
                x = jnp.pad(x, ((0, 0), border, border, (0, 0)), mode="edge")
            x = nnx.relu(convolution(x))
        x = x.astype(image.dtype)
        if not self.apart:
            x = self.positions(x)
        x = self.norm(x.reshape(len(x), -1, x.shape[-1]))
        x = self.leave(nnx.relu(self.enter(x))).astype(image.dtype)
        if not self.apart:
            return x
        coordinates, waves = cells(self.side)
        where = jnp.concatenate([self.gate[...] * coordinates, waves], axis=-1)
        where = jnp.broadcast_to(where, (len(x), *where.shape)).astype(x.dtype)
        return jnp.concatenate([x, where], axis=-1)

    def attended(
        self, slots: Callable[..., SlotAttention], *, rngs: nnx.Rngs
    ) -> SlotAttention:
        """Makes slot attention to the cells from `slots` (input size, rngs=…)."""
        if self.apart:
            return slots(self.size, key_size=self.key_size, rngs=rngs)
        return slots(self.size, rngs=rngs)


def cells(side: int) -> tuple[Float[Array, "cells 2"], Float[Array, "cells waves"]]:
    """Where the cells of a grid lie: (y, x) from −1 to 1, and products of cosines."""
    line = jnp.linspace(-1.0, 1.0, side)
    coordinates = jnp.stack(jnp.meshgrid(line, line, indexing="ij"), axis=-1)
    centres = (jnp.arange(side, dtype=jnp.float32) + 0.5) / side
    orders = jnp.arange(WAVES, dtype=jnp.float32)
    wave = jnp.cos(jnp.pi * jnp.outer(centres, orders))
    waves = jnp.einsum("yk,xl->yxkl", wave, wave).reshape(side**2, -1)
    return coordinates.reshape(-1, 2), waves[:, 1:]  # The first is constant.


class ImageSlots(nnx.Module):
    """What models share that make no tokens: slot attention on an encoder's grid.

    Args:
      encoder: of the images, or of their features: with `side` and `attended`.
      slots: makes slot attention from (input size, rngs=…).
      rngs: source of the initial parameters.
    """

    reads: tuple[str, ...] = ("image",)
    annealed = ()

    def __init__(
        self,
        encoder: Any,
        slots: Callable[..., SlotAttention],
        rngs: nnx.Rngs,
    ):
        self.encoder = encoder
        self.slot_attention = encoder.attended(slots, rngs=rngs)

    def inputs(
        self, image: Float[Array, "batch *seen"]
    ) -> Float[Array, "batch cells features"]:
        """Returns what slot attention reads of images in [0, 1]."""
        return self.encoder(image)

    def attend(
        self,
        image: Float[Array, "batch *seen"],
        key: Key[Array, ""],
        *,
        noise: Float[Array, ""] | float | None = None,
        probe: BackwardStats | None = None,
        coupling_key: Key[Array, ""] | None = None,
    ) -> SlotsOutput:
        """Returns the slots of images in [0, 1]; see `SlotAttention`."""
        return self.slot_attention(
            self.inputs(image),
            key=key,
            noise=noise,
            probe=probe,
            coupling_key=coupling_key,
        )

    def backward_probe(self, batch: int) -> BackwardStats | None:
        """See `SlotAttention`."""
        return self.slot_attention.backward_probe(batch)

    def slot_problem(
        self, image: Float[Array, "batch *seen"], key: Key[Array, ""]
    ) -> Problem:
        """Returns the fixed-point problem that images in [0, 1] pose slot attention."""
        inputs = self.inputs(image)
        return self.slot_attention.problem(
            inputs, self.slot_attention.start(inputs, key)
        )

    def encode(
        self, image: Float[Array, "batch *seen"], *, key: Key[Array, ""]
    ) -> Encoded:
        """Takes images in [0, 1] apart; the key draws the initial slots."""
        slots = self.attend(image, key)
        attention = on_grid(slots.attention, self.encoder.side)
        return Encoded(None, slots.slots, attention, slots.stats)


def on_grid(
    attention: Float[Array, "batch slots cells"], side: int
) -> Float[Array, "batch slots {side} {side}"]:
    """Lays attention to the cells of a square grid on that grid, row by row."""
    return attention.reshape(*attention.shape[:2], side, side)
