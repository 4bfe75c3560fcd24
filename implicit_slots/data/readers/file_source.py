"""Sources whose frames are picture files in a folder, with masks beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from implicit_slots.data.readers.files import digest, refuse_unreadable
from implicit_slots.data.readers.frame_source import FrameSource, Progress


class FileSource(FrameSource):
    """Picture files: a reader lists them in its constructor.

    Attributes:
      root: the folder that the other names are relative to.
      images: the picture of each example.
      masks: the mask of each; empty where there are none or none are wanted.
      annotations: other files that the examples depend on.
      colour: whether masks hold colours; ids in one channel otherwise.
      remedy: what to do about files that cannot be read, for the sentence.
    """

    root: Path
    images: Sequence[str]
    masks: Sequence[str] = ()
    annotations: Sequence[str] = ()
    colour: bool = False
    remedy: str = "download them again"

    def __len__(self) -> int:
        return len(self.images)

    def where(self, index: int) -> str:
        """The image's file."""
        return str(self.root / self.images[index])

    def check(self, progress: Progress) -> None:
        """Looks into every picture and mask, without decoding it.

        Raises:
          DataError: some cannot be read, or do not fit each other or the crop.
        """
        masks = self.masks if self.wants("segmentation") else ()
        refuse_unreadable(
            self.root,
            self.images,
            masks,
            self.crop,
            progress,
            self.remedy,
            self.colour,
        )

    def fingerprint(self) -> dict[str, Any]:
        """A digest of the names and sizes of all these files."""
        return digest(self.root, [*self.images, *self.masks, *self.annotations])
