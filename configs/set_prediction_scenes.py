"""The implicit set predictor on the embedded scenes, sized for two CPU cores.

Command: python -m implicit_slots.main --config=configs/set_prediction_scenes.py
Data: rendered by the run itself, 48x48, three or four objects; nothing is downloaded.
    `:full` is the published model on scenes of 128x128, for a GPU.
Cost and expected result: four and a half minutes on one core of an Intel Xeon
    (AVX-512). Average precision over three seeds 0.779 ± 0.017 at any distance, 0.576 ±
    0.022 within 1 and 0.211 ± 0.031 within 0.5 (512 validation scenes); `:vanilla`
    0.676, 0.284, 0.038; with a single iteration (`:vanilla1`) 0.301, 0.025, 0.002,
    or from learned slots 0.645, 0.453, 0.131:
    experiments/results/notes/locatello.md.
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; "full", or see `base.set_variant` for the others."""
    config = base.set_prediction("set_prediction_scenes", base.scenes())
    config.data.with_masks = True  # The attributes come with them.
    if variant == "full":
        config.name += "-full"
        config.data.update(resolution=128, max_objects=10)
        return config
    config.data.update(
        resolution=48,
        train_size=16_384,
        validation_size=512,
        test_size=512,
        max_objects=4,
        zoom=4 / 3,
    )
    config.num_steps = 3_000
    config.batch_size = 64
    config.model.update(
        features=32,
        encoder_strides=(2, 2, 1),
        num_slots=5,
    )
    config.optimizer.update(learning_rate=2e-3, warmup_steps=200, schedule="cosine")
    config.update(
        log_every=100, validate_every=500, draw_every=1_000, checkpoint_every=1_000
    )
    if variant == "vanilla":
        # From random initial slots it learns little or nothing: see README.md.
        config.model.initial_slots = "learned"
    return base.set_variant(config, variant, own=("full",))
