"""Sources whose examples are frames on disk: decoded, cropped, resized one by one."""

import abc
import dataclasses
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Integer
from PIL import Image

from implicit_slots.data.readers.preprocessing import (
    crop_box,
    into_crop,
    resize_image,
    resize_mask,
)
from implicit_slots.data.source import Batch, DataError, Example, Source

# A source keeps its decoded examples in memory up to this size.
KEPT_BYTES = 1 << 30
# Ids of objects fit into a byte of a cache, in which 255 stands for `IGNORED`.
MOST_OBJECTS = 254

# Wraps an iterable and shows how far it is; called with its length and a description.
Progress = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Frame:
    """One example as it lies on disk.

    Attributes:
      image: in any of Pillow's modes.
      segmentation: object at each pixel, 0 for background, `source.IGNORED` for what
        no metric counts; or None.
      objects: arrays [max_objects, …] by name, among them `present`; those with a
        `pixel_position` (column, row) have it in pixels of the frame. Object k has id
        k + 1 in `segmentation`. None where nothing is known.
    """

    image: Image.Image
    segmentation: Integer[np.ndarray, "height width"] | None = None
    objects: Mapping[str, np.ndarray] | None = None


class FrameSource(Source):
    """Frames that are read one by one; the examples of all are kept if they fit.

    A reader derives from this, and says how many frames there are (`__len__`), how one
    is read (`read`) and what it is called (`where`). It is opened fast: what takes a
    look into every file belongs into `check`.
    """

    def __init__(
        self,
        *,
        resolution: int,
        crop: str,
        max_objects: int,
        keys: Collection[str] | None = None,
    ):
        """Keeps the settings that all readers share.

        Args:
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `preprocessing.crop_box`.
          max_objects: length of the arrays of attributes, and largest id in a mask.
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: more objects than a mask's byte can number.
        """
        if not 1 <= max_objects <= MOST_OBJECTS:
            raise DataError(
                f"max_objects must be 1 to {MOST_OBJECTS}, got {max_objects}; set "
                "--config.data.max_objects"
            )
        self.resolution = resolution
        self.crop = crop
        self.max_objects = max_objects
        self._keys = keys
        self._kept: Batch | None = None
        self._is_kept = np.zeros(0, bool)
        self._lock = threading.Lock()

    @abc.abstractmethod
    def read(self, index: int) -> Frame:
        """Reads one frame; what `wants` denies may be left out. Thread-safe.

        Raises:
          DataError: it cannot be read; the sentence names the file.
        """

    @abc.abstractmethod
    def where(self, index: int) -> str:
        """What a frame is called in a sentence: its file, or its record."""

    def check(self, progress: Progress) -> None:
        """Looks into every file as far as that is cheaper than decoding it.

        Called before frames are decoded without a prepared cache.

        Args:
          progress: wraps an iterable to show how far it is, as `tqdm` does.

        Raises:
          DataError: what would fail later, in one sentence.
        """

    def fingerprint(self) -> dict[str, Any]:
        """What the examples depend on beside the options, as JSON; found fast.

        For example the version of the data set, or a digest of names and sizes of its
        files: a cache of other files is refused by it.
        """
        return {}

    def count_objects(self, progress: Progress) -> Int[np.ndarray, " examples"]:
        """Number of objects of every frame; reads all unless a reader knows better.

        Args:
          progress: wraps an iterable to show how far it is, as `tqdm` does.

        Raises:
          DataError: the frames have neither attributes nor masks.
        """
        counts = np.zeros(len(self), np.int64)
        for index in progress(range(len(self)), desc="counting objects"):
            frame = self.read(index)
            if frame.objects is not None:
                counts[index] = np.sum(frame.objects["present"])
            elif frame.segmentation is not None:
                counts[index] = np.sum(np.unique(frame.segmentation) > 0)
            else:
                raise DataError(
                    f"{self.where(index)} has neither masks nor attributes to count "
                    "objects by; leave --config.data.keep_objects at 0"
                )
        return counts

    def wants(self, key: str) -> bool:
        """Whether `batch` is to return this, so that it has to be read."""
        return self._keys is None or key in self._keys

    def decode(self, index: int) -> Example:
        """One example, with the keys of `batch` and no leading axis.

        Raises:
          DataError: it cannot be read, or does not fit the settings.
        """
        return self.fit(index, self.read(index))

    def fit(self, index: int, frame: Frame) -> Example:
        """A frame as an example: cropped, resized and checked; see `decode`."""
        box = crop_box(self.crop, *frame.image.size)
        example: Example = {"image": resize_image(frame.image, box, self.resolution)}
        if frame.segmentation is not None and self.wants("segmentation"):
            height, width = frame.segmentation.shape
            if (width, height) != frame.image.size:
                raise DataError(
                    f"{self.where(index)} has an image of {frame.image.width} x "
                    f"{frame.image.height} pixels and a mask of {width} x {height}; "
                    "they must be of one size"
                )
            if (most := int(frame.segmentation.max())) > self.max_objects:
                raise DataError(
                    f"the mask of {self.where(index)} has object {most}, more than "
                    f"max_objects = {self.max_objects}; set "
                    f"--config.data.max_objects={most} or more"
                )
            example["segmentation"] = resize_mask(
                frame.segmentation, box, self.resolution
            )
        if frame.objects is not None and self.wants("objects"):
            example["objects"] = into_crop(dict(frame.objects), box, self.resolution)
        return example

    def batch(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """Gathers examples from memory, after decoding those that are not there."""
        with self._lock:
            if not len(self._is_kept):
                self._make_room(self.decode(int(indices[0])))
        if self._kept is None:
            return stack([self.decode(int(index)) for index in indices])
        # Two threads may decode the same example: that is harmless, and a lock here
        # would let only one thread decode at a time.
        for index in np.unique(indices[~self._is_kept[indices]]):
            example = self.decode(int(index))
            for room, leaf in zip(
                jax.tree.leaves(self._kept), jax.tree.leaves(example), strict=True
            ):
                room[index] = leaf
            self._is_kept[index] = True
        return jax.tree.map(lambda leaf: leaf[indices], self._kept)

    def _make_room(self, example: Example) -> None:
        """Allocates arrays for all examples like this one if they are few enough."""
        self._is_kept = np.zeros(len(self), bool)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(example))
        if size * len(self) <= KEPT_BYTES:
            # Pages are only taken from the system when an example is written.
            self._kept = jax.tree.map(
                lambda leaf: np.empty((len(self), *leaf.shape), leaf.dtype), example
            )


def stack(examples: list[Example]) -> Batch:
    """Examples as one batch."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
