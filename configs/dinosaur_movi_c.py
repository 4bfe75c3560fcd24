"""Slots of frozen DINO features on frames of MOVi-C, as DINOSAUR trains them.

Command: python -m implicit_slots.main --config=configs/dinosaur_movi_c.py
    --config.features.weights=dino_deitsmall8_pretrain.pth
Data: as configs/movi_c.py; the frames of 128x128 are enlarged to 224x224. A cache of
    all of them takes 53 GB; --config.data.frame_step=6 is a sixth of it.
Weights: DINO's ViT-S/8, as configs/dinosaur_coco.py.
Preprocessing: the whole frame to 224x224 (Lanczos; theirs bicubic), masks nearest.
Used by: Seitzer et al. 2023 (DINOSAUR); the settings are those of their
    movi_c_feat_rec.yaml.
Protocol: theirs. Decoder masks, images at 224x224, masks scored at 128x128.
Cost and expected result: not yet measured here. Published for `:vanilla`: foreground
    ARI 67.2, mBO 38.6 (checked: dinosaur-paper.github.io, its authors' table of the
    paper's numbers; the same says 55.7 and 42.4 of ViT-B/16 and the transformer
    decoder, and 66.0 and 35.0 of ViT-B/16 and the MLP).
"""

from configs import base, movi_c
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = movi_c.get_config().data
    data.resolution = 224
    config = base.feature_slots("dinosaur_movi_c", data)
    config.model.update(
        vit="dino_vits8",
        num_slots=11,
        slot_size=128,
        slot_mlp_size=512,
        decoder_features=1024,
    )
    config.evaluation.masks.resolution = 128
    return base.set_variant(config, variant)
