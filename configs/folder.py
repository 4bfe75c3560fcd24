"""Implicit SLATE on any folder of images, sized for two CPU cores.

Command: python -m implicit_slots.main --config=configs/folder.py \
    --config.data.path=DIR
Data: DIR/images/ (or DIR itself) with PNG or JPEG files, optional DIR/masks/ with the
    same names and DIR/scenes.json; implicit_slots/data/README.md has the layout.
Cost: 600 steps on 972 CLEVR renders in 2.3 minutes on one core (two trained beside it).
Expected result: after those 600 steps the dVAE has found objects but no colours and the
    slots nothing yet (foreground ARI 0.07); a full run is not yet measured.
"""

from configs import base, image_input, scenes
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; its variants are those of scenes.py."""
    config = base.get_config("folder", base.folder())
    scenes.set_size(config)
    if (variant or "").partition("-")[0] != scenes.TOKENS:
        image_input.set_small(config)
    config.model.num_slots = 7  # CLEVR6's: six objects and the ground
    config.data.resolution = scenes.RESOLUTION
    config.data.flip = True  # a folder may hold a thousand images
    return image_input.set_variant(
        config, variant, lambda config: None, first=scenes.TOKENS
    )
