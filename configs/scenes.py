"""Implicit SLATE on the embedded scenes, sized for two CPU cores.

Command: python -m implicit_slots.main --config=configs/scenes.py
Data: rendered by the run itself, 48x48, three or four objects; nothing is downloaded.
Cost: 3.7 minutes on two cores of an AMD EPYC (AVX-512), JAX 0.10.1; 5 to 8 with other
    work beside it.
Expected result (512 test scenes, attention masks, seeds 0 to 4): foreground ARI 0.90,
    0.91, 0.91, 0.81, 0.90; ARI 0.82, 0.78, 0.81, 0.85, 0.82; mIoU 0.70, 0.65, 0.69,
    0.71, 0.69; squared error through the slots 14.5 to 15.5, summed over an image.
    Other machines and versions add up in other orders and give other runs: seed 0
    after a change of rounding had 0.89; 0.83; 0.71.
    experiments/results/notes/finding_objects.md says what was tried and what limits it.

"tokens" is SLATE as published, small: 7,000 steps of 16 images in 4 to 6 minutes;
foreground ARI 0.52, 0.42, 0.80; ARI 0.69, 0.26, 0.70; mIoU 0.42, 0.21, 0.56; squared
error through the slots 62, 56, 21 (seeds 0, 1, 2).
"""

from configs import base, image_input
from implicit_slots.runtime.config import Config

RESOLUTION = 48


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration.

    Args:
      variant: "tokens": SLATE as published, small: its slots read the tokens of a dVAE
        that is trained beside them; one of `base.set_variant`; or both, as in
        "tokens-vanilla".
    """
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
    return image_input.set_small_variant(config, variant)


def set_size(config: Config) -> None:
    """Shrinks the published model and its schedules to two CPU cores and minutes."""
    config.num_steps = 7_000
    config.batch_size = 16
    config.model.update(
        vocab_size=64,
        dvae_features=32,
        width=64,
        num_blocks=1,
        num_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        num_slots=5,
        slot_size=64,
        slot_mlp_size=64,
        initial_positions="smooth",
        position_scale=0.25,
    )
    config.optimizer.update(
        learning_rate=1e-3,
        dvae_learning_rate=3e-3,
        warmup_steps=500,
        schedule="cosine",
    )
    config.temperature.steps = 1_000
    config.update(
        log_every=100, validate_every=500, draw_every=1_000, checkpoint_every=1_000
    )
