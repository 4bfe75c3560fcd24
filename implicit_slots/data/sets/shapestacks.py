"""ShapeStacks: stacked blocks, cylinders and balls, seen by sixteen cameras."""

import os
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from implicit_slots.data.readers.file_source import FileSource
from implicit_slots.data.readers.files import data_folder, name_some
from implicit_slots.data.readers.frame_source import Frame, Progress
from implicit_slots.data.readers.listing import list_folder
from implicit_slots.data.readers.pictures import COLOUR_MODES, read_image, read_mask
from implicit_slots.data.source import DataError, mark_present

LISTS = {"train": "train", "validation": "eval", "test": "test"}
# env_ccs-hard-h=6-vcom=0-vpsf=4-v=22 is a stack of six objects.
SCENARIO = re.compile(r"env_(?:.+-)?h=(\d+)(?:-.*)?")
# rgb-w=5-f=2-l=1-c=unique-cam_7-mono-0.png, and the same with iseg- and .map.
PICTURE = re.compile(r"rgb-.*cam_(\d+)-mono-0\.png")
INSTANCES = re.compile(r"iseg-.*cam_(\d+)-mono-0\.map")
# A map's red channel is 32 times the label.
LABEL_STEP = 32


class ShapeStacks(FileSource):
    """ShapeStacks (Groth et al. 2018) in its published folders.

    Layout: `recordings/env_<scenario>/rgb-…-cam_K-mono-0.png` (224 x 224),
    `splits/<split_set>/{train,eval,test}.txt` (one folder of a scenario per line) and,
    for segmentation, `iseg-…-cam_K-mono-0.map` in `iseg/env_<scenario>/` or beside the
    images: PNGs whose red channel is 32 times the label, 0 for background, one map per
    camera. Read as Genesis reads it (Engelcke et al. 2020). Validation is `eval`.

    The examples come in the order of the list, each scenario's by file name. Labels
    count a stack's objects from the bottom. Their number is `h` in a scenario's name,
    and `objects` holds `present` alone. Without any map there is no segmentation.
    """

    mask_modes = COLOUR_MODES

    def __init__(
        self,
        *,
        path: str,
        split: str,
        resolution: int,
        crop: str = "center-196",
        max_objects: int = 6,
        split_set: str = "default",
        variant: str = "all",
        keys: Collection[str] | None = None,
    ):
        """Lists the scenarios' folders; opens no picture.

        Args:
          path: the folder that holds `recordings` and `splits`.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `crop_box`.
          max_objects: length of the arrays of attributes, and largest label.
          split_set: folder in `splits`: "default", "blocks_all" or "ccs_all".
          variant: which scenarios of these: "all", or those whose name starts like
            this: "ccs", "blocks", "ccs-easy", "ccs-hard", "blocks-easy", …
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: what is missing, in one sentence.
        """
        super().__init__(
            resolution=resolution, crop=crop, max_objects=max_objects, keys=keys
        )
        self.root = data_folder(path, "ShapeStacks")
        self.images, self.masks = [], []
        self._heights: list[int] = []
        lacking = []
        for scenario in _read_list(self.root, split_set, split, variant):
            images, maps = self._list(scenario)
            self.images += [image for image, _ in images]
            self._heights += [self._height(scenario)] * len(images)
            self.masks += [maps[camera] for _, camera in images if camera in maps]
            lacking += [image for image, camera in images if camera not in maps]
        if self.masks and lacking:
            raise DataError(
                f"{name_some(lacking, len(self.images))} in {self.root} have no "
                "instance map (iseg-…-cam_K-mono-0.map); unpack all maps into "
                f"{self.root / 'iseg'}, or move them away to do without"
            )

    def read(self, index: int) -> Frame:
        """Reads one image and its camera's instance map."""
        image = read_image(self.root / self.images[index])
        height = self._heights[index]
        labels = None
        if self.masks and self.wants("segmentation"):
            labels = _read_labels(self.root / self.masks[index], height)
        present = mark_present(height, self.max_objects, self.where(index))
        return Frame(image, labels, {"present": present})

    def count_objects(self, progress: Progress) -> Int[np.ndarray, " examples"]:
        """Heights of the stacks, which the scenarios' names tell."""
        del progress  # There is nothing to wait for.
        return np.array(self._heights, np.int64)

    def _list(self, scenario: str) -> tuple[list[tuple[str, str]], dict[str, str]]:
        """A scenario's images with their cameras, and the cameras' maps, by name."""
        beside = list_folder(self.root / "recordings" / scenario)
        images = [
            (f"recordings/{scenario}/{match[0]}", match[1])
            for match in map(PICTURE.fullmatch, beside)
            if match
        ]
        if not images:
            raise DataError(
                f"folder {self.root / 'recordings' / scenario} has no image "
                "rgb-…-cam_K-mono-0.png; unpack ShapeStacks' recordings again"
            )
        if not self.wants("segmentation"):
            return images, {}
        folder, names = "recordings", beside
        if os.path.isdir(self.root / "iseg" / scenario):
            folder, names = "iseg", list_folder(self.root / "iseg" / scenario)
        maps = {
            match[1]: f"{folder}/{scenario}/{match[0]}"
            for match in map(INSTANCES.fullmatch, names)
            if match
        }
        return images, maps

    def _height(self, scenario: str) -> int:
        """Number of objects that a scenario's name tells."""
        match = SCENARIO.fullmatch(scenario)
        if match is None:
            raise DataError(
                f"the name of scenario {scenario} in {self.root} does not tell its "
                "number of objects (h=…); use ShapeStacks' own splits"
            )
        height = int(match[1])
        where = f"scenario {scenario} in {self.root}"
        mark_present(height, self.max_objects, where)
        return height


def _read_list(root: Path, split_set: str, split: str, variant: str) -> list[str]:
    """The scenarios of a split and variant, in the list's order."""
    file = root / "splits" / split_set / f"{LISTS[split]}.txt"
    try:
        scenarios = file.read_text().split()
    except (OSError, ValueError) as error:
        if not os.path.isdir(root / "splits"):
            raise DataError(
                f"there is no folder {root / 'splits'}; unpack ShapeStacks' splits "
                "there, or set --config.data.path to the folder that holds recordings "
                "and splits"
            ) from error
        there = list_folder(root / "splits")
        raise DataError(
            f"there is no readable list of scenarios {file}; unpack ShapeStacks' "
            f"splits into {root / 'splits'} or choose --config.data.split_set from "
            f"{', '.join(there) or 'those there'}"
        ) from error
    start = "env_" if variant == "all" else f"env_{variant}-"
    chosen = [scenario for scenario in scenarios if scenario.startswith(start)]
    if not chosen:
        raise DataError(
            f"list {file} has no scenario of variant '{variant}', out of "
            f"{len(scenarios)}; set --config.data.variant to 'all', 'ccs', 'blocks', "
            "'ccs-easy', 'ccs-hard', 'blocks-easy' or 'blocks-hard'"
        )
    return chosen


def _read_labels(file: Path, height: int) -> Integer[np.ndarray, "height width"]:
    """Labels of an instance map, which may not exceed the stack's height."""
    labels = read_mask(file, colour=True)[..., 0] // LABEL_STEP
    if labels.max() > height:
        raise DataError(
            f"instance map {file} has object {labels.max()}, but its scenario's name "
            f"tells h={height}; download it again, or move all maps away to do without"
        )
    return labels
