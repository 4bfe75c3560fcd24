"""The implicit autoencoder on Multi-dSprites, 64x64, as Locatello et al. 2020 train it.

Command: python -m implicit_slots.main --config=configs/autoencoder_multi_dsprites.py
Data: as configs/multi_dsprites.py.
Model: 32 channels, and a decoder without strides on the whole grid (four convolutions),
    from memory of the paper's appendix.
Cost and expected result: not yet measured.
"""

from configs import base, multi_dsprites
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    config = base.autoencoder(
        "autoencoder_multi_dsprites", multi_dsprites.get_config().data
    )
    config.data.resolution = 64
    config.model.update(
        features=32,
        decoder_features=32,
        decoder_strides=(1, 1, 1),
        num_slots=6,
    )
    return base.set_variant(config, variant)
