"""The paper's implicit SLATE on CLEVR, 96x96, from tensorflow-datasets.

Command: python -m implicit_slots.main --config=configs/clevr.py
Data: `clevr` 3.1.0, 70,000 / 15,000 / 15,000 images; 19.0 GB to download, 18 GB as
    array_record, 2.8 GB as a cache. `python -m implicit_slots.data prepare
    --config=configs/clevr.py` downloads it (with the extra `tfds`). No masks; objects'
    attributes, except in the test split.
Preprocessing: IODINE's crop (rows 29:221, columns 64:256 of 240x320, the same view of
    larger frames), Lanczos to 96x96.
Used by: Johnson et al. 2017; for slots Locatello et al. 2020 (set prediction, 128x128).
Cost and expected result: the papers train this model for 250,000 steps of 50 images on
    one A100; not yet measured here. On CLEVR-Mirror, whose images resemble CLEVR's,
    Chang et al. 2022 (Table 3) report a squared error through the slots of 10.66 per
    image, against 67.04 for `:vanilla`.
Variants: with `:image`, slots read the image as in STEVE (Singh, Wu, Ahn 2022), whose
    authors read CLEVR scenes of their own so: 72 images a batch, 200,000 steps; see
    configs/image_input.py. Not yet measured.
"""

from configs import base, image_input
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `image_input.set_variant` for the variants."""
    data = base.files("clevr", resolution=96, max_objects=10, crop="clevr", path="")
    data.splits = base.splits()
    config = base.get_config("clevr", data)
    config.model.num_slots = 12
    return image_input.set_variant(config, variant, image_input.set_steve)
