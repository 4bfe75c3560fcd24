"""Slots of frozen features on the embedded scenes, sized for two CPU cores.

Command: python -m implicit_slots.main --config=configs/dinosaur_scenes.py
Data: rendered by the run itself, 48x48, three objects; nothing is downloaded. The
    features are those of a vision transformer of one block on patches of 4x4 pixels,
    as it is drawn at random; the run standardises them on 256 training images and
    changes nothing else of it. It shows the path from pixels to masks, not what
    trained features are worth.
Cost and expected result: 16 minutes beside other work on two cores of an Intel Xeon.
    Decoder masks of 256 validation scenes, seeds 0 and 1: foreground ARI 0.78 and
    0.75, ARI 0.48 and 0.18, mIoU 0.35 and 0.31; attention: 0.80 and 0.76, 0.16 and
    0.11, 0.20 and 0.22. With seed 0 one slot takes the ground, with seed 1 several
    share it, as do drawn slots (`--config.model.initial_slots=gaussian`, seed 0: 0.77,
    0.12, 0.22). Masks are wider than their objects; objects at the border or as grey
    as the ground are missed. `:vanilla` with the same rates, seed 0: 0.56, 0.20, 0.32.
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
        # With some seeds one of them then takes the ground; drawn ones share it.
        initial_slots="learned",
        straight_through=True,
    )
    config.optimizer.update(learning_rate=2e-3, warmup_steps=500, schedule="cosine")
    config.update(
        log_every=100, validate_every=1_000, draw_every=2_000, checkpoint_every=2_000
    )
    return base.set_variant(config, variant)
