"""One page that shows what a model makes of a user's images."""

import base64
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from implicit_slots.report.render import render
from implicit_slots.runtime.files import write_atomically

# A page of more images is slow to open.
SHOWN = 100
# The height of a picture on the page; larger ones are scaled down.
HEIGHT = 240


class Shown(NamedTuple):
    """An image on the page.

    Attributes:
      name: of the files beside the page, without their endings.
      pictures: as text for the page (`picture`), by what they are.
    """

    name: str
    pictures: Mapping[str, str]


def picture(image: Image.Image) -> str:
    """Returns a picture as part of a page, at most `HEIGHT` pixels high."""
    width = max(round(image.width * HEIGHT / image.height), 1)
    small = image.height <= HEIGHT
    shown = image if small else image.resize((width, HEIGHT), Image.Resampling.LANCZOS)
    kind = "png" if small else "jpeg"
    encoded = io.BytesIO()
    shown.convert("RGB").save(encoded, kind, quality=88)
    text = base64.b64encode(encoded.getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{text}"


def write_predictions(
    out: pathlib.Path,
    shown: Sequence[Shown],
    *,
    heading: str,
    note: str,
    command: str,
    left_out: Sequence[str],
    more: int,
) -> pathlib.Path:
    """Writes `index.html` beside the files that `prediction.write` wrote.

    Args:
      out: the folder of the files.
      shown: images, as many as are to be seen.
      heading: of the page.
      note: a sentence on the model.
      command: that makes the same again.
      left_out: a sentence on each image that could not be read.
      more: how many images are in the folder that the page does not show.

    Returns:
      The path of the page.

    Raises:
      OSError: it cannot be written.
    """
    page = render(
        "predictions.html.j2",
        heading=heading,
        note=note,
        command=command,
        shown=shown,
        left_out=left_out,
        more=more,
    )
    path = out / "index.html"
    write_atomically(path, page)
    return path
