"""Implicit SLATE on any image data set of tensorflow-datasets, 96x96.

Command: python -m implicit_slots.main --config=configs/tfds.py \
    --config.data.dataset=NAME[/CONFIGURATION][:VERSION]
Data: `python -m implicit_slots.data prepare` with the same flags downloads it, with the
    extra `tfds`. Images alone, but for the sets that have a configuration of their own.
Preprocessing: largest square, Lanczos to 96x96.
Used by: whoever brings data of their own.
Cost and expected result: not measured.
"""

from configs import base
from implicit_slots.runtime.config import Config


def get_config(variant: str | None = None) -> Config:
    """Returns the configuration; see `base.set_variant` for the variants."""
    data = base.files("tfds", resolution=96, max_objects=10, crop="center")
    data.dataset = ""
    data.splits = base.splits()
    config = base.get_config("tfds", data)
    return base.set_variant(config, variant)
