"""The paper's implicit SLATE on ShapeStacks, 96x96.

Command: python -m implicit_slots.main --config=configs/shapestacks.py
Data: recordings/, splits/ and, for masks, iseg/ as published: about 311,000 images of
    224x224. The variants are pooled in the published splits
    (--config.data.split_set=default, blocks_all or ccs_all);
    --config.data.variant=ccs-hard takes some.
Preprocessing: the middle 196x196 pixels, Lanczos to 96x96, masks nearest.
Used by: GENESIS (64x64, nine slots), SLATE (96x96), BO-QSA (128x128); Chang et al.
    2022, Table 3.
Cost and expected result: Chang et al. 2022 (Table 3): FID 34.2 and squared error 108.67
    per image, `:vanilla` 34.76 and 312.14. Not yet measured here.
Variants: with `:image`, slots read the image as in BO-QSA (Jia et al. 2023), with its
    encoder for ShapeStacks: 128 images a batch, 250,000 steps; see
    configs/image_input.py. Not yet measured.
"""

from configs import base, image_input
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `image_input.set_variant` for the variants."""
    data = base.files(
        "shapestacks",
        resolution=96,
        max_objects=6,
        crop="center-196",
        path="data/shapestacks",
    )
    data.split_set = "default"
    data.variant = "all"
    config = base.get_config("shapestacks", data)
    config.model.num_slots = 12
    return image_input.set_variant(config, variant, image_input.set_bo_qsa_synthetic)
