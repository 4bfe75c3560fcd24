"""Images in a folder, with masks and attributes where there are some."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from implicit_slots.data.base import DataError, DecodedSource, Example, pack_objects
from implicit_slots.data.images import (
    crop_box,
    into_crop,
    resize_image,
    resize_mask,
)

SUFFIXES = (".png", ".jpg", ".jpeg")
SPLIT_FOLDERS = {
    "train": ("train",),
    "validation": ("validation", "val"),
    "test": ("test",),
}
# What Pillow raises for broken files besides OSError.
BROKEN = (SyntaxError, ValueError, Image.DecompressionBombError)
# Which image falls into which split never changes, whatever the seed of the run.
CARVING_KEY = 20240229


class ImageFolder(DecodedSource):
    """PNG and JPEG images below a folder, in any depth.

    Layout: `images/…` (or the images directly), optional `masks/…` with the same
    names (ids in one channel, 0 background), optional `scenes.json`. See README.md for
    the splits.

    Attributes:
      files: the images of this split, relative to `images/`, in order.
    """

    def __init__(
        self,
        *,
        path: str,
        split: str,
        resolution: int,
        crop: str = "center",
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        max_objects: int = 10,
        skip_unreadable: bool = False,
    ):
        """Lists the split's files and checks them; decodes none.

        Args:
          path: the folder.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `images.crop_box`.
          validation_fraction: share of the images to carve out for validation where
            there is no such folder.
          test_fraction: the same for the test split.
          max_objects: length of the arrays of attributes.
          skip_unreadable: leave out files that cannot be read instead of refusing.

        Raises:
          DataError: what is wrong with the folder, in one sentence.
        """
        super().__init__()
        if not path:
            raise DataError(
                "no image folder is named; set it with --config.data.path=FOLDER"
            )
        root = Path(path).expanduser()
        if not root.is_dir():
            raise DataError(f"there is no folder {root} to read images from")
        self._images = root / "images" if (root / "images").is_dir() else root
        self._masks = root / "masks"
        self._resolution = resolution
        self._max_objects = max_objects
        self._crop = crop

        listed = _list_images(self._images)
        if not listed:
            raise DataError(f"folder {self._images} has no PNG or JPEG images")
        files = _split(listed, split, validation_fraction, test_fraction)
        masks = self._find_masks(files)
        readable, sizes = self._readable(files, masks, skip_unreadable)
        self.files = [files[i] for i in readable]
        self._mask_files = [masks[i] for i in readable] if masks else []
        if not self.files:
            raise DataError(
                f"split '{split}' of folder {root} is empty, out of {len(listed)} "
                "images; add images or change --config.data.validation_fraction and "
                "--config.data.test_fraction"
            )
        for size in sizes:
            crop_box(crop, *size)  # What does not fit is said now and not in epoch 1.
        self._objects = None
        if (root / "scenes.json").is_file():
            self._objects = _read_scenes(root / "scenes.json", self.files, max_objects)

    def __len__(self) -> int:
        return len(self.files)

    def decode(self, index: int) -> Example:
        """Reads one image and what belongs to it."""
        file = self._images / self.files[index]
        with _opened(file) as image:
            box = crop_box(self._crop, *image.size)
            example: Example = {"image": resize_image(image, box, self._resolution)}
        if self._mask_files:
            with _opened(self._mask_files[index]) as mask:
                segmentation = resize_mask(mask, box, self._resolution)
            if segmentation.max() > self._max_objects:
                raise DataError(
                    f"mask {self._mask_files[index]} has object {segmentation.max()}, "
                    f"more than max_objects = {self._max_objects}; set "
                    f"--config.data.max_objects={segmentation.max()} or more"
                )
            example["segmentation"] = segmentation
        if self._objects is not None:
            example["objects"] = into_crop(self._objects[index], box, self._resolution)
        return example

    def _find_masks(self, files: Sequence[str]) -> list[Path]:
        """The mask of each image: of the same name, or of the same stem as PNG."""
        if not self._masks.is_dir():
            return []
        masks, lacking = [], []
        for file in files:
            same = self._masks / file
            either = [m for m in (same, same.with_suffix(".png")) if m.is_file()]
            masks += either[:1]
            lacking += [] if either else [file]
        if lacking:
            raise DataError(
                f"{_named(lacking, len(files))} in {self._images} have no mask of the "
                f"same name in {self._masks}"
            )
        return masks

    def _readable(
        self, files: Sequence[str], masks: Sequence[Path], skip_unreadable: bool
    ) -> tuple[list[int], set[tuple[int, int]]]:
        """Indices of the files that can be read, and the sizes among them."""
        readable, broken, sizes = [], [], set()
        for index, file in enumerate(files):
            try:
                size = _check(self._images / file)
                if masks:
                    _check_mask(masks[index], file, size)
            except OSError:
                broken.append(file)
            else:
                readable.append(index)
                sizes.add(size)
        if broken and not skip_unreadable:
            raise DataError(
                f"{_named(broken, len(files))} in {self._images}, or their masks, "
                "cannot be read; repair or remove them, or leave them out with "
                "--config.data.skip_unreadable=True"
            )
        return readable, sizes


def _list_images(root: Path) -> list[str]:
    """Images below a folder as sorted relative names, without hidden ones and masks."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder).relative_to(root)
        folders[:] = [f for f in folders if not f.startswith(".")]
        if folder == str(root) and "masks" in folders:
            folders.remove("masks")
        found += [
            (here / name).as_posix()
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def _split(
    files: list[str], split: str, validation_fraction: float, test_fraction: float
) -> list[str]:
    """The files of one split: its own folder's, or a share carved out of the rest."""
    own = {
        name: [f for f in files if f.split("/")[0] in folders and "/" in f]
        for name, folders in SPLIT_FOLDERS.items()
    }
    if split not in own:
        raise DataError(
            f"unknown split '{split}'; choose from 'train', 'validation', 'test'"
        )
    if split != "train" and own[split]:
        return own[split]
    with_folder = {f for files_of_split in own.values() for f in files_of_split}
    pool = own["train"] or [f for f in files if f not in with_folder]
    if not pool:
        raise DataError(
            f"there are no images for split '{split}': all are in folders of other "
            "splits, and none is called 'train'"
        )
    # Each share is a stretch of one fixed permutation, so that shares are disjoint.
    fractions = {"validation": validation_fraction, "test": test_fraction}
    bits = np.random.Philox(key=CARVING_KEY).random_raw(len(pool))
    order = np.argsort(bits, kind="stable")
    start = 0
    for name, fraction in fractions.items():
        if own[name]:
            continue
        stop = start + round(fraction * len(pool))
        if name == split:
            return [pool[i] for i in sorted(order[start:stop])]
        start = stop
    return [pool[i] for i in sorted(order[start:])]


def _check(file: Path) -> tuple[int, int]:
    """Size of a picture, found without decoding it.

    Raises:
      OSError: the file is not a whole picture.
    """
    try:
        with Image.open(file) as image:
            size = image.size
            if image.format == "JPEG":
                whole = _ends_as_jpeg(file)
            else:
                image.verify()  # Reads every chunk of a PNG and checks its sum.
                whole = True
        if not whole:  # Some programs leave bytes behind the end: decode to know.
            with Image.open(file) as image:
                image.load()
    except BROKEN as error:
        raise OSError(str(error)) from error
    return size


def _ends_as_jpeg(file: Path) -> bool:
    """Whether the end-of-image marker is there; a truncated JPEG has lost it."""
    with file.open("rb") as stream:
        stream.seek(-2, os.SEEK_END)
        return stream.read() == b"\xff\xd9"


def _check_mask(mask: Path, image: str, size: tuple[int, int]) -> None:
    mask_size = _check(mask)
    if mask_size != size:
        raise DataError(
            f"mask {mask} has {mask_size[0]} x {mask_size[1]} pixels and its image "
            f"{image} {size[0]} x {size[1]}; they must be of one size"
        )
    with Image.open(mask) as picture:
        if picture.mode not in ("L", "P", "1"):
            raise DataError(
                f"mask {mask} has pixels of mode {picture.mode}; it must hold 8-bit "
                "object ids in one channel, 0 for background"
            )


def _opened(file: Path) -> Image.Image:
    """An image with its pixels, or a sentence: it was whole when the run started."""
    try:
        image = Image.open(file)
        image.load()
    except (OSError, *BROKEN) as error:
        raise DataError(f"image {file} cannot be read: {error}") from error
    return image


def _read_scenes(
    path: Path, files: Sequence[str], max_objects: int
) -> list[dict[str, np.ndarray]]:
    """Attributes of each file's objects from CLEVR's `scenes.json`."""
    try:
        scenes = json.loads(path.read_text())["scenes"]
        # The same name may occur in several splits.
        objects_of = {scene["image_filename"]: scene["objects"] for scene in scenes} | {
            f"{scene.get('split')}/{scene['image_filename']}": scene["objects"]
            for scene in scenes
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a list of scenes as CLEVR's: {error!r}"
        ) from error
    keys = [file if file in objects_of else Path(file).name for file in files]
    lacking = [f for f, key in zip(files, keys, strict=True) if key not in objects_of]
    if lacking:
        raise DataError(f"{_named(lacking, len(files))} are not described in {path}")
    return [
        pack_objects(objects_of[key], max_objects, f"{path}: {file}")
        for file, key in zip(files, keys, strict=True)
    ]


def _named(files: Sequence[str], total: int) -> str:
    """The first few of some files and their number, for a sentence."""
    few = ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
    return f"{len(files)} of {total} images ({few})"
