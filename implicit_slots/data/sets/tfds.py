"""Data sets that tensorflow-datasets prepared, read without TensorFlow."""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from implicit_slots.data.readers.frame_source import Frame, FrameSource, Progress
from implicit_slots.data.readers.pictures import turn_along
from implicit_slots.data.readers.tfds import (
    Records,
    check_known,
    data_dir,
    describe,
    find,
    first_line,
    instructions,
)
from implicit_slots.data.readers.tfrecords import parse_example
from implicit_slots.data.sets.tfds_formats import (
    SHAPES3D_ROWS,
    SHAPES3D_SPLITS,
    Record,
    Shapes3d,
    decode_image,
    layout,
)
from implicit_slots.data.source import DataError

# Parsed records that are kept, so that a video is parsed once for all its frames.
PARSED_RECORDS = 16


class Tfds(FrameSource):
    """Images, masks and objects of a data set in array_record or tfrecord files.

    What is read besides images depends on the set: `tfds_formats` has a class for each
    of CLEVR, 3D Shapes, COCO's panoptic configuration and MOVi.

    | set | train, validation, test | examples |
    |---|---|---|
    | clevr | the same names; no objects in test | 70,000, 15,000, 15,000 |
    | shapes3d | official SLATE's rows of the file | 400,000, 29,999, 29,999 |
    | coco/2017_panoptic | train, validation, validation | 118,287, 5,000, 5,000 |
    | movi_a, movi_b | train, validation, validation | frames of about 9,700 and 250 |
    | movi_c … movi_e | train, validation, test | the same, and about 1,000 videos |
    """

    def __init__(
        self,
        *,
        dataset: str,
        split: str,
        resolution: int,
        path: str = "",
        crop: str = "center",
        max_objects: int = 10,
        splits: Mapping[str, str] | None = None,
        frame_step: int = 1,
        masks: str = "instances",
        keys: Collection[str] | None = None,
    ):
        """Reads what is said of the data set and lists its files; parses no image.

        Args:
          dataset: the data set's name, with `/config` and `:version` where wanted.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          path: where data sets were prepared (tensorflow-datasets' `data_dir`), or the
            folder of one version; empty for tensorflow-datasets' own default.
          crop: what part of a frame is kept, see `crop_box`.
          max_objects: length of the arrays of attributes, and largest id in a mask.
          splits: for any of "train", "validation" and "test" an expression of
            tensorflow-datasets, such as "train[:90%]"; others, and empty ones, keep
            the default above.
          frame_step: of videos, every so many frames one is read, from the first on.
          masks: for COCO, "instances" for things or "panoptic" for stuff as well.
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: no such data set or split, or it was not prepared, or files are
            missing.
        """
        super().__init__(
            resolution=resolution, crop=crop, max_objects=max_objects, keys=keys
        )
        description = describe(dataset, path)
        self._name = str(description)
        self._layout = layout(description.name, description.config, max_objects, masks)
        own = (splits or {}).get(split)
        names = self._layout.splits[split]
        default = next((n for n in names if n in description.splits), names[0])
        is_slate = description.name == "shapes3d" and not own
        self._expression = own or ("train" if is_slate else default)
        self._records = Records(
            instructions(description, self._expression, split),
            description.file_format,
        )
        fields = dict(self._layout.fields)
        if "test" in self._expression and description.name == "clevr":
            del fields["objects"]  # Nothing is published of them.
        self._fields = fields
        self._read = [key for key in fields if key == "image" or self.wants(key)]
        self._parsed = functools.lru_cache(PARSED_RECORDS)(
            lambda position: self._parse(position, self._read)
        )
        if frame_step < 1:
            raise DataError(
                f"frame_step must be at least 1, got {frame_step}; set "
                "--config.data.frame_step"
            )
        self._frames = range(0, self._layout.frames, frame_step)
        self._order = self._official_order(split) if is_slate else None

    def __len__(self) -> int:
        count = len(self._records) if self._order is None else len(self._order)
        return count * len(self._frames)

    def read(self, index: int) -> Frame:
        """Reads one frame out of its record; of the others nothing is decoded."""
        position, frame = self._locate(index)
        record, where = self._parsed(position), self.where(index)
        segmentation = objects = None
        with self._sentence(position):
            image = self._layout.image(record, frame)
            if "segmentation" in self._read:
                segmentation = self._layout.segmentation(record, frame, where)
            if "objects" in self._read:
                objects = self._layout.objects(record, frame, where)
        picture, turn = decode_image(image, f"the image of {where}")
        if segmentation is not None:
            segmentation = turn_along(segmentation, picture.size, turn)
        return Frame(picture, segmentation, objects)

    def where(self, index: int) -> str:
        """The record's place in its file, and the frame of a video."""
        position, frame = self._locate(index)
        name = self._records.where(position)
        return f"frame {frame} of {name}" if self._layout.frames > 1 else name

    def check(self, progress: Progress) -> None:
        """Opens every file, which shows those that are truncated or of another kind."""
        for file in progress(range(self._records.num_files), desc="checking files"):
            self._records.file(file)

    def fingerprint(self) -> dict[str, Any]:
        """Name and version, the split, the number of examples, and a digest of files.

        The digest is of the files' names and sizes.
        """
        return {
            "dataset": self._name,
            "split": self._expression,
            "examples": len(self),
            "files": self._records.digest(),
        }

    def count_objects(self, progress: Progress) -> Int[np.ndarray, " examples"]:
        """Number of objects of every frame, without decoding an image."""
        if "objects" not in self._fields:
            return super().count_objects(progress)
        counts = np.zeros(len(self), np.int64)
        frames = len(self._frames)
        for first in progress(range(0, len(self), frames), desc="counting objects"):
            position, frame = self._locate(first)
            record = self._parse(position, ["objects"])
            with self._sentence(position):
                objects = self._layout.objects(record, frame, self.where(first))
            assert objects is not None
            counts[first : first + frames] = np.sum(objects["present"])
        return counts

    @staticmethod
    def is_prepared(dataset: str, path: str = "") -> bool:
        """Whether the data set's files are there; the arguments are the reader's.

        Raises:
          DataError: a configuration has to be named, or a folder may not be read.
        """
        return find(dataset, data_dir(path)) is not None

    @staticmethod
    def download(
        dataset: str, path: str = "", say: Callable[[str], Any] = print
    ) -> None:
        """Downloads and prepares a data set as array_record files; needs TensorFlow.

        tensorflow-datasets shows its own progress. What is prepared already, it leaves.

        Args:
          dataset: the data set's name, with `/config` and `:version` where wanted.
          path: where to prepare it; empty for tensorflow-datasets' own default.
          say: is told when it begins.

        Raises:
          DataError: TensorFlow is missing, there is no such data set, or the download
            failed.
        """
        import tensorflow_datasets as tfds

        root = data_dir(path)
        check_known(dataset, root)
        # tensorflow-datasets 4.9.10 imports the second without asking for it.
        needed = ("tensorflow", "importlib_resources")
        lacking = [name for name in needed if importlib.util.find_spec(name) is None]
        if lacking:
            raise DataError(
                f"preparing data set '{dataset}' needs {' and '.join(lacking)}, which "
                "reading it does not; install them with: pip install "
                "tensorflow-cpu importlib_resources"
            )
        say(f"downloading and preparing data set '{dataset}' in {root}")
        try:
            builder: Any = tfds.builder(dataset, data_dir=str(root))
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # Whatever the builder and the network raise.
            raise DataError(
                f"data set '{dataset}' could not be prepared in {root}: "
                f"{first_line(error)}"
            ) from error

    def _locate(self, index: int) -> tuple[int, int]:
        """The record of an example, and the frame within its video."""
        position, frame = divmod(index, len(self._frames))
        if self._order is not None:
            position = int(self._order[position])
        return position, self._frames[frame]

    def _parse(self, position: int, keys: Collection[str]) -> Record:
        """What is needed for these keys, out of a record that may have much more."""
        names = {name for key in keys for name in self._fields[key]}
        with self._sentence(position):
            record = parse_example(self._records[position], names)
        if missing := sorted(names - record.keys()):
            raise DataError(
                f"{self._records.where(position)} has no feature {', '.join(missing)}; "
                f"set --config.data.dataset to another data set than {self._name}, or "
                "prepare it again"
            )
        return record

    @contextlib.contextmanager
    def _sentence(self, position: int) -> Iterator[None]:
        """Turns what a foreign record makes parsers raise into a `DataError`."""
        try:
            yield
        except DataError:
            raise
        except (ValueError, IndexError) as error:
            raise DataError(
                f"{self._records.where(position)} is not an example of {self._name} "
                f"({first_line(error)}); prepare or download the data set again"
            ) from error

    def _official_order(self, split: str) -> Int[np.ndarray, " examples"]:
        """The records of a split of official SLATE's, in the order of their rows."""
        if len(self._records) != SHAPES3D_ROWS:
            raise DataError(
                f"{self._name} has {len(self._records)} records where the published "
                f"file has {SHAPES3D_ROWS}; prepare it again, or set "
                f"--config.data.splits.{split} to an expression such as train[:90%]"
            )
        rows = SHAPES3D_SPLITS[split]
        order = Shapes3d.positions()[rows]
        for row in (0, len(order) // 2, len(order) - 1):
            record = self._parse(int(order[row]), ["objects"])
            if Shapes3d.row(record) != rows.start + row:
                raise DataError(
                    f"{self._name} is not in the order in which tensorflow-datasets "
                    "writes it, so that official SLATE's splits cannot be found; "
                    "prepare it again, or set "
                    f"--config.data.splits.{split} to an expression such as train[:90%]"
                )
        return order
