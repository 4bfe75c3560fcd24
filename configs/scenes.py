"""Implicit SLATE on the embedded scenes, sized for two CPU cores.

Command: python -m implicit_slots.main --config=configs/scenes.py
Data: rendered by the run itself, 48x48, three or four objects; nothing is downloaded.
Cost: 4.5 to 4.9 minutes on two cores of an AMD EPYC (AVX-512), JAX 0.10.1, with other
    work beside it (20 to 40 steps/s); first step after 18 s with an empty cache.
Expected result (512 test scenes, attention masks, seeds 0, 1, 2): foreground ARI 0.52,
    0.42, 0.80; ARI 0.69, 0.26, 0.70; mIoU 0.42, 0.21, 0.56; squared error through the
    slots 62, 56, 21, summed over an image. Other machines and versions add up in other
    orders and give other runs: expect the spread.
    With :image, slots that read the image: 0.72, 0.83, 0.73; 0.68, 0.67, 0.62; 0.53,
    0.56, 0.45; 16.9, 18.6, 25.3 (experiments/results/notes/image_input.md).
    experiments/results/notes/scenes.md says what was tried and what limits it.
"""

from configs import base
from implicit_slots.runtime.config import Config

RESOLUTION = 48


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration.

    Args:
      variant: "image": slots read the image and not the dVAE's tokens; one of
        `base.set_variant`; or both, as in "image-vanilla".
    """
    config = base.get_config("scenes", base.scenes())
    set_size(config)
    own, _, rest = (variant or "").partition("-")
    if own == "image":
        set_image(config)
        config.name, variant = "scenes-image", rest
    config.data.update(
        resolution=RESOLUTION,
        train_size=16_384,
        validation_size=256,
        test_size=512,
        max_objects=4,
        zoom=4 / 3,
    )
    return base.set_variant(config, variant)


def set_image(config: Config) -> None:
    """Lets slots read the image, and makes the decoder need them."""
    config.model.update(
        inputs="image",
        encoder_features=32,
        encoder_positions="apart",
        drop_tokens=1.0,
    )


def set_size(config: Config) -> None:
    """Shrinks model and schedules to what two CPU cores train in six minutes."""
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
