"""One page on several runs: each number with its spread over seeds."""

import contextlib
import csv
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from implicit_slots.evaluation.catalogue import describe, title
from implicit_slots.report.curves import read_curves
from implicit_slots.report.evaluation import read, records, tables
from implicit_slots.report.plots import SERIES, Line, Panel, plot
from implicit_slots.report.render import render
from implicit_slots.runtime.config import flat
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import write_atomically
from implicit_slots.runtime.workdir import (
    CONFIG_FILE,
    EVALUATION_FILE,
    EVALUATION_FOLDER,
    METRICS_FILE,
)

# What may differ between runs of one configuration.
SEED_KEYS = ("seed", "name", "data.cache", "data.path", "data.workers")
# What must be equal for numbers of two evaluations to be compared.
EVALUATED_ON = ("images", "split", "checkpoint", "step", "data", "settings")
NOT_DATA = ("cache", "path", "workers")


class _Run(NamedTuple):
    """A run of which an evaluation was looked for.

    Attributes:
      workdir: of the run.
      name: its folder's, or the whole path where two runs have the same.
      config: flat, without what may differ between seeds; None if unreadable.
      seed: of the run.
      record: its evaluation, or None.
      problem: why there is none.
    """

    workdir: pathlib.Path
    name: str
    config: dict[str, Any] | None
    seed: Any
    record: dict[str, Any] | None
    problem: str


def write_comparison(
    workdirs: Sequence[pathlib.Path], path: pathlib.Path
) -> pathlib.Path:
    """Writes a page that compares the latest evaluations of runs.

    Runs that differ in nothing but their seed are one configuration, whose numbers are
    the mean over its runs and their sample standard deviation. A run without a
    readable evaluation is counted and listed, never left out silently.

    Args:
      workdirs: of the runs, each evaluated.
      path: of the page.

    Returns:
      The path.

    Raises:
      UserError: if none of them was evaluated.
    """
    workdirs = list({workdir.resolve(): workdir for workdir in workdirs}.values())
    pattern = f"{EVALUATION_FOLDER}/*/{EVALUATION_FILE}"
    files = [file for workdir in workdirs for file in workdir.glob(pattern)]
    if not files:
        raise UserError("none of these runs has an evaluation")
    # The data that was evaluated last
    label = max(files, key=lambda file: file.stat().st_mtime).parent.name
    folders = [workdir.resolve().name for workdir in workdirs]
    told = [
        folder if folders.count(folder) == 1 else str(workdir)
        for folder, workdir in zip(folders, workdirs, strict=True)
    ]
    runs = [_read(*pair, label) for pair in zip(workdirs, told, strict=True)]
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.config, sort_keys=True), []).append(run)
    names = _names([members[0].config for members in groups.values()])
    by_name = dict(zip(names, groups.values(), strict=True))
    summary = {}
    for name, members in by_name.items():
        done = [run.record["metrics"] for run in members if run.record is not None]
        summary[f"{name} (n = {len(done)})" if done else name] = _over_runs(done)
    singles = {
        run.name: {key: m | {"std": None} for key, m in run.record["metrics"].items()}
        for run in runs
        if run.record is not None
    }
    kinds = [SERIES[place % len(SERIES)] for place in range(len(names))]
    page = render(
        "comparison.html.j2",
        heading="Comparison of runs",
        label=label,
        runs=[(name, run) for name, members in by_name.items() for run in members],
        missing=len(runs) - len(singles),
        unlike=_unlike([run.record for run in runs if run.record is not None]),
        summary=tables(summary),
        singles=tables(singles),
        plots=_plots(by_name),
        legend=[(*kind, name) for kind, name in zip(kinds, names, strict=True)],
    )
    write_atomically(path, page)
    return path


def write_table(
    workdirs: Sequence[pathlib.Path], keys: Sequence[str], path: pathlib.Path
) -> pathlib.Path:
    """Writes a CSV with a row per run and evaluation: settings, then means.

    A run without an evaluation has a row with its settings alone.

    Args:
      workdirs: of the runs.
      keys: of the configuration, that have a column.
      path: of the table.

    Returns:
      The path.
    """
    rows: list[dict[str, Any]] = []
    for workdir in workdirs:
        config: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            config = flat(json.loads((workdir / CONFIG_FILE).read_text()))
        row = {"run": workdir.name} | {key: config.get(key) for key in keys}
        found = [
            row
            | {"evaluation": record["folder"].name, "step": record["step"]}
            | {name: metric["mean"] for name, metric in record["metrics"].items()}
            for record in records(workdir)
        ]
        rows += found or [row]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with io.StringIO() as text:
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue())
    return path


def _read(workdir: pathlib.Path, name: str, label: str) -> _Run:
    config, seed, record, problem = None, None, None, ""
    folder = workdir / EVALUATION_FOLDER / label
    try:
        config = flat(json.loads((workdir / CONFIG_FILE).read_text()))
        seed = config["seed"]
        config = {
            key: value
            for key, value in config.items()
            if key not in SEED_KEYS and not key.startswith("evaluation.")
        }
    except (OSError, ValueError, KeyError, AttributeError):
        problem = "it holds no run"
    try:
        record = read(folder)
    except UserError as error:
        there = (folder / EVALUATION_FILE).exists()
        missing = f"it has no evaluation on {label}"
        problem = problem or (str(error) if there else missing)
    return _Run(workdir, name, config, seed, record, problem)


def _names(configs: Sequence[dict[str, Any] | None]) -> list[str]:
    """Names configurations by the keys in which they differ."""
    known = [config for config in configs if config is not None]
    keys = sorted({key for config in known for key in config})
    differing = [
        key for key in keys if len({json.dumps(c.get(key)) for c in known}) > 1
    ]
    more = [f"{len(differing) - 3} more"] if len(differing) > 3 else []
    names: list[str] = []
    for place, config in enumerate(configs, start=1):
        name = "unreadable"
        if config is not None:
            told = [f"{key}={config.get(key)}" for key in differing[:3]]
            name = ", ".join(told + more) or "all"
        names.append(name if name not in names else f"{name} [{place}]")
    return names


def _over_runs(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and sample standard deviation over runs, and how many had the number."""
    found = {}
    for name in dict.fromkeys(name for record in records for name in record):
        means = [record[name]["mean"] for record in records if name in record]
        values = np.array(means, np.float64)  # None becomes NaN
        values = values[np.isfinite(values)]
        found[name] = {
            "mean": float(values.mean()) if len(values) else None,
            "std": float(values.std(ddof=1)) if len(values) > 1 else None,
            "count": len(values),
        }
    return found


def _unlike(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """What the evaluations do not have in common, with the values if they are short."""
    unlike = []
    for key in EVALUATED_ON:
        values = list(dict.fromkeys(_compared(record.get(key)) for record in records))
        if len(values) > 1:
            unlike.append((key, [] if key in ("data", "settings") else values))
    return unlike


def _compared(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: value[key] for key in value if key not in NOT_DATA}
    return json.dumps(value, sort_keys=True)


def _plots(by_name: Mapping[str, Sequence[_Run]]) -> list[Panel]:
    """Of each metric that was logged in validation, a line per run."""
    lines: dict[str, list[Line]] = {}
    for place, members in enumerate(by_name.values()):
        kind, _ = SERIES[place % len(SERIES)]
        for run in members:
            for name, by_split in read_curves(run.workdir / METRICS_FILE)[0].items():
                for split in by_split.keys() - {"train"}:
                    lines.setdefault(name, []).append(Line(kind, *by_split[split]))
    return [
        Panel(title(name), describe(name).note, plot(found), name)
        for name, found in lines.items()
    ]
