"""The implicit autoencoder on CLEVR6, 128x128, as Locatello et al. 2020 train it.

Command: python -m implicit_slots.main --config=configs/autoencoder_clevr6.py
Data: as configs/clevr_with_masks.py; scenes of more than six objects are left out of
    every split.
Preprocessing: IODINE's crop, Lanczos to 128x128 (theirs: bilinear), masks nearest.
Cost and expected result: not yet measured. Published for `:vanilla`: foreground ARI
    98.8 ± 0.3; an independent replication reports 93.3 ± 11.1 over five seeds, of which
    one failed.
"""

from configs import base, clevr_with_masks
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    config = base.autoencoder("autoencoder_clevr6", clevr_with_masks.data())
    config.data.keep_objects = 6
    return base.set_variant(config, variant)
