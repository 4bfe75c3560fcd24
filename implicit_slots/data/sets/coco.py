"""COCO 2017: photographs with instance or panoptic masks, as downloaded."""

import functools
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from implicit_slots.data.readers.file_source import FileSource
from implicit_slots.data.readers.files import data_folder, name_some, read_json
from implicit_slots.data.readers.frame_source import Frame, Progress
from implicit_slots.data.readers.listing import list_folder
from implicit_slots.data.readers.pictures import COLOUR_MODES, read_image, read_mask
from implicit_slots.data.sets.coco_shapes import (
    decode_runs,
    draw_polygons,
    import_pycocotools,
    number_segments,
)
from implicit_slots.data.source import DataError, mark_present

# The published test images have no annotations.
YEARS = {"train": "train2017", "validation": "val2017", "test": "val2017"}
PHOTOGRAPH = re.compile(r"(\d{12})\.jpg")
KINDS = ("instances", "panoptic", "none")


class Region(NamedTuple):
    """One annotated object.

    Attributes:
      category: COCO's `category_id`.
      shape: of an instance: polygons [x, y, x, y, …] in pixels, or a run-length code,
        `{"size": [height, width], "counts": …}`; of a panoptic segment: its id.
    """

    category: int
    shape: Any


class Scene(NamedTuple):
    """The annotation of one photograph.

    Attributes:
      regions: the objects in the order of their ids in masks.
      size: (width, height) that it is made for; None where a mask's file tells.
      crowds: ids of panoptic segments that are background.
    """

    regions: list[Region]
    size: tuple[int, int] | None = None
    crowds: frozenset[int] = frozenset()


class Coco(FileSource):
    """COCO 2017 (Lin et al. 2014; panoptic: Kirillov et al. 2019), unpacked.

    Layout: `train2017/*.jpg`, `val2017/*.jpg` and, for masks, in `annotations/`
    `instances_{train,val}2017.json`, or `panoptic_{train,val}2017.json` with the PNGs
    of the same name in `panoptic_{train,val}2017/` (unpack the archives in the
    archive). Formats: cocodataset.org/#format-data. Validation and test are both
    `val2017`, because COCO keeps the annotations of its test images to itself. The
    examples come in the order of the image ids.

    Instances: polygons and run-length codes as pycocotools rasterises them. Ids go by
    annotated area, larger objects first, then by annotation id; where objects overlap
    the later id, the smaller object, is seen. Panoptic: things and stuff alike are
    objects, in the order of `segments_info`. In both, crowds and what is not annotated
    are background. `objects` has `present` bool [max_objects] and `label` int32
    [max_objects], COCO's `category_id`, 0 where there is no object.
    """

    mask_modes = COLOUR_MODES

    def __init__(
        self,
        *,
        path: str,
        split: str,
        resolution: int,
        crop: str = "center",
        max_objects: int = 254,
        masks: str = "instances",
        keys: Collection[str] | None = None,
    ):
        """Lists the split's photographs.

        Annotations are read when they are first wanted, which takes half a minute and
        some memory for the training split.

        Args:
          path: the folder that holds `train2017`, `val2017` and `annotations`.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `crop_box`.
          max_objects: length of the arrays of attributes, and most objects.
          masks: "instances", "panoptic" or "none".
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: what is missing or does not fit, in one sentence.
        """
        super().__init__(
            resolution=resolution, crop=crop, max_objects=max_objects, keys=keys
        )
        if masks not in KINDS:
            raise DataError(
                f"COCO has no masks '{masks}'; set --config.data.masks to one of "
                f"{', '.join(KINDS)}"
            )
        self.root = data_folder(path, "COCO")
        self._year = YEARS[split]
        self._kind = masks
        names = map(PHOTOGRAPH.fullmatch, list_folder(self.root / self._year))
        self._ids = [int(name[1]) for name in names if name]
        if not self._ids:
            raise DataError(
                f"folder {self.root / self._year} has no photographs "
                "NNNNNNNNNNNN.jpg; unpack COCO's images there"
            )
        self.images = [f"{self._year}/{number:012}.jpg" for number in self._ids]
        if masks == "panoptic" and self.wants("segmentation"):
            self.masks = [
                f"annotations/panoptic_{self._year}/{number:012}.png"
                for number in self._ids
            ]
        if masks != "none" and (self.wants("segmentation") or self.wants("objects")):
            self.annotations = [f"annotations/{masks}_{self._year}.json"]

    def read(self, index: int) -> Frame:
        """Reads one photograph, and draws or reads its mask."""
        scene = self._scenes[self._ids[index]] if self.annotations else None
        image = read_image(self.root / self.images[index])
        if scene is None:
            return Frame(image)
        segmentation = None
        if self.masks:
            segmentation = _read_segments(self.root / self.masks[index], scene)
        elif self.wants("segmentation"):
            segmentation = self._draw(scene, image.size, index)
        count = len(scene.regions)
        labels = np.zeros(self.max_objects, np.int32)
        labels[:count] = [region.category for region in scene.regions]
        present = mark_present(count, self.max_objects, self.where(index))
        return Frame(image, segmentation, {"present": present, "label": labels})

    def check(self, progress: Progress) -> None:
        """Looks into every photograph and panoptic mask, without decoding it.

        Raises:
          DataError: some cannot be read, or do not fit each other or the crop.
        """
        if self.annotations:
            _ = self._scenes
            if self._kind == "instances" and self.wants("segmentation"):
                _ = self._tools
        folder = self.root / f"annotations/panoptic_{self._year}"
        if self.masks and not os.path.isdir(folder):
            raise DataError(
                f"there is no folder {folder}; unpack {folder.name}.zip there, which "
                "is in COCO's archive of panoptic annotations"
            )
        super().check(progress)

    def count_objects(self, progress: Progress) -> Int[np.ndarray, " examples"]:
        """Number of annotated objects of each photograph, crowds left out."""
        if self._kind == "none":
            return super().count_objects(progress)
        return np.array([len(self._scenes[i].regions) for i in self._ids], np.int64)

    @functools.cached_property
    def _tools(self) -> Any:
        return import_pycocotools()

    @property
    def _file(self) -> Path:
        """The annotations."""
        return self.root / f"annotations/{self._kind}_{self._year}.json"

    @functools.cached_property
    def _scenes(self) -> dict[int, Scene]:
        """The annotations by image id.

        Raises:
          DataError: they are not there, not COCO's, without some of the photographs,
            or of more objects than fit.
        """
        file = self._file
        if not os.path.isfile(file):
            raise DataError(
                f"there is no file {file}; unpack COCO's annotations there, or do "
                "without masks by --config.data.masks=none"
            )
        content = read_json(file)
        try:
            if self._kind == "instances":
                scenes = _instances(content["images"], content["annotations"])
            else:
                scenes = _segments(content["annotations"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{file} is not in COCO's {self._kind} format ({error!r}); unpack it "
                "again"
            ) from error
        lacking = [self.images[i] for i, d in enumerate(self._ids) if d not in scenes]
        if lacking:
            raise DataError(
                f"{name_some(lacking, len(self))} in {self.root} are not described in "
                f"{file}; unpack images and annotations of the same year"
            )
        for index, identity in enumerate(self._ids):
            count = len(scenes[identity].regions)
            mark_present(count, self.max_objects, self.where(index))
        return scenes

    def _draw(
        self, scene: Scene, size: tuple[int, int], index: int
    ) -> UInt8[np.ndarray, "height width"]:
        """Paints instances over each other, the last on top."""
        where = f"{self.where(index)} and {self._file}"
        if scene.size != size:
            raise DataError(
                f"{where} do not agree on the size, {size} and {scene.size}; unpack "
                "the images as COCO publishes them"
            )
        ids = np.zeros(size[::-1], np.uint8)
        for number, (_, shape) in enumerate(scene.regions, start=1):
            try:
                if isinstance(shape, Mapping):
                    inside = decode_runs(shape, *size)
                else:
                    inside = draw_polygons(self._tools, shape, *size)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"object {number} of {where} cannot be drawn ({error}); unpack the "
                    "annotations again"
                ) from error
            ids[inside] = number
        return ids


def _instances(
    images: Iterable[Mapping[str, Any]], annotations: Iterable[Mapping[str, Any]]
) -> dict[int, Scene]:
    """Objects by image id: larger areas first, so that small ones stay visible."""
    scenes = {
        image["id"]: Scene([], (image["width"], image["height"])) for image in images
    }
    for annotation in sorted(annotations, key=lambda a: (-a["area"], a["id"])):
        if annotation["iscrowd"]:
            continue
        shape = annotation["segmentation"]
        if not isinstance(shape, Mapping):
            # As Python objects, the training split's coordinates take gigabytes.
            shape = [np.asarray(polygon, np.float64) for polygon in shape]
        scenes[annotation["image_id"]].regions.append(
            Region(annotation["category_id"], shape)
        )
    return scenes


def _segments(annotations: Iterable[Mapping[str, Any]]) -> dict[int, Scene]:
    """Panoptic segments by image id."""
    scenes = {}
    for annotation in annotations:
        segments = annotation["segments_info"]
        scenes[annotation["image_id"]] = Scene(
            [Region(s["category_id"], s["id"]) for s in segments if not s["iscrowd"]],
            crowds=frozenset(s["id"] for s in segments if s["iscrowd"]),
        )
    return scenes


def _read_segments(file: Path, scene: Scene) -> UInt8[np.ndarray, "height width"]:
    """Ids of a panoptic mask, whose colours number the segments.

    Raises:
      DataError: it cannot be read, or has a segment that is not described.
    """
    colours = read_mask(file, colour=True)[..., :3]
    found, places = np.unique(number_segments(colours), return_inverse=True)
    # 0 is what nobody annotated.
    ids = dict.fromkeys([0, *scene.crowds], 0)
    ids |= {region.shape: k for k, region in enumerate(scene.regions, start=1)}
    strange = [segment for segment in found.tolist() if segment not in ids]
    if strange:
        raise DataError(
            f"mask {file} has segment {strange[0]}, which its annotation does not "
            "describe; unpack COCO's panoptic annotations again"
        )
    numbers = np.array([ids[segment] for segment in found.tolist()], np.uint8)
    return numbers[places].reshape(colours.shape[:2])
