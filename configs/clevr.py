"""The paper's implicit SLATE on CLEVR, 96x96, from tensorflow-datasets.

Command: python -m implicit_slots.main --config=configs/clevr.py
Data: `clevr` of tensorflow-datasets (about 18 GB to download), prepared once as
    array_record; started without it, the command says how.
Cost: the papers train this model for 250,000 steps of 50 images on one A100; not yet
    measured here.
Expected result: not yet measured. On CLEVR-Mirror, whose images resemble CLEVR's, Chang
    et al. 2022 (Table 3) report a reconstruction error through the slots of 10.66 per
    image, against 67.04 for `:vanilla`.
"""

from configs import base
from implicit_slots.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    config = base.get_config("clevr", base.tfds())
    return base.set_variant(config, variant)
