"""Slots of frozen DINO features on COCO 2017, 224x224, as DINOSAUR trains them.

Command: python -m implicit_slots.main --config=configs/dinosaur_coco.py
    --config.features.weights=dino_vitbase16_pretrain.pth
Data: as configs/coco.py. Cache of images 25 GB, of features 73 GB with the mirrored
    ones (`--mode=prepare`, then `--config.model.cached_features=True`).
Weights: DINO's ViT-B/16 (github.com/facebookresearch/dino; of transformers
    facebook/dino-vitb16), never downloaded for you. `.pth` needs `pip install
    'implicit_slots[torch]'`, `.safetensors` does not.
Preprocessing: short side to 224 (Lanczos; theirs bicubic), centre crop, masks nearest,
    random mirroring.
Used by: Seitzer et al. 2023 (DINOSAUR), with the MLP decoder; the settings are those
    of their coco_feat_rec_dino_base16.yaml, and of the same name with `_auto` for
    `--config.model.decoder=autoregressive`.
Protocol: theirs. Decoder masks, images at 224x224, masks scored at 320x320 after a
    centre crop; what several instances share is ignored (of class masks too, where
    they take the higher class), and so are crowds, where they leave the annotations
    out.
Cost and expected result: not yet measured here. Published for `:vanilla`: foreground
    ARI 40.5, mBO of instances 27.7; with the autoregressive decoder 34.1 and 31.6
    (checked: dinosaur-paper.github.io, its authors' table of the paper's numbers); mBO
    of classes 30.9 (from memory). SPOT, which adds self-training and other
    orders of patches: mBO 34.9, of classes 44.8 (checked: its README).
"""

from configs import base, coco
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = coco.get_config().data
    data.resolution = 224
    data.overlaps = "ignored"
    config = base.feature_slots("dinosaur_coco", data)
    config.evaluation.masks.resolution = 320
    return base.set_variant(config, variant)
