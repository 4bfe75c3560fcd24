"""Scenes as no training scene is: what is changed when they are rendered.

Of the same seed, split and index a shift shows the same objects in the same places
(more objects: other scenes), so that a difference is the shift's.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

# CLEVR hands these sRGB bytes to Blender as linear values, which is why its objects
# look paler than the numbers; so do we.
CLEVR_RGB = (
    (87, 87, 87),
    (42, 75, 215),
    (129, 74, 25),
    (255, 238, 51),
    (173, 35, 35),
    (29, 105, 20),
    (129, 38, 192),
    (41, 208, 208),
)
# Orange, pink, lime, navy, olive, white, wine and mint: none of CLEVR's.
_UNSEEN_RGB = (
    (255, 128, 0),
    (255, 105, 180),
    (160, 235, 30),
    (12, 20, 90),
    (107, 107, 20),
    (240, 240, 240),
    (90, 10, 40),
    (150, 255, 190),
)


class Shift(NamedTuple):
    """What of a scene or its picture is changed.

    Attributes:
      meaning: in a line.
      rgb: bytes of the eight colours.
      ground: factors on the ground's light, red, green and blue; none changes nothing.
      turn: of the three lamps about the vertical, in radians.
      crop: the picture is the middle 1/crop of itself, at the same resolution.
      noise: standard deviation of normal noise on each level, as a share of white.
      more: how many objects more than the most, from one on; other scenes.
    """

    meaning: str
    rgb: tuple[tuple[int, int, int], ...] = CLEVR_RGB
    ground: tuple[float, ...] = ()
    turn: float = 0.0
    crop: float = 1.0
    noise: float = 0.0
    more: int = 0


NONE = Shift("scenes as trained on")
SHIFTS: Mapping[str, Shift] = {
    "objects": Shift("one to three objects more than in any other scene", more=3),
    "colours": Shift("eight colours, none of them CLEVR's", rgb=_UNSEEN_RGB),
    "light": Shift(
        "the lamps turned by 120° about the vertical: shadows fall elsewhere",
        turn=2 * math.pi / 3,
    ),
    "ground": Shift("a brown ground", ground=(0.8, 0.55, 0.35)),
    "cropped": Shift("the middle two thirds of the same images", crop=1.5),
    "noise": Shift("normal noise of a tenth of white on each level", noise=0.1),
}


def turned(lamps: Float[Array, "lamps 3"], shift: Shift) -> Float[Array, "lamps 3"]:
    """Lamps turned about the vertical through the origin."""
    cos, sin = math.cos(shift.turn), math.sin(shift.turn)
    x, y, z = lamps.T
    return jnp.stack([cos * x - sin * y, sin * x + cos * y, z], axis=1)


def grainy(
    image: UInt8[Array, "height width 3"], key: Key[Array, ""], shift: Shift
) -> UInt8[Array, "height width 3"]:
    """An image with noise on each level, cut off at black and white."""
    noise = 255 * shift.noise * jax.random.normal(key, image.shape)
    noisy = jnp.clip(image.astype(jnp.float32) + noise, 0, 255)
    return jnp.round(noisy).astype(jnp.uint8)
