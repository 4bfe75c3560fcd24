"""From slots to frozen features: each slot on its own, or one patch after the other.

The MLP decoder and the autoregressive one of DINOSAUR (Seitzer et al. 2023, arXiv
2209.14860); orders of the patches as in SPOT (Kakogeorgiou et al. 2024, arXiv
2312.00648).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from implicit_slots.models import layers
from implicit_slots.models.transformer import TransformerDecoder

BEGIN_DEVIATION = 0.02


class FeatureDecoder(nnx.Module):
    """Slots to features and masks of every patch, each slot on its own.

    Args:
      patches: how many.
      slot_size: width of a slot, and of the learned position of a patch.
      features: of a patch.
      hidden: width of the MLP's hidden layers.
      num_layers: how many of those.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        patches: int,
        slot_size: int,
        features: int,
        *,
        hidden: int,
        num_layers: int,
        rngs: nnx.Rngs,
    ):
        positions = jax.random.normal(rngs.params(), (patches, slot_size))
        self.positions = nnx.Param(positions * slot_size**-0.5)
        widths = [slot_size, *[hidden] * num_layers]
        self.hidden = nnx.List(
            [
                layers.Linear(one, other, kernel_init=layers.kaiming_uniform, rngs=rngs)
                for one, other in itertools.pairwise(widths)
            ]
        )
        self.out = layers.Linear(
            widths[-1],
            features + 1,
            kernel_init=layers.kaiming_uniform,
            full_output=True,
            rngs=rngs,
        )

    def __call__(
        self, slots: Float[Array, "batch slots dim"]
    ) -> tuple[
        Float[Array, "batch slots patches features"],
        Float[Array, "batch slots patches"],
    ]:
        """Returns each slot's features, and its mask's logits."""
        x = slots[:, :, None] + self.positions[...][None, None]
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        x = self.out(x)
        return x[..., :-1], x[..., -1]


class AutoregressiveDecoder(nnx.Module):
    """Predicts each patch's features from the slots and from the patches before it.

    The transformer is SLATE's, as in SPOT: the true features of the patches before a
    patch, after a learned beginning, go through a linear layer and a LayerNorm, and
    every block reads the slots. No positions are added: features have them. What comes
    out of the last LayerNorm is the prediction.

    Args:
      side: of the grid of patches.
      slot_size: width of a slot.
      features: of a patch, and width of the transformer.
      num_blocks: of the transformer.
      num_heads: of its attention.
      orders: how many of `patch_orders` there are, each with a beginning of its own.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        side: int,
        slot_size: int,
        features: int,
        *,
        num_blocks: int,
        num_heads: int,
        orders: int,
        rngs: nnx.Rngs,
    ):
        self.side = side
        begin = jax.random.normal(rngs.params(), (orders, features))
        self.begin = nnx.Param(BEGIN_DEVIATION * begin)
        self.enter, self.read = (
            layers.Linear(size, features, bias=False, rngs=rngs)
            for size in (features, slot_size)
        )
        self.norm_enter = layers.LayerNorm(features)
        self.norm_read = layers.LayerNorm(features)
        self.transformer = TransformerDecoder(
            num_blocks,
            features,
            num_heads,
            dropout=0.0,
            attention_dropout=0.0,
            kernels="auto",
            remat=False,
            rngs=rngs,
        )

    def __call__(
        self,
        slots: Float[Array, "batch slots dim"],
        features: Float[Array, "batch patches features"],
        *,
        present: Bool[Array, "batch slots"] | None = None,
        order: Int[Array, ""] | int = 0,
    ) -> tuple[
        Float[Array, "batch patches features"], Float[Array, "batch slots patches"]
    ]:
        """Predicts all patches, each from the true ones before it; shares of slots.

        Args:
          slots: of each image.
          features: the true ones, row by row.
          present: which slots are read, at least one; all if not given.
          order: in which the patches follow each other, of `patch_orders`.

        Returns:
          The predicted features, row by row; and of each patch the shares of what its
          prediction reads of the slots in the last block, mean over the heads.
        """
        places = jnp.asarray(patch_orders(self.side))[order]
        before = jnp.take(features, places[:-1], axis=1)
        begin = jnp.broadcast_to(self.begin[...][order], before[:, :1].shape)
        x = self.enter(jnp.concatenate([begin, before], axis=1))
        x = self.norm_enter(x.astype(features.dtype))
        seen = self.norm_read(self.read(slots).astype(slots.dtype))
        made, shares = self.transformer.watch_blocks(x, seen, present)
        back = jnp.argsort(places)
        last = shares[-1].swapaxes(1, 2)
        return jnp.take(made, back, axis=1), jnp.take(last, back, axis=2)


def patch_orders(side: int) -> Int[np.ndarray, "orders patches"]:
    """The nine orders of SPOT's: the patch that is predicted first, second, ….

    The first is row by row. Then come columns and rows from each of the corners, and
    the spiral from the middle outwards.

    Args:
      side: of the grid of patches.
    """
    grid = np.arange(side**2, dtype=np.int32).reshape(side, side)
    left, up = grid[:, ::-1], grid[::-1]
    both = up[:, ::-1]
    orders = [grid, grid.T, left.T, left, both.T, both, up.T, up]
    return np.stack([*(order.reshape(-1) for order in orders), _spiral(grid)])


def _spiral(grid: np.ndarray) -> np.ndarray:
    """From the middle outwards, as SPOT has it."""
    rings, rest = [], np.rot90(grid)
    while rest.size:
        rings.append(rest[0])
        rest = rest[1:].T[::-1]
    return np.concatenate(rings)[::-1]
