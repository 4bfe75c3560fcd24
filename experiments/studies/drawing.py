"""How studies draw: lines with their seeds, values by arm, pictures by step.

A `Panel` draws one part of a figure from a study's table. The settings that panels take
are those of matplotlib's `Axes.set`: `yscale="log"`, `title="same time"`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.studies.runs import PROBE_FOLDER, Done
from experiments.studies.table import Curve, Table
from implicit_slots.drawing import grids
from implicit_slots.drawing.figures import LINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = Callable[["Axes", Table], None]
# What masks are scored by, always together: where slots share the ground in smears,
# foreground ARI is high and the others are low.
MASKS = {"fg_ari": "foreground ARI", "ari": "ARI", "miou": "mIoU"}


def of_masks(make: Callable[[str, str], Panel]) -> tuple[Panel, ...]:
    """Returns a panel for each score of masks, made of its name and label."""
    return tuple(make(name, label) for name, label in MASKS.items())


def figure(table: Table, *panels: Panel, columns: int = 3) -> "Figure":
    """Returns a figure of panels, row by row."""
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.1 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis, table)
        axis.set_visible(
            axis.has_data()
        )  # Of arms that were left out there is nothing.
        axis.tick_params(which="both", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
        axis.title.set_size(9)
        if names := axis.get_legend_handles_labels()[1]:
            beside: dict[str, Any] = {}
            if len(names) > 8:  # They would lie over their lines.
                beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
            axis.legend(fontsize=6.5, frameon=False, **beside)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def style(place: int) -> dict[str, Any]:
    """Colour and dash of the line in this place; past five, paler and with a marker."""
    colour, dash = LINES[place % len(LINES)]
    again = place // len(LINES)
    return {
        "color": colour,
        "ls": dash,
        "marker": ("", "o", "s", "^")[again % 4],
        "ms": 3,
    }


def middle(curves: Iterable[Curve]) -> Curve:
    """The median over seeds; runs that stopped early leave it to the others."""
    by_step: dict[int, list[float]] = {}
    for steps, values in curves:
        for step, value in zip(steps, values, strict=True):
            by_step.setdefault(int(step), []).append(value)
    steps = sorted(by_step)
    return np.array(steps), np.array([median(by_step[step]) for step in steps])


def median(values: Iterable[float]) -> float:
    """The median of what is not NaN; NaN of nothing."""
    found = np.array([*values], float)
    return float(np.nanmedian(found)) if np.isfinite(found).any() else math.nan


def along(
    metric: str,
    label: str,
    split: str | None = None,
    *,
    beginning: str = "",
    **settings: Any,
) -> Panel:
    """A metric along training: the median over seeds, thin lines for the seeds.

    Args:
      metric: of which.
      label: of the axis, with unit.
      split: of the metric.
      beginning: of the names of the arms that are drawn.
      settings: of the axes.
    """

    def draw(axis: "Axes", table: Table) -> None:
        arms = [arm for arm in table.arms() if arm.startswith(beginning)]
        for place, arm in enumerate(arms):
            curves = table.curves(arm, metric, split).values()
            for x, y in curves:
                axis.plot(x, y, lw=0.5, alpha=0.4, color=style(place)["color"])
            name = arm.removeprefix(beginning) if beginning.endswith(": ") else arm
            axis.plot(*middle(curves), lw=1.4, label=name, **style(place))
        axis.set(xlabel="training step", ylabel=label, **settings)

    return draw


def by_arm(metric: str, label: str, *, beginning: str = "", **settings: Any) -> Panel:
    """The last value of every run, by arm: a dot a run, a cross where it diverged.

    Args:
      metric: of which.
      label: of the axis, with unit.
      beginning: of the names of the arms that are drawn, left out below the axis.
      settings: of the axes.
    """

    def draw(axis: "Axes", table: Table) -> None:
        arms = [arm for arm in table.arms() if arm.startswith(beginning)]
        names = [arm.removeprefix(beginning) for arm in arms]
        for place, arm in enumerate(arms):
            values = np.array(list(table.last(arm, metric).values()))
            known = values[np.isfinite(values)]
            colour, lost = LINES[0][0], LINES[1][0]
            axis.plot(np.full(len(known), place), known, "o", ms=4, color=colour)
            if len(known):
                axis.plot(place, np.median(known), "_", ms=16, color="black")
            above = axis.get_xaxis_transform()
            for count in range(len(values) - len(known)):
                x = place + 0.12 * count
                axis.plot(x, 0.97, "x", color=lost, transform=above)
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
        axis.set_xlim(-0.5, max(len(names), 1) - 0.5)
        axis.set(ylabel=label, **settings)

    return draw


def over_arms(metric: str, labels: tuple[str, str], **settings: Any) -> Panel:
    """The last values of arms "NAME@NUMBER" over the number, a line a name.

    Args:
      metric: of which.
      labels: of the two axes.
      settings: of the axes.
    """

    def draw(axis: "Axes", table: Table) -> None:
        lines: dict[str, dict[float, str]] = {}
        for arm in table.arms():
            name, _, number = arm.partition("@")
            lines.setdefault(name, {})[float(number)] = arm
        for place, (name, arms) in enumerate(lines.items()):
            medians = []
            dots = {"color": style(place)["color"], "marker": "o", "ms": 3, "ls": ""}
            for number in sorted(arms):
                found = list(table.last(arms[number], metric).values())
                axis.plot([number] * len(found), found, alpha=0.6, **dots)
                medians.append(median(found))
            axis.plot(sorted(arms), medians, lw=1.4, label=name, **style(place))
        axis.set(xlabel=labels[0], ylabel=labels[1], **settings)

    return draw


def over(metrics: Mapping[int, str], labels: tuple[str, str], **settings: Any) -> Panel:
    """The last values of several metrics over a number, medians over seeds, by arm.

    Args:
      metrics: by the number; those that an arm lacks are left out.
      labels: of the two axes.
      settings: of the axes.
    """

    def draw(axis: "Axes", table: Table) -> None:
        for place, arm in enumerate(table.arms()):
            values = {n: table.last(arm, m).values() for n, m in metrics.items()}
            medians = {n: median(found) for n, found in values.items() if found}
            axis.plot([*medians], [*medians.values()], label=arm, **style(place))
        axis.set(xlabel=labels[0], ylabel=labels[1], **settings)

    return draw


def at(metric: str, counts: Iterable[int]) -> dict[int, str]:
    """The metrics "METRIC@COUNT", by the count, for `over`."""
    return {count: f"{metric}@{count}" for count in counts}


def scatter(x: str, y: str, labels: tuple[str, str]) -> Panel:
    """Every run's last values of two metrics, a colour an arm."""

    def draw(axis: "Axes", table: Table) -> None:
        for place, arm in enumerate(table.arms()):
            xs, ys = table.last(arm, x), table.last(arm, y)
            seeds = sorted(xs.keys() & ys.keys())
            axis.plot(
                [xs[seed] for seed in seeds],
                [ys[seed] for seed in seeds],
                ls="",
                marker="osD^v<>PX*"[place % 10],
                ms=5,
                color=LINES[place % len(LINES)][0],
                alpha=0.8,
                label=arm,
            )
        axis.set(xlabel=labels[0], ylabel=labels[1])

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
