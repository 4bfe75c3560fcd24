"""Multi-object record files: CLEVR with masks, dSprites, Objects Room, Tetrominoes.

Format: the readers of google-deepmind/multi_object_datasets. An image and its masks are
lists of one-byte strings, one per number; a mask is 255 where its entity is seen and 0
elsewhere. Entities are in one order everywhere, backgrounds first.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from implicit_slots.data.readers.frame_source import Frame, FrameSource, Progress
from implicit_slots.data.readers.tfrecords import (
    GzipRecords,
    RecordFile,
    is_gzip,
    parse_example,
)
from implicit_slots.data.sets.multi_object_files import find, layout_of, record_range
from implicit_slots.data.source import CLEVR_CODES, DataError, Example

SEEN = 255
NOT_ATTRIBUTES = {"image", "mask", "visibility"}


class MultiObject(FrameSource):
    """One of the multi-object data sets, in its published record file.

    `segmentation` is 0 where a background is seen, and k + 1 where entity k after the
    backgrounds is. `objects` has `present`, which is what the file calls visible, or,
    in Objects Room, what has a pixel; and, in the file's own units, for CLEVR
    `position`, `rotation`, `pixel_position`, `depth` and the undocumented codes
    `color`, `material`, `shape` and `size`; for dSprites and Tetrominoes `x`, `y`,
    `shape` and `color` [max_objects, channels], and `scale` and `orientation` of
    sprites. Objects that are not present have zeros.

    Attributes:
      file: the record file.
      is_packed: whether it is compressed, as it is published. It can then only be read
        from its start, by `stream`; anything else needs a prepared cache.
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
        test_set: str = "six_objects",
    ):
        """Opens the file; looks at nothing but its beginning.

        Args:
          dataset: a key of `multi_object_files.LAYOUTS`.
          path: the published file, or a folder with it or with the bucket's folders.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `crop_box`.
          max_objects: length of the arrays of attributes, and largest id in a mask.
          splits: record numbers by split, as "start:stop", in place of the defaults.
          keys: what `batch` returns; None for all there is.
          test_set: which of Objects Room's test files is the test split.

        Raises:
          DataError: no such file or range of records, or it holds no records.
        """
        super().__init__(
            resolution=resolution, crop=crop, max_objects=max_objects, keys=keys
        )
        self._layout = layout_of(dataset, split, test_set)
        self._dataset = dataset
        self._split = split
        self._start, self._stop = record_range(self._layout, split, splits or {})
        self.file = find(self._layout, path)
        self.is_packed = is_gzip(self.file)

    def __len__(self) -> int:
        return self._stop - self._start

    def where(self, index: int) -> str:
        """The record's number in the file, and the file."""
        return f"record {self._start + index} of {self.file}"

    def fingerprint(self) -> dict[str, Any]:
        """The file's name and size, and which records are read."""
        return {
            "file": self.file.name,
            "size": self.file.stat().st_size,
            "records": [self._start, self._stop],
        }

    def check(self, progress: Progress) -> None:
        """Finds the records; their data are looked at when they are read.

        Raises:
          DataError: the file is compressed, damaged, or has fewer records than the
            split.
        """
        if len(self._records) < self._stop:
            raise self._lacking(len(self._records))

    def count_objects(self, progress: Progress) -> Int[np.ndarray, " examples"]:
        """Number of objects of every frame, of which no pixel is decoded."""
        self.check(progress)
        numbers = progress(range(self._start, self._stop), desc="counting objects")
        return np.array([self._count(self._records[n]) for n in numbers], np.int64)

    def read(self, index: int) -> Frame:
        """Reads one record."""
        return self._frame(index, self._records[self._start + index])

    def stream(
        self, *, most: int = 0, skip: int = 0
    ) -> Iterator[Callable[[], Example]]:
        """Reads a compressed file in order; for one thread.

        Args:
          most: leaves out examples with more objects than this; 0 leaves out none.
          skip: passes over so many of the examples that are not left out.

        Yields:
          What decodes an example, in any thread.

        Raises:
          DataError: the file is damaged, or has fewer records than the split.
        """
        index = -1
        records = _opened(self.file, self.file.stat().st_mtime_ns)
        for index, record in enumerate(records.read(self._start, self._stop)):
            if most and self._count(record) > most:
                continue
            if skip:
                skip -= 1
                continue
            yield functools.partial(self._decode, index, record)
        if self._start + index + 1 < self._stop:
            raise self._lacking(records.place)

    def _decode(self, index: int, record: bytes) -> Example:
        return self.fit(index, self._frame(index, record))

    @functools.cached_property
    def _records(self) -> RecordFile:
        """The records at random.

        Raises:
          DataError: the file is compressed.
        """
        if self.is_packed:
            raise DataError(
                f"{self.file} is compressed and can only be read from its start; "
                "prepare it once by `python -m implicit_slots.data prepare` with the "
                "same --config, which has to name a cache, or unpack it"
            )
        return RecordFile(self.file)

    def _lacking(self, found: int) -> DataError:
        return DataError(
            f"{self.file} has {found} records, fewer than split '{self._split}' asks "
            f"for ({self._start}:{self._stop}); download it again if it is not whole, "
            f"or set --config.data.splits.{self._split}"
        )

    def _frame(self, index: int, record: bytes) -> Frame:
        """What a record holds of the keys that are wanted."""
        names = {"image"}
        if self.wants("objects"):
            names |= {*self._layout.numbers, *self._layout.codes}
        if self.wants("segmentation") or (
            self.wants("objects") and "visibility" not in self._layout.numbers
        ):
            names.add("mask")
        where = self.where(index)
        features = self._parse(record, names, where)
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
          DataError: the record is no example, or one of another data set.
        """
        layout = self._layout
        frame, entities = layout.shape[:2], layout.entities
        shapes = {
            "image": layout.shape,
            "mask": (*frame, entities) if layout.entities_last else (entities, *frame),
            **{name: (entities, *rest) for name, rest in layout.numbers.items()},
            **dict.fromkeys(layout.codes, (entities,)),
        }
        try:
            features = parse_example(
                record, only=names, uint8={"image", "mask", *layout.codes}
            )
        except ValueError as error:
            raise DataError(
                f"{where} cannot be understood ({error}); download the file again"
            ) from error
        arrays = {}
        for name in sorted(names):
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
        """Number of objects in a record."""
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


# One after the other, the splits of a file are read in a single pass.
@functools.lru_cache(maxsize=2)
def _opened(file: Path, modified: int) -> GzipRecords:
    del modified  # A file that was changed is another.
    return GzipRecords(file)
