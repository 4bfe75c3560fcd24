"""Multi-object record files: CLEVR with masks, dSprites, Objects Room, Tetrominoes.

Format: the readers of google-deepmind/multi_object_datasets. An image and its masks are
lists of one-byte strings, one per number; a mask is 255 where its entity is seen and 0
elsewhere. Entities are in one order everywhere, backgrounds first.
"""

import dataclasses
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from implicit_slots.data.readers.frames import Frame, FrameSource, Progress
from implicit_slots.data.readers.records import RecordFile, parse_example
from implicit_slots.data.source import CLEVR_CODES, DataError
from implicit_slots.runtime.files import expand

ADDRESS = "https://storage.googleapis.com/multi-object-datasets"
SEEN = 255
NOT_ATTRIBUTES = {"image", "mask", "visibility"}
SPLIT = re.compile(r"(\d+):(\d+)")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one published file holds.

    Attributes:
      file: its place in the published bucket.
      shape: height, width and channels of an image.
      entities: number of masks, backgrounds among them.
      splits: record numbers by split, as "start:stop".
      backgrounds: number of masks of background, which are the first.
      entities_last: whether masks are [height, width, entities] and not
        [entities, height, width].
      numbers: features float32 [entities, …], with the shape after the entities.
      codes: features uint8 [entities].
    """

    file: str
    shape: tuple[int, int, int]
    entities: int
    splits: Mapping[str, str]
    backgrounds: int = 1
    entities_last: bool = False
    numbers: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    codes: tuple[str, ...] = ()


def _sprites(variant: str, entities: int, channels: int) -> Layout:
    return Layout(
        file=f"multi_dsprites/multi_dsprites_{variant}.tfrecords",
        shape=(64, 64, channels),
        entities=entities,
        splits=FIRST_60000,
        entities_last=True,
        numbers={
            **dict.fromkeys(("x", "y", "shape", "orientation", "scale"), ()),
            "visibility": (),
            "color": (channels,),
        },
    )


def _rooms(part: str, entities: int, splits: Mapping[str, str]) -> Layout:
    return Layout(
        file=f"objects_room/objects_room_{part}.tfrecords",
        shape=(64, 64, 3),
        entities=entities,
        splits=splits,
        backgrounds=4,
    )


# Slot Attention trains on the first 60,000 of these, and tests on 320 others.
FIRST_60000 = {
    "train": "0:60000",
    "validation": "60000:61000",
    "test": "61000:61320",
}

LAYOUTS: Mapping[str, Layout] = {
    "clevr_with_masks": Layout(
        file="clevr_with_masks/clevr_with_masks_train.tfrecords",
        shape=(240, 320, 3),
        entities=11,
        # Slot Attention trains on the first 70,000.
        splits={
            "train": "0:70000",
            "validation": "70000:85000",
            "test": "85000:100000",
        },
        numbers={
            **dict.fromkeys(("x", "y", "z", "rotation", "visibility"), ()),
            "pixel_coords": (3,),
        },
        codes=tuple(CLEVR_CODES),
    ),
    "multi_dsprites_binarized": _sprites("binarized", 4, 1),
    "multi_dsprites_colored_on_grayscale": _sprites("colored_on_grayscale", 6, 3),
    "multi_dsprites_colored_on_colored": _sprites("colored_on_colored", 5, 3),
    # Genesis tests on the first 10,000, validates on the next and trains on the rest.
    # The first are left out here: the published test files are the test split.
    "objects_room": _rooms(
        "train", 7, {"validation": "10000:20000", "train": "20000:1000000"}
    ),
    "tetrominoes": Layout(
        file="tetrominoes/tetrominoes_train.tfrecords",
        shape=(35, 35, 3),
        entities=4,
        splits=FIRST_60000,
        numbers={
            **dict.fromkeys(("x", "y", "shape", "visibility"), ()),
            "color": (3,),
        },
    ),
}
# The test split of Objects Room, by `test_set`.
ROOM_TESTS: Mapping[str, Layout] = {
    name: _rooms(f"test_{name}", entities, {"test": "0:922"})
    for name, entities in (
        ("six_objects", 10),
        ("empty_room", 4),
        ("identical_color", 10),
    )
}


class MultiObject(FrameSource):
    """One of the multi-object data sets, in its published record file.

    `segmentation` is 0 where a background is seen, and k + 1 where entity k after the
    backgrounds is. `objects` has `present`, which is what the file calls visible, or,
    in Objects Room, what has a pixel; and, in the file's own units, for CLEVR
    `position`, `rotation`, `pixel_position`, `depth` and the undocumented codes
    `color`, `material`, `shape` and `size`; for dSprites and Tetrominoes `x`, `y`,
    `shape` and `color` [max_objects, channels], and `scale` and `orientation` of
    sprites. Objects that are not present have zeros.
    """

    def __init__(
        self,
        *,
        dataset: str,
        path: str,
        split: str,
        resolution: int,
        crop: str = "none",
        max_objects: int,
        splits: Mapping[str, str] | None = None,
        keys: Collection[str] | None = None,
        cache: str = "",
        test_set: str = "six_objects",
    ):
        """Opens the file; looks at nothing but its beginning.

        Args:
          dataset: one of `LAYOUTS`.
          path: the published file, or a folder with it or with the bucket's folders.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `images.crop_box`.
          max_objects: length of the arrays of attributes, and largest id in a mask.
          splits: record numbers by split, as "start:stop", in place of the defaults.
            The file is looked through up to the last number of all splits.
          keys: what `batch` returns; None for all there is.
          cache: folder that keeps where in the file the records are for later runs;
            empty for none, which takes a pass over the file in every run.
          test_set: which of Objects Room's test files is the test split.

        Raises:
          DataError: no such data set, split or file, or it holds no records.
        """
        super().__init__(
            resolution=resolution, crop=crop, max_objects=max_objects, keys=keys
        )
        layout = _layout(dataset, split, test_set)
        if unknown := (splits or {}).keys() - {"train", "validation", "test"}:
            raise DataError(
                f"unknown split '{min(unknown)}' in config.data.splits; choose from "
                "'train', 'validation', 'test'"
            )
        ranges = {
            name: _range(name, (splits or {}).get(name) or default)
            for name, default in layout.splits.items()
        }
        self._layout = layout
        self._dataset = dataset
        self._split = split
        self._start, self._stop = ranges[split]
        self.file = _find(layout, path)
        self._records = RecordFile(
            self.file,
            stop=max(stop for _, stop in ranges.values()),
            index=expand(cache) / "records" / f"{self.file.name}.npz"
            if cache
            else None,
            inspect=self._count,
        )
        self._size = self.file.stat().st_size

    def __len__(self) -> int:
        return self._stop - self._start

    def where(self, index: int) -> str:
        """The record's number in the file, and the file."""
        return f"record {self._start + index} of {self.file}"

    def fingerprint(self) -> dict[str, Any]:
        """The file's name and size, and which records are read."""
        return {
            "file": self.file.name,
            "size": self._size,
            "records": [self._start, self._stop],
        }

    def check(self, progress: Progress) -> None:
        """Finds the records; their data are looked at when they are read.

        Raises:
          DataError: the file is damaged, or has fewer records than the split.
        """
        self._records.build(progress)
        if len(self._records) < self._stop:
            raise DataError(
                f"{self.file} has {len(self._records)} records, fewer than split "
                f"'{self._split}' asks for ({self._start}:{self._stop}); download it "
                f"again if it is not whole, or set --config.data.splits.{self._split}"
            )

    def count_objects(self, progress: Progress) -> Int[np.ndarray, " examples"]:
        """Number of objects of every frame, which the pass over the file has found."""
        self.check(progress)
        return self._records.values[self._start : self._stop]

    def read(self, index: int) -> Frame:
        """Reads one record."""
        if len(self._records) < self._stop:
            self.check(lambda iterable, **_: iterable)
        names = {"image"}
        if self.wants("objects"):
            names |= {*self._layout.numbers, *self._layout.codes}
        if self.wants("segmentation") or (
            self.wants("objects") and "visibility" not in self._layout.numbers
        ):
            names.add("mask")
        where = self.where(index)
        record = self._records[self._start + index]
        try:
            features = self._parse(record, names, where)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(
                f"{where} cannot be understood ({error}); download the file again"
            ) from error
        pixels = features["image"]
        return Frame(
            # Pillow wants no axis for the one channel of binarised sprites.
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels),
            self._segmentation(features) if "mask" in features else None,
            self._objects(features, where) if self.wants("objects") else None,
        )

    def _parse(
        self, record: bytes, names: Collection[str], where: str
    ) -> dict[str, np.ndarray]:
        """Features as arrays; `mask` is [entities, height, width] in all data sets.

        Raises:
          ValueError: the record is no example.
          DataError: it is one of another data set.
        """
        layout = self._layout
        frame, entities = layout.shape[:2], layout.entities
        shapes = {
            "image": layout.shape,
            "mask": (*frame, entities) if layout.entities_last else (entities, *frame),
            **{name: (entities, *rest) for name, rest in layout.numbers.items()},
            **dict.fromkeys(layout.codes, (entities,)),
        }
        features = parse_example(
            record, only=names, uint8={"image", "mask", *layout.codes}
        )
        arrays = {}
        for name in names:
            size, wanted = len(features.get(name, ())), math.prod(shapes[name])
            if size != wanted:
                raise DataError(
                    f"{where} has {size} numbers of '{name}' where '{self._dataset}' "
                    f"has {wanted}; take the configuration of the set that it is, or "
                    "set --config.data.path to another file"
                )
            arrays[name] = np.ascontiguousarray(features[name]).reshape(shapes[name])
        if "mask" in arrays and layout.entities_last:
            arrays["mask"] = arrays["mask"].transpose(2, 0, 1)
        return arrays

    def _count(self, record: bytes) -> int:
        """Number of objects in a record, for the pass over the file."""
        name = "visibility" if "visibility" in self._layout.numbers else "mask"
        features = self._parse(record, {name}, f"a record of {self.file}")
        return int(self._present(features).sum())

    def _present(self, features: Mapping[str, np.ndarray]) -> Bool[np.ndarray, " k"]:
        """Which entities after the backgrounds are there."""
        if "visibility" in features:
            return features["visibility"][self._layout.backgrounds :] > 0
        return np.any(features["mask"][self._layout.backgrounds :], axis=(1, 2))

    def _segmentation(
        self, features: Mapping[str, np.ndarray]
    ) -> UInt8[np.ndarray, "height width"]:
        ids = np.zeros(self._layout.shape[:2], np.uint8)
        for place, mask in enumerate(features["mask"][self._layout.backgrounds :]):
            ids[mask == SEEN] = place + 1
        return ids

    def _objects(
        self, features: Mapping[str, np.ndarray], where: str
    ) -> dict[str, np.ndarray]:
        """Attributes by their standard names, in arrays of `max_objects`."""
        present = self._present(features)
        if (most := int(np.max(np.flatnonzero(present) + 1, initial=0))) > (
            self.max_objects
        ):
            raise DataError(
                f"{where} has object {most}, more than max_objects = "
                f"{self.max_objects}; set --config.data.max_objects={most} or more"
            )
        # Sorted, because the cache keeps the order.
        names = sorted(features.keys() - NOT_ATTRIBUTES)
        own = {name: features[name] for name in names}
        if self._layout.codes:
            own |= {name: features[name].astype(np.int32) for name in CLEVR_CODES}
            own["position"] = np.stack([own.pop(axis) for axis in "xyz"], -1)
            # As elsewhere: CLEVR's generator took the number of degrees for radians.
            own["rotation"] = np.mod(own["rotation"], np.float32(2 * np.pi))
            coordinates = own.pop("pixel_coords")
            own["pixel_position"], own["depth"] = coordinates[:, :2], coordinates[:, 2]
        objects = {"present": np.zeros(self.max_objects, bool)}
        kept = min(len(present), self.max_objects)
        objects["present"][:kept] = present[:kept]
        for name, entities in own.items():
            values = entities[self._layout.backgrounds :][:kept]
            objects[name] = np.zeros(
                (self.max_objects, *values.shape[1:]), values.dtype
            )
            objects[name][:kept][present[:kept]] = values[present[:kept]]
        return objects


def _layout(dataset: str, split: str, test_set: str) -> Layout:
    """The file that a split is in."""
    if dataset not in LAYOUTS:
        raise DataError(
            f"there is no multi-object data set '{dataset}'; set "
            f"--config.data.dataset to one of {', '.join(LAYOUTS)}"
        )
    layout = LAYOUTS[dataset]
    if dataset == "objects_room":
        if test_set not in ROOM_TESTS:
            raise DataError(
                f"Objects Room has no test set '{test_set}'; set "
                f"--config.data.test_set to one of {', '.join(ROOM_TESTS)}"
            )
        if split == "test":
            layout = ROOM_TESTS[test_set]
    if split not in layout.splits:
        raise DataError(
            f"unknown split '{split}'; choose from 'train', 'validation', 'test'"
        )
    return layout


def split_sizes(dataset: str) -> dict[str, int]:
    """Number of examples of each split, where `splits` leaves it as it is."""
    ranges = {
        split: _range(split, _layout(dataset, split, "six_objects").splits[split])
        for split in ("train", "validation", "test")
    }
    return {split: stop - start for split, (start, stop) in ranges.items()}


def _range(split: str, numbers: str) -> tuple[int, int]:
    """First record of a split, and the one behind its last."""
    matched = SPLIT.fullmatch(numbers)
    if matched is None or not int(matched[1]) < int(matched[2]):
        raise DataError(
            f"the records of split '{split}' cannot be '{numbers}'; set "
            f"--config.data.splits.{split}=START:STOP, the first and the one behind "
            "the last"
        )
    return int(matched[1]), int(matched[2])


def _find(layout: Layout, path: str) -> Path:
    """The published file in a folder, or the file that is named."""
    if not path:
        raise DataError(
            f"no folder with {Path(layout.file).name} is named; set it with "
            "--config.data.path=FOLDER"
        )
    root = expand(path)
    name = Path(layout.file).name
    # What is no file is left to the sentence below, also where it may not be listed.
    for file in (root, root / name, root / layout.file):
        if os.path.isfile(file):
            return file
    raise DataError(
        f"there is no {name} in {root}; download it from {ADDRESS}/{layout.file} and "
        "put it there, or set --config.data.path to where it is"
    )
