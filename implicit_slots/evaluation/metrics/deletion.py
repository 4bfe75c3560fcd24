"""What an image loses when its slots are deleted one at a time, in numbers.

Chang, Griffiths and Levine (2022, arXiv 2207.00787), figure 9, show renders while slots
are deleted: with many left each deletion takes one object away, with few left what
remains falls apart. Here that is measured: what a deletion changes outside the deleted
object ("spill") and how far renders are from the scene that truly lacks the objects.

The study knows no model: `render` and `read` are arguments, so that controls with known
answers go through the same code.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from implicit_slots.data.source import IGNORED
from implicit_slots.evaluation.metrics.segmentation import attention_to_masks

# (slots, present) -> image [batch, height, width, 3] in [0, 1].
Render = Callable[[jax.Array, jax.Array], jax.Array]
# (slots, present) -> cross-entropy [batch, rows, columns] of the image's own tokens.
Read = Callable[[jax.Array, jax.Array], jax.Array | None]
# Removed objects [batch, objects] -> image uint8, or None.
Without = Callable[[np.ndarray], UInt8[np.ndarray, "batch height width 3"] | None]


class Regions(NamedTuple):
    """What each slot stands for in its image.

    Attributes:
      pixels: that may change when the slot goes; none for a slot without an object.
      objects: which objects the slot owns, to be taken out of the scene with it.
      counted: pixels of its image that count: all but those that are `IGNORED`.
    """

    pixels: Bool[Array, "batch slots height width"]
    objects: Bool[Array, "batch slots objects"]
    counted: Bool[Array, "batch slots height width"]


class Deletions(NamedTuple):
    """What deletions did, by the number of slots left: K − 1, …, 1 along `left`.

    Images come last everywhere, so that batches are joined along the last axis. What a
    deletion does is against the state just before it. Pixels that do not count are in
    none of the numbers, nor are tokens with such a pixel. NaN where a number is
    undefined: the first six where the deleted slot has no region.

    Attributes:
      spill: squared change of the render outside the deleted slot's region, summed
        over pixels and channels, images in [0, 1]; from 0.
      spill_share: the same as a share of the whole change, 0 to 1; NaN also where the
        render did not change.
      scene_spill: `spill` of the true scenes, from which objects are taken: what
        reflections, faint shadows and edges alone make of it.
      spill_cross_entropy: rise of the cross-entropy of the image's own tokens outside
        the region, nats per image; a token is inside if any of its pixels is.
      object_cross_entropy: the same inside.
      change: squared change of the whole render, of slots with a region.
      idle_change: the same of slots without one; NaN for the others.
      counterfactual_error: squared error of the render against the scene without the
        objects of all slots deleted so far. Slots that own no object take nothing out
        of the scene: what goes with them counts as error.
      render_error: squared error of the render before any deletion against the image.
    """

    spill: Float[np.ndarray, "orders left images"]
    spill_share: Float[np.ndarray, "orders left images"]
    scene_spill: Float[np.ndarray, "orders left images"]
    spill_cross_entropy: Float[np.ndarray, "orders left images"]
    object_cross_entropy: Float[np.ndarray, "orders left images"]
    change: Float[np.ndarray, "orders left images"]
    idle_change: Float[np.ndarray, "orders left images"]
    counterfactual_error: Float[np.ndarray, "orders left images"]
    render_error: Float[np.ndarray, " images"]


def object_regions(
    segmentation: Int[Array, "batch height width"],
    matched: Int[Array, "batch objects"],
    *,
    num_slots: int,
    shadow: Int[Array, "batch height width"] | None = None,
) -> Regions:
    """Gives each object's pixels, and those of its shadow, to the slot matched to it.

    Args:
      segmentation: object k has id k + 1; 0 is the background, `IGNORED` does not
        count.
      matched: slot of each object, −1 for none: `iou.match` of the decoder's masks,
        since it is the decoder that a deletion concerns.
      num_slots: number of slots.
      shadow: the object whose shadow falls there, 0 for none, where that is known.

    Returns:
      Regions; an object that is nowhere seen has none, whatever its shadow.
    """
    ids = jnp.arange(1, matched.shape[1] + 1)[:, None, None]
    seen = segmentation[:, None] == ids
    there = seen.any(axis=(2, 3), keepdims=True)
    if shadow is not None:
        seen |= shadow[:, None] == ids
    owned = matched[:, None] == jnp.arange(num_slots)[:, None]
    counts = jnp.einsum(
        "bso,bohw->bshw", owned.astype(jnp.float32), (seen & there).astype(jnp.float32)
    )
    counted = jnp.broadcast_to((segmentation != IGNORED)[:, None], counts.shape)
    return Regions((counts > 0) & counted, owned, counted)


def mask_regions(
    attention: Float[Array, "batch slots rows columns"], height: int, width: int
) -> Regions:
    """Gives each pixel to the slot of largest weight, for images without true masks.

    Spill is then measured against what the decoder itself takes for the slot's, the
    background's slot among them, and no object can be taken out of the scene.

    Args:
      attention: the decoder's, with all slots present.
      height: of the image, in pixels.
      width: of the image, in pixels.
    """
    batch, slots = attention.shape[:2]
    winners = attention_to_masks(attention, height, width)
    pixels = winners[:, None] == jnp.arange(slots)[:, None, None]
    owned = jnp.zeros((batch, slots, 0), bool)
    return Regions(pixels, owned, jnp.ones_like(pixels))


def random_orders(
    key: Key[Array, ""], orders: int, batch: int, slots: int
) -> Int[Array, "{orders} {batch} {slots}"]:
    """Draws in which order each image's slots are deleted; the last one is kept."""
    places = jnp.broadcast_to(jnp.arange(slots), (orders, batch, slots))
    return jax.random.permutation(key, places, axis=-1, independent=True)


def shuffle_slots(key: Key[Array, ""], values: PyTree) -> PyTree:
    """The control: sets of slots that share no image.

    Slot k of each set is slot k of another image of the batch, no two slots of a set
    are of one image, and every slot is used once.

    Args:
      key: draws which.
      values: arrays [batch, slots, …], all shuffled alike: slots with their `Regions`.

    Raises:
      ValueError: fewer images than slots.
    """
    batch, slots = jax.tree.leaves(values)[0].shape[:2]
    if batch < slots:
        raise ValueError(
            f"slots are shuffled among at least as many images as slots: {slots}, got "
            f"{batch}"
        )
    key_images, key_shifts = jax.random.split(key)
    images = jax.random.permutation(key_images, batch)
    # Along a circle of all images, each slot is shifted by another number of places.
    shifts = jax.random.permutation(key_shifts, batch)[:slots]
    donors = jnp.zeros((batch, slots), jnp.int32)
    donors = donors.at[images].set(
        images[(jnp.arange(batch)[:, None] + shifts) % batch]
    )
    return jax.tree.map(lambda leaf: leaf[donors, jnp.arange(slots)], values)


def delete_in_turn(
    render: Render,
    slots: Float[Array, "batch slots dim"],
    regions: Regions,
    orders: Int[Array, "orders batch slots"],
    *,
    read: Read | None = None,
    image: Float[Array, "batch height width 3"] | None = None,
    without: Without | None = None,
    progress: Callable[..., Any],
) -> tuple[Deletions, Float[np.ndarray, "slots batch height width 3"]]:
    """Deletes each image's slots one by one until one is left.

    Runs on the host. Presence is an argument of `render` and `read`: compiled once,
    they serve all states. Costs 1 + orders · (K − 1) calls of each.

    Args:
      render: the image that present slots make.
      slots: of each image; at least two.
      regions: what each slot stands for, `object_regions` or `mask_regions`.
      orders: slots in the order of their deletion, permutations of 0 … K − 1.
      read: cross-entropy of the image's own tokens given present slots; None where
        there are no such tokens, as for shuffled slots.
      image: the images; None leaves `render_error` undefined.
      without: the scenes without some of the objects of `regions` (`Source.without`);
        None, or returning None, leaves `scene_spill` and `counterfactual_error`
        undefined.
      progress: wraps an iterable to show how far it is, as `tqdm` does.

    Returns:
      The numbers, and the renders of the first order with K, …, 1 slots left.

    Raises:
      ValueError: fewer than two slots.
    """
    batch, count = slots.shape[:2]
    if count < 2:
        raise ValueError(f"deleting slots needs at least two, got {count}")
    owned = np.asarray(regions.objects)

    def state(deleted: np.ndarray) -> _State:
        present = jnp.asarray(~deleted)
        scene = None
        if without is not None:
            removed = np.any(owned & deleted[..., None], axis=1)
            scene = without(removed)
        return _State(
            render(slots, present),
            None if read is None else read(slots, present),
            None if scene is None else jnp.asarray(scene, jnp.float32) / 255,
        )

    # Before any deletion all orders are in the same state.
    start = before = state(deleted := np.zeros((batch, count), bool))
    rows, renders = [], [np.asarray(start.image)]
    images = np.arange(batch)
    for turn in progress(range(len(orders) * (count - 1)), desc="deleting slots"):
        order, step = divmod(turn, count - 1)
        if step == 0:
            before, deleted = start, np.zeros((batch, count), bool)
        chosen = np.asarray(orders[order, :, step])
        # A new array: the transfer of the last one need not be over.
        deleted = deleted | (np.arange(count) == chosen[:, None])
        after = state(deleted)
        of_chosen = (leaf[images, chosen] for leaf in (regions.pixels, regions.counted))
        rows.append(_compare(before, after, *of_chosen))
        if order == 0:
            renders.append(np.asarray(after.image))
        before = after

    columns = zip(*jax.device_get(rows), strict=True)
    numbers = [np.reshape(c, (len(orders), count - 1, batch)) for c in columns]
    error = jnp.full(batch, jnp.nan)
    if image is not None:
        error = _error(start.image, image, regions.counted[:, 0])
    return Deletions(*numbers, render_error=np.asarray(error)), np.stack(renders)


def summarise(deletions: Deletions) -> dict[str, Float[np.ndarray, " left"]]:
    """Means over images and orders, by the number of slots left: K − 1, …, 1.

    Args:
      deletions: of all images.

    Returns:
      `left`, the number of slots left; `counted`, how many deletions were of a slot
      with a region; and the mean of each number of `Deletions` over where it is
      defined, NaN if nowhere. `render_error` is the same in each row.
    """
    rows = deletions.spill.shape[1]
    table = {
        "left": np.arange(rows, 0, -1, dtype=np.float64),
        "counted": np.isfinite(deletions.spill).sum(axis=(0, 2)).astype(np.float64),
    }
    for name, values in deletions._asdict().items():
        values = np.broadcast_to(values, deletions.spill.shape).astype(np.float64)
        defined = ~np.isnan(values)
        total = np.where(defined, values, 0).sum(axis=(0, 2))
        count = defined.sum(axis=(0, 2))
        table[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return table


class _State(NamedTuple):
    """Images without some slots: render, cross-entropy, and the true scene."""

    image: jax.Array
    cross_entropy: jax.Array | None
    scene: jax.Array | None


@jax.jit
def _compare(
    before: _State, after: _State, region: jax.Array, counted: jax.Array
) -> list[jax.Array]:
    """One deletion's numbers, in the order of `Deletions`."""
    undefined = jnp.full(len(region), jnp.nan)
    scene_spill = rise_inside = rise_outside = error = undefined
    has_region = region.any(axis=(1, 2))
    change, outside = _change(before.image, after.image, region, counted)
    share = jnp.where(change > 0, outside / change, jnp.nan)
    if before.cross_entropy is not None and after.cross_entropy is not None:
        rise = after.cross_entropy - before.cross_entropy
        batch, rows, columns = rise.shape
        cells = (batch, rows, -1, columns, region.shape[2] // columns)
        inside = region.reshape(cells).any(axis=(2, 4))
        rise = jnp.where(counted.reshape(cells).all(axis=(2, 4)), rise, 0)
        rise_inside = jnp.sum(jnp.where(inside, rise, 0), axis=(1, 2))
        rise_outside = jnp.sum(jnp.where(inside, 0, rise), axis=(1, 2))
    if before.scene is not None and after.scene is not None:
        scene_spill = _change(before.scene, after.scene, region, counted)[1]
        error = _error(after.image, after.scene, counted)
    of_region = [outside, share, scene_spill, rise_outside, rise_inside, change]
    of_region = [jnp.where(has_region, value, jnp.nan) for value in of_region]
    return [*of_region, jnp.where(has_region, jnp.nan, change), error]


def _change(
    before: jax.Array, after: jax.Array, region: jax.Array, counted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Squared change per image, all of it and outside the region."""
    squared = jnp.where(counted, jnp.sum((after - before) ** 2, axis=-1), 0)
    outside = jnp.sum(jnp.where(region, 0, squared), axis=(1, 2))
    # A sum of two, so that the share is exactly 0 or 1 where it should be.
    return outside + jnp.sum(jnp.where(region, squared, 0), axis=(1, 2)), outside


def _error(image: jax.Array, other: jax.Array, counted: jax.Array) -> jax.Array:
    return jnp.sum((image - other) ** 2, axis=(1, 2, 3), where=counted[..., None])
