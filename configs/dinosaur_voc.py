"""Slots of frozen DINO features on Pascal VOC 2012, 224x224, as DINOSAUR trains them.

Command: python -m implicit_slots.main --config=configs/dinosaur_voc.py
    --config.features.weights=dino_vitbase16_pretrain.pth
Data: the archive of training and validation images, unpacked to data/voc (2 GB), and
    the list trainaug.txt in ImageSets/Segmentation/: 10,582 training images, 1,449 of
    validation; the test split is validation again. Without the list
    --config.data.split_set=train takes VOC's own 1,464 images. Cache 2.4 GB.
Weights: as configs/dinosaur_coco.py.
Preprocessing: short side to 224 (Lanczos; theirs bicubic), centre crop, masks nearest,
    void ignored, random mirroring.
Used by: Seitzer et al. 2023 (DINOSAUR). Slots, rates and steps are those of their
    voc2012_trainaug_feat_rec_dino_base16_auto.yaml, whose decoder is a transformer; the
    MLP decoder is that of COCO with layers half as wide (from memory).
Cost and expected result: not yet measured here. Published for `:vanilla` with the MLP
    decoder, masks at 320x320: foreground ARI 24.6, mBO of instances 39.5, of classes
    40.9 (from memory). Here masks are scored at 224x224.
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = base.files(
        "voc", resolution=224, max_objects=64, crop="center", path="data/voc"
    )
    data.split_set = "trainaug"
    data.flip = True
    config = base.feature_slots("dinosaur_voc", data)
    config.num_steps = 300_000
    config.model.update(num_slots=6, decoder_features=1024)
    return base.set_variant(config, variant)
