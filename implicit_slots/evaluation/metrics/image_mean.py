"""The mean of a value per image, over batches and processes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics
from jaxtyping import Array, Bool, Float


@flax.struct.dataclass
class ImageMean(metrics.Metric):
    """A sum and a count of images, so that batches and hosts merge in any order.

    An image counts if it is no padding and its value is defined (not NaN).
    """

    # Any: JAX rebuilds a pytree of whatever it is mapped to, not only of arrays.
    total: Any
    count: Any

    @classmethod
    def empty(cls) -> "ImageMean":
        """Returns the mean over no image."""
        return cls(jnp.float32(0), jnp.int32(0))

    @classmethod
    def of(
        cls, values: Float[Array, " batch"], mask: Bool[Array, " batch"]
    ) -> "ImageMean":
        """Measures a batch.

        Args:
          values: one for each image; NaN where it has none.
          mask: False for examples that only pad the batch.
        """
        counted = mask & ~jnp.isnan(values)
        return cls(
            total=jnp.sum(jnp.where(counted, values, 0)),
            count=jnp.sum(counted, dtype=jnp.int32),
        )

    def merge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, other: "ImageMean"
    ) -> "ImageMean":
        """Returns the mean over both sets of images."""
        return type(self)(self.total + other.total, self.count + other.count)

    def compute(self) -> Float[Array, ""]:
        """The mean; NaN where no image has a value."""
        return jnp.asarray(self.total) / jnp.asarray(self.count).astype(jnp.float32)


def image_means(
    values: dict[str, jax.Array], mask: Bool[Array, " batch"]
) -> dict[str, ImageMean]:
    """Measures several values of a batch, by name."""
    return {name: ImageMean.of(value, mask) for name, value in values.items()}
