"""Curves of logged values as inline SVG, coloured by the page that they stand on."""

import dataclasses
import html
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from implicit_slots.report.style import SERIES, format_number

# Name → heading and meaning, in the order of the page. Other names follow by alphabet.
METRICS: Mapping[str, tuple[str, str]] = {
    "fg_ari": ("Foreground ARI", "agreement with the true masks; 1 same, 0 chance"),
    "ari": ("ARI", "the same with the background; 1 same, 0 chance"),
    "loss": ("Loss", "what is minimised, without penalties"),
    "mse": ("Squared error", "of the dVAE, relaxed tokens; summed over an image"),
    "dvae_mse": (
        "Squared error, dVAE",
        "of the likeliest tokens; summed over an image",
    ),
    "slot_mse": (
        "Squared error, slots",
        "generated from the slots; summed over an image",
    ),
    "cross_entropy": ("Cross-entropy", "nats, summed over an image's tokens"),
    "reconstruction": ("Squared error", "mean over values of images in [−1, 1]"),
    "huber": ("Huber distance", "of the matched sets, summed over slots"),
    "ap_inf": ("AP, any distance", "of predicted objects; all attributes right"),
    "ap_1": ("AP, within 1", "the same, less than 1 of CLEVR's units away"),
    "ap_0_5": ("AP, within 0.5", "less than 0.5 away"),
    "ap_0_25": ("AP, within 0.25", "less than 0.25 away"),
    "ap_0_125": ("AP, within 0.125", "less than 0.125 away"),
    "decoder_fg_ari": (
        "Foreground ARI, decoder",
        "of the decoder's masks with the true ones; 1 the same, 0 chance",
    ),
    "penalty_attention_entropy": ("Penalty, entropy", "nats per position, not weighed"),
    "penalty_slot_coupling": (
        "Penalty, coupling",
        "per entry of the slots, not weighed",
    ),
    "forward_residual": ("Forward residual", "‖f(z) - z‖ / ‖f(z)‖, last application"),
    "forward_steps": ("Forward steps", "evaluations of f by the solver"),
    "forward_converged": ("Converged", "share of examples that met the tolerances"),
    "forward_stagnated": ("Stagnated", "share whose residual no longer fell"),
    "forward_diverged": ("Diverged", "share of examples whose f(z) is not finite"),
    "backward_steps": ("Backward steps", "products with J, or terms of the series"),
    "backward_residual": ("Backward residual", "of the backward linear solve"),
    "backward_failed": ("Backward failures", "share that fell back to one term"),
    "spectral_radius": ("Spectral radius", "of J at the slots; mean over images"),
    "spectral_radius_max": ("Spectral radius, largest", "over the same images"),
    "spectral_norm": ("Spectral norm", "σ_max of J at the slots; mean over images"),
    "diagnosed_residual": ("Residual, diagnosed", "of the same images' slots"),
    "attention_entropy": ("Attention entropy", "1 spread evenly, 0 one slot each"),
    "largest_slot": ("Largest slot", "its share of an image"),
    "mask_similarity": (
        "Mask similarity",
        "ARI of two images' masks; 1 position alone",
    ),
    "skipped": ("Skipped steps", "so far: not finite"),
    "rate_scale": ("Rates' factor", "on a plateau"),
    "grad_norm_l2": ("Gradient, 2-norm", "of all parameters, before clipping"),
    "grad_norm_inf": ("Gradient, ∞-norm", "largest entry, before clipping"),
    "learning_rate": ("Learning rate", "of all parameters but the dVAE's"),
    "temperature": ("Temperature", "of the Gumbel-softmax"),
    "steps_per_second": ("Speed", "steps per second"),
    "data_wait": ("Waiting for data", "share of the time between validations"),
    "step": ("Steps", "updates of the parameters"),
    "parameters": ("Parameters", "numbers that are trained"),
    "wall_seconds": ("Time", "by the clock"),
}

BUCKETS = 240  # points of a curve; more records than that show as a band
MAX_DOTS = 60  # validation points up to this number are dotted
CONSTANT = 1e-3  # relative variation that is drawn as none
LOG_RANGE = 100  # a curve of positive values that spans this factor is logarithmic

# The plot's frame in the units of its viewBox.
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 346, 10, 168

Curve = tuple[Int[np.ndarray, " records"], Float[np.ndarray, " records"]]


def read_curves(path: pathlib.Path) -> tuple[dict[str, dict[str, Curve]], int]:
    """Reads metrics.jsonl: per metric and split its steps and values.

    A run that was killed and resumed logs some steps twice, of which the last counts,
    and may have left half a line.

    Returns:
      The curves, and how many lines made no sense. No file: none, and 0.
    """
    values: dict[str, dict[str, dict[int, float]]] = {}
    unreadable = 0
    lines = path.read_text().splitlines() if path.exists() else []
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
            step, split = int(record.pop("step")), str(record.pop("split"))
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            unreadable += 1
            continue
        for name, value in record.items():
            number = to_number(value)
            if number is not None:
                values.setdefault(name, {}).setdefault(split, {})[step] = number
    curves = {}
    for name in sorted(values, key=rank):
        curves[name] = {}
        for split, by_step in sorted(values[name].items()):
            steps = np.array(sorted(by_step))
            curves[name][split] = steps, np.array([by_step[s] for s in steps.tolist()])
    return curves, unreadable


def to_number(value: object) -> float | None:
    """A logged value as a number (null and "NaN" as NaN), None if it is none."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def rank(name: str) -> tuple[int, str]:
    """Sorts metrics as the page does."""
    known = list(METRICS)
    return (known.index(name) if name in known else len(known), name)


def panels(curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """One plot per metric, its splits on the same axes, in the order of `curves`.

    Args:
      curves: Per metric and split the steps, ascending, and the values, of which some
        may not be finite.

    Returns:
      HTML: a legend and a `div` of panels. The page's CSS gives the colours.
    """
    splits = sorted({split for by_split in curves.values() for split in by_split})
    legend = "".join(
        f'<span class="{_kind(split)}">{html.escape(split)}</span>' for split in splits
    )
    plots = "".join(_panel(name, by_split) for name, by_split in curves.items())
    return f'<p class="legend">{legend}</p><div class="panels">{plots}</div>'


class Line(NamedTuple):
    """A line of a chart; `x` ascends, what is not finite is marked.

    Attributes:
      kind: its colour, a class of the page's CSS: "train", "validation", or one that
        `series` gives.
      x: where its points are.
      y: how high; as long as `x`.
      low: the lower edge of a band around it, or None.
      high: the upper edge, or None.
    """

    kind: str
    x: Int[np.ndarray, " points"]
    y: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"] | None = None
    high: Float[np.ndarray, " points"] | None = None


def chart(title: str, note: str, lines: Sequence[Line]) -> str:
    """One plot of several lines as an HTML panel; `note` is text under the title."""
    return (
        f'<div class="panel"><h3><span>{html.escape(title)}</span></h3>'
        f"<p>{html.escape(note)}</p>{_plot(title, lines)}</div>"
    )


def series(index: int) -> str:
    """The colour and dashes of a series; they come round again after `SERIES`."""
    return f"series-{index % SERIES}"


def legend(names: Sequence[str]) -> str:
    """The names of series 0, 1, … as HTML, each beside a piece of its line."""
    spans = "".join(
        '<span><svg viewBox="0 0 28 6">'
        f'<path class="line {series(index)}" d="M0 3H28"/></svg>{html.escape(name)}'
        "</span>"
        for index, name in enumerate(names)
    )
    return f'<p class="legend lines">{spans}</p>'


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A range of values, linear or logarithmic, and where it lies on the page."""

    low: float
    high: float
    start: int
    end: int
    log: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        fraction = (value - low) / (high - low)
        return round(self.start + fraction * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """At most seven round values within the range, and their labels."""
        if self.log:
            first = math.ceil(math.log10(self.low) - 1e-9)
            last = math.floor(math.log10(self.high) + 1e-9)
            stride = 1 + (last - first) // 5
            return [(10.0**e, _power(e)) for e in range(first, last + 1, stride)]
        unit = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
        # The largest of 1, 2, 5 units that leaves three ticks
        fits = [m for m in (2, 5) if m * unit * 3 <= self.high - self.low]
        unit *= max(fits, default=1)
        first = math.ceil(self.low / unit - 1e-9)
        last = math.floor(self.high / unit + 1e-9)
        return [(i * unit, _short(i * unit, unit)) for i in range(first, last + 1)]


def _power(exponent: int) -> str:
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _short(value: float, unit: float) -> str:
    """A multiple of `unit`; in millions or thousands where two decimals suffice."""
    if abs(value) >= 1e9 or 0 < abs(value) < 1e-4:
        return f"{value:.3g}"
    size, suffix = 1.0, ""
    for larger, letter in ((1e3, "k"), (1e6, "M")):
        if abs(value) >= larger and unit >= larger / 100:
            size, suffix = larger, letter
    decimals = max(0, -math.floor(math.log10(unit / size) + 1e-9))
    return f"{value / size:.{decimals}f}{suffix}" if value else "0"


def _kind(split: str) -> str:
    return "train" if split == "train" else "validation"


def _panel(name: str, by_split: Mapping[str, Curve]) -> str:
    """Heading with the last values, meaning, plot."""
    label, meaning = METRICS.get(name, (name, ""))
    values = np.concatenate([values for _, values in by_split.values()])

    heading = f"<span>{html.escape(label)}</span>"
    for split, (_, logged) in by_split.items():
        last = format_number(logged[-1]) if math.isfinite(logged[-1]) else "not finite"
        heading += f'<span class="{_kind(split)}">{last}</span>'
    notes = [html.escape(meaning)] if meaning else []
    notes.append(f"<code>{html.escape(name)}</code>")
    if bad := np.sum(~np.isfinite(values)):
        notes.append(f'<span class="bad">{bad} not finite</span>')

    lines = [Line(_kind(split), *curve) for split, curve in by_split.items()]
    return (
        f'<div class="panel"><h3>{heading}</h3><p>{" · ".join(notes)}</p>'
        f"{_plot(label, lines)}</div>"
    )


def _plot(label: str, lines: Sequence[Line]) -> str:
    """Lines and their bands on the same axes, logarithmic where they span much."""
    columns = [c for line in lines for c in (line.y, line.low, line.high)]
    values = np.concatenate([column for column in columns if column is not None])
    finite = values[np.isfinite(values)]
    log = finite.size > 0 and bool(0 < finite.min() < finite.max() / LOG_RANGE)
    low, high = (finite.min(), finite.max()) if log else _widened(finite, CONSTANT)
    steps = np.concatenate([line.x for line in lines])
    x = _Axis(*_widened(steps), start=LEFT, end=RIGHT)
    y = _Axis(float(low), float(high), start=BOTTOM, end=TOP, log=log)
    marks = [
        f'<path class="grid" d="M{LEFT} {y.place(value)}H{RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y.place(value) + 3.5:.1f}" text-anchor="end">'
        f"{text}</text>"
        for value, text in y.ticks()
    ]
    marks += [
        f'<text x="{x.place(value)}" y="{BOTTOM + 16}" text-anchor="middle">{text}'
        "</text>"
        for value, text in x.ticks()
    ]
    marks += [_band(line, x, y) + _line(line.kind, line[1:3], x, y) for line in lines]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(marks)}</svg>'
    )


def _band(line: Line, x: _Axis, y: _Axis) -> str:
    """The area between `low` and `high`, where both are finite."""
    if line.low is None or line.high is None:
        return ""
    known = np.isfinite(line.low) & np.isfinite(line.high)
    columns = (line.x, line.low, line.high)
    at, low, high = (column[known].astype(float).tolist() for column in columns)
    outline = [(x.place(a), y.place(b)) for a, b in zip(at, low, strict=True)]
    outline += [(x.place(a), y.place(b)) for a, b in zip(at, high, strict=True)][::-1]
    return f'<path class="band {line.kind}" d="{_path(outline)}Z"/>' if outline else ""


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


def _line(kind: str, curve: Curve, x: _Axis, y: _Axis) -> str:
    """A curve: mean per bucket of steps, a band from least to largest, bad values."""
    steps, values = curve
    bucket = ((steps - x.low) / (x.high - x.low) * (BUCKETS - 1)).astype(int)
    pieces: list[list[tuple[float, ...]]] = [[]]  # of x, mean, least, largest
    bad = []
    for index in np.unique(bucket):
        at, inside = steps[bucket == index], values[bucket == index]
        finite = np.isfinite(inside)
        if not finite.all():
            left = x.place(float(at[~finite][0])) - 3
            bad.append(f"M{left:.1f} {TOP - 3}l6 6m0 -6l-6 6")
        if finite.any():
            good = inside[finite]
            heights = (good.mean(), good.min(), good.max())
            places = [y.place(float(height)) for height in heights]
            pieces[-1].append((x.place(float(at[finite].mean())), *places))
        else:
            pieces.append([])  # Nothing to draw: the line is broken here.

    marks = [f'<path class="notfinite" d="{"".join(bad)}"/>'] if bad else []
    for piece in filter(None, pieces):
        if len(steps) > BUCKETS:
            outline = [(a, least) for a, _, least, _ in piece]
            outline += [(a, largest) for a, _, _, largest in reversed(piece)]
            marks.append(f'<path class="band {kind}" d="{_path(outline)}Z"/>')
        points = [(a, mean) for a, mean, _, _ in piece]
        marks.append(f'<path class="line {kind}" d="{_path(points)}"/>')
        if len(piece) == 1 or (kind == "validation" and len(piece) <= MAX_DOTS):
            marks += [
                f'<circle class="{kind}" cx="{a}" cy="{b}" r="2.6"/>' for a, b in points
            ]
    return "".join(marks)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points)
