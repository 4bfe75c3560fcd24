"""The implicit autoencoder on any folder of images, sized for two CPU cores.

Command: python -m implicit_slots.main --config=configs/autoencoder_folder.py \
    --config.data.path=DIR
Data: as configs/folder.py; masks, where the folder has some, only score.
Cost and expected result: `--config.num_steps=3000` on 918 CLEVR renders of three to six
    objects in three and a half minutes on one core (20 steps/s): foreground ARI of the
    decoder's masks on 108 held-out ones 0.70, 0.71, 0.66 (seeds 0, 1, 2), `:vanilla`
    0.33, 0.50, 0.51. The whole run is not yet measured.
"""

from configs import autoencoder_scenes, base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    config = base.autoencoder("autoencoder_folder", base.folder())
    autoencoder_scenes.set_size(config)
    config.num_steps = 6_000
    config.data.resolution = autoencoder_scenes.RESOLUTION
    config.data.flip = True  # A folder is small.
    autoencoder_scenes.set_rate(config, variant)
    return base.set_variant(config, variant)
