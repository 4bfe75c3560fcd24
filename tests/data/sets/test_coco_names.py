"""COCO's format as others write it: names, folders and what annotations leave out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from implicit_slots.data.sets.coco import Coco
from implicit_slots.data.sets.coco_files import describe
from implicit_slots.data.source import IGNORED, DataError

pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")

HEIGHT, WIDTH = 12, 20


def box(left, top, width, height):
    right, bottom = left + width, top + height
    corners = [left, top, right, top, right, bottom, left, bottom]
    return {"bbox": [left, top, width, height], "segmentation": [corners]}


def save(file, value=0, size=(WIDTH, HEIGHT), orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(file, exif=exif)


def write(file, images, annotations, **more):
    """An annotation file of images by name, and what is on the one of this number."""
    listed = [
        {"id": 100 - i, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for i, name in enumerate(images)
    ]
    marked = [
        {"image_id": 100 - place, "category_id": 5 + place, **annotation}
        for place, annotation in annotations
    ]
    content = {"images": listed, "annotations": marked, **more}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def read(root, split="train", **options):
    options = {"resolution": WIDTH, "crop": "none", "max_objects": 4, **options}
    source = Coco(path=str(root), split=split, **options)
    source.check(lambda iterable, **_: iterable)
    return source


def labels(source):
    """The class of the one object of each image, by the image's name."""
    return {
        name: int(source[index]["objects"]["label"][0])
        for index, name in enumerate(source.images)
    }


@pytest.mark.parametrize(
    ("folder", "names", "told"),
    [
        ("train2017", ["000000000009.jpg", "000000000025.jpg"], None),
        ("train2014", [f"COCO_train2014_{i:012}.jpg" for i in (9, 25)], None),
        ("train", ["a.png", "b.webp"], None),
        ("Training", ["IMG 1.JPG", "Ünlü.png"], None),
        ("train2017", ["sub/a.jpg", "other/a.jpg"], None),
        ("train", ["sub/a.jpg", "b.jpg"], ["train/sub/a.jpg", "/home/me/train/b.jpg"]),
        ("train", ["sub/a.jpg", "b.jpg"], ["sub\\a.jpg", ".\\b.jpg"]),
        ("train", ["a.PNG", "b.png"], ["a.png", "B.jpg"]),
        ("train", ["a.png", "b.png"], ["b/c/a.png", "b.png"]),
    ],
)
@pytest.mark.parametrize("base", ["", "images/"])
def test_photographs_are_found_by_the_name_that_is_told(
    tmp_path, base, folder, names, told
):
    """Entries are in no order of the names, and may be more."""
    for name in names:
        save(tmp_path / base / folder / name)
    for name in ("._a.jpg", "notes.txt", "Thumbs.db"):
        (tmp_path / base / folder / name).touch()
    file = tmp_path / "annotations" / f"instances_{folder}.json"
    told = [*reversed(told or names), "not there.jpg"]
    write(file, told, [(i, box(i, 0, 5, 4)) for i in range(3)])
    source = read(tmp_path)
    assert source.images == sorted(f"{base}{folder}/{name}" for name in names)
    first, second = (f"{base}{folder}/{name}" for name in names)
    assert labels(source) == {first: 6, second: 5}


def test_a_photograph_that_is_found_is_no_other_entrys():
    """Though it has the same stem."""
    entries = describe(["t/a.jpg", "t/b.png"], ["a.png", "b.tif", "a.jpg"], Path("f"))
    assert entries == [2, 1]


def test_splits_have_the_names_that_people_give_them(tmp_path):
    """As Roboflow exports them, with annotations beside the photographs."""
    for place, folder in enumerate(("train", "valid", "test")):
        save(tmp_path / folder / f"{folder}.rf.0a1b.jpg", 10 * place)
        file = tmp_path / folder / "_annotations.coco.json"
        write(file, [f"{folder}.rf.0a1b.jpg"], [(0, box(0, 0, 5 + place, 4))])
    for place, split in enumerate(("train", "validation", "test")):
        example = read(tmp_path, split)[0]
        assert np.unique(example["image"]).tolist() == [10 * place]
        assert example["segmentation"][0].sum() == 5 + place


def test_a_test_folder_without_annotations_is_none(tmp_path):
    """As COCO's own; years do not mix either."""
    for folder in ("val2017", "val2014", "test2017"):
        save(tmp_path / folder / f"{folder}.jpg")
        file = tmp_path / "annotations" / f"instances_{folder}.json"
        if folder != "test2017":
            write(file, [f"{folder}.jpg"], [(0, box(0, 0, 5, 4))])
    for split in ("validation", "test"):
        assert read(tmp_path, split).images == ["val2017/val2017.jpg"]
        assert read(tmp_path, split, masks="none").images == ["val2017/val2017.jpg"]
    (tmp_path / "val2017").rename(tmp_path / "val2015")
    with pytest.raises(
        DataError, match="several folders of the split 'validation', va"
    ):
        read(tmp_path, "test")


def test_panoptic_masks_have_the_name_that_is_told(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / "train" / name, size=(WIDTH, HEIGHT))
    folder = tmp_path / "annotations" / "panoptic_train"
    folder.mkdir(parents=True)
    segments = []
    for place, name in enumerate(("seg_of_b.png", "seg_of_a.png")):
        colour = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        colour[: place + 1, :, 0] = 7
        Image.fromarray(colour).save(folder / name)
        info = [{"id": 7, "category_id": 1}]
        segments.append((place, {"file_name": name, "segments_info": info}))
    file = tmp_path / "annotations" / "panoptic_train.json"
    write(file, ["b.jpg", "a.jpg"], segments)
    source = read(tmp_path, masks="panoptic", crop="center", resolution=HEIGHT)
    assert source.images == ["train/a.jpg", "train/b.jpg"]
    for index, rows in enumerate((2, 1)):
        ids = source[index]["segmentation"]
        assert (ids[:rows] == 1).all() and (ids[rows:] == IGNORED).all()


def drawn(tmp_path, *annotations, image="a.png", **options):
    """The mask of one photograph with these annotations, 20 x 20 of 12 x 20."""
    if not (tmp_path / "train" / image).exists():
        save(tmp_path / "train" / image)
    file = tmp_path / "annotations" / "instances_train.json"
    write(file, [image], [(0, annotation) for annotation in annotations])
    example = read(tmp_path, **options)[0]
    rows = (np.arange(HEIGHT) * WIDTH + WIDTH // 2) // HEIGHT
    return example["segmentation"][rows], example["objects"]["present"].sum()


LARGE, SMALL = box(2, 2, 10, 8), box(4, 4, 3, 3)


def test_what_annotations_may_leave_out(tmp_path):
    """Areas, numbers, crowd flags, the list around one polygon, other images."""
    flat = {**SMALL, "segmentation": SMALL["segmentation"][0]}
    elsewhere = {**LARGE, "image_id": 7}
    ids, count = drawn(tmp_path, flat, LARGE, elsewhere)
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[2:10, 2:12], expected[4:7, 4:7] = 1, 2
    np.testing.assert_array_equal(ids, expected)
    assert count == 2


def test_crowds_and_boxes_without_masks_are_ignored_but_where_objects_are(tmp_path):
    runs = {"size": [HEIGHT, WIDTH], "counts": [0, 5 * HEIGHT, 15 * HEIGHT]}
    crowd = {"segmentation": runs, "iscrowd": 1, "area": 60, "bbox": [0, 0, 5, 12]}
    boxed = {"segmentation": [], "bbox": [10, 0, 5, 3], "area": 15}
    bare = {"bbox": [17, 9, 3, 3]}
    flagged = {**box(15, 0, 2, 2), "ignore": 1}
    ids, count = drawn(tmp_path, LARGE, crowd, boxed, bare, flagged)
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[:, :5] = expected[:3, 10:15] = IGNORED
    expected[9:, 17:] = expected[:2, 15:17] = IGNORED
    expected[2:10, 2:12] = 1
    np.testing.assert_array_equal(ids, expected)
    assert count == 1


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_annotations_are_of_the_upright_photograph_or_as_it_is_stored(
    tmp_path, orientation
):
    """The size in the annotations tells."""
    ids, _ = drawn(tmp_path, LARGE)
    tall = {6: np.rot90(ids, -1), 8: np.rot90(ids)}.get(orientation)
    lying = (HEIGHT, WIDTH) if tall is not None else (WIDTH, HEIGHT)
    save(tmp_path / "train" / "a.png", size=lying, orientation=orientation)
    np.testing.assert_array_equal(drawn(tmp_path, LARGE)[0], ids)
    if tall is not None:
        save(tmp_path / "train" / "a.png", orientation=orientation)
        source = read(tmp_path, crop="center", resolution=HEIGHT)
        np.testing.assert_array_equal(source[0]["segmentation"], tall[4:16])


def without(key):
    def spoil(root):
        file = root / "annotations" / "instances_train.json"
        content = json.loads(file.read_text())
        del content[key]
        file.write_text(json.dumps(content))

    return spoil


def boxes_alone(root):
    file = root / "annotations" / "instances_train.json"
    bare = [(0, {"bbox": [0, 0, 3, 3], "segmentation": []})] * 2
    write(file, ["a.png"], bare)


def unclear(root):
    for folder in ("x", "y"):
        save(root / "train" / folder / "a.png")
    (root / "train" / "a.png").unlink()


def twice(root):
    file = root / "annotations" / "instances_train.json"
    write(file, ["x/a.png", "y/a.png"], [(0, LARGE)])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without("annotations"), "lists images and has no annotations; do without mas"),
        (without("images"), r"not in COCO's instances format \(KeyError\('images'\)"),
        (boxes_alone, "has boxes of objects and no masks; do without masks by --conf"),
        (twice, r"describes train/a\.png twice, as x/a\.png and y/a\.png; leave one"),
        (unclear, r"2 of 2 images \(train/x/a\.png, train/y/a\.png\) in .* are not de"),
        (
            lambda root: (root / "train" / "a.png").rename(root / "train" / "c.png"),
            r"1 of 1 images \(train/c\.png\) in .* are not described in",
        ),
    ],
)
def test_annotations_that_cannot_be_used_are_one_sentence(tmp_path, spoil, sentence):
    drawn(tmp_path, LARGE)
    spoil(tmp_path)
    with pytest.raises(DataError, match=sentence) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    assert len(read(tmp_path, masks="none")) == 1 + (spoil is unclear)
