"""One page on several runs: each number with its spread over seeds."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from implicit_slots.evaluation.catalogue import describe, title
from implicit_slots.report.curves import read_curves
from implicit_slots.report.evaluation import read, tables
from implicit_slots.report.plots import SERIES, Line, Panel, plot
from implicit_slots.report.render import render
from implicit_slots.runtime.config import flat
from implicit_slots.runtime.files import write_whole
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
      config: flat, without what may differ between seeds; None if unreadable.
      seed: of the run.
      record: its evaluation, or None.
      problem: why there is none.
    """

    workdir: pathlib.Path
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
      ValueError: if none of them was evaluated.
    """
    workdirs = list({workdir.resolve(): workdir for workdir in workdirs}.values())
    label = _latest_label(workdirs)
    if label is None:
        raise ValueError("none of these runs has an evaluation")
    runs = [_read(workdir, label) for workdir in workdirs]
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.config, sort_keys=True), []).append(run)
    names = _names([members[0].config for members in groups.values()])
    by_name = dict(zip(names, groups.values(), strict=True))
    told = _told_apart(workdirs)
    rows = [
        run._asdict() | {"configuration": name, "name": told[run.workdir]}
        for name, members in by_name.items()
        for run in members
    ]
    summary, singles = {}, {}
    for name, members in by_name.items():
        done = [run.record for run in members if run.record is not None]
        heading = f"{name} (n = {len(done)})" if done else name
        summary[heading] = _over_runs([record["metrics"] for record in done])
        for run in members:
            if run.record is not None:
                singles[told[run.workdir]] = {
                    key: m | {"std": None} for key, m in run.record["metrics"].items()
                }
    kinds = [SERIES[place % len(SERIES)] for place in range(len(by_name))]
    page = render(
        "comparison.html.j2",
        heading="Comparison of runs",
        label=label,
        runs=rows,
        missing=sum(run.record is None for run in runs),
        unlike=_unlike(runs),
        summary=tables(summary),
        singles=tables(singles),
        plots=_plots(by_name),
        legend=[(*kind, name) for kind, name in zip(kinds, by_name, strict=True)],
    )
    write_whole(path, page)
    return path


def _latest_label(workdirs: Sequence[pathlib.Path]) -> str | None:
    """The data that was evaluated last."""
    found = [
        f for w in workdirs for f in w.glob(f"{EVALUATION_FOLDER}/*/{EVALUATION_FILE}")
    ]
    if not found:
        return None
    return max(found, key=lambda file: file.stat().st_mtime).parent.name


def _read(workdir: pathlib.Path, label: str) -> _Run:
    config, seed, record, problem = None, None, None, ""
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
        record = read(workdir / EVALUATION_FOLDER / label)
    except ValueError as error:
        there = (workdir / EVALUATION_FOLDER / label / EVALUATION_FILE).exists()
        missing = f"it has no evaluation on {label}"
        problem = problem or (str(error) if there else missing)
    return _Run(workdir, config, seed, record, problem)


def _names(configs: Sequence[dict[str, Any] | None]) -> list[str]:
    """Names configurations by the keys in which they differ."""
    known = [config for config in configs if config is not None]
    keys = sorted({key for config in known for key in config})
    differing = [
        key for key in keys if len({json.dumps(c.get(key)) for c in known}) > 1
    ]
    names = []
    for place, config in enumerate(configs):
        if config is None:
            name = "unreadable"
        elif not differing:
            name = "all"
        else:
            told = [f"{key}={config.get(key)}" for key in differing[:3]]
            more = len(differing) - 3
            name = ", ".join(told) + (f", {more} more" if more > 0 else "")
        names.append(name if name not in names else f"{name} [{place + 1}]")
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


def _told_apart(workdirs: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
    """Names of runs: their folders', or the whole path where two have the same."""
    names = [workdir.resolve().name for workdir in workdirs]
    return {
        workdir: name if names.count(name) == 1 else str(workdir)
        for workdir, name in zip(workdirs, names, strict=True)
    }


def _unlike(runs: Sequence[_Run]) -> list[tuple[str, list[str]]]:
    """What the evaluations do not have in common, with the values if they are short."""
    records = [run.record for run in runs if run.record is not None]
    unlike = []
    for key in EVALUATED_ON:
        found = [_without(record.get(key), NOT_DATA) for record in records]
        values = list(dict.fromkeys(json.dumps(value) for value in found))
        if len(values) > 1:
            unlike.append((key, [] if key in ("data", "settings") else values))
    return unlike


def _without(value: Any, keys: Sequence[str]) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: value[key] for key in sorted(value) if key not in keys}


def _plots(by_name: Mapping[str, Sequence[_Run]]) -> list[Panel]:
    """Of each metric that was logged in validation, a line per run."""
    lines: dict[str, list[Line]] = {}
    for place, members in enumerate(by_name.values()):
        kind, _ = SERIES[place % len(SERIES)]
        for run in members:
            for name, by_split in read_curves(run.workdir / METRICS_FILE)[0].items():
                lines.setdefault(name, []).extend(
                    Line(kind, *curve)
                    for split, curve in by_split.items()
                    if split != "train"
                )
    return [
        Panel(title(name), describe(name).note, plot(found), name)
        for name, found in lines.items()
        if found
    ]
