"""One page that tells what a run did: `report.html` out of a run's directory.

The page is a function of the directory's files. It stands alone and follows the
reader's light or dark mode.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from implicit_slots.evaluation import catalogue
from implicit_slots.report.curves import Curves, kind_of, plots, read_curves
from implicit_slots.report.evaluation import evaluations
from implicit_slots.report.render import duration, number, render, to_number
from implicit_slots.runtime.config import flat
from implicit_slots.runtime.files import write_atomically
from implicit_slots.runtime.goodput import PARTS, read_starts, repeated_steps, totals
from implicit_slots.runtime.workdir import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE

EARLIER_PICTURES = 6


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` from what a run's directory holds.

    Reads `config.json` and, where they are there, `metrics.jsonl`, `summary.json`,
    `goodput.json`, `images/step_*.png` and `evaluation/`. Values that are not finite
    are marked, not drawn.

    Args:
      workdir: The run's directory.

    Returns:
      The path of the page.

    Raises:
      FileNotFoundError: If the directory holds no `config.json`.
    """
    config_path = workdir / CONFIG_FILE
    if not config_path.exists():
        raise FileNotFoundError(f"{workdir} is not a run: it holds no {CONFIG_FILE}")
    config = json.loads(config_path.read_text())
    summary_path = workdir / SUMMARY_FILE
    finished = summary_path.exists()
    summary = json.loads(summary_path.read_text()) if finished else {}
    curves, unreadable = read_curves(workdir / METRICS_FILE)
    splits = sorted({split for by_split in curves.values() for split in by_split})
    summary.pop("wall_time", None)  # The same, of goodput.json, is told in full.
    versions, command = summary.pop("versions", {}), summary.pop("command", None)
    page = render(
        "page.html.j2",
        heading=str(config.get("name") or workdir.resolve().name),
        settings=flat(config),
        finished=finished,
        numbers=_numbers(summary if finished else _last_values(curves)),
        evaluations=evaluations(workdir),
        pictures=_pictures(sorted(workdir.glob("images/step_*.png"))),
        legend=[(kind_of(split), (), split) for split in splits],
        plots=plots(curves),
        unreadable=unreadable,
        time=_time(workdir),
        command=command,
        versions=versions,
        config=json.dumps(config, indent=2),
    )
    path = workdir / "report.html"
    write_atomically(path, page)
    return path


def _last_values(curves: Curves) -> dict[str, Any]:
    """Of each curve its last value, named as in a summary."""
    numbers: dict[str, Any] = {}
    for name, by_split in curves.items():
        for split, (steps, values) in by_split.items():
            numbers["step"] = max(numbers.get("step", 0), int(steps[-1]))
            numbers[f"{split}/{name}"] = float(values[-1])
    return numbers


def _numbers(numbers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, split and value of each number, in the order of the catalogue."""
    rows = []
    for key, value in numbers.items():
        split, slash, name = key.partition("/")
        name = name if slash else key
        rows.append((name, split if slash else "", _shown(name, value)))
    return sorted(rows, key=lambda row: catalogue.rank(row[0]))


def _shown(name: str, value: Any) -> str:
    found = to_number(value)
    if found is None or isinstance(value, str):
        return str(value)
    if name == "wall_seconds" and math.isfinite(found):
        return duration(found)
    return number(found)


def _time(workdir: pathlib.Path) -> dict[str, Any]:
    """Where the time of all starts went: what a sentence and a table say of it."""
    starts = read_starts(workdir)
    seconds = totals(starts)
    whole = sum(seconds.values())
    rows = [
        (part.replace("_", " "), taken, taken / whole, PARTS[part])
        for part, taken in seconds.items()
        if whole
    ]
    return {
        "whole": whole,
        "starts": len(starts),
        "repeated": repeated_steps(starts),
        "rows": sorted(rows, key=lambda row: -row[1]),
    }


def _pictures(paths: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """The latest picture, then earlier ones from the first, evenly chosen."""
    *earlier, latest = paths or [None]
    if latest is None:
        return []
    chosen = np.linspace(0, len(earlier) - 1, min(len(earlier), EARLIER_PICTURES))
    return [_picture(path) for path in (latest, *(earlier[round(i)] for i in chosen))]


def _picture(path: pathlib.Path) -> dict[str, Any]:
    step = path.stem.removeprefix("step_")
    title = f"Step {int(step):,}" if step.isdigit() else path.stem
    return {"path": path, "title": title}
