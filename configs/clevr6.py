"""Implicit SLATE on CLEVR6: CLEVR with masks, at most six objects, 128x128.

Command: python -m implicit_slots.main --config=configs/clevr6.py
Data: as configs/clevr_with_masks.py; scenes of more than six objects are left out of
    every split.
Preprocessing: IODINE's crop, Lanczos to 128x128, masks nearest.
Used by: IODINE, Slot Attention, Invariant Slot Attention: seven slots.
Cost and expected result: not yet measured.
Variants: with `:image`, slots read the image as in STEVE (Singh, Wu, Ahn 2022), whose
    authors read CLEVR scenes of their own so: 72 images a batch, 200,000 steps; see
    configs/image_input.py. Not yet measured.
"""

from configs import base, clevr_with_masks, image_input
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `image_input.set_variant` for the variants."""
    config = base.get_config("clevr6", clevr_with_masks.data())
    config.data.keep_objects = 6
    config.model.num_slots = 7
    return image_input.set_variant(config, variant, image_input.set_steve)
