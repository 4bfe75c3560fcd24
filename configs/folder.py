"""Implicit SLATE on any folder of images, sized for two CPU cores.

Command: python -m implicit_slots.main --config=configs/folder.py \
    --config.data.path=DIR
Data: DIR/images/ (or DIR itself) with pictures, optional DIR/masks/ with the same names
    and DIR/scenes.json; implicit_slots/data/README.md has what a folder may look like.
Cost: 6.5 to 8.2 minutes for 972 CLEVR renders on two cores with another run beside it.
Expected result (54 held-out CLEVR renders of CLEVR's generator, seeds 0, 1, 2):
    foreground ARI 0.81, 0.84, 0.76; ARI 0.40, 0.35, 0.19; mIoU 0.58, 0.61, 0.51. Spare
    slots share the ground; experiments/results/notes/finding_objects.md.
"""

from configs import base, image_input, scenes
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; its variants are those of scenes.py."""
    config = base.get_config("folder", base.folder())
    scenes.set_size(config)
    config.model.num_slots = 7  # CLEVR6's: six objects and the ground
    config.data.resolution = scenes.RESOLUTION
    config.data.flip = True  # a folder may hold a thousand images
    return image_input.set_small_variant(config, variant)
