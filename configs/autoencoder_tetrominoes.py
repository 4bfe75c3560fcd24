"""The implicit autoencoder on Tetrominoes, 35x35, as Locatello et al. 2020 train it.

Command: python -m implicit_slots.main --config=configs/autoencoder_tetrominoes.py
Data: as configs/tetrominoes.py, at the frames' own 35x35.
Model: 32 channels, and a decoder without strides on the whole grid (four convolutions),
    from memory of the paper's appendix.
Cost and expected result: not yet measured.
"""

from configs import base, tetrominoes
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    config = base.autoencoder("autoencoder_tetrominoes", tetrominoes.get_config().data)
    config.data.resolution = 35
    config.model.update(
        features=32,
        decoder_features=32,
        decoder_strides=(1, 1, 1),
        num_slots=4,
    )
    return base.set_variant(config, variant)
