"""Slots of frozen DINO features on frames of MOVi-E, as DINOSAUR trains them.

Command: python -m implicit_slots.main --config=configs/dinosaur_movi_e.py
    --config.features.weights=dino_deitsmall8_pretrain.pth
Data: as configs/movi_e.py; the frames of 128x128 are enlarged to 224x224. The cache is
    as large as that of configs/dinosaur_movi_c.py.
Weights, preprocessing, protocol: as configs/dinosaur_movi_c.py.
Used by: Seitzer et al. 2023 (DINOSAUR); the settings are those of their
    movi_e_feat_rec.yaml: MOVi-C's with 24 slots.
Cost and expected result: not yet measured here. Published for `:vanilla`: foreground
    ARI 64.7, mBO 34.1 (checked: dinosaur-paper.github.io, its authors' table of the
    paper's numbers; the same says 76.7 and 29.7 of 11 slots, and of ViT-B/8 65.1 and
    35.5 of 24, 79.3 and 32.7 of 11).
"""

from configs import base, dinosaur_movi_c, movi_e
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    config = dinosaur_movi_c.get_config()
    config.name = "dinosaur_movi_e"
    config.data = movi_e.get_config().data
    config.data.resolution = 224
    config.model.num_slots = 24
    return base.set_variant(config, variant)
