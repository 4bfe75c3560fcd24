"""Masks as people save them: values become objects, void or background."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from implicit_slots.data.sets.folder import ImageFolder
from implicit_slots.data.source import IGNORED, DataError

SIDE = 8
AREA = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) // 16  # four stripes: 0, 1, 2, 3


def values(*of_stripes: int, dtype: Any = np.uint8):
    """A mask that has these values in its four stripes."""
    return np.array(of_stripes, dtype)[AREA]


def colours(*of_stripes):
    return np.array(of_stripes, np.uint8)[AREA]


def save(file, picture):
    file.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    picture.save(file)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "images" / "a.png", np.zeros((SIDE, SIDE, 3), np.uint8))
    return tmp_path


def read(folder, **options):
    source = ImageFolder(
        path=str(folder),
        split="train",
        resolution=SIDE,
        validation_fraction=0.0,
        test_fraction=0.0,
        **options,
    )
    source.check(lambda iterable, **_: iterable)
    return source


def objects(folder, **options):
    """What the stripes of the one mask are."""
    ids = read(folder, **options)[0]["segmentation"]
    assert ids.dtype == np.int32
    stripes = [np.unique(ids[AREA == stripe]).tolist() for stripe in range(4)]
    assert all(len(stripe) == 1 for stripe in stripes)
    return [stripe[0] for stripe in stripes]


RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        # One object, as most tools save it.
        (values(0, 255, 0, 255), [0, 1, 0, 1]),
        (values(255, 255, 255, 255), [1, 1, 1, 1]),
        (values(0, 1, 0, 0).astype(bool), [0, 1, 0, 0]),
        # Levels of grey that set objects apart.
        (values(0, 128, 255, 0), [0, 1, 2, 0]),
        (values(0, 85, 170, 255), [0, 1, 2, 3]),
        # Void, as in Pascal VOC and Cityscapes.
        (values(0, 1, 2, 255), [0, 1, 2, IGNORED]),
        (values(0, 7, 255, 255), [0, 1, IGNORED, IGNORED]),
        (values(255, 1, 1, 2), [IGNORED, 1, 1, 2]),
        (values(0, 254, 253, 255), [0, 2, 1, IGNORED]),
        # Ids with gaps, and beyond a byte.
        (values(0, 9, 4, 9), [0, 2, 1, 2]),
        (values(0, 26_001, 255, 65_535, dtype=np.uint16), [0, 2, 1, 3]),
        (values(3, 3, 3, 1), [2, 2, 2, 1]),
        (values(0, 0, 0, 0), [0, 0, 0, 0]),
        # Colours, of which none is void.
        (colours(BLACK, RED, WHITE, RED), [0, 1, 2, 1]),
        (colours(BLACK, (0, 0, 9), (9, 0, 0), (0, 9, 0)), [0, 3, 1, 2]),
        (colours(BLACK, WHITE, BLACK, BLACK), [0, 1, 0, 0]),
        (colours(BLACK, (1, 1, 1), (2, 2, 2), WHITE), [0, 1, 2, IGNORED]),
        (colours((*RED, 0), (*RED, 255), (*WHITE, 9), (0, 0, 0, 255)), [0, 1, 2, 0]),
    ],
)
def test_values_become_objects(folder, picture, expected):
    save(folder / "masks" / "a.png", picture)
    assert objects(folder) == expected
    count = len({place for place in expected if place > 0})
    assert read(folder).count_objects(lambda i, **_: i).tolist() == [count]


@pytest.mark.parametrize("ending", ["png", "tif", "bmp", "gif", "webp"])
def test_void_and_objects_are_the_same_in_every_format(folder, ending):
    mask = Image.fromarray(values(0, 1, 2, 255))
    (folder / "masks").mkdir()
    mask.save(folder / "masks" / f"a.{ending}", lossless=True)
    assert objects(folder) == [0, 1, 2, IGNORED]


def test_ids_of_a_palette_are_its_indices(folder):
    mask = Image.fromarray(values(0, 1, 2, 255), "P")
    mask.putpalette([level for i in range(256) for level in (i, 255 - i, 7)])
    mask.info["transparency"] = 2
    save(folder / "masks" / "a.png", mask)
    assert objects(folder) == [0, 1, 2, IGNORED]


def test_grey_with_transparency_is_ids_where_it_is_seen(folder):
    mask = Image.merge(
        "LA",
        [Image.fromarray(values(0, 1, 2, 255)), Image.fromarray(values(9, 9, 0, 9))],
    )
    save(folder / "masks" / "a.png", mask)
    assert objects(folder) == [0, 1, 0, IGNORED]


@pytest.mark.parametrize(
    ("ids", "ignore_id", "expected"),
    [
        ((0, 7, 9, 255), -1, [0, 1, 2, 3]),
        ((0, 7, 9, 255), 7, [0, IGNORED, 1, 2]),
        ((0, 7, 9, 255), 0, [IGNORED, 1, 2, 3]),
        ((0, 128, 255, 0), 128, [0, IGNORED, 1, 0]),
    ],
)
def test_another_id_may_be_void_or_none(folder, ids, ignore_id, expected):
    save(folder / "masks" / "a.png", values(*ids))
    assert objects(folder, ignore_id=ignore_id) == expected


def test_one_object_needs_no_more_than_one(folder):
    save(folder / "masks" / "a.png", values(0, 255, 0, 0))
    assert objects(folder, max_objects=1) == [0, 1, 0, 0]
    save(folder / "masks" / "a.png", values(0, 7, 9, 255))
    with pytest.raises(
        DataError, match=r"has 2 objects, more than max_objects = 1; se"
    ):
        objects(folder, max_objects=1)


def test_smoothed_masks_are_refused(folder):
    disc = Image.fromarray(np.hypot(*np.mgrid[-9:10, -9:10]) < 6).convert("L")
    save(folder / "images" / "a.png", np.zeros((64, 64, 3), np.uint8))
    save(folder / "masks" / "a.png", disc.resize((64, 64), Image.Resampling.BICUBIC))
    with pytest.raises(
        DataError, match=r"has \d+ objects, .* without smoothing if most"
    ):
        read(folder)[0]


def describe(folder, count):
    cube = {
        "shape": "cube",
        "size": "large",
        "color": "cyan",
        "material": "metal",
        "rotation": 7.0,
        "3d_coords": [1.0, -2.0, 0.7],
        "pixel_coords": [10, 6, 9.5],
    }
    scene = {"image_filename": "a.png", "objects": [cube] * count}
    (folder / "scenes.json").write_text(json.dumps({"scenes": [scene]}))


def test_ids_that_attributes_belong_to_stay(folder):
    """Object 2 is hidden; void is void there too."""
    save(folder / "masks" / "a.png", values(0, 1, 3, 255))
    describe(folder, 3)
    assert objects(folder) == [0, 1, 3, IGNORED]


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        (
            values(0, 1, 3, 4),
            r"a\.png has object 4, but scenes\.json describes 3; make",
        ),
        (
            values(0, 255, 0, 0),
            r"has object 255, but scenes\.json describes 3; make th",
        ),
        (
            colours(BLACK, RED, WHITE, RED),
            "is in colours, which do not tell which obje",
        ),
    ],
)
def test_masks_that_do_not_tell_whose_attributes_are_refused(folder, picture, sentence):
    save(folder / "masks" / "a.png", picture)
    describe(folder, 3)
    with pytest.raises(DataError, match=sentence):
        read(folder)[0]


@pytest.mark.parametrize(
    ("name", "picture", "sentence"),
    [
        (
            "a.tif",
            values(0, 1, 2, 3, dtype=np.float32),
            "has pixels of mode F; it must",
        ),
        (
            "a.tif",
            values(0, -1, 2, 3, dtype=np.int32),
            "has ids from -1 to 3; renumber",
        ),
        (
            "a.jpg",
            values(0, 1, 2, 3),
            "is a JPEG, which does not keep ids exactly; sav",
        ),
        (
            "a.png",
            np.zeros((4, 4), np.uint8),
            "has 4 x 4 pixels and its image .* 8 x 8",
        ),
    ],
)
def test_what_holds_no_ids_is_one_sentence(folder, name, picture, sentence):
    save(folder / "masks" / name, picture)
    with pytest.raises(DataError, match=sentence) as error:
        read(folder)[0]
    assert "\n" not in str(error.value)
