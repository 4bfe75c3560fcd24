"""CLEVRTex: CLEVR-like scenes of textured objects and backgrounds."""

import os
import re
from collections.abc import Collection
from typing import Any

import numpy as np
from jaxtyping import Int

from implicit_slots.data.readers.files import (
    count_ids,
    data_folder,
    digest,
    name_some,
    read_image,
    read_mask,
    read_objects,
    refuse_unreadable,
    walk_folder,
)
from implicit_slots.data.readers.frame_source import Frame, FrameSource, Progress
from implicit_slots.data.source import DataError, mark_present

VARIANTS = ("full", "pbg", "vbg", "grassbg", "camo", "outd")
# Where each split begins and ends, in tenths of the images by number.
SHARES = {"test": (0, 1), "validation": (1, 2), "train": (2, 10)}
# Made for testing what was trained on another variant: all of it is the test split.
WITHOUT_SPLITS = "outd"


class ClevrTex(FrameSource):
    """CLEVRTex (Karazija et al. 2021) in its published folders.

    Layout: `clevrtex_<variant>/**/CLEVRTEX_<variant>_NNNNNN.png` (320 x 240), beside
    each `…_flat.png`, a palette image whose indices are the objects' ids (0 for
    background), and `….json`, whose `objects` are in the ids' order. Splits are by
    number, as in the authors' loader: the first tenth is for testing, the second for
    validation, the rest for training; `outd` is for testing alone. `objects` holds
    `present` alone, and is there where every image has its JSON file.
    """

    def __init__(
        self,
        *,
        path: str,
        split: str,
        resolution: int,
        crop: str = "center-192",
        max_objects: int = 10,
        variant: str = "full",
        keys: Collection[str] | None = None,
    ):
        """Lists the variant's folder; opens no file.

        Args:
          path: the folder of the variant, or the one that holds it.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `images.crop_box`.
          max_objects: length of the arrays of attributes, and largest id in a mask.
          variant: "full", "pbg", "vbg", "grassbg", "camo" or "outd".
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: what is missing, in one sentence.
        """
        super().__init__(
            resolution=resolution, crop=crop, max_objects=max_objects, keys=keys
        )
        shares = {"test": (0, 10)} if variant == WITHOUT_SPLITS else SHARES
        if variant not in VARIANTS:
            raise DataError(
                f"CLEVRTex has no variant '{variant}'; set --config.data.variant to "
                f"one of {', '.join(VARIANTS)}"
            )
        if split not in shares:
            raise DataError(
                f"variant '{variant}' of CLEVRTex has no split '{split}', only "
                f"{', '.join(shares)}; set --config.data.variant=full for the others"
            )
        root = data_folder(path, "CLEVRTex")
        below = root / f"clevrtex_{variant}"
        self._root = below if os.path.isdir(below) else root
        there = set(walk_folder(self._root))
        stems = self._number(there, variant)
        first, last = (share * len(stems) // 10 for share in shares[split])
        self._stems = stems[first:last]
        if not self._stems:
            raise DataError(
                f"split '{split}' of {self._root} is empty, out of {len(stems)} "
                f"images; unpack all of CLEVRTex's variant '{variant}' there"
            )
        self._has_scenes = self._all_have(".json", there)
        if self.wants("segmentation") and not self._all_have("_flat.png", there):
            raise DataError(
                f"{self._root} has no masks CLEVRTEX_{variant}_NNNNNN_flat.png; unpack "
                "them beside the images"
            )

    def __len__(self) -> int:
        return len(self._stems)

    def where(self, index: int) -> str:
        """The image's file."""
        return str(self._root / f"{self._stems[index]}.png")

    def read(self, index: int) -> Frame:
        """Reads one image, its mask and its number of objects."""
        stem = self._stems[index]
        image = read_image(self._root / f"{stem}.png")
        mask = None
        if self.wants("segmentation"):
            mask = read_mask(self._root / f"{stem}_flat.png")
        if not self._has_scenes or not self.wants("objects"):
            return Frame(image, mask)
        count = self._count(index)
        scene = f"scene {self._root / stem}.json"
        present = mark_present(count, self.max_objects, scene)
        if mask is not None and mask.max() > count:
            raise DataError(
                f"mask {self._root / stem}_flat.png has object {mask.max()}, but "
                f"{stem}.json describes {count}; download both again"
            )
        return Frame(image, mask, {"present": present})

    def check(self, progress: Progress) -> None:
        """Looks into every picture and mask, without decoding it.

        Raises:
          DataError: some cannot be read, or do not fit each other or the crop.
        """
        masks = self._files("_flat.png") if self.wants("segmentation") else []
        refuse_unreadable(self._root, self._files(".png"), masks, self.crop, progress)

    def fingerprint(self) -> dict[str, Any]:
        """A digest of the names and sizes of images, and of masks and scenes in use."""
        masks = self._files("_flat.png") if self.wants("segmentation") else []
        scenes = self._files(".json") if self._has_scenes else []
        return digest(self._root, [*self._files(".png"), *masks, *scenes])

    def count_objects(self, progress: Progress) -> Int[np.ndarray, " examples"]:
        """Number of objects of each scene, out of its JSON file or its mask."""
        if not self._has_scenes:
            return count_ids(self._root, self._files("_flat.png"), progress)
        indices = progress(range(len(self)), desc="counting objects")
        return np.array([self._count(index) for index in indices], np.int64)

    def _number(self, there: Collection[str], variant: str) -> list[str]:
        """The images without their suffix, in the order of their numbers.

        Raises:
          DataError: there is none, one lacks or one is there twice; the splits would
            not be the authors'.
        """
        pattern = re.compile(rf"(?:.*/)?(CLEVRTEX_{variant}_(\d{{6}}))\.png")
        matches = [match for match in map(pattern.fullmatch, there) if match]
        stems = {int(match[2]): match[0].removesuffix(".png") for match in matches}
        if not stems:
            raise DataError(
                f"folder {self._root} has no images CLEVRTEX_{variant}_NNNNNN.png; "
                "set --config.data.path to where CLEVRTex was unpacked, or "
                "--config.data.variant"
            )
        if len(stems) < len(matches) or max(stems) >= len(stems):
            raise DataError(
                f"folder {self._root} has {len(matches)} images of {len(stems)} "
                f"numbers from 0 to {max(stems)}, which must be one of each; unpack "
                f"all of CLEVRTex's variant '{variant}' there, because its splits go "
                "by number"
            )
        return [stems[number] for number in range(len(stems))]

    def _all_have(self, suffix: str, there: Collection[str]) -> bool:
        """Whether each image of the split has a file of this ending; no in-between."""
        lacking = [stem for stem in self._stems if stem + suffix not in there]
        if 0 < len(lacking) < len(self._stems):
            raise DataError(
                f"{name_some(lacking, len(self._stems))} in {self._root} have no file "
                f"of the same name that ends in {suffix}; unpack all of them"
            )
        return not lacking

    def _files(self, suffix: str) -> list[str]:
        return [stem + suffix for stem in self._stems]

    def _count(self, index: int) -> int:
        """Number of objects that a scene's file describes."""
        file = self._root / f"{self._stems[index]}.json"
        return len(read_objects(file, "unpack it again"))
