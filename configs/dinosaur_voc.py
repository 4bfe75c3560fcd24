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
    Theirs is `--config.model.decoder=autoregressive --config.model.decoder_heads=4`.
Protocol: theirs. Decoder masks, images at 224x224, masks scored at 320x320 after a
    centre crop, void ignored.
Cost and expected result: not yet measured here. Published for `:vanilla`: foreground
    ARI 24.6, mBO of instances 39.5; with the autoregressive decoder 24.8 and 44.0
    (checked: dinosaur-paper.github.io, its authors' table of the paper's numbers); mBO
    of classes 40.9 (from memory). SPOT: mBO 48.6, of classes 55.7 (checked: its README;
    its code takes void for background).
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
    config.evaluation.masks.resolution = 320
    return base.set_variant(config, variant)
