"""COCO's polygons, run-length codes and panoptic colours to pixels."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from implicit_slots.data.source import DataError


def import_pycocotools() -> ModuleType:
    """The package's masks, which draw polygons as COCO does.

    Raises:
      DataError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(
            "COCO's instances are drawn by pycocotools, which is not installed: run "
            "pip install pycocotools, or set --config.data.masks=none"
        ) from error
    return mask


def number_segments(
    colours: UInt8[np.ndarray, "height width 3"],
) -> Int32[np.ndarray, "height width"]:
    """The segments of a panoptic mask: R + 256 G + 65536 B.

    Source: https://cocodataset.org/#format-data.
    """
    return colours.astype(np.int32) @ np.array([1, 256, 65536], np.int32)


def draw_polygons(
    tools: Any, polygons: list[np.ndarray], width: int, height: int
) -> Bool[np.ndarray, "height width"]:
    """The pixels that the polygons of one instance enclose together.

    Args:
      tools: `import_pycocotools()`.
      polygons: each a list of corners x, y, x, y, … in pixels.
      width: of the frame.
      height: of the frame.

    Raises:
      ValueError: they are not polygons of this frame.
    """
    for polygon in polygons:
        # pycocotools would take any number, and memory in proportion.
        if (
            polygon.ndim != 1
            or len(polygon) % 2
            or not np.all(np.abs(polygon) <= 10 * max(width, height))
        ):
            raise ValueError("not a list of coordinates x, y, … in the frame")
    # It would take four numbers for a box; two corners enclose nothing.
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]
    if not polygons:
        return np.zeros((height, width), bool)
    code = tools.merge(tools.frPyObjects(polygons, height, width))
    return decode_runs({**code, "counts": code["counts"].decode()}, width, height)


def decode_runs(
    code: Mapping[str, Any], width: int, height: int
) -> Bool[np.ndarray, "height width"]:
    """The pixels of a run-length code: lengths of runs outside, inside, … by columns.

    Not left to pycocotools, which gives pixels by chance for runs of a wrong sum.

    Args:
      code: `size`, height and width, and `counts`, a list or compressed text.
      width: of the frame.
      height: of the frame.

    Raises:
      ValueError: it is not such a code, or of another size.
    """
    counts = code["counts"]
    runs = np.array(_decompress(counts) if isinstance(counts, str) else counts)
    if list(code["size"]) != [height, width]:
        raise ValueError(f"its run-length code is of size {code['size']}")
    if runs.ndim != 1 or np.any(runs < 0) or np.sum(runs) != height * width:
        raise ValueError("its run-length code does not fill the frame")
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return inside.reshape(width, height).T


def _decompress(text: str) -> list[int]:
    """Run lengths from COCO's compressed code.

    As in pycocotools' maskApi: each character less 48 has five bits of a number, lowest
    first, and a sixth that says whether more follow; the last one's fifth bit is the
    sign; from the fourth number on it is the difference from the run before last.
    """
    runs: list[int] = []
    number, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its run-length code has a character {character!r}")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number, shift = 0, 0
    if shift:
        raise ValueError("its run-length code is cut off")
    return runs
