"""CLEVRTex: CLEVR-like scenes of textured objects and backgrounds."""

import os
import re
from collections.abc import Collection

import numpy as np
from jaxtyping import Int

from implicit_slots.data.readers.file_source import FileSource
from implicit_slots.data.readers.files import data_folder, name_some, read_objects
from implicit_slots.data.readers.frame_source import Frame, Progress
from implicit_slots.data.readers.listing import walk_folder
from implicit_slots.data.readers.pictures import count_ids, read_image, read_mask
from implicit_slots.data.source import DataError, mark_present

VARIANTS = ("full", "pbg", "vbg", "grassbg", "camo", "outd")
# Where each split begins and ends, in tenths of the images by number.
SHARES = {"test": (0, 1), "validation": (1, 2), "train": (2, 10)}
# Made for testing what was trained on another variant: all of it is the test split.
WITHOUT_SPLITS = "outd"


class ClevrTex(FileSource):
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
          crop: what part of a frame is kept, see `crop_box`.
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
        self.root = below if os.path.isdir(below) else root
        there = {file.name for file in walk_folder(self.root)}
        stems = self._number(there, variant)
        first, last = (share * len(stems) // 10 for share in shares[split])
        self._stems = stems[first:last]
        if not self._stems:
            raise DataError(
                f"split '{split}' of {self.root} is empty, out of {len(stems)} "
                f"images; unpack all of CLEVRTex's variant '{variant}' there"
            )
        if self.wants("segmentation") and not self._all_have("_flat.png", there):
            raise DataError(
                f"{self.root} has no masks CLEVRTEX_{variant}_NNNNNN_flat.png; unpack "
                "them beside the images"
            )
        self.images = [f"{stem}.png" for stem in self._stems]
        if self.wants("segmentation"):
            self.masks = [f"{stem}_flat.png" for stem in self._stems]
        if self._all_have(".json", there):
            self.annotations = [f"{stem}.json" for stem in self._stems]

    def read(self, index: int) -> Frame:
        """Reads one image, its mask and its number of objects."""
        image = read_image(self.root / self.images[index])
        mask = read_mask(self.root / self.masks[index]) if self.masks else None
        if not self.annotations or not self.wants("objects"):
            return Frame(image, mask)
        count = self._count(index)
        scene = self.root / self.annotations[index]
        present = mark_present(count, self.max_objects, f"scene {scene}")
        if mask is not None and mask.max() > count:
            raise DataError(
                f"mask {self.root / self.masks[index]} has object {mask.max()}, but "
                f"{self.annotations[index]} describes {count}; download both again"
            )
        return Frame(image, mask, {"present": present})

    def count_objects(self, progress: Progress) -> Int[np.ndarray, " examples"]:
        """Number of objects of each scene, out of its JSON file or its mask."""
        if not self.annotations:
            masks = [f"{stem}_flat.png" for stem in self._stems]
            return count_ids(self.root, masks, progress)
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
                f"folder {self.root} has no images CLEVRTEX_{variant}_NNNNNN.png; "
                "set --config.data.path to where CLEVRTex was unpacked, or "
                "--config.data.variant"
            )
        if len(stems) < len(matches) or max(stems) >= len(stems):
            raise DataError(
                f"folder {self.root} has {len(matches)} images of {len(stems)} "
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
                f"{name_some(lacking, len(self._stems))} in {self.root} have no file "
                f"of the same name that ends in {suffix}; unpack all of them"
            )
        return not lacking

    def _count(self, index: int) -> int:
        """Number of objects that a scene's file describes."""
        file = self.root / self.annotations[index]
        return len(read_objects(file, "unpack it again"))
