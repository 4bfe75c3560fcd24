"""wip."""

from ml_collections import ConfigDict

from configs import base

RESOLUTION = 48


def get_config(variant: str | None = None) -> ConfigDict:
    """Returns the configuration; see `base.set_variant` for the variants."""
    config = base.get_config("scenes", base.scenes())
    set_size(config)
    config.data.update(
        resolution=RESOLUTION,
        train_size=16_384,
        validation_size=256,
        test_size=512,
        max_objects=4,
        zoom=4 / 3,
    )
    return base.set_variant(config, variant)


def set_size(config: ConfigDict) -> None:
    """Shrinks model and schedules to what two CPU cores train in ten minutes."""
    config.num_steps = 6_000
    config.batch_size = 16
    config.model.update(
        vocab_size=64,
        dvae_features=16,
        width=64,
        num_blocks=1,
        num_heads=4,
        dropout=0.0,
        num_slots=5,
        slot_size=64,
        slot_mlp_size=64,
        position_scale=0.1,
    )
    config.model.solver.max_steps = 3
    config.optimizer.update(
        learning_rate=1e-3,
        dvae_learning_rate=1e-3,
        warmup_steps=500,
        schedule="cosine",
    )
    config.temperature.steps = 2_000
    config.update(
        log_every=100, validate_every=500, draw_every=1_000, checkpoint_every=1_000
    )
