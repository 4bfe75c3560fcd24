"""Pascal VOC 2012: photographs with masks of objects and of classes, and void."""

import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int32

from implicit_slots.data.readers.file_source import FileSource
from implicit_slots.data.readers.files import data_folder, name_some, unreadable
from implicit_slots.data.readers.frame_source import Frame
from implicit_slots.data.readers.pictures import (
    ID_MODES,
    check_mask,
    read_image,
    read_stored,
)
from implicit_slots.data.source import IGNORED, DataError, mark_present

FOLDER = "VOCdevkit/VOC2012"
VOID = 255
# The list of a split whose masks VOC publishes; of training images there are others.
HELD_OUT = "val"
WITH_MASKS = ("train", "trainval", "val")


class Voc(FileSource):
    """Pascal VOC 2012 (Everingham et al. 2010), its segmentation images.

    Layout: `JPEGImages/`, `SegmentationObject/`, `SegmentationClass/` and the lists in
    `ImageSets/Segmentation/`, as the archive of training and validation images is
    unpacked. Training images are those of a list; validation and test are both `val`,
    1,449 images, because VOC keeps the masks of its test images to itself. `trainaug`
    (10,582 images) are the training images and those of the Semantic Boundaries Dataset
    (Hariharan et al. 2011) that are not in `val`; they have no masks here. An image
    stands in a list by its name, or as the path of its photograph, before others.

    A mask is a palette image: 0 is the background, 1, 2, … the objects, 255 void, which
    becomes `IGNORED`. `objects` has `present` bool [max_objects] and `label` int32
    [max_objects], VOC's class from 1 (aeroplane) to 20 (tvmonitor), 0 where there is no
    object: the class that most of an object's pixels have in `SegmentationClass/`.
    """

    def __init__(
        self,
        *,
        path: str,
        split: str,
        resolution: int,
        crop: str = "center",
        max_objects: int = 64,
        split_set: str = "trainaug",
        keys: Collection[str] | None = None,
    ):
        """Reads the split's list; opens no picture.

        Args:
          path: the folder `VOC2012`, or one that holds `VOCdevkit/VOC2012`.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `crop_box`.
          max_objects: length of the arrays of attributes, and largest id in a mask.
          split_set: the list of the training images: "trainaug", "train", or another.
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: what is missing, in one sentence.
        """
        super().__init__(
            resolution=resolution, crop=crop, max_objects=max_objects, keys=keys
        )
        root = data_folder(path, "Pascal VOC 2012")
        below = root / FOLDER
        self.root = below if os.path.isdir(below) else root
        name = split_set if split == "train" else HELD_OUT
        self._names = self._read_list(name)
        self.images = [f"JPEGImages/{name}.jpg" for name in self._names]
        if name in WITH_MASKS and (self.wants("segmentation") or self.wants("objects")):
            self.masks = [f"SegmentationObject/{name}.png" for name in self._names]
            self.annotations = [f"SegmentationClass/{name}.png" for name in self._names]
        files = [*self.images, *self.masks, *self.annotations]
        lacking = [file for file in files if not os.path.isfile(self.root / file)]
        if lacking:
            raise DataError(
                f"{name_some(lacking, len(files))} of the list {name} are not in "
                f"{self.root}; unpack VOC 2012 there"
            )

    def read(self, index: int) -> Frame:
        """Reads one photograph, its masks and its objects' classes."""
        image = read_image(self.root / self.images[index])
        if not self.masks:
            return Frame(image)
        ids = _read(self.root / self.masks[index])
        classes = _read(self.root / self.annotations[index])
        if ids.shape != classes.shape:
            raise DataError(
                f"the masks {self.masks[index]} and {self.annotations[index]} in "
                f"{self.root} are not of one size; unpack VOC 2012 again"
            )
        most = max(int(ids.max()), 0)
        present = mark_present(most, self.max_objects, self.where(index))
        labels = np.zeros(self.max_objects, np.int32)
        for k in range(most):
            of_object = classes[ids == k + 1]
            known = of_object[of_object > 0]
            present[k] = len(of_object) > 0
            labels[k] = np.bincount(known).argmax() if len(known) else 0
        return Frame(image, ids, {"present": present, "label": labels})

    def _read_list(self, name: str) -> list[str]:
        """The images of a list of `ImageSets/Segmentation/`, in its order."""
        file = self.root / "ImageSets" / "Segmentation" / f"{name}.txt"
        try:
            lines = file.read_text().split("\n")
        except OSError as error:
            if name == "trainaug" and isinstance(error, FileNotFoundError):
                raise DataError(
                    f"there is no list {file}: it comes with the Semantic Boundaries "
                    "Dataset and not with VOC; put it there, or train on VOC's own "
                    "1,464 images by --config.data.split_set=train"
                ) from error
            raise unreadable(file, error) from error
        names = [PurePosixPath(line.split()[0]).stem for line in lines if line.strip()]
        if not names:
            raise DataError(f"the list {file} is empty; put VOC's list there")
        return names


def _read(file: Path) -> Int32[np.ndarray, "height width"]:
    """The indices of a palette image, void as `IGNORED`."""
    image = read_stored(file)
    check_mask(file, image, ID_MODES)
    ids = np.asarray(image).astype(np.int32)
    return np.where(ids == VOID, np.int32(IGNORED), ids)
