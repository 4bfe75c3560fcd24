"""The implicit set predictor on CLEVR, 128x128, as Locatello et al. 2020 train it.

Command: python -m implicit_slots.main --config=configs/set_prediction_clevr.py
Data: as configs/clevr.py. Published numbers are of the validation split, because the
    test split names no objects: evaluate with --config.evaluation.split=validation.
Preprocessing: the whole frame, squeezed to 128x128.
Cost and expected result: not yet measured.
"""

from configs import base, clevr
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    config = base.set_prediction("set_prediction_clevr", clevr.get_config().data)
    config.data.update(resolution=128, crop="none")
    config.evaluation.split = "validation"
    return base.set_variant(config, variant)
