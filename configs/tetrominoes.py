"""Implicit SLATE on Tetrominoes, 36x36.

Command: python -m implicit_slots.main --config=configs/tetrominoes.py
Data: tetrominoes_train.tfrecords, 300 MB (gsutil cp -r
    gs://multi-object-datasets/tetrominoes data/). Splits by record: 60,000, the next
    1,000, the next 320. Cache 0.3 GB.
Preprocessing: 35x35 frames are resized to 36x36, because the dVAE halves them twice.
Used by: IODINE, Slot Attention: four slots, at 35x35.
Cost and expected result: not yet measured.
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = base.files(
        "tetrominoes",
        resolution=36,
        max_objects=3,
        crop="none",
        path="data/tetrominoes",
    )
    data.splits = base.splits(
        train="0:60000", validation="60000:61000", test="61000:61320"
    )
    config = base.get_config("tetrominoes", data)
    config.model.num_slots = 4
    return base.set_variant(config, variant)
