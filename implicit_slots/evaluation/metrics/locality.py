"""Where the attention of an object's slot lies: on it, on its shadow, elsewhere.

To put numbers on Fig. 10 of Chang et al. (2022), whose maps look smeared.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from implicit_slots.evaluation.metrics.iou import (
    drop_ignored,
    intersection_over_union,
    match,
    mean_over,
    one_hot_objects,
    scorable,
)
from implicit_slots.evaluation.metrics.segmentation import upsample
from implicit_slots.models.outputs import attention_entropy


def locality(
    attention: Float[Array, "batch slots rows columns"],
    segmentation: Int[Array, "batch height width"],
    shadow: Int[Array, "batch height width"] | None,
    *,
    max_true: int,
) -> dict[str, Float[Array, " batch"]]:
    """Measures the attention maps of the slots that have an object.

    Each object's slot is that of the matching by soft intersection over union
    (`iou.match`); a map is the slot's attention at the image's resolution, divided
    by its sum over pixels where shares are meant. Numbers are means over an image's
    objects that have a slot.

    Args:
      attention: Per slot, its weight at each position; sums to one over slots.
      segmentation: True segmentation; 0 is the background. Where it is `IGNORED`,
        maps are cut out, before they are divided by their sums.
      shadow: Id of the object whose shadow falls on a pixel, 0 for none; None where
        the data does not tell.
      max_true: The largest true id.

    Returns:
      Per image, NaN where no object has a slot, attention is not finite or an id is
      out of range:

      - `token_entropy`: of a position's distribution over slots, in nats, mean over
        positions of the feature grid (of every image, whatever it shows).
      - `area_ratio`: (Σa)² / Σa² in pixels, the size of a uniform map that is as
        concentrated (participation ratio), over the object's area.
      - `spread_ratio`: root mean squared distance of the map's mass from the object's
        centre over that of the object's own pixels.
      - `on_object`, `elsewhere` and, with `shadow`, `on_shadow`: shares of the map on
        the object, on the pixels of its shadow that show ground, and on the rest.
      - `shadow_contrast`, with `shadow`: the map's mean over its own shadow over its
        mean over the other ground; NaN also without visible shadows.
    """
    height, width = segmentation.shape[1:]
    objects = one_hot_objects(segmentation, max_true)
    weights = upsample(attention, height, width)
    weights = drop_ignored(weights.reshape(*weights.shape[:2], -1), segmentation)
    slots = match(intersection_over_union(objects, weights))
    matched = slots >= 0
    maps = jnp.take_along_axis(weights, jnp.maximum(slots, 0)[..., None], axis=1)
    mass = maps.sum(axis=2)
    area = objects.sum(axis=2)

    def ratio(above, below):
        return above / jnp.where(below > 0, below, 1)

    effective = ratio(mass**2, jnp.sum(maps**2, axis=2))
    rows, columns = jnp.meshgrid(
        jnp.arange(height, dtype=jnp.float32),
        jnp.arange(width, dtype=jnp.float32),
        indexing="ij",
    )
    places = jnp.stack([rows.ravel(), columns.ravel()])
    centre = ratio(jnp.einsum("bon,pn->bop", objects, places), area[..., None])
    distance = jnp.sum((places[None, None] - centre[..., None]) ** 2, axis=2)
    # A pixel is a square: of a single one the radius is not zero.
    radius = jnp.sqrt(ratio(jnp.sum(objects * distance, axis=2), area) + 1 / 6)
    spread = jnp.sqrt(ratio(jnp.sum(maps * distance, axis=2), mass) + 1 / 6)
    on_object = ratio(jnp.sum(maps * objects, axis=2), mass)
    found = {
        "area_ratio": ratio(effective, area),
        "spread_ratio": spread / radius,
        "on_object": on_object,
    }
    contrast = None
    if shadow is None:
        found["elsewhere"] = 1 - on_object
    else:
        ground = (segmentation == 0).astype(jnp.float32).reshape(len(shadow), 1, -1)
        shaded = one_hot_objects(shadow, max_true) * ground
        lit = ground - shaded
        on_shadow = jnp.sum(maps * shaded, axis=2)
        found["on_shadow"] = ratio(on_shadow, mass)
        found["elsewhere"] = 1 - on_object - found["on_shadow"]
        own = ratio(on_shadow, shaded.sum(axis=2))
        other = ratio(jnp.sum(maps * lit, axis=2), lit.sum(axis=2))
        seen = matched & shaded.any(axis=2) & (other > 0)
        contrast = mean_over(ratio(own, other), seen)
    values = {name: mean_over(value, matched) for name, value in found.items()}
    if contrast is not None:
        values["shadow_contrast"] = contrast
    values["token_entropy"] = attention_entropy(attention)
    valid = scorable(attention, segmentation, max_true)
    if shadow is not None:
        valid &= jnp.all((shadow >= 0) & (shadow <= max_true), axis=(1, 2))
    return {name: jnp.where(valid, value, jnp.nan) for name, value in values.items()}
