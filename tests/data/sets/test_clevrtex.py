"""CLEVRTex: numbered images with palette masks, written with Pillow."""

import json

import numpy as np
import pytest
from PIL import Image

from implicit_slots.data.sets.clevrtex import ClevrTex
from implicit_slots.data.source import DataError

COUNT = 20


def pixels(index):
    return np.random.default_rng(index).integers(0, 256, (12, 16, 3), np.uint8)


def ids(index):
    rng = np.random.default_rng([index, 1])
    return rng.integers(0, objects(index) + 1, (12, 16), np.uint8)


def objects(index):
    return 3 + index % 8


def stem(root, index, variant="full"):
    """Ten images to a folder, whose names do not sort as their numbers do."""
    folder = root / f"clevrtex_{variant}" / str(9 - index // 10)
    return str(folder / f"CLEVRTEX_{variant}_{index:06}")


def write(root, variant="full", count=COUNT):
    """The published files; colours of the palette say nothing of the ids."""
    for index in range(count):
        start = stem(root, index, variant)
        (root / f"clevrtex_{variant}" / str(9 - index // 10)).mkdir(
            parents=True, exist_ok=True
        )
        Image.fromarray(pixels(index)).convert("RGBA").save(f"{start}.png")
        mask = Image.fromarray(ids(index), "P")
        mask.putpalette(np.random.default_rng(0).bytes(768))
        mask.save(f"{start}_flat.png")
        for other in ("depth_0001", "normal_0001", "shadow_0001"):
            (root / f"{start}_{other}.png").write_bytes(b"not read")
        scene = {"objects": [{"shape": "cube"}] * objects(index)}
        with open(f"{start}.json", "w") as file:
            json.dump(scene, file)
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path)


def read(root, split="test", **options):
    options = {"resolution": 12, "crop": "center", **options}
    return ClevrTex(path=str(root), split=split, **options)


def silent(iterable, **_):
    return iterable


def test_splits_are_tenths_by_number(root):
    """Test, validation, train, each with its own pixels, ids and counts."""
    first = 0
    for split, count in (("test", 2), ("validation", 2), ("train", 16)):
        source = read(root, split)
        source.check(silent)
        assert len(source) == count
        batch = source.batch(np.arange(count))
        wanted = range(first, first + count)
        for row, index in enumerate(wanted):
            middle = (slice(None), slice(2, 14))
            np.testing.assert_array_equal(batch["image"][row], pixels(index)[middle])
            np.testing.assert_array_equal(
                batch["segmentation"][row], ids(index)[middle]
            )
            assert source.where(row) == f"{stem(root, index)}.png"
        expected = [objects(index) for index in wanted]
        assert batch["objects"]["present"].sum(1).tolist() == expected
        assert source.count_objects(silent).tolist() == expected
        first += count


def test_the_crop_is_the_middle_192_pixels_of_320_by_240(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    Image.fromarray(frame).save(tmp_path / "CLEVRTEX_outd_000000.png")
    flat = Image.fromarray(np.full((240, 320), 7, np.uint8), "P")
    flat.putpalette(bytes(768))
    flat.save(tmp_path / "CLEVRTEX_outd_000000_flat.png")
    source = ClevrTex(path=str(tmp_path), split="test", resolution=192, variant="outd")
    np.testing.assert_array_equal(source[0]["image"], frame[24:216, 64:256])
    assert (source[0]["segmentation"] == 7).all()


def test_outd_is_all_for_testing(tmp_path):
    """The folder of the variant itself may be named, too."""
    write(tmp_path, "outd", 4)
    assert len(read(tmp_path, variant="outd")) == 4
    assert len(read(tmp_path / "clevrtex_outd", variant="outd")) == 4
    with pytest.raises(
        DataError, match="'outd' of CLEVRTex has no split 'train', only"
    ):
        read(tmp_path, "train", variant="outd")


def test_scenes_are_optional_and_masks_are_not_read_unless_wanted(root):
    """Objects are then counted in the masks."""
    for file in root.rglob("*.json"):
        file.unlink()
    source = read(root)
    assert source[0].keys() == {"image", "segmentation"}
    expected = [np.count_nonzero(np.unique(ids(index))) for index in range(2)]
    assert source.count_objects(silent).tolist() == expected
    for file in root.rglob("*_flat.png"):
        file.unlink()
    assert read(root, keys=("image",))[0].keys() == {"image"}
    with pytest.raises(DataError, match=r"has no masks CLEVRTEX_full_NNNNNN_flat\.png"):
        read(root)


def test_the_fingerprint_tells_other_files(root):
    first = read(root).fingerprint()
    assert first["files"] == 6 and first == read(root).fingerprint()
    Image.new("P", (16, 12)).save(f"{stem(root, 1)}_flat.png")
    assert read(root).fingerprint() != first


def remove(root, *patterns):
    for pattern in patterns:
        for file in root.rglob(pattern):
            file.unlink()


def truncate(root, suffix):
    with open(stem(root, 0) + suffix, "r+b") as file:
        file.truncate(90)


def save_mask(root, array):
    Image.fromarray(array).save(f"{stem(root, 0)}_flat.png")


@pytest.mark.parametrize(
    ("spoil", "options", "sentence"),
    [
        (
            lambda root: remove(root, "CLEVRTEX_full_000005*"),
            {},
            "19 images of 19 numbers from 0 to 19, which must be one of each; unpack",
        ),
        (
            lambda root: (
                root / "clevrtex_full" / "CLEVRTEX_full_000001.png"
            ).write_bytes(b""),
            {},
            "21 images of 20 numbers from 0 to 19, which must",
        ),
        (
            lambda root: remove(root, "*1_flat.png"),
            {},
            r"1 of 2 images \(.*CLEVRTEX_full_000001\) in .* ends in _flat\.png",
        ),
        (
            lambda root: remove(root, "*1.json"),
            {},
            r"1 of 2 images \(.*CLEVRTEX_full_000001\) in .* ends in \.json; unpack",
        ),
        (lambda root: truncate(root, ".png"), {}, r"000000\.png cannot be read \("),
        (
            lambda root: truncate(root, "_flat.png"),
            {},
            r"000000_flat\.png cannot be re",
        ),
        (lambda root: truncate(root, ".json"), {}, r"000000\.json cannot be read \("),
        (
            lambda root: save_mask(root, np.zeros((12, 15), np.uint8)),
            {},
            "an image of 16 x 12 pixels and a mask of 15 x 12; they must be of one",
        ),
        (
            lambda root: save_mask(root, np.zeros((12, 16, 3), np.uint8)),
            {},
            r"000000_flat\.png has pixels of mode RGB; it must hold object ids in one",
        ),
        (
            lambda root: save_mask(root, np.full((12, 16), 4, np.uint8)),
            {},
            r"000000_flat\.png has object 4, but .*000000\.json describes 3; download",
        ),
        (lambda root: None, {"variant": "camo"}, "no images CLEVRTEX_camo_NNNNNN.png"),
        (
            lambda root: None,
            {"variant": "night"},
            "no variant 'night'; set --config.da",
        ),
        (lambda root: None, {"split": "dev"}, "no split 'dev', only test, validation"),
        (
            lambda root: None,
            {"max_objects": 2},
            r"has 3 objects, more than max_objects = 2; set --config\.data\.max_obj",
        ),
    ],
)
def test_what_cannot_be_used_is_one_sentence(root, spoil, options, sentence):
    spoil(root)
    with pytest.raises(DataError, match=sentence) as error:
        read(root, **options)[0]
    assert "\n" not in str(error.value)


def test_a_check_finds_broken_files_and_few_images_make_an_empty_split(root):
    truncate(root, "_flat.png")
    with pytest.raises(DataError, match=r"1 of 2 images .*, or their masks, cannot be"):
        read(root).check(silent)
    for index in range(5, COUNT):
        remove(root, f"CLEVRTEX_full_{index:06}*")
    with pytest.raises(
        DataError, match=r"split 'test' of .* is empty, out of 5 images"
    ):
        read(root)
    with pytest.raises(DataError, match="no folder of CLEVRTex is named; set it"):
        read("")
