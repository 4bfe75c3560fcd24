"""Implicit SLATE on 3D Shapes, 64x64: official SLATE's own example.

Command: python -m implicit_slots.main --config=configs/shapes3d.py
Data: `shapes3d` 2.0.0 of tensorflow-datasets, 268 MB to download (`python -m
    implicit_slots.data prepare` does it, with the extra `tfds`). Official SLATE's
    splits by index, [:400000], [400001:430000], [430001:460000]; they are not random:
    floor hue 9 never appears in training. The indices are those of the published
    HDF5 file, whose order is restored from tensorflow-datasets' shuffled records. Cache
    5.7 GB. Labels, no masks.
Preprocessing: none; the frames are 64x64.
Used by: official SLATE (github.com/singhgautam/slate): three slots.
Cost and expected result: not yet measured.
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = base.files("shapes3d", resolution=64, max_objects=1, crop="none", path="")
    data.splits = base.splits()
    config = base.get_config("shapes3d", data)
    config.model.num_slots = 3
    return base.set_variant(config, variant)
