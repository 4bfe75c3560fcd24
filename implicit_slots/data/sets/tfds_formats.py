"""How the records of the data sets that tensorflow-datasets holds are read."""

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer
from PIL import Image, UnidentifiedImageError

from implicit_slots.data.readers.files import BROKEN
from implicit_slots.data.readers.pictures import Turn, decode
from implicit_slots.data.sets.coco_shapes import number_segments
from implicit_slots.data.source import (
    CLEVR_CODES,
    IGNORED,
    DataError,
    mark_present,
    pack_objects,
)

Record = Mapping[str, Any]
Objects = dict[str, np.ndarray]
# What `masks` may be, for COCO.
MASKS = ("instances", "panoptic")
# COCO's panoptic labels are its 80 countable things and then its 53 kinds of stuff.
COCO_THINGS = 80
# 3D Shapes: each combination of these once, the last changing fastest.
SHAPES3D_FACTORS: Mapping[str, int] = {
    "floor_hue": 10,
    "wall_hue": 10,
    "object_hue": 10,
    "scale": 8,
    "shape": 4,
    "orientation": 15,
}
SHAPES3D_ROWS = 480_000
# Official SLATE's splits by row of the published file, to the letter: rows 400000 and
# 430000 are in none.
SHAPES3D_SPLITS: Mapping[str, slice] = {
    "train": slice(0, 400_000),
    "validation": slice(400_001, 430_000),
    "test": slice(430_001, 460_000),
}

# MOVi-A's classes, in the order of its codes.
MOVI_A_WORDS: Mapping[str, tuple[str, ...]] = {
    "color": ("blue", "brown", "cyan", "gray", "green", "purple", "red", "yellow"),
    "material": ("metal", "rubber"),
    "shape": ("cube", "cylinder", "sphere"),
    "size": ("small", "large"),
}


def decode_image(encoded: bytes, what: str) -> tuple[Image.Image, Turn | None]:
    """A PNG or JPEG image in whatever mode it has, upright, and what made it so.

    Args:
      encoded: the file's content.
      what: its name in a sentence.

    Raises:
      DataError: it is not a whole image.
    """
    try:
        return decode(io.BytesIO(encoded))
    except BROKEN as error:
        # Pillow's own sentence names an object in memory.
        why = "no image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{what} cannot be decoded ({why}); prepare or download the data set again"
        ) from error


class Images:
    """Any data set with an `image`, which is all that is read of it.

    Besides `DataError`, methods raise `ValueError` and `IndexError` for records that
    are not as the data set's are.

    Attributes:
      fields: for `image`, `segmentation` and `objects`, the names in a record's
        `tf.train.Example` that are needed for it; what is missing here the data set
        does not have.
      splits: for "train", "validation" and "test", the splits of
        tensorflow-datasets, the first of which that exists is read.
      frames: how many frames a record has.
    """

    fields: Mapping[str, tuple[str, ...]] = {"image": ("image",)}
    splits: Mapping[str, tuple[str, ...]] = {
        "train": ("train",),
        "validation": ("validation",),
        "test": ("test",),
    }
    frames: int = 1

    def __init__(self, max_objects: int):
        """Keeps the length of the arrays of attributes."""
        self.max_objects = max_objects

    def image(self, record: Record, frame: int) -> bytes:
        """The encoded image of one frame."""
        return record["image"][0]

    def segmentation(
        self, record: Record, frame: int, where: str
    ) -> Integer[np.ndarray, "height width"] | None:
        """The mask of one frame, asked for only where `fields` has it.

        Raises:
          DataError: it cannot be decoded; the sentence starts with `where`.
        """
        return None

    def objects(self, record: Record, frame: int, where: str) -> Objects | None:
        """The objects of one frame, asked for only where `fields` has them.

        Raises:
          DataError: there are more than `max_objects`.
        """
        return None

    def _padded(self, values: Any, dtype: type) -> np.ndarray:
        """One value an object, or one array, followed by zeros."""
        values = np.asarray(values, dtype)
        padded = np.zeros((self.max_objects, *values.shape[1:]), dtype)
        padded[: len(values)] = values
        return padded


class Clevr(Images):
    """`clevr` 3.1.0: objects in no order of masks, for there are none."""

    fields: Mapping[str, tuple[str, ...]] = {
        **Images.fields,
        "objects": tuple(
            f"objects/{name}"
            for name in (*CLEVR_CODES, "rotation", "3d_coords", "pixel_coords")
        ),
    }

    def objects(self, record: Record, frame: int, where: str) -> Objects:
        """The arrays of `source.pack_objects`."""
        count = len(record["objects/color"])
        columns = {
            name.removeprefix("objects/"): np.reshape(
                record[name], (count, 3) if name.endswith("coords") else count
            )
            for name in self.fields["objects"]
        }
        rows = [{name: columns[name][k] for name in columns} for k in range(count)]
        return pack_objects(rows, self.max_objects, where)


class Shapes3d(Images):
    """`shapes3d` 2.0.0: one object; its labels and the room's are its attributes."""

    fields: Mapping[str, tuple[str, ...]] = {
        **Images.fields,
        "objects": tuple(f"label_{factor}" for factor in SHAPES3D_FACTORS),
    }

    def objects(self, record: Record, frame: int, where: str) -> Objects:
        """`present`, and a label for each factor, such as `floor_hue` int32 [K]."""
        return {
            "present": mark_present(1, self.max_objects, where),
            **{
                factor: self._padded(record[f"label_{factor}"], np.int32)
                for factor in SHAPES3D_FACTORS
            },
        }

    @staticmethod
    def row(record: Record) -> int:
        """The row of the published file that a record comes from."""
        labels = [int(record[f"label_{factor}"][0]) for factor in SHAPES3D_FACTORS]
        return int(np.ravel_multi_index(labels, tuple(SHAPES3D_FACTORS.values())))

    @staticmethod
    def positions() -> Int64[np.ndarray, " rows"]:
        """Where each row of the published file is among the records.

        tensorflow-datasets sorts records by the MD5 of the split's name and their key,
        which is the row's number; `row` shows whether a prepared copy does.
        """
        order = sorted(
            range(SHAPES3D_ROWS),
            key=lambda row: hashlib.md5(
                b"train%d" % row, usedforsecurity=False
            ).digest(),
        )
        positions = np.empty(SHAPES3D_ROWS, np.int64)
        positions[order] = np.arange(SHAPES3D_ROWS)
        return positions


class CocoPanoptic(Images):
    """`coco/2017_panoptic` 1.1.0; `test` is `validation`, as no other is labelled.

    Objects are in the order of `panoptic_objects`. Crowds are `IGNORED`. Stuff is
    background, unless all is asked for: then what nobody annotated is `IGNORED`.
    """

    fields: Mapping[str, tuple[str, ...]] = {
        **Images.fields,
        "segmentation": (
            "panoptic_image",
            "panoptic_objects/id",
            "panoptic_objects/label",
            "panoptic_objects/is_crowd",
        ),
        "objects": ("panoptic_objects/label", "panoptic_objects/is_crowd"),
    }
    splits: Mapping[str, tuple[str, ...]] = {
        **Images.splits,
        "test": ("test", "validation"),
    }

    def __init__(self, max_objects: int, masks: str):
        """Keeps the length of the arrays, and what is an object.

        Args:
          max_objects: length of the arrays of attributes.
          masks: "instances" or "panoptic", which has stuff as well.

        Raises:
          DataError: `masks` is neither.
        """
        if masks not in MASKS:
            raise DataError(
                f"unknown masks '{masks}'; set --config.data.masks to one of "
                f"{', '.join(MASKS)}"
            )
        super().__init__(max_objects)
        self._has_stuff = masks == "panoptic"

    def segmentation(
        self, record: Record, frame: int, where: str
    ) -> Int32[np.ndarray, "height width"]:
        """Ids from the colours of `panoptic_image`, which number the segments."""
        picture, _ = decode_image(record["panoptic_image"][0], f"the mask of {where}")
        codes = number_segments(np.asarray(picture.convert("RGB")))
        segments = np.asarray(record["panoptic_objects/id"])
        kept = segments[self._kept(record)]
        mark_present(len(kept), self.max_objects, where)
        crowds = segments[np.asarray(record["panoptic_objects/is_crowd"], bool)]
        ids = np.zeros(codes.shape, np.int32)
        ids[np.isin(codes, [*crowds, *[0] * self._has_stuff])] = IGNORED
        for place, segment in enumerate(kept):
            ids[codes == segment] = place + 1
        return ids

    def objects(self, record: Record, frame: int, where: str) -> Objects:
        """`present`, and `label` int32 [K], 0 … 79 for things, to 132 for stuff."""
        labels = np.asarray(record["panoptic_objects/label"])[self._kept(record)]
        return {
            "present": mark_present(len(labels), self.max_objects, where),
            "label": self._padded(labels, np.int32),
        }

    def _kept(self, record: Record) -> Bool[np.ndarray, " segments"]:
        crowd = np.asarray(record["panoptic_objects/is_crowd"], bool)
        is_thing = np.asarray(record["panoptic_objects/label"]) < COCO_THINGS
        return ~crowd & (is_thing | self._has_stuff)


class Movi(Images):
    """`movi_a` … `movi_e` 1.0.0: each frame of a video is an example.

    `test` is the set's own where it has one (held-out objects and backgrounds, from
    `movi_c` on) and `validation` otherwise. Source of the format: the builders in
    challenges/movi of google-research/kubric.
    """

    splits: Mapping[str, tuple[str, ...]] = CocoPanoptic.splits
    frames: int = 24

    def __init__(self, name: str, max_objects: int):
        """Finds out what there is to know of the instances.

        Args:
          name: of the data set.
          max_objects: length of the arrays of attributes.
        """
        super().__init__(max_objects)
        # What MOVi-A numbers in this order has other numbers in `CLEVR_CODES`.
        self._codes = {
            attribute: np.array([CLEVR_CODES[attribute].index(word) for word in words])
            for attribute, words in MOVI_A_WORDS.items()
            if name == "movi_a"
        }
        self._has_category = name in ("movi_c", "movi_d", "movi_e")
        attributes = [f"instances/{attribute}_label" for attribute in self._codes]
        attributes += ["instances/category"] if self._has_category else []
        self.fields = {
            "image": ("video",),
            "segmentation": ("segmentations",),
            "objects": (
                "metadata/num_instances",
                "metadata/height",
                "metadata/width",
                "instances/positions",
                "instances/image_positions",
                *attributes,
            ),
        }

    def image(self, record: Record, frame: int) -> bytes:
        """One frame of the video."""
        if len(record["video"]) != self.frames:
            raise ValueError(f"{len(record['video'])} frames instead of {self.frames}")
        return record["video"][frame]

    def segmentation(
        self, record: Record, frame: int, where: str
    ) -> Integer[np.ndarray, "height width"]:
        """Ids as they are published: an instance's index + 1."""
        encoded = record["segmentations"][frame]
        return np.asarray(decode_image(encoded, f"the mask of {where}")[0])

    def objects(self, record: Record, frame: int, where: str) -> Objects:
        """`present`, positions in this frame, and the attributes that the set has.

        `position` float32 [K, 3] is in the world, `pixel_position` float32 [K, 2] is
        (column, row); `color`, `material`, `shape` and `size` are CLEVR's codes where
        the words are CLEVR's; `category` is the set's. Hidden instances are present.
        """
        count = int(record["metadata/num_instances"][0])
        present = mark_present(count, self.max_objects, where)
        size = [record[f"metadata/{side}"][0] for side in ("width", "height")]
        positions = np.reshape(record["instances/positions"], (count, self.frames, 3))
        places = np.reshape(
            record["instances/image_positions"], (count, self.frames, 2)
        )
        pixels = places[:, frame] * np.array(size, np.float32)
        objects = {
            "present": present,
            "position": self._padded(positions[:, frame], np.float32),
            "pixel_position": self._padded(pixels, np.float32),
            **{
                name: self._padded(codes[record[f"instances/{name}_label"]], np.int32)
                for name, codes in self._codes.items()
            },
        }
        if self._has_category:
            objects["category"] = self._padded(record["instances/category"], np.int32)
        return objects


def layout(name: str, config: str, max_objects: int, masks: str) -> Images:
    """The reader of a data set's records.

    Args:
      name: of the data set.
      config: its configuration.
      max_objects: length of the arrays of attributes.
      masks: see `CocoPanoptic`.

    Raises:
      DataError: `masks` is none of `MASKS`.
    """
    if name.startswith("movi_"):
        return Movi(name, max_objects)
    if name == "coco" and config.endswith("panoptic"):
        return CocoPanoptic(max_objects, masks)
    sets = {"clevr": Clevr, "shapes3d": Shapes3d}
    return sets.get(name, Images)(max_objects)
