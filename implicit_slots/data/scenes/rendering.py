"""The ray caster: a scene's picture and masks, in JAX.

Lamps and colours are those of CLEVR's generator (``base_scene.blend``); the picture
is the standard crop (``sampling``), rendered at the asked resolution instead of
resized.

One ray per pixel is enough: every silhouette (of objects against the camera, of
shadows against a lamp) is an exact signed distance, so its edge is a ramp one pixel
(one penumbra) wide. Objects stand on disjoint discs of the ground, so painting them
from far to near is exact. A "vector" is a tuple of three arrays, as in ``sampling``.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Integer

from implicit_slots.data.scenes.occlusion import sample_occluded
from implicit_slots.data.scenes.sampling import (
    Scene,
    dot,
    minus,
    objects,
    sample_scene,
    scene_key,
    split_code,
)
from implicit_slots.data.scenes.shapes import along, unit
from implicit_slots.data.scenes.shifts import NONE, Shift, grainy, rearranged
from implicit_slots.data.scenes.stage import POWER, set_stage

_LAMP_RADIUS = np.array([0.4, 0.4, 0.7, 20.0], np.float32)
_GLEAM = np.array([1.0, 0.4, 0.7, 0.0], np.float32)
_AMBIENT = 0.05
_FLOOR = 0.13  # what the ground sends up
_GROUND_ALBEDO = 0.74
_SHADOW_SHARE = 0.1


def _irradiance(lamp, point, normal):
    """Light that falls on a surface from a lamp of unit power."""
    to_lamp = minus(lamp, point)
    inverse2 = 1 / dot(to_lamp, to_lamp)
    facing = jnp.maximum(dot(to_lamp, normal), 0.0)
    # An area lamp shines by Lambert's cosine about its axis, towards the origin.
    emitted = jnp.maximum(dot(to_lamp, unit(lamp)), 0.0)
    return facing * emitted * inverse2 * inverse2


def _to_srgb(x):
    # The sRGB curve out of square roots, to within 0.3% of white; `pow` is slow.
    a = jnp.sqrt(jnp.clip(x, 0.0, 1.0))
    b = jnp.sqrt(a)
    return jnp.clip(
        0.662002687 * a
        + 0.684122060 * b
        - 0.323583601 * jnp.sqrt(b)
        - 0.0225411470 * x,
        0.0,
        1.0,
    )


def _light_ground(stage):
    """The ground's colour, lit and shaded, and whose shadow falls where."""
    ground = along(stage.eye, stage.view, -stage.eye[2] / stage.view[2])
    green = jnp.asarray(POWER[:, 1])
    lamp_radius = jnp.asarray(_LAMP_RADIUS)
    zeros = jnp.zeros_like(ground[0])

    def shine(i, state):
        canvas, total, most, shadow = state
        lamp = tuple(stage.lamps[i])
        light = _irradiance(lamp, ground, (0.0, 0.0, 1.0))
        fall = minus(ground, lamp)
        spread = lamp_radius[i] * lax.rsqrt(dot(fall, fall))
        fall = unit(fall)

        def cast(k, state):
            passing, most, shadow = state
            o = minus(ground, tuple(stage.scene.position[k]))
            outline = stage.outline(k, o, fall)
            # The share of the lamp's disc that the object's edge covers.
            penumbra = spread * jnp.maximum(dot(o, fall), 0.05)
            x = jnp.clip(0.5 + 0.5 * outline / penumbra, 0.0, 1.0)
            x = x * x * (3 - 2 * x)
            blocked = x * light * green[i]
            shadow = jnp.where(blocked > most, k + 1, shadow)
            return passing * (1 - x), jnp.maximum(blocked, most), shadow

        passing, most, shadow = stage.for_present(
            jnp.arange(len(stage.present)), cast, (zeros + 1, most, shadow)
        )
        canvas += stage.power[i] * (light * passing)
        return canvas, total + green[i] * light, most, shadow

    dark = (
        jnp.full((3, *zeros.shape), _AMBIENT),
        zeros + _AMBIENT,
        zeros,
        zeros.astype(jnp.int32),
    )
    canvas, total, most, shadow = lax.fori_loop(0, len(POWER), shine, dark)
    return canvas, jnp.where(most > _SHADOW_SHARE * total, shadow, 0)


def _paint(stage, k, state):
    """Object k over what has been painted."""
    canvas, segmentation = state
    scene, view = stage.scene, stage.view
    o = stage.turn(k, minus(stage.eye, tuple(scene.position[k])))
    d = stage.turn(k, view)
    distance = jnp.sqrt(dot(o, o))
    pixels = stage.radius[k] / (stage.pixel * distance)  # the radius, on the image
    bevel = jnp.clip(1.5 / pixels, 0.13, 0.5)
    outline, t, lean, edge = lax.switch(
        scene.shape[k], stage.surfaces, o, d, stage.radius[k], bevel
    )
    point = along(stage.eye, view, t)
    normal = stage.turn_back(k, unit(lean))
    mirror = along(view, normal, -2 * dot(view, normal))
    metal = scene.material[k] == 1

    # Light is gathered where it leaves for the camera: on the object if it is rubber,
    # on the ground that it mirrors if it is metal.
    reach = jnp.minimum(point[2] / jnp.maximum(-mirror[2], 0.01), 20.0)
    spot = (*along(point, mirror, reach)[:2], 0.0)
    up = (0.0, 0.0, 1.0)
    source = [jnp.where(metal, p, q) for p, q in zip(spot, point, strict=True)]
    facing = [jnp.where(metal, p, q) for p, q in zip(up, normal, strict=True)]
    # No highlight narrower than the pixels that sample it, at equal energy.
    widest = jnp.where(metal, 120.0, 12.0)
    sharp = jnp.minimum(widest, pixels * pixels)
    gleam = jnp.asarray(_GLEAM) * sharp / widest

    def gather(i, state):
        light, shine = state
        lamp = tuple(stage.lamps[i])
        # (1 + n (1 - cos))^-2 peaks like a power of the cosine, without pow.
        lobe = 1 / (1 + sharp * (1 - dot(mirror, unit(minus(lamp, point)))))
        light += stage.power[i] * _irradiance(lamp, source, facing)
        return light, shine + gleam[i] * lobe * lobe

    ambient = _AMBIENT + (0.5 - 0.5 * facing[2]) * (_FLOOR - _AMBIENT)
    dark = jnp.broadcast_to(ambient, canvas.shape), jnp.zeros_like(outline)
    light, shine = lax.fori_loop(0, len(POWER), gather, dark)

    def polished(light):
        light = 0.95 * _mirrored(stage, k, point, mirror, light) + 1.5 * shine
        # A bevel gathers what is all around.
        return light + edge * (0.22 - light)

    light = lax.cond(metal, polished, lambda light: light / _GROUND_ALBEDO, light)
    rgb = stage.rgb[k]
    if stage.checked:
        rgb += _checks(along(o, d, t), pixels / stage.radius[k]) * (
            stage.second[k] - rgb
        )
    color = rgb * light + 0.05 * shine
    alpha = jnp.clip(0.5 - outline / (dot(o, d) * stage.pixel), 0.0, 1.0)
    canvas += alpha * (color - canvas)
    return canvas, jnp.where(outline > 0, k + 1, segmentation)


def _checks(point, scale):
    """The second colour's share: the eight octants of an object have two by turns."""
    x, y, z = (jnp.clip(scale * c, -1.0, 1.0) for c in point)
    return 0.5 - 0.5 * x * y * z


def _mirrored(stage, k, point, mirror, floor):
    """What object k reflects: the floor's light, the dark above it, other objects."""
    forward = stage.forward
    # CLEVR's world is dark but for the backdrop, whose wall stands ahead.
    ahead = mirror[0] * forward[0] + mirror[1] * forward[1]
    flat = mirror[0] ** 2 + mirror[1] ** 2
    level = forward[0] ** 2 + forward[1] ** 2
    ahead = ahead * lax.rsqrt(jnp.maximum(flat * level, 1e-6))
    sky = 0.03 + 0.1 * jnp.clip(2.5 * ahead - 1.0, 0.0, 1.0)
    light = floor + jnp.clip(mirror[2] * 4 + 0.6, 0.0, 1.0) * (sky - floor)

    def reflect(j, light):
        # Others are blurred balls: metal in CLEVR is rough, and they are small in it.
        offset = minus(tuple(stage.scene.position[j]), point)
        along = dot(offset, mirror)
        miss = jnp.sqrt(jnp.maximum(dot(offset, offset) - along * along, 0.0))
        x = jnp.clip(0.5 + 4 * (stage.radius[j] - miss), 0.0, 1.0)
        x = jnp.where((along > 0) & (j != k), x, 0.0)
        return light + x * (0.3 * stage.mean[j] - light)

    return stage.for_present(jnp.arange(len(stage.present)), reflect, light)


def render(
    scene: Scene,
    resolution: int,
    keep: Bool[Array, " objects"] | None = None,
    *,
    zoom: float = 1.0,
    shift: Shift = NONE,
) -> dict[str, Array]:
    """Renders a scene.

    Args:
        scene: What to draw.
        resolution: Side of the square image, in pixels.
        keep: Objects to draw; the others are taken out, with their shadows and
            reflections, and those that remain keep their ids. None draws all.
        zoom: The image is the middle ``1 / zoom`` of the crop in each direction, at
            this resolution; at least 1, and static.
        shift: whose colours, shapes and ground are drawn; static.

    Returns:
        ``image`` uint8 ``[resolution, resolution, 3]``; ``segmentation`` int32
        ``[resolution, resolution]``, k + 1 where object k is seen at the pixel's
        centre and 0 on the ground; ``shadow`` likewise on the ground, the object that
        takes most of one lamp's light from that point, where that is a tenth of all
        the light there or more.

    Raises:
        ValueError: ``zoom`` is below 1.
    """
    present = scene.present if keep is None else scene.present & keep
    stage = set_stage(scene, resolution, present, zoom, shift)
    canvas, shadow = _light_ground(stage)
    if shift.ground:
        canvas = canvas * jnp.asarray(shift.ground)[:, None, None]
    canvas, segmentation = stage.for_present(
        stage.far_to_near(),
        partial(_paint, stage),
        (canvas, jnp.zeros_like(shadow)),
    )
    image = jnp.moveaxis(_to_srgb(canvas), 0, -1)
    return {
        "image": jnp.round(image * 255).astype(jnp.uint8),
        "segmentation": segmentation,
        "shadow": jnp.where(segmentation == 0, shadow, 0),
    }


# The split is traced, as its code: static, it would cost each split a compilation.
@partial(jax.jit, static_argnums=range(4, 9))
def _draw_batch(
    seed, split, indices, keep, resolution, min_objects, max_objects, zoom, shift
):
    def one(index, keep):
        key = scene_key(seed, split, index)
        limits = {"min_objects": min_objects, "max_objects": max_objects, "zoom": zoom}
        if shift.hidden:
            scene = sample_occluded(key, resolution, shift.hidden, **limits)
        else:
            scene = sample_scene(key, **limits)
        scene = rearranged(scene, shift)
        shown = zoom * shift.crop
        batch = render(scene, resolution, keep, zoom=shown, shift=shift)
        if shift.noise:
            noise = jax.random.fold_in(key, 1)
            batch["image"] = grainy(batch["image"], noise, shift)
        return {**batch, "objects": objects(scene, resolution, zoom=shown)}

    # One scene after another stays in a CPU's cache and skips what a scene does not
    # have; an accelerator wants them all at once.
    return lax.platform_dependent(
        indices,
        keep,
        cpu=lambda *args: lax.map(lambda pair: one(*pair), args),
        default=jax.vmap(one),
    )


def render_batch(
    seed: Integer[Array, ""] | int,
    split: str,
    indices: Integer[Array | np.ndarray, " batch"],
    *,
    resolution: int = 64,
    min_objects: int = 3,
    max_objects: int = 6,
    keep: Bool[Array | np.ndarray, "batch objects"] | None = None,
    zoom: float = 1.0,
    shift: Shift = NONE,
) -> dict:
    """Draws and renders the scenes with these indices.

    On a CPU it takes one core: threads that render parts of a batch share the cores,
    since JAX lets go of the interpreter's lock.

    Args:
        seed: Of the whole data set.
        split: One of ``SPLITS``; they share a compilation.
        indices: One per image. A scene's bytes do not depend on the others of its
            batch (on a CPU).
        resolution: Side of the images, in pixels.
        min_objects: Fewest objects asked for in a scene.
        max_objects: Most objects, K.
        keep: Objects to draw, as in ``render``.
        zoom: As in ``render``; scenes are placed for it, so another zoom draws other
            scenes.
        shift: What is changed of the same scenes, or of how they are placed; not how
            many objects there are.

    Returns:
        The batch: ``image``, ``segmentation`` and ``shadow`` as ``render`` gives them
        and ``objects`` as ``objects`` does, all with a leading batch axis.

    Raises:
        ValueError: An unknown split, not ``1 <= min_objects <= max_objects``, or
            ``zoom`` below 1.
    """
    code = split_code(split)
    size = len(indices)
    if keep is None:
        keep = np.ones((size, max_objects), bool)
    if size == 1:
        # XLA inlines a loop of one turn, fuses it differently and so rounds some
        # pixels differently.
        indices, keep = jnp.repeat(indices, 2), jnp.repeat(keep, 2, axis=0)
    how = resolution, min_objects, max_objects, zoom, shift
    batch = _draw_batch(seed, code, indices, keep, *how)
    return jax.tree.map(lambda x: x[:size], batch) if size == 1 else batch
