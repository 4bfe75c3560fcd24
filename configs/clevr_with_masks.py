"""Implicit SLATE on CLEVR with masks, up to ten objects, 128x128.

Command: python -m implicit_slots.main --config=configs/clevr_with_masks.py
Data: one file of 100,000 scenes, clevr_with_masks_train.tfrecords, 10.5 GB (gsutil cp
    -r gs://multi-object-datasets/clevr_with_masks data/). Splits by record: the first
    70,000, the next 15,000, the last 15,000. Cache 6.6 GB. Masks and attributes.
Preprocessing: IODINE's crop, Lanczos to 128x128, masks nearest.
Used by: IODINE (Greff et al. 2019), Slot Attention (Locatello et al. 2020), Invariant
    Slot Attention (Biza et al. 2023).
Cost and expected result: not yet measured.
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    config = base.get_config("clevr_with_masks", data())
    config.model.num_slots = 11
    return base.set_variant(config, variant)


def data() -> Config:
    """Data section: the record file as Slot Attention reads it."""
    section = base.files(
        "clevr_with_masks",
        resolution=128,
        max_objects=10,
        crop="clevr",
        path="data/clevr_with_masks",
    )
    section.splits = base.splits(
        train="0:70000", validation="70000:85000", test="85000:100000"
    )
    return section
