"""Implicit SLATE on frames of MOVi-E (scanned objects, moving camera), 128x128.

Command: python -m implicit_slots.main --config=configs/movi_e.py
Data: movi_e/128x128/1.0.0/ of tensorflow-datasets' format (gsutil -m cp -r
    gs://kubric-public/tfds/movi_e/128x128 data/movi_e/), about 9,700 training, 250
    validation and 1,000 test videos of 24 frames, of 11 to 23 objects.
    --config.data.frame_step=6 takes every sixth frame. Masks.
Preprocessing: none; the frames are 128x128.
Used by: Elsayed et al. 2022 (SAVi++), as videos: 24 slots (from memory).
Cost and expected result: not yet measured.
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = base.files(
        "movi_e", resolution=128, max_objects=23, crop="none", path="data"
    )
    data.frame_step = 1
    data.splits = base.splits()
    config = base.get_config("movi_e", data)
    config.model.num_slots = 24
    return base.set_variant(config, variant)
