"""One page that tells what a run did: `report.html` out of a run's directory.

The page stands alone (pictures as data, curves as inline SVG, no script), follows the
reader's light or dark mode, and is a function of the directory's files.
"""

import base64
import html
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from implicit_slots.data.layout import write_whole
from implicit_slots.training.report_curves import METRICS, Curve, format_number, panels

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
    curves, unreadable = _read_curves(workdir / "metrics.jsonl")

    name = str(config.get("name") or workdir.resolve().name)
    versions = summary.pop("versions", {})
    command = summary.pop("command", None)
    numbers = _flatten(summary) if finished else _last_values(curves)
    heading = "Final numbers" if finished else "Last numbers logged (not finished)"
    sections = [
        f"<header><h1>{_text(name)}</h1><p>{_text(_sentence(config))}</p></header>",
        _section(heading, _numbers_table(numbers)),
        _section("Pictures", _pictures(sorted(workdir.glob("images/step_*.png")))),
        _section("Curves", _curves(curves, unreadable)),
        _section("Run it again", command and f"<pre>{_text(command)}</pre>"),
        _section("Versions", _pairs_table(_flatten(versions))),
        "<section><details><summary>Full configuration</summary>"
        f"<pre>{_text(json.dumps(config, indent=2))}</pre></details></section>",
    ]
    page = PAGE.format(title=_text(name), style=STYLE, body="\n".join(sections))
    path = workdir / "report.html"
    write_whole(path, page)
    return path


# --- what the files say


def _read_curves(path: pathlib.Path) -> tuple[dict[str, dict[str, Curve]], int]:
    """Per metric and split its steps and values, and how many lines made no sense.

    A run that was killed and resumed logs some steps twice, of which the last counts,
    and may have left half a line.
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
            number = _number(value)
            if number is not None:
                values.setdefault(name, {}).setdefault(split, {})[step] = number
    curves = {}
    for name in sorted(values, key=_rank):
        curves[name] = {}
        for split, by_step in sorted(values[name].items()):
            steps = np.array(sorted(by_step))
            curves[name][split] = steps, np.array([by_step[s] for s in steps.tolist()])
    return curves, unreadable


def _number(value: object) -> float | None:
    """A logged value as a number (null and "NaN" as NaN), None if it is none."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


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


def _rank(name: str) -> tuple[int, str]:
    known = list(METRICS)
    return (known.index(name) if name in known else len(known), name)


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


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(heading: str, body: str | None) -> str:
    """A section, or nothing where there is nothing to show."""
    return f"<section><h2>{_text(heading)}</h2>{body}</section>" if body else ""


def _format(name: str, value: object) -> str:
    """A value as HTML."""
    number = _number(value)
    if number is None or isinstance(value, str):
        return _text(value)
    if not math.isfinite(number):
        return '<span class="bad">not finite</span>'
    if name == "wall_seconds":
        minutes, seconds = divmod(round(number), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
    return format_number(number)


def _numbers_table(numbers: Mapping[str, Any]) -> str:
    """Quantity and split, value, meaning of each number; known ones first."""
    rows = []
    for key in sorted(numbers, key=lambda key: _rank(key.rpartition("/")[2])):
        split, _, name = key.rpartition("/")
        label, meaning = METRICS.get(name, (name, ""))
        rows.append(
            f'<tr><th scope="row">{_text(label)} <span>{_text(split)}</span></th>'
            f'<td class="value">{_format(name, numbers[key])}</td>'
            f'<td class="meaning">{_text(meaning)}</td></tr>'
        )
    return f'<table class="numbers">{"".join(rows)}</table>' if rows else ""


def _pairs_table(pairs: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>'
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
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><figcaption>{_text(caption)}</figcaption><div class="scroll">'
        f'<img alt="Reconstructions and slots. {_text(caption)}" '
        f'src="data:image/png;base64,{data}"></div></figure>'
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root {
  --page: #fcfcfb; --card: #ffffff; --ink: #1d2126; --quiet: #656b74;
  --rule: #e4e6e9; --train: #2b6cb0; --validation: #c2571a; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131518; --card: #1a1d21; --ink: #e5e7ea; --quiet: #9aa1ab;
    --rule: #2d3238; --train: #6fb3f5; --validation: #f3a35f; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 0.75rem; }
h3 {
  display: flex; gap: 0.75rem; font-size: 0.95rem; margin: 0; overflow-wrap: anywhere;
}
h3 span { font-weight: 400; font-variant-numeric: tabular-nums; }
h3 :first-child { flex: 1; font-weight: 600; }
header p { max-width: 68ch; margin: 0.75rem 0 0; }
code, pre { font: 0.85em/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre {
  margin: 0; padding: 0.75rem 1rem; overflow-x: auto; background: var(--card);
  border: 1px solid var(--rule); border-radius: 6px;
}
summary { cursor: pointer; margin: 2.5rem 0 0.75rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td {
  padding: 0.35rem 1.5rem 0.35rem 0; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--rule); font-weight: 400;
}
th { font-weight: 600; }
.value { text-align: right; }
.meaning, .panel p, figcaption { color: var(--quiet); }
th span { margin-left: 0.35rem; font-weight: 400; color: var(--quiet); }
.meaning { white-space: normal; }
@media (max-width: 680px) {
  .numbers, .numbers tbody { display: block; }
  .numbers tr {
    display: grid; grid-template-columns: 1fr auto; padding: 0.35rem 0;
    border-bottom: 1px solid var(--rule);
  }
  .numbers th, .numbers td { padding: 0; border: 0; white-space: normal; }
  .numbers .meaning { grid-column: 1 / -1; font-size: 0.85rem; }
}
figure { margin: 0; }
figcaption { font-size: 0.85rem; margin-bottom: 0.25rem; }
img {
  display: block; max-width: max(100%, 640px); border-radius: 6px;
  border: 1px solid var(--rule);
}
.earlier {
  display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
}
.earlier img { max-width: 100%; }
.legend { margin: 0 0 0.75rem; font-size: 0.9rem; }
.legend span { margin-right: 1.25rem; }
.legend span::before {
  content: ""; display: inline-block; width: 1.25rem; height: 0.2rem;
  margin-right: 0.5rem; vertical-align: middle; background: currentColor;
}
.legend .train, h3 .train { color: var(--train); }
.legend .validation, h3 .validation { color: var(--validation); }
.panels {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
}
.panel {
  background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
  padding: 0.75rem 0.75rem 0.25rem; min-width: 0;
  display: flex; flex-direction: column;
}
.panel p { margin: 0 0 0.25rem; font-size: 0.8rem; }
svg { display: block; width: 100%; height: auto; margin-top: auto; }
svg text { font-size: 10.5px; fill: var(--quiet); }
.grid { stroke: var(--rule); fill: none; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.line.train { stroke: var(--train); }
.line.validation { stroke: var(--validation); }
.band { opacity: 0.22; }
circle.train, .band.train { fill: var(--train); }
circle.validation, .band.validation { fill: var(--validation); }
.notfinite { stroke: var(--bad); stroke-width: 1.4; fill: none; }
.bad { color: var(--bad); }
"""
