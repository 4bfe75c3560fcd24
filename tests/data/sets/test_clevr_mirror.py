"""CLEVR-Mirror: images and scenes in their folders, split in order."""

import json

import numpy as np
import pytest
from PIL import Image

from implicit_slots.data.sets.clevr_mirror import ClevrMirror
from implicit_slots.data.source import DataError

COUNT = 20


def pixels(index):
    return np.random.default_rng(index).integers(0, 256, (8, 12, 3), np.uint8)


def objects(index):
    return [
        {
            "shape": "cylinder",
            "size": "small",
            "color": "yellow",
            "material": "rubber",
            "rotation": 1.5,
            "3d_coords": [1.0, -2.0, 0.7],
            "pixel_coords": [6, 4, 9.5],
        }
    ] * (index % 3 + 1)


def save(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)


@pytest.fixture
def root(tmp_path):
    for index in range(COUNT):
        stem = f"CLEVR_mirror_{index:06}"
        save(tmp_path / "images" / f"{stem}.png", pixels(index))
        scene = {"image_filename": f"{stem}.png", "objects": objects(index)}
        (tmp_path / "scenes").mkdir(exist_ok=True)
        (tmp_path / "scenes" / f"{stem}.json").write_text(json.dumps(scene))
    (tmp_path / "images" / "README.txt").write_text("not an image")
    return tmp_path


def read(root, split="train", **options):
    options = {"resolution": 8, "crop": "center", **options}
    return ClevrMirror(path=str(root), split=split, **options)


def silent(iterable, **_):
    return iterable


def test_splits_are_70_15_and_15_percent_in_order(root):
    """Every image is in one split, with its own pixels and attributes."""
    first = 0
    for split, count in (("train", 14), ("validation", 3), ("test", 3)):
        source = read(root, split)
        source.check(silent)
        assert len(source) == count
        batch = source.batch(np.arange(count))
        assert batch.keys() == {"image", "objects"}
        for image, index in zip(batch["image"], range(first, COUNT), strict=False):
            np.testing.assert_array_equal(image, pixels(index)[:, 2:10])
        expected = [i % 3 + 1 for i in range(first, first + count)]
        assert batch["objects"]["present"].sum(1).tolist() == expected
        assert source.count_objects(silent).tolist() == expected
        first += count
    assert first == COUNT


def test_attributes_are_clevrs_and_positions_follow_the_crop(root):
    batch = read(root, max_objects=4)[1]["objects"]
    assert batch["present"].tolist() == [True, True, False, False]
    assert batch["color"].tolist() == [3, 3, 0, 0]
    assert batch["shape"].tolist() == [2, 2, 0, 0]
    np.testing.assert_allclose(batch["pixel_position"][0], [4, 4])
    whole = ClevrMirror(path=str(root), split="train", resolution=8)
    np.testing.assert_allclose(whole[1]["objects"]["pixel_position"][0], [4, 4])
    assert whole[1]["image"].shape == (8, 8, 3)


def test_images_alone_will_do(root):
    """Scenes are not read where they are not wanted either."""
    (root / "scenes" / "CLEVR_mirror_000000.json").write_text("{")
    assert read(root, keys=("image",))[0].keys() == {"image"}
    (root / "scenes").rename(root / "elsewhere")
    source = read(root)
    assert source[0].keys() == {"image"}
    with pytest.raises(DataError, match="has neither masks nor attributes to count"):
        source.count_objects(silent)


def test_the_fingerprint_tells_other_files(root):
    first = read(root).fingerprint()
    assert first["files"] == 28 and first == read(root).fingerprint()
    (root / "scenes" / "CLEVR_mirror_000000.json").write_text("{}")
    assert read(root).fingerprint() != first


def truncate(root):
    file = root / "images" / "CLEVR_mirror_000000.png"
    file.write_bytes(file.read_bytes()[:99])


def remove(root, pattern):
    for file in root.glob(pattern):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "options", "sentence"),
    [
        (truncate, {}, r"000000\.png cannot be read \(.*\); put a whole, readable cop"),
        (
            lambda root: remove(root, "scenes/*3.json"),
            {},
            r"2 of 20 images \(CLEVR_mirror_000003, CLEVR_mirror_000013\) have no JSON",
        ),
        (
            lambda root: remove(root, "images/*.png"),
            {},
            "split 'train' of .*images is empty, out of 0 PNG images; unpack",
        ),
        (
            lambda root: (root / "images").rename(root / "pictures"),
            {},
            r"no folder .*images; unpack it there",
        ),
        (
            lambda root: (root / "scenes/CLEVR_mirror_000000.json").write_text("[]"),
            {},
            r"scene .*000000\.json has no list of objects; unpack it again",
        ),
        (
            lambda root: (root / "scenes/CLEVR_mirror_000000.json").write_text("{"),
            {},
            r"000000\.json cannot be read \(Expecting",
        ),
        (lambda root: None, {"crop": "center-20"}, "does not fit a frame of 12 x 8"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(root, spoil, options, sentence):
    spoil(root)
    with pytest.raises(DataError, match=sentence) as error:
        read(root, **options)[0]
    assert "\n" not in str(error.value)


def test_more_objects_than_fit_and_missing_folders_are_one_sentence(root):
    with pytest.raises(DataError, match=r"scene .*000002\.json has 3 objects, more th"):
        read(root, max_objects=2)[2]
    with pytest.raises(DataError, match="no folder of CLEVR-Mirror is named; set it"):
        read("")
    truncate(root)
    with pytest.raises(DataError, match=r"1 of 14 images \(images/CLEVR_mirror_000000"):
        read(root).check(silent)
