"""One page that shows a model's masks of a user's images."""

import pathlib
from collections.abc import Sequence

from implicit_slots.report.render import render
from implicit_slots.runtime.files import write_atomically

# A page of more pictures is slow to open.
SHOWN = 100


def write_predictions(
    out: pathlib.Path, names: Sequence[str], *, heading: str, note: str
) -> pathlib.Path:
    """Writes `index.html` beside the files that `prediction.predict` wrote.

    The page refers to those files; it shows the first `SHOWN`.

    Args:
      out: the folder of the files.
      names: of the images, as they lie there.
      heading: of the page.
      note: a sentence on the model.

    Returns:
      The path of the page.
    """
    page = render(
        "predictions.html.j2",
        heading=heading,
        note=note,
        names=names[:SHOWN],
        left_out=max(len(names) - SHOWN, 0),
    )
    path = out / "index.html"
    write_atomically(path, page)
    return path
