"""Implicit SLATE on CLEVRTex, 128x128.

Command: python -m implicit_slots.main --config=configs/clevrtex.py
Data: clevrtex_full/ as it is unpacked from robots.ox.ac.uk/~vgg/data/clevrtex: 50,000
    images of 320x240; the first tenth is the test split, the second validation.
    --config.data.variant is full, camo, pbg, vbg, grassbg or outd (test split alone).
    Cache 3.3 GB. Masks.
Preprocessing: the middle 192x192 pixels, Lanczos to 128x128, masks nearest.
Used by: CLEVRTex (Karazija et al. 2021), Invariant Slot Attention, BO-QSA: eleven
    slots.
Cost and expected result: not yet measured.
Variants: with `:image`, slots read the image as in BO-QSA (Jia et al. 2023), with its
    encoder for CLEVRTex: 128 images a batch, 250,000 steps; see
    configs/image_input.py. Not yet measured.
"""

from configs import base, image_input
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `image_input.set_variant` for the variants."""
    data = base.files(
        "clevrtex",
        resolution=128,
        max_objects=10,
        crop="center-192",
        path="data/clevrtex",
    )
    data.variant = "full"
    config = base.get_config("clevrtex", data)
    config.model.num_slots = 11
    return image_input.set_variant(config, variant, image_input.set_bo_qsa_synthetic)
