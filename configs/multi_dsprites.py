"""Implicit SLATE on Multi-dSprites, 64x64.

Command: python -m implicit_slots.main --config=configs/multi_dsprites.py
Data: multi_dsprites_<version>.tfrecords, 0.5 to 1 GB (gsutil cp -r
    gs://multi-object-datasets/multi_dsprites data/). This is coloured sprites on grey;
    the others are --config.data.name=multi_dsprites_binarized and
    multi_dsprites_colored_on_colored. Splits by record: 60,000, the next 1,000, the
    next 320. Cache 1.0 GB.
Preprocessing: none; the frames are 64x64.
Used by: IODINE, Slot Attention (first 60,000 scenes; 320 test scenes): six slots.
Cost and expected result: not yet measured.
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = base.files(
        "multi_dsprites_colored_on_grayscale",
        resolution=64,
        max_objects=5,
        crop="none",
        path="data/multi_dsprites",
    )
    data.splits = base.splits(
        train="0:60000", validation="60000:61000", test="61000:61320"
    )
    config = base.get_config("multi_dsprites", data)
    config.model.num_slots = 6
    return base.set_variant(config, variant)
