"""Pascal VOC 2012: lists, photographs and palette masks, written with Pillow."""

import jax
import numpy as np
import pytest
from PIL import Image

from configs import base
from implicit_slots.data import registry
from implicit_slots.data.prepared.cache import Prepared
from implicit_slots.data.prepared.prepare import prepare
from implicit_slots.data.sets.voc import Voc
from implicit_slots.data.source import IGNORED, DataError

NAMES = ("2007_000032", "2007_000039", "2008_000001")
CLASSES = np.array([0, 15, 7, 15])  # of the background, then of objects 1, 2, 3


def ids(name):
    """Three objects, a border of void, a background; the second is a single pixel."""
    mask = np.zeros((12, 16), np.uint8)
    mask[1:5, 3:9] = 1
    mask[6, 6] = 2
    mask[7:11, 8:13] = 3
    mask[:, 2] = 255
    return np.roll(mask, NAMES.index(name), axis=0)


def save(array, file):
    """A palette image, whose colours say nothing of the ids."""
    image = Image.fromarray(array, "P")
    image.putpalette(np.random.default_rng(0).bytes(768))
    image.save(file)


@pytest.fixture
def root(tmp_path):
    """As the archive is unpacked; masks are there for VOC's own images alone."""
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationObject", "SegmentationClass"):
        (voc / folder).mkdir(parents=True)
    for name in NAMES:
        pixels = np.full((12, 16, 3), 40 * NAMES.index(name), np.uint8)
        Image.fromarray(pixels).save(voc / "JPEGImages" / f"{name}.jpg")
    for name in NAMES[:2]:
        save(ids(name), voc / "SegmentationObject" / f"{name}.png")
        classes = np.where(ids(name) == 255, 255, CLASSES[ids(name) % 255])
        save(classes.astype(np.uint8), voc / "SegmentationClass" / f"{name}.png")
    lists = voc / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text(f"{NAMES[1]}\n")
    (lists / "train.txt").write_text(f"{NAMES[0]}\n")
    (lists / "trainaug.txt").write_text(
        "".join(
            f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n"
            for name in (NAMES[2], NAMES[0])
        )
    )
    return tmp_path


def read(root, split="validation", **options):
    return Voc(path=str(root), split=split, resolution=12, **options)


def silent(iterable, **_):
    return iterable


@pytest.mark.parametrize("split", ["validation", "test"])
def test_masks_classes_and_void_are_the_files(root, split):
    source = read(root, split)
    source.check(silent)
    assert len(source) == 1
    example = source[0]
    wanted = ids(NAMES[1]).astype(np.int32)
    wanted[wanted == 255] = IGNORED
    np.testing.assert_array_equal(example["segmentation"], wanted[:, 2:14])
    assert example["objects"]["label"][:4].tolist() == [15, 7, 15, 0]
    assert example["objects"]["present"].sum() == 3
    assert source.count_objects(silent).tolist() == [3]
    # The class mask is the union of its objects, which is what mBO of classes takes.
    classes = np.asarray(Image.open(source.root / source.annotations[0]))
    labels = np.append(example["objects"]["label"], [0, 255])  # …, background, void
    found = labels[
        np.where(wanted == IGNORED, -1, np.where(wanted > 0, wanted - 1, -2))
    ]
    np.testing.assert_array_equal(found, classes)


def test_trainaug_has_photographs_and_no_masks_in_the_order_of_its_list(root):
    source = read(root / "VOCdevkit" / "VOC2012", "train")
    source.check(silent)
    assert source.images == [f"JPEGImages/{NAMES[i]}.jpg" for i in (2, 0)]
    assert source[0].keys() == {"image"}
    assert source[0]["image"].mean() > source[1]["image"].mean()
    masked = read(root, "train", split_set="train")
    assert masked[0].keys() == {"image", "segmentation", "objects"}


def test_what_is_missing_is_said(root):
    voc = root / "VOCdevkit" / "VOC2012"
    with pytest.raises(DataError, match="3 objects, more than max_objects = 2"):
        read(root, max_objects=2)[0]
    (voc / "JPEGImages" / f"{NAMES[2]}.jpg").unlink()
    with pytest.raises(DataError, match=r"2008_000001\.jpg\) of the list trainaug"):
        read(root, "train")
    (voc / "ImageSets" / "Segmentation" / "trainaug.txt").unlink()
    with pytest.raises(DataError, match=r"Boundaries.*data\.split_set=train"):
        read(root, "train")
    (voc / "SegmentationObject" / f"{NAMES[1]}.png").unlink()
    with pytest.raises(DataError, match=r"SegmentationObject/2007_000039\.png"):
        read(root)
    with pytest.raises(DataError, match="no folder"):
        read(root / "nowhere")


def test_what_is_prepared_is_what_is_read(root, tmp_path):
    """Void survives a byte of the cache."""
    section = base.files(
        "voc", resolution=12, max_objects=64, crop="center", path=str(root)
    )
    section.split_set, section.cache = "trainaug", str(tmp_path / "cache")
    for split in ("train", "validation"):
        prepare(section, split, progress=silent, say=lambda text: None)
        source = registry.build(section, split)
        assert isinstance(source, Prepared)
        batch = source.batch(np.arange(len(source)))
        direct = read(root, split).batch(np.arange(len(source)))
        same = jax.tree.map(np.array_equal, batch, direct)
        assert all(jax.tree.leaves(same)) and batch.keys() == direct.keys()
