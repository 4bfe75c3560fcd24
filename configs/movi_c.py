"""Implicit SLATE on frames of MOVi-C (scanned objects), 128x128.

Command: python -m implicit_slots.main --config=configs/movi_c.py
Data: movi_c/128x128/1.0.0/ of tensorflow-datasets' format (gsutil -m cp -r
    gs://kubric-public/tfds/movi_c/128x128 data/movi_c/), about 9,700 training, 250
    validation and 1,000 test videos of 24 frames.
    --config.data.frame_step=6 takes every sixth frame. Masks.
Preprocessing: none; the frames are 128x128.
Used by: SAVi (Kipf et al. 2022), as videos: eleven slots.
Cost and expected result: not yet measured.
Variants: with `:image`, slots read the image as in STEVE (Singh, Wu, Ahn 2022), whose
    code downloads these videos: 72 frames a batch, 200,000 steps; see
    configs/image_input.py. Not yet measured.
"""

from configs import base, image_input
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `image_input.set_variant` for the variants."""
    data = base.files(
        "movi_c", resolution=128, max_objects=10, crop="none", path="data"
    )
    data.frame_step = 1
    data.splits = base.splits()
    config = base.get_config("movi_c", data)
    config.model.num_slots = 11
    return image_input.set_variant(config, variant, image_input.set_steve)
