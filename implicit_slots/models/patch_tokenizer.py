"""Image tokens without a network: the nearest of some patches, found by k-means.

It stands where SLATE has its dVAE, and no gradient changes it: the decoder's targets
are the same from the first step on, and a step does not pay for a dVAE.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from implicit_slots.models.dvae import STRIDE, most_probable, patches

PATCH = STRIDE * STRIDE * 3
LLOYD_STEPS = 15


class PatchTokenizer(nnx.Module):
    """A codebook of 4x4 patches, in the dVAE's place.

    Args:
      vocab_size: number of codes.
      rngs: source of the codes before `fit` has found better ones.
    """

    def __init__(self, vocab_size: int, *, rngs: nnx.Rngs):
        self.vocab_size = vocab_size
        self.codes = nnx.Param(jax.random.uniform(rngs.params(), (vocab_size, PATCH)))
        # Of the tokens, in the images that the codes were found in.
        self.shares = nnx.Param(jnp.full(vocab_size, 1 / vocab_size))

    def encode(
        self, image: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch rows columns vocab"]:
        """Returns logits: minus the squared distance to each code, but for a constant.

        Raises:
          ValueError: if the image size is not divisible by four.
        """
        return closeness(patches(image), self.codes[...])

    def decode_ids(
        self, ids: Int[Array, "batch rows columns"]
    ) -> Float[Array, "batch height width 3"]:
        """Returns the image of token ids in 0 … vocab − 1."""
        return unpatched(self.codes[...][ids])


class Codebook(NamedTuple):
    """What `fit` finds.

    Attributes:
      codes: patches with values in [0, 1], as `dvae.patches` flattens them.
      shares: of all patches, how many are nearest to each code.
    """

    codes: Float[Array, "vocab patch"]
    shares: Float[Array, " vocab"]


def fit(
    points: Float[Array, "points patch"], vocab_size: int, key: Key[Array, ""]
) -> Codebook:
    """Finds codes by k-means (Lloyd 1982) from k-means++ starts (Arthur 2007).

    Args:
      points: patches.
      vocab_size: number of codes.
      key: draws the starts.
    """

    def distances(code):
        return jnp.square(points - code[None]).sum(axis=1)

    def add(nearest, key):
        # Drawn in proportion to the squared distance from the codes so far.
        index = jax.random.categorical(key, jnp.log(nearest))
        code = points[index]
        return jnp.minimum(nearest, distances(code)), code

    keys = jax.random.split(key, vocab_size)
    start = points[jax.random.randint(keys[0], (), 0, len(points))]
    _, others = jax.lax.scan(add, distances(start), keys[1:])

    def total(values, codes):
        nearest = most_probable(closeness(points, codes))
        return jax.ops.segment_sum(values, nearest, vocab_size)

    ones = jnp.ones((len(points), 1))

    def improve(_, codes):
        count = total(ones, codes)
        # A code that lost all its points stays where it is.
        mean = total(points, codes) / jnp.maximum(count, 1)
        return jnp.where(count > 0, mean, codes)

    codes = jnp.concatenate([start[None], others])
    codes = jax.lax.fori_loop(0, LLOYD_STEPS, improve, codes)
    return Codebook(codes, total(ones, codes)[:, 0] / len(points))


def closeness(
    points: Float[Array, "*points patch"], codes: Float[Array, "vocab patch"]
) -> Float[Array, "*points vocab"]:
    """Minus half the squared distance of each point to each code, up to a constant."""
    products = jnp.matmul(points, codes.T, precision=jax.lax.Precision.HIGHEST)
    lengths = jnp.square(codes).sum(axis=1) / 2
    return products - jnp.expand_dims(lengths, range(products.ndim - 1))


def unpatched(
    grid: Float[Array, "batch rows columns patch"],
) -> Float[Array, "batch height width 3"]:
    """Lays patches out as an image: the inverse of `dvae.patches`."""
    batch, rows, columns, _ = grid.shape
    x = grid.reshape(batch, rows, columns, STRIDE, STRIDE, 3).swapaxes(2, 3)
    return x.reshape(batch, rows * STRIDE, columns * STRIDE, 3)
