"""Images as models see them, and how far one is from another."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def as_float(
    image: Num[Array, "batch height width 3"],
) -> Float[Array, "batch height width 3"]:
    """Returns images in [0, 1]; bytes are divided by 255, floats taken as they are."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    return image


def squared_error(
    image: Float[Array, "batch height width 3"],
    other: Float[Array, "batch height width 3"],
) -> Float[Array, " batch"]:
    """Returns the squared error per image, summed over pixels and channels."""
    return jnp.sum((image - other) ** 2, axis=(1, 2, 3))
