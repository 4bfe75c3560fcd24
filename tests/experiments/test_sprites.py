"""The sprites' images and masks, and that the folder reader takes them."""

import numpy as np
import pytest
from PIL import Image

from configs import folder
from experiments.examples import sprites
from implicit_slots.data import registry


@pytest.mark.parametrize("textured", [False, True])
def test_a_mask_says_which_pixels_have_a_sprites_colours(textured):
    image, mask = sprites.draw(np.random.default_rng(0), textured=textured)
    assert image.shape == (48, 48, 3) and mask.shape == (48, 48)
    ids, counts = np.unique(mask, return_counts=True)
    assert list(ids) == list(range(mask.max() + 1)) and mask.max() >= 2
    assert counts[1:].min() >= 20
    for index in ids:
        colours = np.unique(image[mask == index], axis=0)
        assert len(colours) <= (2 if textured else 1)


def test_a_folder_of_sprites_is_read_by_its_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(sprites, "SPLITS", {"train": 3, "validation": 2, "test": 2})
    sprites.main([f"--out={tmp_path}"])
    config = folder.get_config()
    config.data.update(path=str(tmp_path), max_objects=4, cache="")
    batch = registry.build(config.data, "validation").batch(np.arange(2))
    for index in range(2):
        name = f"validation/{index:05}.png"
        image = np.asarray(Image.open(tmp_path / "images" / name))
        mask = np.asarray(Image.open(tmp_path / "masks" / name))
        assert np.array_equal(batch["image"][index], image)
        assert np.array_equal(batch["segmentation"][index], mask)
    assert not np.array_equal(batch["image"][0], batch["image"][1])
