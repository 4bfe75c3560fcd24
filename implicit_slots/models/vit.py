"""Vision transformers (Dosovitskiy et al. 2021) as DINO and DINOv2 lay them out.

DINO: Caron et al. 2021 (arXiv 2104.14294). DINOv2: Oquab et al. 2023 (arXiv
2304.07193); with register tokens: Darcet et al. 2024 (arXiv 2309.16588).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from implicit_slots.models import layers, products
from implicit_slots.runtime.errors import InvalidValue

EPSILON = 1e-6  # of every LayerNorm, in both repositories
MLP_RATIO = 4
DRAWN_POSITIONS = 0.1  # their standard deviation; a patch's own part has about 2
# Of ImageNet's pixels in [0, 1]: what all of these were trained on is scaled by them.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Layout(NamedTuple):
    """The shape of a vision transformer.

    Attributes:
      patch: side of a patch in pixels.
      width: features of a token.
      depth: number of blocks.
      heads: attention heads of a block.
      registers: tokens beside the class token that stand for no patch.
      layer_scale: whether what a block adds is scaled feature by feature.
      centred: whether ImageNet's mean is taken from the pixels. Without it grey differs
        from grey by a factor alone, which a LayerNorm takes away.
      pretrained: whether weights of it are published, and are to be read.
    """

    patch: int
    width: int
    depth: int
    heads: int
    registers: int = 0
    layer_scale: bool = False
    centred: bool = True
    pretrained: bool = True


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}
LAYOUTS: Mapping[str, Layout] = {
    **{f"dino_vit{s}{p}": Layout(p, *_SIZES[s]) for s in "sb" for p in (8, 16)},
    **{
        f"dinov2_vit{s}14{'_reg' if n else ''}": Layout(14, *_SIZES[s], n, True)
        for s in _SIZES
        for n in (0, 4)
    },
    # As its initialisation draws it: for small runs and tests.
    "random": Layout(4, 64, 1, 4, centred=False, pretrained=False),
}


class Block(nnx.Module):
    """Self-attention and an MLP, each behind a LayerNorm and added to what came in.

    Args:
      layout: of the transformer.
      rngs: source of the initial parameters.
    """

    def __init__(self, layout: Layout, *, rngs: nnx.Rngs):
        width, hidden = layout.width, MLP_RATIO * layout.width
        self.heads = layout.heads
        self.norm_attention = _norm(width, rngs)
        self.qkv = layers.Linear(width, 3 * width, rngs=rngs)
        self.out = layers.Linear(width, width, rngs=rngs)
        self.norm_mlp = _norm(width, rngs)
        self.enter = layers.Linear(width, hidden, rngs=rngs)
        self.leave = layers.Linear(hidden, width, rngs=rngs)
        scaled = layout.layer_scale
        self.scale_attention = nnx.Param(jnp.ones(width)) if scaled else None
        self.scale_mlp = nnx.Param(jnp.ones(width)) if scaled else None

    def __call__(
        self, x: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch tokens dim"]:
        """Maps all tokens together."""
        x = x + _scaled(self._attend(self.norm_attention(x)), self.scale_attention)
        hidden = nnx.gelu(self.enter(self.norm_mlp(x)), approximate=False)
        return x + _scaled(self.leave(hidden).astype(x.dtype), self.scale_mlp)

    def _attend(self, x):
        heads = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
        logits = products.product("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
        weights = nnx.softmax(logits, axis=-1).astype(v.dtype)
        read = products.product("bhts,bshd->bthd", weights, v)
        return self.out(read.reshape(x.shape)).astype(x.dtype)


class VisionTransformer(nnx.Module):
    """Square images to a vector for each patch.

    Args:
      layout: its shape, for example one of `LAYOUTS`.
      resolution: image side in pixels, divisible by the patch's.
      rngs: source of the initial parameters.
    """

    def __init__(self, layout: Layout, resolution: int, *, rngs: nnx.Rngs):
        self.layout = layout
        self.side = grid_side(layout, resolution)
        width = layout.width
        draw = nnx.initializers.truncated_normal(0.02)
        self.embedding = layers.Linear(3 * layout.patch**2, width, rngs=rngs)
        self.class_token = nnx.Param(draw(rngs.params(), (1, width)))
        registers = draw(rngs.params(), (layout.registers, width))
        self.registers = nnx.Param(registers) if layout.registers else None
        # The class token's, then the patches' row by row.
        positions = draw(rngs.params(), (1 + self.side**2, width))
        if not layout.pretrained:
            # Features must say where a patch lies, as trained ones do: a slot that does
            # not know where its object is cannot be decoded.
            grid = layers.smooth_positions(rngs.params(), self.side, width)
            positions = positions.at[1:].set(DRAWN_POSITIONS * grid)
        self.positions = nnx.Param(positions)
        self.blocks = nnx.List([Block(layout, rngs=rngs) for _ in range(layout.depth)])
        self.norm = _norm(width, rngs)

    def __call__(
        self, image: Float[Array, "batch height width 3"], *, final_norm: bool = True
    ) -> Float[Array, "batch patches dim"]:
        """Encodes images in [0, 1], patch by patch, row by row.

        Args:
          image: of the model's resolution.
          final_norm: whether the last block's output goes through the last LayerNorm.
        """
        mean, deviation = jnp.array((MEAN, DEVIATION), image.dtype)[:, None, None, None]
        x = (image - mean if self.layout.centred else image) / deviation
        x = self.embedding(self._patches(x)).astype(image.dtype)
        positions = self.positions[...]
        special = self.class_token[...] + positions[:1]
        if self.registers is not None:
            special = jnp.concatenate([special, self.registers[...]])
        special = jnp.broadcast_to(special, (len(x), *special.shape))
        x = jnp.concatenate([special, x + positions[None, 1:]], axis=1)
        for block in self.blocks:
            x = block(x)
        x = x[:, special.shape[1] :]
        return self.norm(x) if final_norm else x

    def _patches(self, x):
        side, patch = self.side, self.layout.patch
        x = x.reshape(len(x), side, patch, side, patch, 3).swapaxes(2, 3)
        return x.reshape(len(x), side**2, -1)


def grid_side(layout: Layout, resolution: int) -> int:
    """Returns how many patches are side by side.

    Args:
      layout: of the transformer.
      resolution: image side in pixels, divisible by the patch's.

    Raises:
      ValueError: it is not.
    """
    if resolution < layout.patch or resolution % layout.patch:
        raise InvalidValue(
            f"the image size must be divisible by the patches' {layout.patch} "
            f"pixels, got {resolution}"
        )
    return resolution // layout.patch


def layout_of(name: str) -> Layout:
    """Returns the row of `LAYOUTS`.

    Raises:
      ValueError: if there is none of that name.
    """
    if name not in LAYOUTS:
        raise InvalidValue(f"vit must be one of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name]


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)


def _scaled(x, scale):
    return x if scale is None else x * scale[...][None, None]
