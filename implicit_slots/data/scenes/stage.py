"""What is derived from a scene before any pixel is looked at.

A "vector" is a tuple of three arrays, as in ``sampling``.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from implicit_slots.data.scenes.sampling import (
    RADIUS,
    Scene,
    camera_axes,
    lens,
    radii,
)
from implicit_slots.data.scenes.shapes import OUTLINES, SURFACES, unit
from implicit_slots.data.scenes.shifts import Shift
from implicit_slots.data.scenes.unseen_shapes import UNSEEN_OUTLINES, UNSEEN_SURFACES

# base_scene.blend's sun, far enough out that its rays are nearly parallel.
_SUN = np.array([11.66081, -6.62799, 25.82317], np.float32) * 10

# Radiance of the ground per lamp (key, fill, back, sun): the least-squares fit to the
# mean of 600 Blender renders, whose residual is 0.4% of white.
POWER = np.array(
    [[5.68, 5.28, 4.56], [1.06, 1.15, 1.46], [2.36, 2.37, 2.35], [0.08 * 300**2] * 3],
    np.float32,
)


class Stage(NamedTuple):
    """A scene, ready to be traced; `k` is an object's place in it."""

    scene: Scene
    present: Array  # bool [K]
    radius: Array  # [K]
    cos: Array  # [K]
    sin: Array  # [K]
    rgb: Array  # [K, 3, 1, 1]: colours lie on a leading axis, for one loop over all
    checked: bool  # whether objects have a second colour
    second: Array  # [K, 3, 1, 1]
    mean: Array  # [K, 3, 1, 1]: of both
    lamps: Array  # [4, 3]: key, fill, back, sun
    power: Array  # [4, 3, 1, 1]
    eye: tuple
    forward: tuple
    view: tuple  # unit rays, each component [resolution, resolution]
    pixel: float  # radians
    outlines: tuple  # functions, by the code of a shape
    surfaces: tuple

    def turn(self, k, v):
        """Into the frame of object k."""
        return (
            self.cos[k] * v[0] + self.sin[k] * v[1],
            self.cos[k] * v[1] - self.sin[k] * v[0],
            v[2],
        )

    def turn_back(self, k, v):
        """Out of the frame of object k."""
        return (
            self.cos[k] * v[0] - self.sin[k] * v[1],
            self.cos[k] * v[1] + self.sin[k] * v[0],
            v[2],
        )

    def outline(self, k, o, d):
        """Signed distance of lines through `o` along `d` from object k's outline."""
        return lax.switch(
            self.scene.shape[k],
            self.outlines,
            self.turn(k, o),
            self.turn(k, d),
            self.radius[k],
        )

    def far_to_near(self):
        """The objects in the order in which they are painted.

        They stand on disjoint discs of the ground. By the power of the camera's foot
        point to each disc, no object is behind one that comes before it.
        """
        foot = self.scene.position[:, :2] - self.scene.camera[:2]
        power = jnp.sum(foot**2, -1) - jnp.asarray(RADIUS)[self.scene.size] ** 2
        return jnp.argsort(-power)

    def for_present(self, order, body, state):
        """Folds `body(k, state)` over the objects that are there."""

        def step(i, state):
            k = order[i]
            return lax.cond(self.present[k], body, lambda _, state: state, k, state)

        return lax.fori_loop(0, len(self.present), step, state)


def set_stage(
    scene: Scene, resolution: int, present: Array, zoom: float, shift: Shift
) -> Stage:
    """Returns the stage of a scene.

    Args:
      scene: what is there.
      resolution: side of the square image, in pixels.
      present: bool `[K]`, which objects are there.
      zoom: as in `sampling.lens`.
      shift: whose colours and shapes the objects have.

    Raises:
      ValueError: `zoom` is below 1.
    """
    focal, middle_column, middle_row = lens(zoom)
    grid = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution
    a = ((grid - middle_column) / focal)[None, :]
    b = ((middle_row - grid) / focal)[:, None]
    right, up, forward = camera_axes(scene.camera)
    palette = np.asarray(shift.rgb, np.float32) / 255
    rgb = second = mean = jnp.asarray(palette)[scene.color][:, :, None, None]
    if shift.checks:
        second = jnp.asarray(np.roll(palette, -1, 0))[scene.color][:, :, None, None]
        mean = 0.5 * (rgb + second)
    return Stage(
        scene=scene,
        present=present,
        radius=radii(scene.shape, scene.size),
        cos=jnp.cos(scene.rotation),
        sin=jnp.sin(scene.rotation),
        rgb=rgb,
        checked=shift.checks,
        second=second,
        mean=mean,
        lamps=jnp.concatenate([scene.lamps, _SUN[None]]),
        power=jnp.asarray(POWER)[:, :, None, None],
        eye=tuple(scene.camera),
        forward=tuple(forward),
        view=unit(tuple(forward[i] + a * right[i] + b * up[i] for i in range(3))),
        pixel=1 / (focal * resolution),
        outlines=UNSEEN_OUTLINES if shift.shapes else OUTLINES,
        surfaces=UNSEEN_SURFACES if shift.shapes else SURFACES,
    )
