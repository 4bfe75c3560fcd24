"""The part of a page that tells of evaluations: tables, curves, pictures."""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from implicit_slots.evaluation.catalogue import (
    GROUPS,
    PREFIXES,
    describe,
    rank,
    split,
)
from implicit_slots.report.plots import Line, Panel, plot
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.workdir import EVALUATION_FILE, EVALUATION_FOLDER


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what an evaluation's metrics.json holds, its `folder`, and its `lines`.

    Raises:
      UserError: if it cannot be read, in one sentence.
    """
    path = folder / EVALUATION_FILE
    told = ("title", "step", "command", "checkpoint", "images", "seconds", "date")
    found: dict[str, Any] = dict.fromkeys(told, "")
    found |= {"absent": {}, "notes": [], "pictures": [], "curves": {}}
    try:
        found |= json.loads(path.read_text())
        numbers = [(m["mean"], m.get("std")) for m in found["metrics"].values()]
        if not all(isinstance(n, float | int | None) for pair in numbers for n in pair):
            raise ValueError
        for picture in found["pictures"]:
            _ = picture["file"], picture["title"], picture["caption"]
        lines = [(curve, _line(curve)) for curve in found["curves"].values()]
        return found | {"folder": folder, "lines": lines}
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; evaluate the run") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read; evaluate again") from error


def _line(curve: Mapping[str, Any]) -> Line:
    """A curve's median with the quartiles as a band."""
    _ = curve["title"], curve["x_label"], curve["y_label"]
    x = np.asarray(curve["x"], np.int64)
    order = np.argsort(x)
    series = {
        name: np.asarray(values, np.float64)[order]
        for name, values in curve["series"].items()
    }
    edges = series.get("low"), series.get("high")
    return Line("validation", x[order], series["median"], *edges)


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns each evaluation of a run that can be read, as `read` does."""
    found = []
    for file in sorted(workdir.glob(f"{EVALUATION_FOLDER}/*/{EVALUATION_FILE}")):
        with contextlib.suppress(UserError):
            found.append(read(file.parent))
    return found


def evaluations(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns each evaluation of a run as the template takes it, its own data first."""
    files = workdir.glob(f"{EVALUATION_FOLDER}/*/{EVALUATION_FILE}")
    folders = sorted((f.parent for f in files), key=lambda f: (f.name != "test", f))
    return [_evaluation(folder) for folder in folders]


def _evaluation(folder: pathlib.Path) -> dict[str, Any]:
    try:
        record = read(folder)
    except UserError as error:
        return {"folder": folder, "problem": str(error)}
    plots = [
        Panel(curve["title"], f"{curve['y_label']} by {curve['x_label']}", plot([line]))
        for curve, line in record["lines"]
    ]
    shown = {"plots": plots, "tables": tables({"": record["metrics"]}), "problem": ""}
    return record | shown


def tables(records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a table per group: a row per metric, a column per kind of mask or image.

    Args:
      records: per group of runs its metrics, `{name: {mean, std, count}}`; the key is
        shown above its columns, "" for a single run.

    Returns:
      Of each table `heading`, `columns` and `rows`: each a metric and, per column, what
      was found (or None) and the usual count there.
    """
    names = sorted({name for found in records.values() for name in found}, key=rank)
    by_group: dict[str, list[str]] = {group: [] for group in (*GROUPS, "")}
    for name in names:
        by_group[describe(name).group].append(name)
    usual = {
        title: max((m.get("count", 0) for m in metrics.values()), default=0)
        for title, metrics in records.items()
    }
    found = []
    for group, names in by_group.items():
        columns = [(title, prefix) for prefix in _prefixes(names) for title in records]
        rows = [
            (
                describe(row),
                [
                    (records[title].get(f"{prefix}/{row}".lstrip("/")), usual[title])
                    for title, prefix in columns
                ],
            )
            for row in dict.fromkeys(split(name)[1] for name in names)
        ]
        headings = [_heading(*column) for column in columns]
        if rows:
            found.append(
                {"heading": group or "Other", "columns": headings, "rows": rows}
            )
    return found


def _prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes of names, in the order of the catalogue, then by alphabet."""
    found = {split(name)[0] for name in names}
    return [p for p in PREFIXES if p in found] + sorted(found - PREFIXES.keys())


def _heading(title: str, prefix: str) -> str:
    kind = PREFIXES.get(prefix, prefix)
    return ": ".join(filter(None, (title, kind))) or "value"
