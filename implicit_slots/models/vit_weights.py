"""Published weights of vision transformers, under any of their names, in our tree.

The names are those of facebookresearch/dino and facebookresearch/dinov2, and those of
the `transformers` package, its older ones in files included.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from implicit_slots.models.vit import VisionTransformer
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.weights import find_module

# From transformers' names, and from those of blocks in chunks, to the original ones.
RENAMED = (
    (r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"\bembeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"\bembeddings\.position_embeddings$", "pos_embed"),
    (r"\bembeddings\.(cls_token|register_tokens)$", r"\1"),
    (r"\b(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\battention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r"attn.\1."),
    (r"\battention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"\blayer_scale(\d)\.lambda1$", r"ls\1.gamma"),
    (r"\bintermediate\.dense\.", "mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\blayernorm_before\.", "norm1."),
    (r"\blayernorm_after\.", "norm2."),
    (r"\blayernorm\.", "norm."),
)
# Of a block: our path, the original name. Matrices are transposed.
BLOCK = (
    ("norm_attention", "norm1"),
    ("qkv", "attn.qkv"),
    ("out", "attn.proj"),
    ("norm_mlp", "norm2"),
    ("enter", "mlp.fc1"),
    ("leave", "mlp.fc2"),
)
SCALES = (("scale_attention", "ls1.gamma"), ("scale_mlp", "ls2.gamma"))


def from_published(
    weights: Mapping[str, np.ndarray], vit: VisionTransformer
) -> dict[str, Any]:
    """Returns the parameters of a vision transformer, as a nested dictionary.

    Positions of another grid are interpolated as the published code does; see
    `resize_positions`.

    Args:
      weights: as `runtime.weights.read_weights` returns them: of the transformer, or
        of what holds it; heads, poolers and mask tokens are not read.
      vit: whose shapes are to be filled; an abstract one will do.

    Raises:
      UserError: they are of another model, in one sentence.
    """
    names = [f"blocks.{i}.norm1.weight" for i in range(vit.layout.depth)]
    renamed: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        if (new := _original(name)) in renamed:
            raise UserError(f"the weights hold a tensor twice, the second as {name}")
        renamed[new] = value
    found = find_module(renamed, [*names, "pos_embed", "cls_token"])
    for i in range(vit.layout.depth):
        for leaf in ("weight", "bias"):
            parts = [found.get(f"blocks.{i}.attn.{part}.{leaf}") for part in "qkv"]
            if not any(part is None for part in parts):
                found[f"blocks.{i}.attn.qkv.{leaf}"] = np.concatenate(
                    [np.asarray(part) for part in parts]
                )
    _check_kind(found, vit)
    read = _Reader(found)
    positions = resize_positions(
        read("pos_embed")[0], vit.side, antialias=vit.layout.registers > 0
    )
    patches = read("patch_embed.proj.weight").transpose(2, 3, 1, 0)
    params: dict[str, Any] = {
        "embedding": {
            "kernel": patches.reshape(-1, patches.shape[-1]),
            "bias": read("patch_embed.proj.bias"),
        },
        "class_token": read("cls_token")[0],
        "positions": positions,
        "blocks": {i: _block(read, i, vit) for i in range(vit.layout.depth)},
        "norm": {"scale": read("norm.weight"), "bias": read("norm.bias")},
    }
    if vit.layout.registers:
        params["registers"] = read("register_tokens")[0]
    return params


def resize_positions(
    positions: Float[np.ndarray, "places dim"], side: int, *, antialias: bool
) -> Float[np.ndarray, "cells dim"]:
    """Interpolates the patches' positions to another grid, as `transformers` does.

    Bicubic in PyTorch's way: a = −3/4, and borders repeated; with `antialias`
    a = −1/2, widened where the grid shrinks. DINO's and DINOv2's own code moves the
    grid by up to a tenth of a cell beside, which `transformers` leaves out.

    Args:
      positions: the class token's, then those of a square grid, row by row.
      side: of the new grid.
      antialias: as DINOv2 with registers has it.
    """
    first, grid = positions[:1], positions[1:]
    old = math.isqrt(len(grid))
    if old == side:
        return positions
    matrix = _bicubic(old, side, antialias)
    grid = grid.reshape(old, old, -1).astype(np.float64)
    new = np.einsum("ri,cj,ijd->rcd", matrix, matrix, grid).reshape(side**2, -1)
    return np.concatenate([first, new.astype(positions.dtype)])


def _bicubic(old: int, new: int, antialias: bool) -> np.ndarray:
    """The matrix [new, old] of bicubic interpolation along one axis."""
    a = -0.5 if antialias else -0.75
    stretch = max(old / new, 1.0) if antialias else 1.0
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    reach = math.ceil(2 * stretch)
    taps = np.floor(centres)[:, None] + np.arange(-reach, reach + 2)
    x = np.abs(taps - centres[:, None]) / stretch
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0))
    if antialias:  # What lies beyond the border is not there, else it is the border.
        weights = np.where((taps >= 0) & (taps < old), weights, 0)
    matrix = np.zeros((new, old))
    rows = np.broadcast_to(np.arange(new)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, old - 1).astype(int)), weights)
    return matrix / matrix.sum(axis=1, keepdims=True)


class _Reader:
    """Tensors by name, as float32; a missing one is said."""

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self._weights = weights

    def __call__(self, name: str) -> np.ndarray:
        if name not in self._weights:
            raise UserError(
                f"the weights have no tensor {name}: they are no vision transformer "
                "of DINO or DINOv2, under its own names or those of transformers"
            )
        return np.asarray(self._weights[name], np.float32)


def _original(name: str) -> str:
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _block(read: _Reader, index: int, vit: VisionTransformer) -> dict[str, Any]:
    filled: dict[str, Any] = {}
    for ours, theirs in BLOCK:
        weight = read(f"blocks.{index}.{theirs}.weight")
        own = "scale" if weight.ndim == 1 else "kernel"
        bias = read(f"blocks.{index}.{theirs}.bias")
        filled[ours] = {own: weight.T, "bias": bias}
    if vit.layout.layer_scale:
        for ours, theirs in SCALES:
            filled[ours] = read(f"blocks.{index}.{theirs}")
    return filled


def _check_kind(found: Mapping[str, np.ndarray], vit: VisionTransformer) -> None:
    """Refuses weights of another layout, saying which."""
    depth = {m[1] for name in found if (m := re.match(r"blocks\.(\d+)\.", name))}
    patches = np.shape(found.get("patch_embed.proj.weight", np.zeros(4)))
    registers = np.shape(found.get("register_tokens", np.zeros((1, 0, 0))))
    own = {
        "blocks": vit.layout.depth,
        "features": vit.layout.width,
        "pixels to a patch's side": vit.layout.patch,
        "register tokens": vit.layout.registers,
        "layer scales": vit.layout.layer_scale,
    }
    theirs = {
        "blocks": len(depth),
        "features": patches[0],
        "pixels to a patch's side": patches[-1],
        "register tokens": registers[1],
        "layer scales": "blocks.0.ls1.gamma" in found,
    }
    if "patch_embed.proj.weight" not in found or not depth:
        _Reader({})("patch_embed.proj.weight")
    for what, count in theirs.items():
        if count != own[what]:
            raise UserError(
                f"the weights are of another vision transformer: {what} {count}, "
                f"where config.model.vit has {own[what]}; set config.model.vit to "
                "theirs"
            )
    places = np.shape(found.get("pos_embed", np.zeros((1, 2, 1))))[1] - 1
    if math.isqrt(places) ** 2 != places:
        raise UserError(
            f"the weights have positions of {places} patches, which are no square grid"
        )
