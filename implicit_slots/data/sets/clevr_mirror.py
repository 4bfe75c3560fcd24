"""CLEVR-Mirror: CLEVR's scenes with a mirror, as published with SLATE."""

import os
from collections.abc import Collection
from typing import Any

import numpy as np
from jaxtyping import Int

from implicit_slots.data.readers.files import (
    data_folder,
    digest,
    list_folder,
    name_some,
    read_image,
    read_objects,
    refuse_unreadable,
)
from implicit_slots.data.readers.frame_source import Frame, FrameSource, Progress
from implicit_slots.data.source import DataError, pack_objects

# Where each split begins and ends, in hundredths of the sorted images.
SHARES = {"train": (0, 70), "validation": (70, 85), "test": (85, 100)}


class ClevrMirror(FrameSource):
    """CLEVR-Mirror (Singh et al. 2022) in its folders.

    Its authors do not document the layout. This reads what third parties read:
    `images/*.png` and, optionally, `scenes/*.json`, one file of CLEVR's attributes
    for each image and of the same stem. Sorted by name, the first 70 % of the images
    are for training, the next 15 % for validation and the last 15 % for testing. There
    are no masks.
    """

    def __init__(
        self,
        *,
        path: str,
        split: str,
        resolution: int,
        crop: str = "none",
        max_objects: int = 10,
        keys: Collection[str] | None = None,
    ):
        """Lists the folders; opens no file.

        Args:
          path: the folder that holds `images`.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `images.crop_box`.
          max_objects: length of the arrays of attributes.
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: what is missing, in one sentence.
        """
        super().__init__(
            resolution=resolution, crop=crop, max_objects=max_objects, keys=keys
        )
        self._root = data_folder(path, "CLEVR-Mirror")
        if split not in SHARES:
            raise DataError(f"unknown split '{split}'; choose from {', '.join(SHARES)}")
        stems = [
            name.removesuffix(".png")
            for name in list_folder(self._root / "images")
            if name.endswith(".png") and not name.startswith(".")
        ]
        first, last = (share * len(stems) // 100 for share in SHARES[split])
        self._stems = stems[first:last]
        if not self._stems:
            raise DataError(
                f"split '{split}' of {self._root / 'images'} is empty, out of "
                f"{len(stems)} PNG images; unpack CLEVR-Mirror there"
            )
        self._has_scenes = os.path.isdir(self._root / "scenes")
        if self._has_scenes:
            there = set(list_folder(self._root / "scenes"))
            lacking = [stem for stem in stems if f"{stem}.json" not in there]
            if lacking:
                raise DataError(
                    f"{name_some(lacking, len(stems))} have no JSON file in "
                    f"{self._root / 'scenes'}; unpack all, or move that folder away to "
                    "do without attributes"
                )

    def __len__(self) -> int:
        return len(self._stems)

    def where(self, index: int) -> str:
        """The image's file."""
        return str(self._root / "images" / f"{self._stems[index]}.png")

    def read(self, index: int) -> Frame:
        """Reads one image and its scene."""
        image = read_image(self._root / "images" / f"{self._stems[index]}.png")
        if not self._has_scenes or not self.wants("objects"):
            return Frame(image)
        objects = self._read_objects(index)
        file = f"scene {self._scene(index)}"
        return Frame(image, objects=pack_objects(objects, self.max_objects, file))

    def check(self, progress: Progress) -> None:
        """Looks into every picture, without decoding it.

        Raises:
          DataError: some cannot be read, or do not fit the crop.
        """
        refuse_unreadable(self._root, self._images, [], self.crop, progress)

    def fingerprint(self) -> dict[str, Any]:
        """A digest of the names and sizes of images and scenes."""
        scenes = [f"scenes/{s}.json" for s in self._stems if self._has_scenes]
        return digest(self._root, [*self._images, *scenes])

    def count_objects(self, progress: Progress) -> Int[np.ndarray, " examples"]:
        """Number of objects of each scene, out of its JSON file."""
        if not self._has_scenes:
            return super().count_objects(progress)
        indices = progress(range(len(self)), desc="counting objects")
        return np.array([len(self._read_objects(i)) for i in indices], np.int64)

    @property
    def _images(self) -> list[str]:
        """The images relative to the data set's folder."""
        return [f"images/{stem}.png" for stem in self._stems]

    def _scene(self, index: int) -> str:
        return str(self._root / "scenes" / f"{self._stems[index]}.json")

    def _read_objects(self, index: int) -> list[dict[str, Any]]:
        """The objects as the scene's file lists them."""
        return read_objects(
            self._root / "scenes" / f"{self._stems[index]}.json",
            "unpack it again, or move the folder of scenes away to do without "
            "attributes",
        )
