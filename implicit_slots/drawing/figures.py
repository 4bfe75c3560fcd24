"""Figures for papers: attention as heat maps, curves; the same as PNG, PDF and SVG.

Text stays text, no date is written, and the same arrays give the same bytes. Colours
are viridis and Okabe and Ito's (2008), which every kind of colour vision tells apart.
"""

import io
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Per format what it would tell of when and by what it was written.
METADATA: Mapping[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": dict.fromkeys(("CreationDate", "Producer", "Creator")),
    "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
}
SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "figure", "pdf.fonttype": 42}
_SETTING = threading.Lock()  # Matplotlib's settings are one for all threads
# Okabe and Ito's that stand out from white (the last darkened), a dash for each.
LINES = (
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#000000", ":"),
    ("#8C3B6F", (0, (5, 1, 1, 1, 1, 1))),
)
TILE = 1.1  # inches


def attention_figure(
    image: Float[np.ndarray, "batch height width 3"],
    attention: Float[np.ndarray, "batch slots height width"],
) -> "Figure":
    """Draws per image a row of heat maps, and one of them laid over the image.

    Args:
      image: in [0, 1].
      attention: each slot's share of each pixel, from 0 to 1; one scale for all.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows, slots = attention.shape[:2]
    figure = Figure(
        figsize=((slots + 1.4) * TILE, 2 * rows * TILE + 0.3), layout="constrained"
    )
    axes = figure.subplots(2 * rows, slots + 1, squeeze=False)
    grey = np.repeat(image.mean(axis=3, keepdims=True), 3, axis=3)
    colour = np.asarray(colormaps["viridis"](np.clip(attention, 0, 1)))[..., :3]
    shown = None
    for row in range(rows):
        for line in (0, 1):
            axis = axes[2 * row + line, 0]
            axis.imshow(image[row] if line == 0 else grey[row], vmin=0, vmax=1)
            for slot in range(slots):
                axis = axes[2 * row + line, slot + 1]
                if line == 0:
                    shown = axis.imshow(attention[row, slot], vmin=0, vmax=1)
                    continue
                weight = 0.25 + 0.6 * np.clip(attention[row, slot], 0, 1)[..., None]
                axis.imshow((1 - weight) * grey[row] + weight * colour[row, slot])
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    for column, axis in enumerate(axes[0]):
        axis.set_title("image" if column == 0 else f"slot {column - 1}", fontsize=8)
    for row, axis in enumerate(axes[:, 0]):
        axis.set_ylabel("laid over" if row % 2 else "heat map", fontsize=7)
    assert shown is not None
    bar = figure.colorbar(shown, ax=axes, shrink=0.5, pad=0.01)
    bar.set_label("share of attention", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def tile_figure(
    tiles: Float[np.ndarray, "rows columns height width 3"], headings: Sequence[str]
) -> "Figure":
    """Draws images in rows, with a heading over each column.

    Args:
      tiles: in [0, 1].
      headings: one per column.
    """
    from matplotlib.figure import Figure

    rows, columns = tiles.shape[:2]
    figure = Figure(figsize=(columns * TILE, rows * TILE + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column in range(columns):
            axis = axes[row, column]
            axis.imshow(np.clip(tiles[row, column], 0, 1))
            axis.set_axis_off()
            if row == 0:
                axis.set_title(headings[column], fontsize=8)
    return figure


def curve_figure(curves: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws medians with the range between the quartiles, a panel each.

    Args:
      curves: `title`, `x_label`, `y_label`, `x`, `log`, and `series` with `median`,
        `low` and `high`; None where there is no number.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 2.5), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, curve in zip(panels, curves, strict=True):
        x, (colour, dash) = curve["x"], LINES[0]
        low, middle, high = (
            np.array(curve["series"][name], np.float64)
            for name in ("low", "median", "high")
        )
        axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        axis.plot(x, middle, color=colour, ls=dash, marker=".", ms=3)
        if curve["log"]:
            axis.set_yscale("log")
        if len(x) > 1 and x[0] > x[-1]:
            axis.invert_xaxis()
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(curve["title"], fontsize=8)
        _label(axis, curve["x_label"], curve["y_label"])
    return figure


def precision_figure(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> "Figure":
    """Draws precision over recall, a line each.

    Args:
      curves: by the line's label its recall and its precision, both from 0 to 1.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 3), layout="constrained")
    axis = figure.subplots()
    for place, (label, (recall, precision)) in enumerate(curves.items()):
        colour, dash = LINES[place % len(LINES)]
        axis.plot(recall, precision, color=colour, ls=dash, lw=1.2, label=label)
    axis.set(xlim=(0, 1.01), ylim=(0, 1.03))
    _label(axis, "recall", "precision")
    axis.legend(fontsize=7, frameon=False)
    return figure


def _label(axis: "Axes", x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: "Figure", path: pathlib.Path) -> None:
    """Writes a figure beside `path` as .png, .pdf and .svg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in METADATA:
        path.with_suffix(f".{kind}").write_bytes(encode(figure, kind))


def encode(figure: "Figure", kind: str) -> bytes:
    """Returns a figure in a format of `METADATA`, 150 dots to the inch."""
    from matplotlib import rc_context

    encoded = io.BytesIO()
    with _SETTING, rc_context(SETTINGS):
        figure.savefig(encoded, format=kind, dpi=150, metadata=METADATA[kind])
    return encoded.getvalue()
