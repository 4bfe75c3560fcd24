"""The published files of the multi-object data sets, and which records are a split."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from implicit_slots.data.source import CLEVR_CODES, SPLITS, DataError
from implicit_slots.runtime.files import expand

ADDRESS = "https://storage.googleapis.com/multi-object-datasets"
RANGE = re.compile(r"(\d+):(\d+)")


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


def layout_of(dataset: str, split: str, test_set: str) -> Layout:
    """The file that a split is in.

    Raises:
      DataError: there is no such test set.
    """
    layout = LAYOUTS[dataset]
    if dataset == "objects_room":
        if test_set not in ROOM_TESTS:
            raise DataError(
                f"Objects Room has no test set '{test_set}'; set "
                f"--config.data.test_set to one of {', '.join(ROOM_TESTS)}"
            )
        if split == "test":
            layout = ROOM_TESTS[test_set]
    return layout


def split_sizes(dataset: str) -> dict[str, int]:
    """Number of examples of each split, where `splits` leaves it as it is."""
    ranges = {
        split: record_range(layout_of(dataset, split, "six_objects"), split, {})
        for split in SPLITS
    }
    return {split: stop - start for split, (start, stop) in ranges.items()}


def record_range(
    layout: Layout, split: str, splits: Mapping[str, str]
) -> tuple[int, int]:
    """First record of a split, and the one behind its last.

    Args:
      layout: of the split's file.
      split: "train", "validation" or "test".
      splits: record numbers by split, as "start:stop", in place of the layout's.

    Raises:
      DataError: `splits` names another split, or no range.
    """
    if unknown := splits.keys() - set(SPLITS):
        raise DataError(
            f"unknown split '{min(unknown)}' in config.data.splits; choose from "
            f"{', '.join(SPLITS)}"
        )
    numbers = splits.get(split) or layout.splits[split]
    matched = RANGE.fullmatch(numbers)
    if matched is None or not int(matched[1]) < int(matched[2]):
        raise DataError(
            f"the records of split '{split}' cannot be '{numbers}'; set "
            f"--config.data.splits.{split}=START:STOP, the first and the one behind "
            "the last"
        )
    return int(matched[1]), int(matched[2])


def find(layout: Layout, path: str) -> Path:
    """The published file in a folder, or the file that is named.

    Raises:
      DataError: it is not there.
    """
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
