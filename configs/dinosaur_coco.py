"""Slots of frozen DINO features on COCO 2017, 224x224, as DINOSAUR trains them.

Command: python -m implicit_slots.main --config=configs/dinosaur_coco.py
    --config.features.weights=dino_vitbase16_pretrain.pth
Data: as configs/coco.py. Cache 25 GB.
Weights: DINO's ViT-B/16 (github.com/facebookresearch/dino; of transformers
    facebook/dino-vitb16), never downloaded for you. `.pth` needs `pip install
    'implicit_slots[torch]'`, `.safetensors` does not.
Preprocessing: short side to 224 (Lanczos; theirs bicubic), centre crop, masks nearest,
    random mirroring.
Used by: Seitzer et al. 2023 (DINOSAUR), with the MLP decoder; the settings are those
    of their coco_feat_rec_dino_base16.yaml.
Cost and expected result: not yet measured here. Published for `:vanilla`, of decoder
    masks at 320x320: foreground ARI 40.5, mBO of instances 27.7, of classes 30.9 (from
    memory). They leave overlaps of instances out, here the smaller object is seen;
    masks are scored at 224x224.
"""

from configs import base, coco
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = coco.get_config().data
    data.resolution = 224
    config = base.feature_slots("dinosaur_coco", data)
    return base.set_variant(config, variant)
