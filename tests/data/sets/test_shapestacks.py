"""ShapeStacks: its folders and instance maps, written here and as rendered."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from implicit_slots.data.sets.shapestacks import ShapeStacks
from implicit_slots.data.source import DataError

RENDERED = Path(__file__).parents[4] / "shared" / "data" / "shapestacks_mujoco"
needs_rendered = pytest.mark.skipif(
    not RENDERED.is_dir(), reason=f"the rendered ShapeStacks are not in {RENDERED}"
)
CCS = "env_ccs-hard-h=2-vcom=0-vpsf=1-v=50"
BLOCKS = "env_blocks-easy-h=3-vcom=2-vpsf=0-v=34"
# In the order of their names, in which camera 12 comes before camera 7.
CAMERAS = (12, 7)


def pixels(scenario, camera):
    rng = np.random.default_rng([len(scenario), camera])
    return rng.integers(0, 256, (16, 16, 3), np.uint8)


def labels(scenario, camera):
    height = 2 if scenario == CCS else 3
    rng = np.random.default_rng([len(scenario), camera, 1])
    return rng.integers(0, height + 1, (16, 16), np.uint8)


def image_file(root, scenario, camera):
    name = f"rgb-w=5-f=2-l=1-c=unique-cam_{camera}-mono-0.png"
    return root / "recordings" / scenario / name


def map_file(root, scenario, camera, folder="iseg"):
    name = f"iseg-w=0-f=0-l=0-c=original-cam_{camera}-mono-0.map"
    return root / folder / scenario / name


def save(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file, format="PNG")


@pytest.fixture
def root(tmp_path):
    """Two scenarios of two cameras, with maps and other files between them."""
    for scenario in (CCS, BLOCKS):
        for camera in CAMERAS:
            save(image_file(tmp_path, scenario, camera), pixels(scenario, camera))
            red = labels(scenario, camera) * 32
            save(
                map_file(tmp_path, scenario, camera),
                np.dstack([red, 255 - red, red * 0, np.full_like(red, 255)]),
            )
        other = tmp_path / "recordings" / scenario
        (other / "vseg-w=0-f=0-l=0-c=original-cam_7-mono-0.map").write_text("no")
        (other / "depth-w=0-f=0-l=0-c=original-cam_7-mono-0.png").write_text("no")
        (other / "log.txt").write_text("no")
    splits = tmp_path / "splits" / "default"
    splits.mkdir(parents=True)
    (splits / "train.txt").write_text(f"{CCS}\n{BLOCKS}\n")
    (splits / "eval.txt").write_text(f"{BLOCKS}\n")
    (splits / "test.txt").write_text(f"{CCS}")
    return tmp_path


def read(root, split="train", **options):
    options = {"crop": "none", "resolution": 16, **options}
    return ShapeStacks(path=str(root), split=split, **options)


def silent(iterable, **_):
    return iterable


def test_images_and_their_cameras_maps_arrive_bit_for_bit(root):
    """In the list's order; a label is the map's red channel over 32."""
    source = read(root)
    source.check(silent)
    wanted = [(s, camera) for s in (CCS, BLOCKS) for camera in CAMERAS]
    assert len(source) == len(wanted)
    batch = source.batch(np.arange(4))
    for index, (scenario, camera) in enumerate(wanted):
        np.testing.assert_array_equal(batch["image"][index], pixels(scenario, camera))
        np.testing.assert_array_equal(
            batch["segmentation"][index], labels(scenario, camera)
        )
        assert source.where(index) == str(image_file(root, scenario, camera))
    assert batch["objects"].keys() == {"present"}
    assert batch["objects"]["present"].sum(1).tolist() == [2, 2, 3, 3]
    assert source.count_objects(silent).tolist() == [2, 2, 3, 3]


def test_the_crop_is_the_middle_196_pixels_of_224(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    save(image_file(tmp_path, CCS, 0), frame)
    (tmp_path / "splits" / "default").mkdir(parents=True)
    (tmp_path / "splits" / "default" / "test.txt").write_text(CCS)
    source = ShapeStacks(path=str(tmp_path), split="test", resolution=196)
    np.testing.assert_array_equal(source[0]["image"], frame[14:210, 14:210])


def test_splits_and_variants_choose_scenarios(root):
    """Validation is ShapeStacks' eval list; a variant is how a name starts."""
    assert len(read(root, "validation")) == len(read(root, "test")) == 2
    assert read(root, "test").where(0) == str(image_file(root, CCS, 12))
    for variant, scenario in (("ccs", CCS), ("ccs-hard", CCS), ("blocks", BLOCKS)):
        source = read(root, variant=variant)
        assert [source.where(i) for i in range(len(source))] == [
            str(image_file(root, scenario, camera)) for camera in CAMERAS
        ]


def test_maps_may_lie_beside_the_images_or_nowhere(root):
    """Without any there is no segmentation, and the number of objects stays known."""
    for scenario in (CCS, BLOCKS):
        for camera in CAMERAS:
            beside = map_file(root, scenario, camera, "recordings")
            map_file(root, scenario, camera).rename(beside)
    shutil.rmtree(root / "iseg")
    example = read(root)[3]
    np.testing.assert_array_equal(example["segmentation"], labels(BLOCKS, 7))
    for file in root.glob("recordings/*/iseg-*.map"):
        file.unlink()
    assert read(root)[3].keys() == {"image", "objects"}


def test_what_is_not_wanted_is_not_read(root):
    shutil.rmtree(root / "iseg")
    (root / "iseg" / CCS).mkdir(parents=True)
    assert read(root, keys=("image",))[0].keys() == {"image"}


def test_the_fingerprint_tells_other_files(root):
    first = read(root).fingerprint()
    assert first == read(root).fingerprint() and first["files"] == 8
    save(map_file(root, CCS, 7), np.zeros((16, 16, 3), np.uint8))
    assert read(root).fingerprint() != first


def without_a_map(root):
    map_file(root, CCS, 7).unlink()


def with_another_size(root):
    save(map_file(root, CCS, 12), np.zeros((16, 8, 3), np.uint8))


def with_a_grey_map(root):
    save(map_file(root, CCS, 12), np.zeros((16, 16), np.uint8))


def with_a_label_too_many(root):
    save(map_file(root, CCS, 12), np.full((16, 16, 3), 96, np.uint8))


def truncated(root):
    file = image_file(root, CCS, 12)
    file.write_bytes(file.read_bytes()[:-99])


def truncated_map(root):
    file = map_file(root, CCS, 12)
    file.write_bytes(file.read_bytes()[:-99])


def with_a_strange_name(root):
    (root / "splits" / "default" / "train.txt").write_text("env_tower\n")
    (root / "recordings" / "env_tower").mkdir()
    image_file(root, CCS, 7).rename(image_file(root, "env_tower", 7))


@pytest.mark.parametrize(
    ("spoil", "options", "sentence"),
    [
        (
            without_a_map,
            {},
            r"1 of 4 images .*cam_7-mono-0\.png\) in .* no instance map",
        ),
        (with_another_size, {}, r"image of 16 x 16 pixels and a mask of 8 x 16; they"),
        (with_a_grey_map, {}, r"\.map has pixels of mode L; it must hold ids as col"),
        (with_a_label_too_many, {}, r"cam_12-mono-0\.map has object 3, but .* h=2;"),
        (truncated, {}, r"rgb.*cam_12-mono-0\.png cannot be read \("),
        (truncated_map, {}, r"iseg.*cam_12-mono-0\.map cannot be read \("),
        (with_a_strange_name, {}, "scenario env_tower in .* does not tell its number"),
        (
            lambda root: shutil.rmtree(root / "recordings" / BLOCKS),
            {},
            rf"folder .*{BLOCKS}; unpack it there",
        ),
        (
            lambda root: (
                image_file(root, CCS, 7).rename(root / "x")
                and image_file(root, CCS, 12).unlink()
            ),
            {},
            rf"folder .*{CCS} has no image rgb-…-cam_K-mono-0\.png; unpack",
        ),
        (
            lambda root: (root / "splits" / "default" / "train.txt").unlink(),
            {},
            r"no readable list of scenarios .*default/train\.txt; unpack .* default$",
        ),
        (lambda root: None, {"split_set": "ccs"}, r"choose --config\.data\.split_set"),
        (lambda root: None, {"variant": "balls"}, r"no scenario of variant 'balls', o"),
        (
            lambda root: None,
            {"max_objects": 2},
            rf"{BLOCKS} in .* has 3 objects, more than max_objects = 2; set "
            r"--config\.data\.max_objects=3 or more",
        ),
        (lambda root: None, {"crop": "center-196"}, "does not fit a frame of 16 x 16"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(root, spoil, options, sentence):
    spoil(root)
    with pytest.raises(DataError, match=sentence) as error:
        read(root, **options)[0]
    assert "\n" not in str(error.value)


def test_a_check_finds_broken_and_misfitting_files(root):
    source = read(root)
    truncated(root)
    with pytest.raises(DataError, match=r"1 of 4 images .*, or their masks, cannot be"):
        source.check(silent)
    with_another_size(root)
    save(image_file(root, CCS, 12), pixels(CCS, 12))
    with pytest.raises(DataError, match=r"has 8 x 16 pixels and its image .* 16 x 16"):
        source.check(silent)
    with pytest.raises(DataError, match=r"no folder of ShapeStacks is named; set it"):
        read("")
    with pytest.raises(DataError, match=r"no folder .*/nowhere to read ShapeStacks"):
        read(root / "nowhere")


@needs_rendered
def test_rendered_stacks_have_the_objects_their_names_tell_from_the_bottom_up():
    """All splits are disjoint; labels are 1 … h in every map, each above the last."""
    seen = set()
    for split, count in (("train", 45), ("validation", 6), ("test", 15)):
        source = ShapeStacks(path=str(RENDERED), split=split, resolution=196)
        assert len(source) == 4 * count
        scenarios = {Path(source.where(i)).parent.name for i in range(len(source))}
        assert len(scenarios) == count and not seen & scenarios
        seen |= scenarios
        for index in range(0, len(source), 9):
            height = int(re.findall(r"h=(\d)", source.where(index))[0])
            example = source[index]
            ids = example["segmentation"]
            assert example["objects"]["present"].sum() == height
            assert set(np.unique(ids)) == set(range(height + 1))
            rows = [np.nonzero(ids == k)[0].mean() for k in range(1, height + 1)]
            assert rows == sorted(rows, reverse=True)
            assert example["image"].shape == (196, 196, 3)
