"""Scenes as no training scene is: what is changed when they are rendered.

Of the same seed, split and index a shift shows the same objects in the same places
(more objects, and objects that hide each other: other scenes), so that a difference is
the shift's.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt8

from implicit_slots.data.scenes.sampling import Scene

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
      around: turn of the camera about the vertical, in radians; it looks at the origin.
      lower: factor on the camera's height above the ground.
      shapes: a pyramid in place of each cube, a cone of each sphere and cylinder.
      checks: objects have their own colour and the next of the eight, by octants.
      more: how many objects more than the most, from one on; other scenes.
      hidden: least and most share of its pixels that others hide of some object in
        every scene, and of none more; other scenes.
    """

    meaning: str
    rgb: tuple[tuple[int, int, int], ...] = CLEVR_RGB
    ground: tuple[float, ...] = ()
    turn: float = 0.0
    crop: float = 1.0
    noise: float = 0.0
    around: float = 0.0
    lower: float = 1.0
    shapes: bool = False
    checks: bool = False
    more: int = 0
    hidden: tuple[float, ...] = ()


NONE = Shift("scenes as trained on")
SHIFTS: Mapping[str, Shift] = {
    "objects": Shift("one to three objects more than in any other scene", more=3),
    "colours": Shift("eight colours, none of them CLEVR's", rgb=_UNSEEN_RGB),
    "light": Shift(
        "the lamps turned by 120° about the vertical: shadows fall elsewhere",
        turn=2 * math.pi / 3,
    ),
    "ground": Shift("a brown ground", ground=(0.8, 0.55, 0.35)),
    "camera": Shift(
        "the camera 30° around and at 0.6 of its height",
        around=math.pi / 6,
        lower=0.6,
    ),
    "shapes": Shift("pyramids in place of cubes, cones of all else", shapes=True),
    "textures": Shift("checks of two colours on every object", checks=True),
    "occlusion": Shift(
        "objects hide each other: 30 to 70 % of one in each scene, of none more",
        hidden=(0.3, 0.7),
    ),
    "cropped": Shift("the middle two thirds of the same images", crop=1.5),
    "noise": Shift("normal noise of a tenth of white on each level", noise=0.1),
}


def rearranged(scene: Scene, shift: Shift) -> Scene:
    """A scene with its lamps and its camera elsewhere."""
    if shift.turn:
        scene = scene._replace(lamps=_turned(scene.lamps, shift.turn))
    if shift.around:
        camera = _turned(scene.camera[None], shift.around)[0]
        scene = scene._replace(camera=camera.at[2].multiply(shift.lower))
    return scene


def _turned(points, angle):
    """Points turned about the vertical through the origin."""
    cos, sin = math.cos(angle), math.sin(angle)
    x, y, z = points.T
    return jnp.stack([cos * x - sin * y, sin * x + cos * y, z], axis=1)


def grainy(
    image: UInt8[Array, "height width 3"], key: Key[Array, ""], shift: Shift
) -> UInt8[Array, "height width 3"]:
    """An image with noise on each level, cut off at black and white."""
    noise = 255 * shift.noise * jax.random.normal(key, image.shape)
    noisy = jnp.clip(image.astype(jnp.float32) + noise, 0, 255)
    return jnp.round(noisy).astype(jnp.uint8)
