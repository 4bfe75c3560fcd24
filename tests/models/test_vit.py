"""Vision transformers beside the transformers package's, and weights by every name.

tests/record_vit.py made the record.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_vit
from flax import nnx
from record_official import draw_weights

from implicit_slots.models.vit import LAYOUTS, Layout, VisionTransformer
from implicit_slots.models.vit_weights import from_published
from implicit_slots.runtime.errors import UserError

RECORD = pathlib.Path(__file__).parents[1] / "official" / "vit.npz"
TOLERANCE = 1e-5
TINY = {
    "dino": Layout(
        record_vit.PATCH, record_vit.WIDTH, record_vit.DEPTH, record_vit.HEADS
    ),
}
TINY["dinov2"] = TINY["dino"]._replace(layer_scale=True)
TINY["dinov2_reg"] = TINY["dinov2"]._replace(registers=record_vit.REGISTERS)


def abstract(kind, resolution):
    layout = TINY[kind]
    return nnx.eval_shape(
        lambda: VisionTransformer(layout, resolution, rngs=nnx.Rngs(0))
    )


def filled(weights, kind, resolution):
    vit = abstract(kind, resolution)
    graphdef, shapes = nnx.split(vit)
    params = from_published(weights, vit)
    wanted = nnx.to_pure_dict(shapes)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
    return nnx.merge(graphdef, params)


@pytest.fixture(scope="module")
def record():
    with np.load(RECORD) as arrays:
        return dict(arrays)


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", TINY)
def test_features_are_those_of_transformers(kind, record):
    """At the grid of the positions, at a larger one and at a smaller one."""
    weights = draw_weights(record_vit.official_shapes(kind))
    for resolution in record_vit.RESOLUTIONS:
        vit = filled(weights, kind, resolution)
        image = jnp.asarray(record_vit.draw_image(resolution))
        last = nnx.jit(lambda vit, image: vit(image, final_norm=False))(vit, image)
        wanted = record[f"{kind}/{resolution}/normed"]
        assert error(vit.norm(last), wanted) < TOLERANCE
        if resolution == 16:
            assert error(last, record[f"{kind}/16/last_block"]) < TOLERANCE


@pytest.mark.parametrize("kind", TINY)
def test_weights_are_read_by_every_name(kind):
    """Of the two repositories, of transformers' files, of its modules, and wrapped."""
    weights = draw_weights(record_vit.official_shapes(kind))
    vit = abstract(kind, 16)
    wanted = from_published(weights, vit)
    in_files = record_vit.transformers_names(weights)
    chunks = {name.replace("blocks.", "blocks.0."): w for name, w in weights.items()}
    for others in (
        in_files,
        record_vit.newest_names(in_files),
        {f"vit.{name}": w for name, w in in_files.items()}
        | {"classifier.bias": np.zeros(2)},
        {f"module.backbone.{name}": w for name, w in weights.items()},
        chunks,
    ):
        assert len(others) >= len(weights)
        found = from_published(others, vit)
        assert jax.tree.all(jax.tree.map(np.array_equal, found, wanted))


def test_weights_of_another_transformer_are_refused():
    weights = draw_weights(record_vit.official_shapes("dinov2_reg"))
    for kind, what in (("dino", "register tokens 3"), ("dinov2", "register tokens 3")):
        with pytest.raises(UserError, match=f"{what}.* has 0; set config.model.vit"):
            from_published(weights, abstract(kind, 16))
    lacking = {n: w for n, w in weights.items() if n != "blocks.1.mlp.fc2.bias"}
    with pytest.raises(UserError, match=r"no tensor blocks\.1\.mlp\.fc2\.bias"):
        from_published(lacking, abstract("dinov2_reg", 16))
    with pytest.raises(UserError, match=r"no tensor patch_embed\.proj\.weight"):
        from_published({"fc.weight": np.zeros((2, 2))}, abstract("dino", 16))
    cut = weights | {"pos_embed": weights["pos_embed"][:, :-1]}
    with pytest.raises(UserError, match="positions of 15 patches"):
        from_published(cut, abstract("dinov2_reg", 16))


def test_layouts_have_the_published_number_of_parameters():
    """ViT-B/16 85.8 and ViT-S/14 with registers 22.1 million, without mask token."""
    counts = {
        "dino_vitb16": (224, 85_798_656),
        "dinov2_vits14_reg": (518, 22_057_728),
    }
    for name, (resolution, wanted) in counts.items():
        made = nnx.eval_shape(
            lambda layout=LAYOUTS[name], resolution=resolution: VisionTransformer(
                layout, resolution, rngs=nnx.Rngs(0)
            )
        )
        leaves = jax.tree.leaves(nnx.state(made))
        assert sum(leaf.size for leaf in leaves) == wanted, name
    with pytest.raises(
        ValueError, match="divisible by the patches' 16 pixels, got 100"
    ):
        VisionTransformer(LAYOUTS["dino_vits16"], 100, rngs=nnx.Rngs(0))
