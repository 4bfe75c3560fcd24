"""Curves as Matplotlib's SVG, in the colours of the page that they stand on."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from implicit_slots.drawing.figures import encode

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BUCKETS = 240  # points of a line; more records than that show as a band
MAX_DOTS = 60  # validation points up to this number are dotted
CONSTANT = 1e-3  # relative variation that is drawn as none
WIDTH = 1.6  # of a line, in points
LOG_RANGE = 100  # a curve of positive values that spans this factor is logarithmic
SIZE = 5.0, 2.64  # inches: the page stretches a plot to its panel's width
FRAME = 0.133, 0.117, 0.828, 0.83  # left, bottom, width, height, of the whole

# Kind of line → its dashes. Each kind is a colour of style.css.
KINDS: dict[str, tuple[float, ...]] = {
    "train": (),
    "validation": (),
    "series-0": (),
    "series-1": (7, 3),
    "series-2": (2, 2.5),
    "series-3": (9, 3, 2, 3),
    "series-4": (4, 2),
    "series-5": (12, 3),
}
SERIES = [(kind, dashes) for kind, dashes in KINDS.items() if "series" in kind]
# Matplotlib knows no CSS: it draws in placeholders, which become the page's colours.
COLOURS = {
    name: f"#0000{place:02x}"
    for place, name in enumerate((*KINDS, "quiet", "rule", "bad"), start=1)
}


class Line(NamedTuple):
    """A line of a plot; it breaks where a value is not finite, which is marked.

    Attributes:
      kind: of `KINDS`.
      x: where its points are, ascending.
      y: how high; as long as `x`.
      low: the lower edge of a band around it, or None.
      high: the upper edge, or None.
    """

    kind: str
    x: Int[np.ndarray, " points"]
    y: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"] | None = None
    high: Float[np.ndarray, " points"] | None = None


class Panel(NamedTuple):
    """A plot and what stands above it: title, note, the metric's name in files.

    `last` has of each line its kind and last value; `bad` counts what is not finite.
    """

    title: str
    note: str
    svg: str
    name: str = ""
    last: Sequence[tuple[str, float]] = ()
    bad: int = 0


def plot(lines: Sequence[Line]) -> str:
    """Returns lines and their bands on the same axes, as SVG for an HTML page.

    The vertical axis is logarithmic where values span magnitudes. A line of very many
    points becomes its mean and a band from least to largest, per bucket of steps.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    columns = [c for line in lines for c in (line.y, line.low, line.high)]
    values = np.concatenate([column for column in columns if column is not None])
    finite = values[np.isfinite(values)]
    log = finite.size > 0 and bool(0 < finite.min() < finite.max() / LOG_RANGE)
    x_range = _widened(np.concatenate([line.x for line in lines]))
    y_range = (finite.min(), finite.max()) if log else _widened(finite, CONSTANT)

    figure = Figure(figsize=SIZE)
    axis = figure.add_axes(FRAME)
    figure.patch.set_visible(False)
    axis.patch.set_visible(False)
    axis.spines[:].set_visible(False)
    axis.set_axisbelow(True)
    axis.set(xlim=x_range, ylim=y_range, yscale="log" if log else "linear")
    axis.tick_params(left=False, bottom=False, labelcolor=COLOURS["quiet"])
    axis.grid(axis="y", color=COLOURS["rule"], lw=1, gid="grid", clip_on=False)
    axis.minorticks_off()
    steps = [1, 2, 5, 10]
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=steps, integer=True))
    vertical = LogLocator(numticks=6) if log else MaxNLocator(5, steps=steps)
    axis.yaxis.set_major_locator(vertical)
    axis.xaxis.set_major_formatter(_short)
    axis.yaxis.set_major_formatter(_short)
    for line in lines:
        _draw(axis, line)
    return _for_page(encode(figure, "svg").decode())


def _draw(axis: "Axes", line: Line) -> None:
    """One line: its band, itself, its dots, and marks where it is not finite."""
    style: Any = {"color": COLOURS[line.kind], "clip_on": False}
    bad = line.x[~np.isfinite(line.y)]
    low, high = axis.get_xlim()
    bucket = ((line.x - low) / (high - low) * (BUCKETS - 1)).astype(int)
    bad = bad[np.unique(bucket[~np.isfinite(line.y)], return_index=True)[1]]
    if len(line.x) > BUCKETS:
        line = _reduced(line, bucket)
    if line.low is not None and line.high is not None:
        band = axis.fill_between(line.x, line.low, line.high, alpha=0.22, lw=0, **style)
        band.set_gid(f"band {line.kind}")
    dashes = KINDS[line.kind]
    pattern = (0, tuple(d / WIDTH for d in dashes)) if dashes else "-"
    axis.plot(line.x, line.y, lw=WIDTH, ls=pattern, gid=f"line {line.kind}", **style)
    known = np.isfinite(line.y)
    neighbours = np.pad(known, 1)
    dots = known & ~neighbours[:-2] & ~neighbours[2:]
    if line.kind == "validation" and np.count_nonzero(known) <= MAX_DOTS:
        dots = known
    if dots.any():
        gid = f"dots {line.kind}"
        axis.plot(line.x[dots], line.y[dots], "o", ms=5, mew=0, gid=gid, **style)
    if len(bad):
        places, style["color"] = axis.get_xaxis_transform(), COLOURS["bad"]
        top = np.ones(len(bad))
        axis.plot(bad, top, "x", ms=6, gid="notfinite", transform=places, **style)


def _reduced(line: Line, bucket: Int[np.ndarray, " points"]) -> Line:
    """A point per bucket: the mean of its finite values, in their range as a band."""
    first = np.flatnonzero(np.diff(bucket, prepend=-1))
    finite = np.isfinite(line.y)
    y = np.where(finite, line.y, np.nan)
    count = np.add.reduceat(finite, first, dtype=int)
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing is finite
        mean = np.add.reduceat(np.where(finite, line.y, 0), first) / count
    low, high = np.fmin.reduceat(y, first), np.fmax.reduceat(y, first)
    return Line(line.kind, line.x[first], mean, low, high)


def _widened(values: np.ndarray, least: float = 0.0) -> tuple[float, float]:
    """The values' range; room around them where it is less than `least` of them."""
    if values.size == 0:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    size = max(abs(low), abs(high))
    if high - low > least * size and size > 1e-200:
        return low, high
    room = size / 2 if size > 1e-200 else 0.5
    return low - room, high + room


def _short(value: float, *_: object) -> str:
    """A tick's label, in thousands or millions where it would be long."""
    if 1e4 <= abs(value) < 1e9:
        return f"{value / 1e6:.5g}M" if abs(value) >= 1e6 else f"{value / 1e3:.5g}k"
    return f"{value:.5g}".replace("e-0", "e-").replace("-", "−")


def _for_page(svg: str) -> str:
    """Matplotlib's SVG as a part of HTML: classes, the page's colours and fonts."""
    svg = re.sub(r' xmlns[^ ]*="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = svg.replace('<g id="', '<g class="')  # ids would come again in each plot
    svg = re.sub(r"<[^>]*>", _short_tag, svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()


def _short_tag(tag: re.Match[str]) -> str:
    """A tag without fonts, which the page sets, and with one decimal."""
    text = re.sub(r"font[^:]*: [^;]*; ?", "", tag[0])
    return re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.1f}", text)
