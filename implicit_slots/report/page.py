"""One page that tells what a run did: `report.html` out of a run's directory.

The page stands alone (pictures as data, curves as inline SVG, no script), follows the
reader's light or dark mode, and is a function of the directory's files.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from implicit_slots.report import evaluation
from implicit_slots.report.curves import (
    METRICS,
    Curve,
    panels,
    rank,
    read_curves,
    to_number,
)
from implicit_slots.report.style import (
    details,
    escape,
    figure,
    format_duration,
    format_number,
    page,
    preformatted,
    section,
)
from implicit_slots.runtime.files import write_whole

EARLIER_PICTURES = 6


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` from what a run's directory holds.

    Reads `config.json` and, where they are there, `metrics.jsonl`, `summary.json` and
    `images/step_*.png`. Values that are not finite are marked, not drawn.

    Args:
      workdir: The run's directory.

    Returns:
      The path of the page.

    Raises:
      FileNotFoundError: If the directory holds no `config.json`.
    """
    config_path = workdir / "config.json"
    if not config_path.exists():
        raise FileNotFoundError(f"{workdir} is not a run: it holds no config.json")
    config = json.loads(config_path.read_text())
    summary_path = workdir / "summary.json"
    finished = summary_path.exists()
    summary = json.loads(summary_path.read_text()) if finished else {}
    curves, unreadable = read_curves(workdir / "metrics.jsonl")

    name = str(config.get("name") or workdir.resolve().name)
    versions = summary.pop("versions", {})
    command = summary.pop("command", None)
    numbers = _flatten(summary) if finished else _last_values(curves)
    heading = "Final numbers" if finished else "Last numbers logged (not finished)"
    sections = [
        f"<header><h1>{escape(name)}</h1><p>{escape(_sentence(config))}</p></header>",
        section(heading, _numbers_table(numbers)),
        *evaluation.sections(workdir),
        section("Pictures", _pictures(sorted(workdir.glob("images/step_*.png")))),
        section("Curves", _curves(curves, unreadable)),
        section("Run it again", command and preformatted(command)),
        section("Versions", _pairs_table(_flatten(versions))),
        details("Full configuration", preformatted(json.dumps(config, indent=2))),
    ]
    path = workdir / "report.html"
    write_whole(path, page(name, *sections))
    return path


# --- what the files say


def _last_values(curves: Mapping[str, Mapping[str, Curve]]) -> dict[str, Any]:
    """Of each curve its last value, named as in a summary."""
    numbers: dict[str, Any] = {}
    for name, splits in curves.items():
        for split, (steps, values) in splits.items():
            numbers["step"] = max(numbers.get("step", 0), int(steps[-1]))
            numbers[f"{split}/{name}"] = float(values[-1])
    return numbers


def _flatten(tree: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """Nested dictionaries as one, with joined keys."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            inner = _flatten(value, separator)
            flat |= {f"{key}{separator}{rest}": leaf for rest, leaf in inner.items()}
        else:
            flat[key] = value
    return flat


def _sentence(config: Mapping[str, Any]) -> str:
    """What was run, from those of the usual keys that the configuration has."""
    flat = _flatten(config, ".")

    def clause(template: str, *keys: str) -> str:
        values = [flat.get(key) for key in keys]
        if None in values:
            return ""
        plain = (f"{v:,}" if isinstance(v, int) else str(v) for v in values)
        return template.format(*plain)

    sentence = clause("{}", "model.name").upper() or "A model"
    sentence += clause(" with {} slots", "model.num_slots")
    sentence += clause(", trained on {}", "data.name")
    sentence += clause(" at {0} x {0} pixels", "data.resolution")
    sentence += clause(" for {} steps", "num_steps")
    sentence += clause(" of {} images", "batch_size")
    sentence += clause(", seed {}", "seed") + "."
    if solver := clause("{}", "model.solver.name"):
        sentence += f" Forward: {solver}"
        sentence += clause(", at most {} steps", "model.solver.max_steps") + "."
    if adjoint := clause("{}", "model.adjoint.name"):
        sentence += f" Backward: {adjoint}"
        if adjoint == "neumann":
            sentence += clause(", terms: {}", "model.adjoint.terms")
        sentence += "."
    return sentence


# --- HTML


def _format(name: str, value: object) -> str:
    """A value as HTML."""
    number = to_number(value)
    if number is None or isinstance(value, str):
        return escape(value)
    if not math.isfinite(number):
        return '<span class="bad">not finite</span>'
    if name == "wall_seconds":
        return format_duration(number)
    return format_number(number)


def _numbers_table(numbers: Mapping[str, Any]) -> str:
    """Quantity and split, value, meaning of each number; known ones first."""
    rows = []
    for key in sorted(numbers, key=lambda key: rank(key.rpartition("/")[2])):
        split, _, name = key.rpartition("/")
        label, meaning = METRICS.get(name, (name, ""))
        rows.append(
            f'<tr><th scope="row">{escape(label)} <span>{escape(split)}</span></th>'
            f'<td class="value">{_format(name, numbers[key])}</td>'
            f'<td class="meaning">{escape(meaning)}</td></tr>'
        )
    return f'<table class="numbers">{"".join(rows)}</table>' if rows else ""


def _pairs_table(pairs: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in pairs.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>' if rows else ""


def _curves(curves: Mapping[str, Mapping[str, Curve]], unreadable: int) -> str:
    """The plots, and what could not be read."""
    body = panels(curves) if curves else "<p>Nothing is logged yet.</p>"
    if unreadable:
        body += f'<p class="bad">Unreadable lines of metrics.jsonl: {unreadable}</p>'
    return body


def _pictures(paths: Sequence[pathlib.Path]) -> str:
    """The latest picture, then earlier ones from the first, evenly chosen."""
    if not paths:
        return ""
    *earlier, latest = paths
    chosen = np.linspace(0, len(earlier) - 1, min(len(earlier), EARLIER_PICTURES))
    small = "".join(_figure(earlier[round(index)]) for index in chosen)
    return _figure(latest) + f'<div class="earlier">{small}</div>'


def _figure(path: pathlib.Path) -> str:
    step = path.stem.removeprefix("step_")
    caption = f"Step {int(step):,}" if step.isdigit() else path.stem
    return figure(path, caption)
