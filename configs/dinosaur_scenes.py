"""Slots of frozen features on the embedded scenes, sized for two CPU cores.

Command: python -m implicit_slots.main --config=configs/dinosaur_scenes.py
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    config = base.feature_slots("dinosaur_scenes", base.scenes())
    config.data.update(
        resolution=48,
        train_size=16_384,
        validation_size=256,
        test_size=512,
        max_objects=3,
        zoom=4 / 3,
    )
    config.num_steps = 10_000
    config.batch_size = 16
    config.model.update(
        vit="random",
        vit_norm=True,
        num_slots=4,
        slot_size=32,
        slot_mlp_size=64,
        decoder_features=64,
        attention_gain=3.0,
        # One of them then takes the ground; drawn ones share it.
        initial_slots="learned",
        straight_through=True,
    )
    config.optimizer.update(learning_rate=2e-3, warmup_steps=500, schedule="cosine")
    config.update(
        log_every=100, validate_every=1_000, draw_every=2_000, checkpoint_every=2_000
    )
    return base.set_variant(config, variant)
