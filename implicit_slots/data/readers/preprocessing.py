"""Picture files to arrays at the training resolution."""

import re

import numpy as np
from jaxtyping import Int32, Integer, UInt8
from PIL import Image

from implicit_slots.data.source import DataError

Box = tuple[int, int, int, int]
FIXED_CROP = re.compile(r"center-(\d+)")


def crop_box(crop: str, width: int, height: int) -> Box:
    """The part of a frame that is kept: (left, top, right, bottom) in pixels.

    Args:
      crop: "center", the largest centred square; "center-N", N x N pixels of the
        middle; "clevr", IODINE's square around CLEVR's objects; "none", the whole
        frame, which resizing then makes square.
      width: of the frame.
      height: of the frame.

    Raises:
      DataError: there is no such crop, or it would leave the frame.
    """
    if (fixed := FIXED_CROP.fullmatch(crop)) is not None:
        side = int(fixed[1])
        if not 0 < side <= min(width, height):
            raise DataError(
                f"the crop '{crop}' does not fit a frame of {width} x {height} "
                "pixels; use --config.data.crop=center"
            )
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side
    match crop:
        case "none":
            return 0, 0, width, height
        case "center":
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            return left, top, left + side, top + side
        case "clevr":
            # IODINE: rows 29:221 and columns 64:256 of 240x320. Blender's field of
            # view goes by the width and is centred, so that on frames of another
            # shape (320x480) the same view is this far from the centre.
            scale = width / 320
            left, right = round(64 * scale), round(256 * scale)
            top = round(height / 2 + (29 - 120) * scale)
            bottom = top + right - left
            if top < 0 or bottom > height:
                raise DataError(
                    f"the crop 'clevr' does not fit a frame of {width} x {height} "
                    "pixels; use --config.data.crop=center"
                )
            return left, top, right, bottom
        case _:
            raise DataError(
                f"unknown crop '{crop}'; choose from 'center', 'center-N' (N pixels), "
                "'clevr', 'none'"
            )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB; transparency is dropped, not blended."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode == "P":  # Pillow warns of palettes with transparency otherwise.
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_image(
    image: Image.Image, box: Box, resolution: int
) -> UInt8[np.ndarray, "resolution resolution 3"]:
    """Crops and resizes a picture with Pillow's Lanczos, which is anti-aliased."""
    resized = to_rgb(image).resize(
        (resolution, resolution), Image.Resampling.LANCZOS, box
    )
    return np.array(resized)


def resize_mask(
    mask: Integer[np.ndarray, "height width"], box: Box, resolution: int
) -> Int32[np.ndarray, "resolution resolution"]:
    """Crops and resizes an array of ids; every pixel takes its nearest id."""
    picture = Image.fromarray(mask.astype(np.int32))
    resized = picture.resize((resolution, resolution), Image.Resampling.NEAREST, box)
    return np.array(resized)


def into_crop(
    objects: dict[str, np.ndarray], box: Box, resolution: int
) -> dict[str, np.ndarray]:
    """Objects with `pixel_position`, if any, moved from the frame into its crop."""
    if "pixel_position" not in objects:
        return objects
    left, top, right, bottom = box
    scale = resolution / np.array([right - left, bottom - top], np.float32)
    moved = (objects["pixel_position"] - np.array([left, top], np.float32)) * scale
    moved = np.where(objects["present"][:, None], moved, 0).astype(np.float32)
    return {**objects, "pixel_position": moved}
