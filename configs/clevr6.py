"""Implicit SLATE on CLEVR6: CLEVR with masks, at most six objects, 128x128.

Command: python -m implicit_slots.main --config=configs/clevr6.py
Data: as configs/clevr_with_masks.py; scenes of more than six objects are left out of
    every split.
Preprocessing: IODINE's crop, Lanczos to 128x128, masks nearest.
Used by: IODINE, Slot Attention, Invariant Slot Attention: seven slots.
Cost and expected result: not yet measured.
"""

from configs import base, clevr_with_masks
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    config = base.get_config("clevr6", clevr_with_masks.data())
    config.data.keep_objects = 6
    config.model.num_slots = 7
    return base.set_variant(config, variant)
