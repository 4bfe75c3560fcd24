"""The variant "image": its settings are the published ones, and all sizes train."""

import functools
import math

import jax
import pytest
from flax import nnx

from configs import base, clevr, clevr6, clevrtex, coco, movi_c, scenes, shapestacks
from implicit_slots.models.build import build, split_model
from implicit_slots.runtime.config import flat
from implicit_slots.training import run
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import initial_state
from implicit_slots.training.step import build_steps

# As the published scripts have them, defaults of configs/base.py included.
BOTH = {
    "model.inputs": "image",
    "model.encoder_features": 64,
    "model.encoder_kernels": (5,),
    "model.encoder_positions": "added",
    "model.position_scale": 1.0,
    "model.drop_tokens": 0.0,
    "model.dvae_features": 64,
    "model.num_heads": 4,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.slot_heads": 1,
    "model.solver.max_steps": 3,
    "optimizer.dvae_learning_rate": 3e-4,
    "optimizer.schedule": "half_life",
    "temperature.start": 1.0,
    "temperature.end": 0.1,
    "temperature.steps": 30_000,
}
STEVE = {
    **BOTH,
    "num_steps": 200_000,
    "optimizer.learning_rate": 3e-4,
    "optimizer.slots_learning_rate": 1e-4,
    "batch_size": 24 * 3,
    "model.encoder_strides": (2, 1, 1, 1),
    "model.vocab_size": 4_096,
    "model.width": 192,
    "model.num_blocks": 8,
    "model.slot_size": 192,
    "model.slot_mlp_size": 192,
    "model.initial_slots": "gaussian",
    "model.normalizer": "mean",
    "initial_noise.start": 0.0,
    "optimizer.warmup_steps": 30_000,
    "optimizer.half_life": 250_000.0,
    "optimizer.clip": "max_norm",
    "optimizer.clip_limit": 0.05,
}
BO_QSA = {
    **BOTH,
    "num_steps": 250_000,
    "optimizer.learning_rate": 1e-4,
    "optimizer.slots_learning_rate": 0.0,
    "batch_size": 128,
    "model.encoder_strides": (1, 1, 1, 1),
    "model.vocab_size": 1_024,
    "model.width": 256,
    "model.num_blocks": 4,
    "model.slot_size": 256,
    "model.slot_mlp_size": 256,
    "model.initial_slots": "learned",
    "model.straight_through": True,
    "model.normalizer": "damped",
    "initial_noise.start": 1.0,
    "initial_noise.end": 0.0,
    "initial_noise.steps": 30_000,
    "optimizer.warmup_steps": 10_000,
    "optimizer.half_life": 50_000.0,
    "optimizer.clip": "l2",
    "optimizer.clip_limit": 1.0,
}
SYNTHETIC = {**BO_QSA, "model.encoder_strides": (2, 1, 1, 1)}
PUBLISHED = {
    clevr: STEVE,
    clevr6: STEVE,
    movi_c: STEVE,
    coco: BO_QSA,
    shapestacks: SYNTHETIC,
    clevrtex: SYNTHETIC,
}
MODULES = {module.__name__.rpartition(".")[2]: module for module in PUBLISHED}
each_module = pytest.mark.parametrize("name", MODULES)


def values(config):
    """By keys with dots; a tuple is one value."""
    return flat(config.to_dict())


@each_module
def test_the_settings_are_the_published_ones(name):
    found = values(MODULES[name].get_config("image"))
    wanted = PUBLISHED[MODULES[name]]
    assert {key: found[key] for key in wanted} == wanted


@each_module
def test_image_leaves_data_slots_and_all_else_alone(name):
    before, after = (
        values(MODULES[name].get_config(variant)) for variant in (None, "image")
    )
    changed = {key for key in before if before[key] != after[key]}
    assert before.keys() == after.keys()
    assert changed <= {"name", *PUBLISHED[MODULES[name]]}
    assert "model.num_slots" not in changed and "model.inputs" in changed
    assert after["name"] == f"{name}-image"


@each_module
def test_image_goes_with_every_other_variant(name):
    """What the other one sets it sets as without "image", and the name says both."""
    get_config = MODULES[name].get_config
    image = values(get_config("image"))
    for variant in ("vanilla", "vanilla1", "learned", "ib", "bb", "bn", "smoke"):
        both = values(get_config(f"image-{variant}"))
        alone = base.set_variant(get_config("image"), variant)
        assert both == values(alone) != image
        assert both["name"] == f"{name}-image-{variant}"
    assert get_config("image-implicit") == get_config("image-") == get_config("image")


@each_module
@pytest.mark.parametrize("variant", ["imgae", "image-fast", "vanilla-image"])
def test_a_variant_that_does_not_exist_is_refused(name, variant):
    with pytest.raises(
        ValueError,
        match=r"the nearest first, there are .*image.*; image- goes before any",
    ):
        MODULES[name].get_config(variant)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"),
    [*((name, "image") for name in MODULES), ("coco", "image-vanilla")],
)
def test_the_training_step_can_be_traced_at_full_size(name, variant):
    """Nothing is computed: the shapes fit, and slots read every cell of the encoder."""
    config = MODULES[name].get_config(variant)
    graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
    optimizer = build_optimizer(config.optimizer, shapes, num_steps=config.num_steps)
    first = functools.partial(
        initial_state, optimizer=optimizer, config=config.optimizer
    )
    state = jax.eval_shape(first, shapes)
    side = config.data.resolution
    image = jax.ShapeDtypeStruct((config.batch_size, side, side, 3), "uint8")
    train = build_steps(graphdef, optimizer, config).train
    after, _ = train.trace(state, {"image": image}).out_info
    described = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found.params)
        for found in (state, after)
    ]
    assert described[0] == described[1]
    model = nnx.merge(graphdef, shapes)
    assert model.slots_side == side // math.prod(config.model.encoder_strides)
    convolutions = shapes["image_encoder"]["convolutions"].values()
    assert [c["kernel"].shape for c in convolutions] == [
        (5, 5, channels, 64) for channels in (3, 64, 64, 64)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["movi_c", "coco", "clevrtex"])
def test_each_set_up_trains_when_small(name, tmp_path):
    """On embedded scenes, because the files' own data are not there."""
    config = MODULES[name].get_config("image-smoke")
    config.data = scenes.get_config("smoke").data
    config.data.cache = ""
    config.num_steps, config.nonfinite.stop_after = 4, 1
    config.update(log_every=2, validate_every=4, draw_every=4, checkpoint_every=4)
    config.evaluation.fixed_points.iterations = 5
    summary = run.run(config, tmp_path / "run")
    assert summary["step"] == 4
    assert math.isfinite(summary["validation/slot_mse"])
