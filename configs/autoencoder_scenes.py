"""The implicit autoencoder on the embedded scenes, sized for two CPU cores.

Command: python -m implicit_slots.main --config=configs/autoencoder_scenes.py
Data: rendered by the run itself, 32x32, three objects; nothing is downloaded.
    `:full` is the published model on scenes of 128x128, for a GPU.
Cost and expected result: eight minutes on one core of an Intel Xeon (AVX-512), at 28
    steps/s. Foreground ARI of the decoder's masks with seeds 0, 1, 2 (256 validation
    scenes): 0.90, 0.89, 0.85 from one start, 0.93, 0.94, 0.91 from the best of three
    (`evaluation.masks.starts`); `:vanilla` 0.78, 0.84, 0.77 and 0.81, 0.86, 0.83.
    experiments/results/notes/locatello.md says what was tried.
"""

from configs import base
from implicit_slots.runtime.config import Config

RESOLUTION = 32


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; "full", or see `base.set_variant` for the others."""
    config = base.autoencoder("autoencoder_scenes", base.scenes())
    if variant == "full":
        config.name += "-full"
        config.data.resolution = 128
        return config
    config.data.update(
        resolution=RESOLUTION,
        train_size=16_384,
        validation_size=256,
        test_size=512,
        max_objects=3,
        zoom=4 / 3,
    )
    set_size(config)
    config.model.num_slots = 4
    set_rate(config, variant)
    return base.set_variant(config, variant, own=("full",))


def set_size(config: Config) -> None:
    """Shrinks model and schedules to what one CPU core trains in ten minutes."""
    config.num_steps = 12_000
    config.batch_size = 8
    config.model.update(
        features=32,
        encoder_strides=(1, 2, 1),
        decoder_features=16,
        decoder_strides=(2, 2),
        slot_size=32,
        slot_mlp_size=64,
        attention_gain=3.0,  # otherwise the slots of some seeds stay alike for long
    )
    config.optimizer.update(learning_rate=2e-3, warmup_steps=500, schedule="cosine")
    config.update(
        log_every=100, validate_every=1_000, draw_every=2_000, checkpoint_every=2_000
    )


def set_rate(config: Config, variant: str | None) -> None:
    """Lowers the rate for vanilla: at implicit's it learns less; see README.md."""
    if variant == "vanilla":
        config.optimizer.learning_rate = 7e-4
