"""Records what the `transformers` package computes, for tests/models/test_vit.py.

    python tests/record_vit.py --out=tests/official/vit.npz

Needs PyTorch and transformers, by hand and not for the tests. Seconds on one core.
Writes outputs alone: images and weights are drawn by `draw_image` and `draw_weights`
here and in the test, under the names of facebookresearch's dino and dinov2.
"""

import argparse
import pathlib
import re
from typing import Any

import numpy as np
from record_official import draw_weights, save

PATCH, WIDTH, DEPTH, HEADS, SIDE, REGISTERS = 4, 12, 2, 2, 4, 3
KINDS = ("dino", "dinov2", "dinov2_reg")
# The grid of the positions, a larger one and a smaller one.
RESOLUTIONS = (16, 24, 12)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def official_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """The state dictionary of a tiny model, as facebookresearch names it."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + SIDE**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    if kind != "dino":
        shapes["mask_token"] = (1, WIDTH)
    if kind == "dinov2_reg":
        shapes["register_tokens"] = (1, REGISTERS, WIDTH)
    for i in range(DEPTH):
        block = {
            "norm1.weight": (WIDTH,),
            "norm1.bias": (WIDTH,),
            "attn.qkv.weight": (3 * WIDTH, WIDTH),
            "attn.qkv.bias": (3 * WIDTH,),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.proj.bias": (WIDTH,),
            "norm2.weight": (WIDTH,),
            "norm2.bias": (WIDTH,),
            "mlp.fc1.weight": (4 * WIDTH, WIDTH),
            "mlp.fc1.bias": (4 * WIDTH,),
            "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
            "mlp.fc2.bias": (WIDTH,),
        }
        if kind != "dino":
            block |= {"ls1.gamma": (WIDTH,), "ls2.gamma": (WIDTH,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def draw_image(resolution: int) -> np.ndarray:
    """Returns an image [1, resolution, resolution, 3] in [0, 1]."""
    size = (1, resolution, resolution, 3)
    drawn = draw_weights({f"image.{resolution}.bias": (int(np.prod(size)),)})
    (values,) = drawn.values()
    return ((values / 0.2 + 1) / 2).reshape(size).astype(np.float32)


def transformers_names(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under the names that published files of transformers have."""
    is_dino = "mask_token" not in weights
    block = {
        "norm1": "layernorm_before" if is_dino else "norm1",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "norm2": "layernorm_after" if is_dino else "norm2",
        "mlp.fc1": "intermediate.dense" if is_dino else "mlp.fc1",
        "mlp.fc2": "output.dense" if is_dino else "mlp.fc2",
        "ls2.gamma": "layer_scale2.lambda1",
    }
    outside = {
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    named = {}
    for name, value in weights.items():
        if not name.startswith("blocks."):
            named[outside.get(name, f"embeddings.{name}")] = value
            continue
        _, index, inner = name.split(".", 2)
        layer = f"encoder.layer.{index}"
        if inner.startswith("attn.qkv."):
            leaf = inner.rpartition(".")[2]
            for part, piece in zip(
                ("query", "key", "value"), np.split(value, 3), strict=True
            ):
                named[f"{layer}.attention.attention.{part}.{leaf}"] = piece
            continue
        for ours, theirs in block.items():
            if inner.startswith(ours):
                named[f"{layer}.{theirs}{inner.removeprefix(ours)}"] = value
                break
    return named


def newest_names(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of modules of transformers 5, from those of published files."""
    is_dino = any("layernorm_before" in name for name in named)
    changes = [
        (
            r"attention\.attention\.(query|key|value)",
            lambda m: f"attention.{m[1][0]}_proj",
        ),
        (r"attention\.output\.dense", "attention.o_proj"),
    ]
    if is_dino:
        changes += [
            (r"(?<!attention\.)output\.dense", "mlp.fc2"),
            (r"intermediate\.dense", "mlp.fc1"),
            (r"encoder\.layer\.", "layers."),
        ]
    found = {}
    for name, value in named.items():
        for pattern, new in changes:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


def build(kind: str) -> Any:
    """Returns transformers' model with the drawn weights."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    common: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": SIDE * PATCH,
        "patch_size": PATCH,
        # Of both repositories; the default of ViTConfig is 1e-12.
        "layer_norm_eps": 1e-6,
    }
    if kind == "dino":
        sizes = transformers.ViTConfig(**common, intermediate_size=4 * WIDTH)
        model = transformers.ViTModel(sizes, add_pooling_layer=False)
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**common))
    else:
        sizes = transformers.Dinov2WithRegistersConfig(
            **common, num_register_tokens=REGISTERS
        )
        model = transformers.Dinov2WithRegistersModel(sizes)
    named = newest_names(transformers_names(draw_weights(official_shapes(kind))))
    tensors = {name: torch.tensor(value) for name, value in named.items()}
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def main(argv: list[str] | None = None) -> None:
    """Writes the record."""
    import torch  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args(argv)
    found = {}
    for kind in KINDS:
        model = build(kind)
        special = 1 + (REGISTERS if kind == "dinov2_reg" else 0)
        for resolution in RESOLUTIONS:
            image = (draw_image(resolution) - MEAN) / DEVIATION
            pixels = torch.tensor(image.transpose(0, 3, 1, 2), dtype=torch.float32)
            more = {"interpolate_pos_encoding": True} if kind == "dino" else {}
            with torch.no_grad():
                output = model(pixels, output_hidden_states=True, **more)
            name = f"{kind}/{resolution}"
            found[f"{name}/normed"] = output.last_hidden_state[:, special:].numpy()
            if resolution == SIDE * PATCH:
                last = output.hidden_states[-1][:, special:]
                found[f"{name}/last_block"] = last.numpy()
    save(arguments.out, found)


if __name__ == "__main__":
    main()
