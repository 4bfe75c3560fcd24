"""Sources whose frames are picture files in a folder, with masks beside them."""

import functools
import os
from collections.abc import Collection, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from implicit_slots.data.readers.files import BROKEN, digest, name_some, reason
from implicit_slots.data.readers.frame_source import FrameSource, Progress
from implicit_slots.data.readers.pictures import (
    ID_MODES,
    LYING,
    check_mask,
    check_pixels,
    look,
    read_image,
)
from implicit_slots.data.readers.preprocessing import crop_box
from implicit_slots.data.source import DataError


class FileSource(FrameSource):
    """Picture files: a reader lists them in its constructor.

    Attributes:
      root: the folder that the other names are relative to.
      images: the picture of each example.
      masks: the mask of each; empty where there are none or none are wanted.
      annotations: other files that the examples depend on.
      mask_modes: Pillow's modes that masks may have.
      remedy: what to do about files that cannot be read, for the sentence.
    """

    root: Path
    images: Sequence[str]
    masks: Sequence[str] = ()
    annotations: Sequence[str] = ()
    mask_modes: Collection[str] = ID_MODES
    remedy: str = "download them again"

    def __len__(self) -> int:
        return len(self.images)

    def where(self, index: int) -> str:
        """The image's file."""
        return str(self.root / self.images[index])

    def check(self, progress: Progress) -> None:
        """Looks into every picture and mask; decodes no PNG and no JPEG.

        Raises:
          DataError: some cannot be read, or do not fit each other or the crop.
        """
        masks = self.masks if self.wants("segmentation") else ()
        broken = self._find_broken(self.images, masks, progress)
        if broken:
            files = name_some([self.images[i] for i in broken], len(self))
            or_masks = ", or their masks," if masks else ""
            why = reason(next(iter(broken.values())))
            raise DataError(
                f"{files} in {self.root}{or_masks} cannot be read ({why}); "
                f"{self.remedy}"
            )

    def _find_broken(
        self, images: Sequence[str], masks: Sequence[str], progress: Progress
    ) -> dict[int, Exception]:
        """Why pictures, or their masks, are not whole, by index; looks in threads.

        Raises:
          DataError: a mask of another size or kind, or a crop that does not fit a
            frame.
        """
        fit = functools.cache(lambda width, height: crop_box(self.crop, width, height))

        def check_one(index: int) -> Exception | None:
            file = self.root / images[index]
            try:
                image = look(file)
                check_pixels(image)
                mask = look(self.root / masks[index]) if masks else None
            except BROKEN as error:
                return error
            fit(*image.size)
            if mask is None:
                return None
            check_mask(self.root / masks[index], mask, self.mask_modes)
            stored = image.size[::-1] if image.turn in LYING else image.size
            fits = mask.size in (image.size, stored)
            # EXIF behind the pixels is known only to who reads them.
            if not fits and mask.size != read_image(file).size:
                raise DataError(
                    f"mask {self.root / masks[index]} has {mask.size[0]} x "
                    f"{mask.size[1]} pixels and its image {images[index]} "
                    f"{image.size[0]} x {image.size[1]}; they must be of one size"
                )
            return None

        with ThreadPool(os.cpu_count()) as pool:
            found = pool.imap(check_one, range(len(images)), chunksize=16)
            found = progress(found, total=len(images), desc="checking files")
            return {index: error for index, error in enumerate(found) if error}

    def fingerprint(self) -> dict[str, Any]:
        """A digest of the names and sizes of all these files."""
        return digest(self.root, [*self.images, *self.masks, *self.annotations])
