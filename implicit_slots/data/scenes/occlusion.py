"""Scenes whose objects hide each other, judged by their masks."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from implicit_slots.data.scenes.sampling import Scene, minus, sample_scene
from implicit_slots.data.scenes.shifts import NONE
from implicit_slots.data.scenes.stage import set_stage

# Six in ten draws are as asked.
_DRAWS = 64


def hidden_shares(
    scene: Scene, resolution: int, *, zoom: float = 1.0
) -> Float[Array, " objects"]:
    """The share of each object's pixels that nearer objects hide.

    It is 1 where no pixel's centre shows the object even alone, and of entries that are
    no objects.
    """
    stage = set_stage(scene, resolution, scene.present, zoom, NONE)

    def cover(k, state):
        alone, segmentation = state
        to_eye = minus(stage.eye, tuple(scene.position[k]))
        mask = stage.outline(k, to_eye, stage.view) > 0
        return alone.at[k].set(jnp.sum(mask)), jnp.where(mask, k + 1, segmentation)

    nothing = jnp.zeros(len(scene.present), jnp.int32)
    ground = jnp.zeros((resolution, resolution), jnp.int32)
    alone, segmentation = stage.for_present(
        stage.far_to_near(), cover, (nothing, ground)
    )
    names = jnp.arange(len(nothing))[:, None, None] + 1
    seen = jnp.sum(segmentation == names, axis=(1, 2))
    return 1 - seen / jnp.maximum(alone, 1)


def sample_occluded(
    key: Key[Array, ""],
    resolution: int,
    hidden: tuple[float, ...],
    *,
    min_objects: int,
    max_objects: int,
    zoom: float,
) -> Scene:
    """Draws a scene in which objects hide each other.

    Each object takes a place in which it hides another or is hidden, where it finds
    one. Of 64 such scenes it is the first in which some object has a share of its
    pixels hidden that lies within the limits, and none has more. There is none if
    `max_objects` is 1.

    Args:
        key: The scene is a pure function of it and of what follows.
        resolution: Side of the image whose pixels count.
        hidden: Least and most share.
        min_objects: As in `sample_scene`, and so the others.
        max_objects: See there.
        zoom: See there.
    """

    def draw(number):
        return sample_scene(
            jax.random.fold_in(key, number),
            min_objects=min_objects,
            max_objects=max_objects,
            zoom=zoom,
            overlap=hidden,
        )

    def is_wrong(state):
        number, scene = state
        shares = hidden_shares(scene, resolution, zoom=zoom)
        most = jnp.max(jnp.where(scene.present, shares, 0.0))
        return ((most < hidden[0]) | (most > hidden[1])) & (number < _DRAWS)

    def again(state):
        return state[0] + 1, draw(state[0] + 1)

    return lax.while_loop(is_wrong, again, (1, draw(1)))[1]
