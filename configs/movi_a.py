"""Implicit SLATE on frames of MOVi-A (simple objects), 128x128.

Command: python -m implicit_slots.main --config=configs/movi_a.py
Data: movi_a/128x128/1.0.0/ of tensorflow-datasets' format (gsutil -m cp -r
    gs://kubric-public/tfds/movi_a/128x128 data/movi_a/), about 9,700 training and 250
    validation videos of 24 frames; the test split is the validation split again.
    --config.data.frame_step=6 takes every sixth frame. Masks.
Preprocessing: none; the frames are 128x128.
Used by: SAVi (Kipf et al. 2022), as videos: eleven slots.
Cost and expected result: not yet measured.
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = base.files(
        "movi_a", resolution=128, max_objects=10, crop="none", path="data"
    )
    data.frame_step = 1
    data.splits = base.splits()
    config = base.get_config("movi_a", data)
    config.model.num_slots = 11
    return base.set_variant(config, variant)
