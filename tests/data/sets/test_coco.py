"""COCO: photographs, instances and panoptic segments as its own tools write them."""

import json
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from implicit_slots.data.sets.coco import Coco
from implicit_slots.data.source import IGNORED, DataError

coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")

HEIGHT, WIDTH = 20, 20
# Of several digits, so that their order as numbers differs from that as text.
IDENTITIES = (139, 785, 1000)


def box(top, bottom, left, right):
    """Pixels of a rectangle, and it as a polygon."""
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[top:bottom, left:right] = True
    return inside, [left, top, right, top, right, bottom, left, bottom]


LARGE, LARGE_POLYGON = box(2, 18, 1, 15)
SMALL, SMALL_POLYGON = box(4, 9, 3, 8)
LEFT, LEFT_POLYGON = box(0, 2, 0, 4)
RIGHT, RIGHT_POLYGON = box(0, 2, 10, 14)
CROWD = box(0, 20, 18, 20)[0]
RUNS = box(10, 20, 12, 17)[0]
CODED = np.indices((HEIGHT, WIDTH)).sum(0) % 5 == 0
TRIANGLE = [3.3, 4.1, 15.8, 6.2, 8.4, 17.9]


def uncompressed(inside):
    """Lengths of runs by columns, the first of them outside."""
    flat = inside.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.array([0, *edges, flat.size])).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": [0, *runs] if flat[0] else runs}


def compressed(inside):
    code = coco.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def annotation(number, image, segmentation, area, category, crowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "iscrowd": crowd,
        "area": float(area),
        "bbox": [0.0, 0.0, 1.0, 1.0],
        "segmentation": segmentation,
    }


def instances():
    return [
        annotation(1, 139, [SMALL_POLYGON], SMALL.sum(), 3),
        annotation(2, 139, uncompressed(CROWD), CROWD.sum(), 1, crowd=1),
        annotation(3, 139, [LARGE_POLYGON], LARGE.sum(), 90),
        annotation(4, 139, [LEFT_POLYGON, RIGHT_POLYGON], 16, 7),
        annotation(5, 785, compressed(CODED), CODED.sum(), 2),
        annotation(7, 785, uncompressed(RUNS), RUNS.sum(), 4),
        annotation(6, 785, [SMALL_POLYGON], RUNS.sum(), 5),
    ]


# Segment ids that fill one, two and three bytes.
STUFF, THING, MOB = 9, 2 + 256 * 7, 200 + 256 * 100 + 65536 * 50


def segments(image):
    listed = [(STUFF, 184, 0), (MOB, 1, 1), (THING, 17, 0)]
    return [
        {"id": i, "category_id": category, "iscrowd": crowd, "area": 1, "bbox": []}
        for i, category, crowd in (listed if image == 139 else [])
    ]


def panoptic_ids():
    ids = np.zeros((HEIGHT, WIDTH), np.int64)
    ids[:10], ids[5:15, 5:15], ids[:, 18:] = STUFF, THING, MOB
    return ids


def save_segments(file, ids):
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours.astype(np.uint8)).save(file)


def write_json(root, name, content):
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / name).write_text(json.dumps(content))


def write_instances(root, annotations, width=WIDTH):
    images = [
        {"id": i, "file_name": f"{i:012}.jpg", "height": HEIGHT, "width": width}
        for i in reversed(IDENTITIES)
    ]
    content = {"images": images, "annotations": annotations, "categories": []}
    write_json(root, "instances_val2017.json", content)


@pytest.fixture
def root(tmp_path):
    for folder in ("train2017", "val2017"):
        (tmp_path / folder).mkdir()
        for i in IDENTITIES:
            smooth = np.random.default_rng(i).integers(0, 256, (5, 5, 3), np.uint8)
            image = Image.fromarray(smooth).resize((WIDTH, HEIGHT))
            image.save(tmp_path / folder / f"{i:012}.jpg", quality=95)
    write_instances(tmp_path, instances())
    panoptic = []
    for i in IDENTITIES:
        file = f"{i:012}.png"
        ids = panoptic_ids() if i == 139 else np.zeros((HEIGHT, WIDTH), np.int64)
        save_segments(tmp_path / "annotations" / "panoptic_val2017" / file, ids)
        panoptic.append(
            {"image_id": i, "file_name": file, "segments_info": segments(i)}
        )
    write_json(tmp_path, "panoptic_val2017.json", {"annotations": panoptic})
    return tmp_path


def read(root, split="validation", **options):
    options = {"resolution": 20, "max_objects": 4, **options}
    return Coco(path=str(root), split=split, **options)


def silent(iterable, **_):
    return iterable


def paint(*layers):
    ids = np.zeros((HEIGHT, WIDTH), int)
    for k, inside in enumerate(layers, start=1):
        ids[inside] = k
    return ids


def test_photographs_come_by_image_id_and_bit_for_bit(root):
    """Validation and test are both val2017; a folder's other files are left alone."""
    (root / "val2017" / "notes.txt").write_text("not a photograph")
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "val")):
        source = read(root, split, masks="none")
        source.check(silent)
        assert len(source) == 3
        for index, i in enumerate(IDENTITIES):
            file = root / f"{folder}2017" / f"{i:012}.jpg"
            assert source.where(index) == str(file)
            with Image.open(file) as image:
                np.testing.assert_array_equal(source[index]["image"], np.asarray(image))
    assert source[0].keys() == {"image"}


def test_instances_are_painted_from_large_to_small(root):
    """Polygons, two of one object, and both run-length codes; crowds are ignored."""
    source = read(root)
    source.check(silent)
    batch = source.batch(np.arange(3))
    # By area; of two of 50 pixels the one of the lower id is first.
    wanted = [
        np.where(CROWD, IGNORED, paint(LARGE, SMALL, LEFT | RIGHT)),
        paint(CODED, SMALL, RUNS),
        paint(),
    ]
    np.testing.assert_array_equal(batch["segmentation"], wanted)
    assert batch["objects"].keys() == {"present", "label"}
    assert batch["objects"]["label"].dtype == np.int32
    assert batch["objects"]["label"].tolist() == [
        [90, 3, 7, 0],
        [2, 5, 4, 0],
        [0, 0, 0, 0],
    ]
    assert batch["objects"]["present"].sum(1).tolist() == [3, 3, 0]
    assert source.count_objects(silent).tolist() == [3, 3, 0]


def test_where_instances_overlap_nobody_is_seen_if_so_wanted(root):
    """As DINOSAUR scores COCO: `ignore_overlaps`."""
    ids = read(root, overlaps="ignored").batch(np.arange(3))["segmentation"]
    shapes = (LARGE, SMALL, LEFT | RIGHT), (CODED, SMALL, RUNS), ()
    for index, drawn in enumerate(shapes):
        number = sum(
            (shape.astype(int) for shape in drawn), np.zeros((HEIGHT, WIDTH), int)
        )
        plain = read(root)[index]["segmentation"]
        np.testing.assert_array_equal(ids[index] == IGNORED, (number > 1) | (plain < 0))
        np.testing.assert_array_equal(ids[index][number < 2], plain[number < 2])
    assert np.any(ids[1] == IGNORED)


def test_polygons_between_pixels_are_rasterised_as_by_pycocotools(root):
    write_instances(root, [annotation(1, 785, [TRIANGLE], 80, 1)])
    ids = read(root)[1]["segmentation"]
    runs = coco.merge(coco.frPyObjects([TRIANGLE], HEIGHT, WIDTH))
    with warnings.catch_warnings(action="ignore"):  # It is older than NumPy 2.
        expected = coco.decode(runs)
    np.testing.assert_array_equal(ids, expected)
    assert 50 < ids.sum() < 110


@pytest.mark.parametrize("seed", range(4))
def test_run_length_codes_give_pycocotools_masks(root, seed):
    """Short and long runs, so that numbers take one character and several."""
    inside = np.random.default_rng(seed).random((HEIGHT, WIDTH)) < (0.5, 0.02)[seed % 2]
    inside[:, 8:15] = seed < 2
    inside[0, 0] = seed % 2 == 0
    for code in (compressed(inside), uncompressed(inside)):
        write_instances(root, [annotation(1, 139, code, 9, 1)])
        np.testing.assert_array_equal(read(root)[0]["segmentation"], inside)


def test_panoptic_segments_are_numbered_in_their_lists_order(root):
    """Things and stuff alike; crowds and what nobody annotated are ignored."""
    source = read(root, masks="panoptic")
    source.check(silent)
    ids = panoptic_ids()
    batch = source.batch(np.arange(3))
    open_ = (ids == MOB) | (ids == 0)
    np.testing.assert_array_equal(
        batch["segmentation"][0],
        np.where(open_, IGNORED, (ids == STUFF) + 2 * (ids == THING)),
    )
    assert (batch["segmentation"][1:] == IGNORED).all()
    assert batch["objects"]["label"][0].tolist() == [184, 17, 0, 0]
    assert source.count_objects(silent).tolist() == [2, 0, 0]


def test_annotations_are_not_read_unless_wanted(root):
    """Training on images needs neither their file nor pycocotools."""
    (root / "annotations").rename(root / "elsewhere")
    source = read(root, keys=("image",))
    assert source[0].keys() == {"image"}
    (root / "elsewhere").rename(root / "annotations")
    assert source.count_objects(silent).tolist() == [3, 3, 0]
    assert read(root, keys=("objects",))[0].keys() == {"image", "objects"}
    with pytest.raises(DataError, match="neither masks nor attributes to count obje"):
        read(root, masks="none").count_objects(silent)


def test_missing_pycocotools_is_one_sentence(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(DataError, match="run pip install pycocotools, or set --config"):
        read(root)[0]
    assert len(read(root, masks="panoptic")) == len(read(root, masks="none")) == 3


def test_the_fingerprint_tells_other_annotations(root):
    first = read(root).fingerprint()
    assert first["files"] == 4 and first == read(root).fingerprint()
    assert read(root, masks="panoptic").fingerprint()["files"] == 7
    write_instances(root, [])
    assert read(root).fingerprint() != first


def one(segmentation):
    return lambda root: write_instances(root, [annotation(1, 139, segmentation, 9, 1)])


def truncate(file):
    file.write_bytes(file.read_bytes()[:300])


def code(counts, size=(HEIGHT, WIDTH)):
    return {"size": list(size), "counts": counts}


@pytest.mark.parametrize(
    ("spoil", "options", "sentence"),
    [
        (one(code([5, 5])), {}, r"object 1 of .*139\.jpg and .* not fill the frame\);"),
        (one(code([-5, 405])), {}, "its run-length code does not fill the frame"),
        (one(code("ooo")), {}, r"its run-length code is cut off"),
        (one(code("")), {}, "its run-length code does not fill the frame"),
        (one(code("a!")), {}, "its run-length code has a character '!'"),
        (one(code([399, 1], (1, 400))), {}, r"its run-length code is of size \[1, 400"),
        (one({"counts": [400]}), {}, r"cannot be drawn \('size'\)"),
        (one([[1, 2, 3, 4, 5, 6, 7]]), {}, "not a list of coordinates x, y, … in the"),
        (one([[0, 0, 1e9, 0, 1e9, 1e9]]), {}, "not a list of coordinates x, y, … in t"),
        (
            one(None),
            {},
            r"has boxes of objects and no masks; do without masks by --con",
        ),
        (one([["a"]]), {}, r"not in COCO's instances format \(ValueError"),
        (
            lambda root: write_instances(root, instances(), width=40),
            {},
            r"do not agree on the size, \(20, 20\) and \(40, 20\); unpack the images",
        ),
        (
            lambda root: write_json(root, "instances_val2017.json", []),
            {},
            r"instances_val2017\.json is not in COCO's instances format \(TypeError",
        ),
        (
            lambda root: truncate(root / "annotations" / "instances_val2017.json"),
            {},
            r"instances_val2017\.json cannot be read \(",
        ),
        (
            lambda root: (root / "val2017" / f"{1:012}.jpg").touch(),
            {},
            r"1 of 4 images \(val2017/000000000001\.jpg\) in .* are not described in",
        ),
        (
            lambda root: truncate(root / "val2017" / f"{139:012}.jpg"),
            {},
            r"000139\.jpg cannot be read \(",
        ),
        (
            lambda root: None,
            {"max_objects": 2},
            "has 3 objects, more than max_objects =",
        ),
        (
            lambda root: None,
            {"masks": "boxes"},
            "COCO has no masks 'boxes'; set --conf",
        ),
        (
            lambda root: None,
            {"split": "train"},
            r"no file .*/annotations/instances_train2017\.json; unpack COCO's annota",
        ),
        (
            lambda root: (root / "val2017").rename(root / "photographs"),
            {},
            r"there is no folder .*/val2017; unpack it there, or set",
        ),
        (
            lambda root: [f.unlink() for f in (root / "val2017").iterdir()],
            {},
            r"val2017 has no photographs; unpack COCO's images there",
        ),
        (
            lambda root: save_segments(
                root / "annotations" / "panoptic_val2017" / f"{139:012}.png",
                panoptic_ids() + 1,
            ),
            {"masks": "panoptic"},
            r"000139\.png has segment 1, which its annotation does not describe; unp",
        ),
        (
            lambda root: save_segments(
                root / "annotations" / "panoptic_val2017" / f"{139:012}.png",
                panoptic_ids()[:, :9],
            ),
            {"masks": "panoptic"},
            "has an image of 20 x 20 pixels and a mask of 9 x 20; they must be of one",
        ),
        (
            lambda root: (
                root / "annotations" / "panoptic_val2017" / f"{139:012}.png"
            ).unlink(),
            {"masks": "panoptic"},
            r"panoptic_val2017/0+139\.png cannot be read \(No such file",
        ),
    ],
)
def test_what_cannot_be_used_is_one_sentence(root, spoil, options, sentence):
    spoil(root)
    with pytest.raises(DataError, match=sentence) as error:
        read(root, **options)[0]
    assert "\n" not in str(error.value)


def test_a_check_finds_broken_photographs_and_masks(root):
    masks = root / "annotations" / "panoptic_val2017"
    truncate(root / "val2017" / f"{785:012}.jpg")
    with pytest.raises(DataError, match=r"1 of 3 images \(val2017/0+785\.jpg\) in"):
        read(root).check(silent)
    (masks / f"{139:012}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 3 images \(.*, or their masks, cannot"):
        read(root, masks="panoptic").check(silent)
    with pytest.raises(DataError, match="no folder of COCO is named; set it"):
        read("")
