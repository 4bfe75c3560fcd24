"""The part of a report that tells of evaluations: tables, curves, pictures."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from implicit_slots.evaluation.catalogue import GROUPS, METRICS, describe
from implicit_slots.report.curves import Line, chart
from implicit_slots.report.style import (
    escape,
    figure,
    format_duration,
    format_number,
    preformatted,
)
from implicit_slots.runtime.workdir import EVALUATION_FILE, EVALUATION_FOLDER

# What stands before a metric's name, and the heading of its column.
COLUMNS = {
    "": "value",
    "attention": "attention masks",
    "decoder": "decoder masks",
    "dvae": "dVAE",
    "slots": "through the slots",
    "one_left": "down to one slot",
    "shuffled": "shuffled slots",
    "shuffled/one_left": "shuffled, down to one",
}
ARROWS = {"higher": "↑", "lower": "↓"}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what an evaluation's metrics.json holds.

    Raises:
      ValueError: if it cannot be read, in one sentence.
    """
    path = folder / EVALUATION_FILE
    try:
        record = json.loads(path.read_text())
        numbers = [(m["mean"], m.get("std")) for m in record["metrics"].values()]
        if not all(isinstance(n, float | int | None) for pair in numbers for n in pair):
            raise ValueError
        _curves(record.get("curves", {}))
        for picture in record.get("pictures", ()):
            _ = picture["file"], picture["title"], picture["caption"]
        return dict.fromkeys(("label", "title", "step", "command"), "") | record
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}; evaluate the run") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read; evaluate again") from error


def sections(workdir: pathlib.Path) -> list[str]:
    """Returns a section of HTML for each evaluation of a run, its own data first."""
    folders = sorted(workdir.glob(f"{EVALUATION_FOLDER}/*/{EVALUATION_FILE}"))
    folders = sorted((f.parent for f in folders), key=lambda f: (f.name != "test", f))
    return [_section(folder) for folder in folders]


def _section(folder: pathlib.Path) -> str:
    heading = f"<h2>Evaluation: {escape(folder.name)}</h2>"
    try:
        record = read(folder)
    except ValueError as error:
        return f'<section>{heading}<p class="bad">{escape(error)}</p></section>'
    parts = [heading, f"<p>{escape(_sentence(record))}</p>"]
    parts.append(tables({"": record["metrics"]}))
    if absent := record.get("absent"):
        rows = "".join(
            f"<li>{escape(describe(name).label)}: {escape(reason)}</li>"
            for name, reason in absent.items()
        )
        parts.append(f"<p>Not measured:</p><ul>{rows}</ul>")
    parts += [f"<p>{escape(note)}</p>" for note in record.get("notes", ())]
    parts += [
        figure(folder / p["file"], p["title"], p["caption"])
        for p in record.get("pictures", ())
    ]
    if curves := _curves(record.get("curves", {})):
        text = "Lines are medians over images, bands from first to third quartile."
        parts.append(f'<p>{text}</p><div class="panels">{curves}</div>')
    parts.append(f"<p>To evaluate again:</p>{preformatted(record['command'])}")
    return f"<section>{''.join(parts)}</section>"


def _sentence(record: Mapping[str, Any]) -> str:
    text = f"{record['title']}: step {record['step']}"
    if record.get("checkpoint") == "best":
        text += " (the best by validation loss)"
    if isinstance(record.get("images"), int):
        text += f", {record['images']:,} images"
    if isinstance(record.get("seconds"), float | int):
        text += f", in {format_duration(record['seconds'])}"
    if record.get("date"):
        text += f", {record['date']}"
    return (
        f"{text}. Means over images ± their standard deviation; counts differ where "
        "a number is not defined for every image, or few images are used (n). "
        "↑ higher is better, ↓ lower is better."
    )


def tables(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table per group: a row per metric, a column per kind of mask or image.

    Args:
      records: per group of runs its metrics, `{name: {mean, std, count}}`; the key is
        shown above its columns, "" for a single run.
    """
    parts = []
    most = {
        title: max((m.get("count", 0) for m in metrics.values()), default=0)
        for title, metrics in records.items()
    }
    for group in (*GROUPS, ""):
        names = _ordered({n for metrics in records.values() for n in metrics}, group)
        if not names:
            continue
        lasts = list(dict.fromkeys(name.rpartition("/")[2] for name in names))
        prefixes = [
            prefix
            for prefix in [*COLUMNS, *sorted({n.rpartition("/")[0] for n in names})]
            if any(name.rpartition("/")[0] == prefix for name in names)
        ]
        columns = [
            (title, prefix) for prefix in dict.fromkeys(prefixes) for title in records
        ]
        head = "".join(
            f'<th class="value" scope="col">{escape(_heading(title, prefix))}</th>'
            for title, prefix in columns
        )
        rows = "".join(_row(last, columns, records, most) for last in lasts)
        parts.append(
            f"<h3>{escape(group or 'Other')}</h3>"
            '<div class="scroll"><table class="metrics"><thead><tr><th></th>'
            f"{head}<th></th></tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return "".join(parts)


def _heading(title: str, prefix: str) -> str:
    kind = COLUMNS.get(prefix, prefix)
    if not title:
        return kind
    return title if prefix == "" else f"{title}: {kind}"


def _ordered(names: set[str], group: str) -> list[str]:
    """Those of a group, in the order of the catalogue."""
    known = list(METRICS)

    def rank(name: str) -> tuple[int, str]:
        last = name.rpartition("/")[2]
        return (known.index(last) if last in known else len(known), name)

    return sorted((n for n in names if describe(n).group == group), key=rank)


def _row(
    last: str,
    columns: list[tuple[str, str]],
    records: Mapping[str, Mapping[str, Any]],
    most: Mapping[str, int],
) -> str:
    metric = describe(last)
    cells = "".join(
        '<td class="value">'
        + cell(records[title].get(f"{prefix}/{last}".lstrip("/")), most[title])
        + "</td>"
        for title, prefix in columns
    )
    unit = " · ".join(part for part in (metric.unit, metric.range) if part)
    label = escape(metric.label)
    if metric.better:  # The arrow stays on the last word's line.
        label += f"&nbsp;{ARROWS[metric.better]}"
    return (
        f'<tr><th scope="row">{label}<span>{escape(unit)}</span></th>{cells}'
        f'<td class="meaning">{escape(metric.meaning)}</td></tr>'
    )


def cell(found: Mapping[str, Any] | None, usual: int) -> str:
    """Returns mean ± spread, and of how many values where they are not the usual."""
    if found is None:
        return ""
    mean, spread = found["mean"], found.get("std")
    if mean is None or not math.isfinite(mean):
        return "none"
    text = format_number(mean)
    if spread is not None and math.isfinite(spread):
        text += f" <span>± {float(spread):.2g}</span>"
    if (count := found.get("count", usual)) != usual:
        text += f' <span class="count">n = {count:,}</span>'
    return f"<span>{text}</span>"


def _curves(curves: Mapping[str, Any]) -> str:
    """A plot of each curve: its median with the quartiles as a band."""
    plots = ""
    for curve in curves.values():
        x = np.asarray(curve["x"], np.int64)
        order = np.argsort(x)
        columns = {
            name: np.asarray(values, np.float64)[order]
            for name, values in curve["series"].items()
        }
        line = Line(
            "validation",
            x[order],
            columns["median"],
            columns.get("low"),
            columns.get("high"),
        )
        note = f"{curve['y_label']} by {curve['x_label']}"
        plots += chart(curve["title"], note, [line])
    return plots
