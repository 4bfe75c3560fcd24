"""The paper's implicit SLATE on CLEVR-Mirror, 96x96.

Command: python -m implicit_slots.main --config=configs/clevr_mirror.py
Data: a folder with images/*.png and scenes/*.json, from SLATE's authors; split 70/15/15
    in the order of names. No masks.
Preprocessing: the whole frame, Lanczos to 96x96.
Used by: SLATE (Singh et al. 2022); Chang et al. 2022, Figs. 3, 5, 6, 9 and Table 3.
Cost and expected result: 250,000 steps of 50 images on one A100; Chang et al. 2022
    (Table 3): FID 22.19 and squared error 10.66 per image, `:vanilla` 25.89 and 67.04.
    Not yet measured here.
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = base.files(
        "clevr_mirror",
        resolution=96,
        max_objects=10,
        crop="none",
        path="data/clevr_mirror",
    )
    config = base.get_config("clevr_mirror", data)
    config.model.num_slots = 12
    return base.set_variant(config, variant)
