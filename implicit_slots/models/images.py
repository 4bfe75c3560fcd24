"""Images as models see them, and how far one is from another."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def seen(batch: Mapping[str, Any]) -> Any:
    """Returns what models read of a batch: images, or the features made of them."""
    return batch["features"] if "features" in batch else batch["image"]


def as_float(image: Num[Array, "batch *seen"]) -> Float[Array, "batch *seen"]:
    """Returns images in [0, 1]; bytes are divided by 255, floats taken as they are.

    Cached features, which are bfloat16, become float32.
    """
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    return image.astype(jnp.float32) if image.dtype == jnp.bfloat16 else image


def squared_error(
    image: Float[Array, "batch height width 3"],
    other: Float[Array, "batch height width 3"],
) -> Float[Array, " batch"]:
    """Returns the squared error per image, summed over pixels and channels."""
    return jnp.sum((image - other) ** 2, axis=(1, 2, 3))
