"""How studies draw: lines with their seeds, values by arm, pictures by step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.studies.runs import PROBE_FOLDER, Done
from experiments.studies.study import Table
from implicit_slots.drawing import grids
from implicit_slots.drawing.figures import LINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = Callable[["Axes"], None]


def panels(*draw: Panel, columns: int = 3) -> "Figure":
    """Returns a figure of panels, row by row."""
    from matplotlib.figure import Figure

    columns = min(columns, len(draw))
    rows = math.ceil(len(draw) / columns)
    figure = Figure(figsize=(4.1 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, draw, strict=False):
        panel(axis)
        axis.tick_params(which="both", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
        axis.title.set_size(9)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6.5, frameon=False)
    for axis in axes[len(draw) :]:
        axis.set_visible(False)
    return figure


def style(place: int) -> dict[str, Any]:
    """Colour and dash of the line in this place; past five, paler and with a marker."""
    colour, dash = LINES[place % len(LINES)]
    again = place // len(LINES)
    return {"color": colour, "ls": dash, "marker": ("", "o", "s", "^")[again], "ms": 3}


def along(
    table: Table,
    metric: str,
    label: str,
    *,
    split: str | None = None,
    arms: Sequence[str] | None = None,
    log: bool = False,
    title: str = "",
) -> Panel:
    """A metric along training: the median over seeds, thin lines for the seeds.

    Args:
      table: the study's.
      metric: of which.
      label: of the axis, with unit.
      split: of the metric.
      arms: which; all if not given.
      log: a logarithmic axis.
      title: of the panel.
    """

    def draw(axis: "Axes") -> None:
        for place, arm in enumerate(arms or table.arms()):
            curves = table.curves(arm, metric, split)
            for x, y in curves.values():
                colour = style(place)["color"]
                axis.plot(x, y, lw=0.5, alpha=0.4, color=colour)
            # Runs that stopped early leave the median to the others.
            steps = sorted({int(x) for xs, _ in curves.values() for x in xs})
            middle = [
                np.nanmedian(
                    [y[xs == step][0] for xs, y in curves.values() if step in xs]
                )
                if any(np.isfinite(y[xs == step]).any() for xs, y in curves.values())
                else math.nan
                for step in steps
            ]
            axis.plot(steps, middle, lw=1.4, label=arm, **style(place))
        if log:
            axis.set_yscale("log")
        axis.set(xlabel="training step", ylabel=label, title=title)

    return draw


def by_arm(
    table: Table,
    metric: str,
    label: str,
    *,
    arms: Sequence[str] | None = None,
    log: bool = False,
    title: str = "",
) -> Panel:
    """The last value of every run, by arm: a dot a run, a cross where it diverged."""

    def draw(axis: "Axes") -> None:
        names = list(arms or table.arms())
        for place, arm in enumerate(names):
            values = np.array(list(table.last(arm, metric).values()))
            known = values[np.isfinite(values)]
            colour = LINES[0][0]
            axis.plot(np.full(len(known), place), known, "o", ms=4, color=colour)
            if len(known):
                axis.plot(place, np.median(known), "_", ms=16, color="black")
            for lost in range(len(values) - len(known)):
                axis.plot(
                    place + 0.12 * lost,
                    0.97,
                    "x",
                    color=LINES[1][0],
                    transform=axis.get_xaxis_transform(),
                )
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
        axis.set_xlim(-0.5, len(names) - 0.5)
        if log:
            axis.set_yscale("log")
        axis.set(ylabel=label, title=title)

    return draw


def against(
    table: Table,
    lines: Mapping[str, Mapping[float, str]],
    metric: str,
    labels: tuple[str, str],
    *,
    log: bool = False,
    title: str = "",
) -> Panel:
    """The last value over a number that arms differ by.

    Args:
      table: the study's.
      lines: for each line the arm at each number.
      metric: of which.
      labels: of the two axes.
      log: a logarithmic axis of values.
      title: of the panel.
    """

    def draw(axis: "Axes") -> None:
        for place, (name, by_number) in enumerate(lines.items()):
            xs = sorted(by_number)
            values = [list(table.last(by_number[x], metric).values()) for x in xs]
            for x, found in zip(xs, values, strict=True):
                axis.plot([x] * len(found), found, ls="", **_dot(place))
            middle = [
                np.nanmedian(v) if np.isfinite(v).any() else math.nan for v in values
            ]
            axis.plot(xs, middle, lw=1.4, label=name, **style(place))
        if log:
            axis.set_yscale("log")
        axis.set(xlabel=labels[0], ylabel=labels[1], title=title)

    return draw


def over_counts(
    table: Table,
    metric: str,
    counts: Iterable[int],
    labels: tuple[str, str],
    *,
    log_x: bool = False,
    log: bool = False,
) -> Panel:
    """The last values of "METRIC@COUNT" over the counts, medians over seeds, by arm.

    Args:
      table: the study's.
      metric: what stands before the "@".
      counts: at which it may have been measured.
      labels: of the two axes.
      log_x: a logarithmic axis of counts.
      log: a logarithmic axis of values.
    """

    def draw(axis: "Axes") -> None:
        for place, arm in enumerate(table.arms()):
            values = {n: table.last(arm, f"{metric}@{n}").values() for n in counts}
            middle = {n: np.nanmedian([*found]) for n, found in values.items() if found}
            axis.plot([*middle], [*middle.values()], label=arm, **style(place))
        if log_x:
            axis.set_xscale("log")
        if log:
            axis.set_yscale("log")
        axis.set(xlabel=labels[0], ylabel=labels[1])

    return draw


def _dot(place: int) -> dict[str, Any]:
    return {"color": style(place)["color"], "marker": "o", "ms": 3, "alpha": 0.6}


def scatter(
    table: Table, x: str, y: str, labels: tuple[str, str], *, title: str = ""
) -> Panel:
    """Every run's last values of two metrics, a colour an arm."""

    def draw(axis: "Axes") -> None:
        for place, arm in enumerate(table.arms()):
            xs, ys = table.last(arm, x), table.last(arm, y)
            seeds = sorted(xs.keys() & ys.keys())
            marker = "osD^v<>PX*"[place % 10]
            axis.plot(
                [xs[seed] for seed in seeds],
                [ys[seed] for seed in seeds],
                ls="",
                marker=marker,
                ms=5,
                color=LINES[place % len(LINES)][0],
                alpha=0.8,
                label=arm,
            )
        axis.set(xlabel=labels[0], ylabel=labels[1], title=title)

    return draw


def arrays_of(one: Done, probe: str) -> dict[str, np.ndarray]:
    """The arrays that a probe left; nothing if the run diverged before it."""
    path = one.workdir / PROBE_FOLDER / f"{probe}.npz"
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)


def steps_of(arrays: Mapping[str, np.ndarray], kind: str) -> list[int]:
    """At which steps there are pictures of a kind."""
    names = (name.split("/") for name in arrays if name.startswith(f"{kind}/"))
    return sorted(int(step) for _, step in names)


def blank(
    rows: int, columns: int, size: tuple[float, float]
) -> tuple["Figure", np.ndarray]:
    """Returns a figure with places for pictures, [rows, columns], without axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    return figure, axes


def montage(
    table: Table, arms: Sequence[str], *, kind: str = "attention", rows: int = 2
) -> "Figure":
    """Pictures of the first seed by training step: renders, then masks as colours.

    Args:
      table: the study's.
      arms: which.
      kind: "attention" or "decoder": whose masks.
      rows: how many images of each arm.
    """
    found = {arm: arrays_of(table.runs(arm)[0], "pictures") for arm in arms}
    found = {arm: arrays for arm, arrays in found.items() if steps_of(arrays, kind)}
    columns = max((len(steps_of(a, kind)) for a in found.values()), default=1)
    lines = max(rows * len(found), 1)
    size = 2 * columns + 1.4, 1.05 * lines + 0.4
    figure, axes = blank(lines, 2 * columns + 1, size)
    for block, (arm, arrays) in enumerate(found.items()):
        for row in range(rows):
            line = axes[block * rows + row]
            image = arrays["image"][row]
            line[0].imshow(image)
            line[0].set_title(arm if row == 0 else "", fontsize=7, loc="left")
            for column, step in enumerate(steps_of(arrays, kind)):
                masks = arrays[f"{kind}/{step}"][row]
                render = arrays.get(f"slots/{step}")
                left, right = line[1 + 2 * column], line[2 + 2 * column]
                if render is not None:
                    left.imshow(np.clip(render[row], 0, 1))
                right.imshow(coloured(masks, image.shape[0]))
                if row == 0:
                    left.set_title(f"step {step:,}", fontsize=7)
    return figure


def coloured(masks: np.ndarray, side: int) -> np.ndarray:
    """Masks [slots, rows, columns] as one picture, each slot in its colour."""
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(colour) for colour in grids.PALETTE])
    shares = np.einsum(
        "src,sk->rck", masks, colours[np.arange(len(masks)) % len(colours)]
    )
    times = max(side // shares.shape[0], 1)
    return np.clip(shares.repeat(times, axis=0).repeat(times, axis=1), 0, 1)
