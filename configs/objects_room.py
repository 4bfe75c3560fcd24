"""Implicit SLATE on Objects Room, 64x64.

Command: python -m implicit_slots.main --config=configs/objects_room.py
Data: objects_room_train.tfrecords, 7 GB, and three test files of 922 scenes (gsutil cp
    -r gs://multi-object-datasets/objects_room data/). --config.data.test_set is
    six_objects, empty_room or identical_color. Of the training file GENESIS's records:
    all but the first 20,000, of which the second half is the validation split. Cache
    16 GB.
Preprocessing: none; the frames are 64x64. Sky, floor and walls are background.
Used by: GENESIS and GENESIS-V2 (Engelcke et al. 2020, 2021): seven slots.
Cost and expected result: not yet measured.
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = base.files(
        "objects_room",
        resolution=64,
        max_objects=6,
        crop="none",
        path="data/objects_room",
    )
    data.test_set = "six_objects"
    data.splits = base.splits(
        train="20000:1000000", validation="10000:20000", test="0:922"
    )
    config = base.get_config("objects_room", data)
    config.model.num_slots = 7
    return base.set_variant(config, variant)
