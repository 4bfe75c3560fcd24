"""COCO: photographs with instance or panoptic masks, as downloaded, or of one's own."""

import functools
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from implicit_slots.data.readers.file_source import FileSource
from implicit_slots.data.readers.files import data_folder, name_some, read_json
from implicit_slots.data.readers.frame_source import Frame, Progress
from implicit_slots.data.readers.pictures import (
    COLOUR_MODES,
    LYING,
    read_mask,
    read_turned,
    turn_along,
)
from implicit_slots.data.sets.coco_files import describe, find_split, list_photographs
from implicit_slots.data.sets.coco_shapes import (
    decode_runs,
    draw_polygons,
    import_pycocotools,
    number_segments,
)
from implicit_slots.data.source import IGNORED, DataError, mark_present

# As COCO names photographs; the mask of such a one has the same name.
PUBLISHED = re.compile(r"(COCO_\w+_)?\d{12}\.jpg")
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
      crowds: what no metric is to count: shapes of instances, as in `Region`, or ids
        of panoptic segments.
      size: (width, height) that it is made for; None where a file's own size tells.
      mask: file of its panoptic mask, in the folder of those.
    """

    regions: list[Region]
    crowds: list[Any]
    size: tuple[int, int] | None = None
    mask: str = ""


class Coco(FileSource):
    """COCO (Lin et al. 2014; panoptic: Kirillov et al. 2019), or a set in its format.

    Layout: `train2017/`, `val2017/` and, for masks, in `annotations/`
    `instances_{train,val}2017.json`, or `panoptic_{train,val}2017.json` with the PNGs
    in `panoptic_{train,val}2017/` (unpack the archives in the archive). Other names of
    splits' folders, endings and names of photographs will do; README.md has them.
    Formats: cocodataset.org/#format-data. Validation and test are both `val2017`,
    because COCO keeps the annotations of its test images to itself. The examples come
    in the order of their names, which is that of COCO's image ids.

    Instances: polygons and run-length codes as pycocotools rasterises them. Ids go by
    annotated area, larger objects first, then by annotation id; where objects overlap
    the later id, the smaller object, is seen, or nobody is, by `overlaps`. What is not
    annotated is background; crowds, and boxes of objects that have no mask, are
    `IGNORED` where no object is.
    Panoptic: things and stuff alike are objects, in the order of `segments_info`;
    crowds, and what is not annotated, are `IGNORED`, as COCO's own measure ignores
    them. `objects` has `present` bool [max_objects] and `label` int32 [max_objects],
    COCO's `category_id`, 0 where there is no object.
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
        overlaps: str = "smaller",
        keys: Collection[str] | None = None,
    ):
        """Lists the split's photographs.

        Annotations are read when they are first wanted, which takes half a minute and
        some memory for the training split; at once for panoptic masks of photographs
        that have names of their own.

        Args:
          path: the folder that holds `train2017`, `val2017` and `annotations`.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `crop_box`.
          max_objects: length of the arrays of attributes, and most objects.
          masks: "instances", "panoptic" or "none".
          overlaps: of instances: "smaller", the smaller object is seen, or "ignored",
            no metric counts those pixels.
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
        self._kind = masks
        self._ignores_overlaps = overlaps == "ignored"
        kind = "instances" if masks == "none" else masks
        self._place = find_split(self.root, split, kind)
        self.images = list_photographs(self.root, self._place.folder)
        if masks != "none" and (self.wants("segmentation") or self.wants("objects")):
            self.annotations = [self._place.annotations]
        if masks == "panoptic" and self.wants("segmentation"):
            names = [PurePosixPath(image).name for image in self.images]
            if all(map(PUBLISHED.fullmatch, names)):
                names = [name.removesuffix(".jpg") + ".png" for name in names]
            else:
                names = [scene.mask for scene in self._scenes]
            self.masks = [f"{self._place.segments}/{name}" for name in names]

    def read(self, index: int) -> Frame:
        """Reads one photograph, and draws or reads its mask."""
        scene = self._scenes[index] if self.annotations else None
        image, turn = read_turned(self.root / self.images[index])
        if scene is None:
            return Frame(image)
        segmentation = None
        if self.masks:
            segmentation = _read_segments(self.root / self.masks[index], scene)
        elif self.wants("segmentation"):
            width, height = image.size
            if turn in LYING and scene.size == (height, width):
                width, height = height, width  # The annotations are of it as stored.
            segmentation = self._draw(scene, (width, height), index)
        if segmentation is not None:
            segmentation = turn_along(segmentation, image.size, turn)
        count = len(scene.regions)
        labels = np.zeros(self.max_objects, np.int32)
        labels[:count] = [region.category for region in scene.regions]
        present = mark_present(count, self.max_objects, self.where(index))
        return Frame(image, segmentation, {"present": present, "label": labels})

    def check(self, progress: Progress) -> None:
        """Looks into every photograph and panoptic mask; decodes no JPEG and no PNG.

        Raises:
          DataError: some cannot be read, or do not fit each other or the crop.
        """
        if self.annotations:
            _ = self._scenes
            if self._kind == "instances" and self.wants("segmentation"):
                _ = self._tools
        folder = self.root / self._place.segments
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
        return np.array([len(scene.regions) for scene in self._scenes], np.int64)

    @functools.cached_property
    def _tools(self) -> Any:
        return import_pycocotools()

    @property
    def _file(self) -> Path:
        """The annotations."""
        return self.root / self._place.annotations

    @functools.cached_property
    def _scenes(self) -> list[Scene]:
        """The annotations of each photograph.

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
            if isinstance(content, Mapping) and "annotations" not in content:
                raise DataError(
                    f"{file} lists images and has no annotations; do without masks by "
                    "--config.data.masks=none"
                )
            if self._kind == "instances":
                images = content["images"]
                scenes = _instances(images, content["annotations"], file)
            else:
                scenes = _segments(content["annotations"])
                # Those of the photographs, which some writers leave out.
                images = content.get("images") or [
                    {"id": a["image_id"], "file_name": a["file_name"]}
                    for a in content["annotations"]
                ]
            names = [image["file_name"] for image in images]
            entries = describe(self.images, names, file)
            found = [
                None if entry is None else scenes.get(images[entry]["id"])
                for entry in entries
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{file} is not in COCO's {self._kind} format ({error!r}); unpack it "
                "again"
            ) from error
        lacking = [self.images[i] for i, scene in enumerate(found) if scene is None]
        if lacking:
            raise DataError(
                f"{name_some(lacking, len(self))} in {self.root} are not described in "
                f"{file}; unpack images and annotations of the same year"
            )
        scenes = [scene for scene in found if scene is not None]
        for index, scene in enumerate(scenes):
            mark_present(len(scene.regions), self.max_objects, self.where(index))
        return scenes

    def _draw(
        self, scene: Scene, size: tuple[int, int], index: int
    ) -> Int32[np.ndarray, "height width"]:
        """Paints instances over each other, the last on top, and all over crowds."""
        where = f"{self.where(index)} and {self._file}"
        if scene.size not in (None, size):
            raise DataError(
                f"{where} do not agree on the size, {size} and {scene.size}; unpack "
                "the images as COCO publishes them"
            )
        ids = np.zeros(size[::-1], np.int32)
        shared = np.zeros(size[::-1], bool)
        shapes = [(shape, IGNORED) for shape in scene.crowds]
        shapes += [(region.shape, k) for k, region in enumerate(scene.regions, start=1)]
        for shape, number in shapes:
            try:
                if isinstance(shape, Mapping):
                    inside = decode_runs(shape, *size)
                else:
                    inside = draw_polygons(self._tools, shape, *size)
            except (KeyError, TypeError, ValueError) as error:
                what = "a crowd" if number == IGNORED else f"object {number}"
                raise DataError(
                    f"{what} of {where} cannot be drawn ({error}); unpack the "
                    "annotations again"
                ) from error
            shared[inside] |= ids[inside] > 0
            ids[inside] = number
        if self._ignores_overlaps:
            ids[shared] = IGNORED
        return ids


def _instances(
    images: Iterable[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    file: Path,
) -> dict[Any, Scene]:
    """Objects by image id: larger areas first, so that small ones stay visible."""
    scenes = {
        image["id"]: Scene(
            [], [], (image["width"], image["height"]) if "width" in image else None
        )
        for image in images
    }
    if annotations and not any(a.get("segmentation") for a in annotations):
        raise DataError(
            f"{file} has boxes of objects and no masks; do without masks by "
            "--config.data.masks=none"
        )
    for annotation in sorted(annotations, key=_area_and_id):
        scene = scenes.get(annotation["image_id"])
        if scene is None:
            continue  # Of an image that is left out of this file.
        shape = annotation.get("segmentation")
        if not shape:
            left, top, width, height = annotation["bbox"]
            right, bottom = left + width, top + height
            shape = [[left, top, right, top, right, bottom, left, bottom]]
            scene.crowds.append(_as_arrays(shape))
        elif annotation.get("iscrowd") or annotation.get("ignore"):
            scene.crowds.append(_as_arrays(shape))
        else:
            region = Region(annotation["category_id"], _as_arrays(shape))
            scene.regions.append(region)
    return scenes


def _area_and_id(annotation: Mapping[str, Any]) -> tuple[float, Any]:
    """What instances are sorted by; some writers leave areas out, or ids."""
    area = annotation.get("area")
    if area is None:
        area = annotation["bbox"][2] * annotation["bbox"][3]
    return -float(area), annotation.get("id", 0)


def _as_arrays(shape: Any) -> Any:
    """Polygons as arrays: as Python objects, those of COCO take gigabytes."""
    if isinstance(shape, Mapping):
        return shape
    if isinstance(shape[0], int | float):
        shape = [shape]  # A single polygon, without a list around it.
    return [np.asarray(polygon, np.float64) for polygon in shape]


def _segments(annotations: Iterable[Mapping[str, Any]]) -> dict[Any, Scene]:
    """Panoptic segments by image id."""
    scenes = {}
    for annotation in annotations:
        regions, crowds = [], []
        for segment in annotation["segments_info"]:
            if segment.get("iscrowd"):
                crowds.append(segment["id"])
            else:
                regions.append(Region(segment["category_id"], segment["id"]))
        mask = annotation["file_name"]
        scenes[annotation["image_id"]] = Scene(regions, crowds, mask=mask)
    return scenes


def _read_segments(file: Path, scene: Scene) -> Int32[np.ndarray, "height width"]:
    """Ids of a panoptic mask, whose colours number the segments.

    Raises:
      DataError: it cannot be read, or has a segment that is not described.
    """
    colours = read_mask(file, colour=True)[..., :3]
    found, places = np.unique(number_segments(colours), return_inverse=True)
    # 0 is what nobody annotated.
    ids = dict.fromkeys([0, *scene.crowds], IGNORED)
    ids |= {region.shape: k for k, region in enumerate(scene.regions, start=1)}
    strange = [segment for segment in found.tolist() if segment not in ids]
    if strange:
        raise DataError(
            f"mask {file} has segment {strange[0]}, which its annotation does not "
            "describe; unpack COCO's panoptic annotations again"
        )
    numbers = np.array([ids[segment] for segment in found.tolist()], np.int32)
    return numbers[places].reshape(colours.shape[:2])
