"""The paper's implicit SLATE on COCO 2017, 96x96.

Command: python -m implicit_slots.main --config=configs/coco.py
Data: train2017/ (19.3 GB), val2017/ (0.8 GB) and annotations/ of cocodataset.org:
    118,287 / 5,000 images; the test split is the validation split again, because the
    real one has no labels. --config.data.masks is instances (needs `pip install
    pycocotools`), panoptic or none. --config.data.name=coco_tfds reads
    tensorflow-datasets' coco/2017_panoptic instead. Cache 4.5 GB. Other sets in COCO's
    format are read as well: implicit_slots/data/README.md.
Preprocessing: short side to 96 (Lanczos), centre crop, masks nearest, random mirroring.
Used by: Chang et al. 2022, Table 3; DINOSAUR and BO-QSA, with eleven slots.
Cost and expected result: Chang et al. 2022 (Table 3): FID 127.79 and squared error
    1659.15 per image, `:vanilla` 147.48 and 1821.75. Not yet measured here.
Variants: with `:image`, slots read the image at its full resolution, as in BO-QSA's
    transformer on COCO (Jia et al. 2023): 128 images a batch, 250,000 steps; see
    configs/image_input.py. Not yet measured.
"""

from configs import base, image_input
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `image_input.set_variant` for the variants."""
    data = base.files(
        "coco", resolution=96, max_objects=254, crop="center", path="data/coco"
    )
    data.masks = "instances"
    data.overlaps = "smaller"  # is seen; "ignored": no metric counts those pixels
    data.flip = True
    config = base.get_config("coco", data)
    config.model.num_slots = 12
    return image_input.set_variant(config, variant, image_input.set_bo_qsa)
