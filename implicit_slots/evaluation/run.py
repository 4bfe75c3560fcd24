"""An evaluation, top to bottom: all groups of numbers, and the files that hold them."""

import csv
import hashlib
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from implicit_slots.evaluation import catalogue, shift_table
from implicit_slots.evaluation.catalogue import describe
from implicit_slots.evaluation.findings import Findings, Subject
from implicit_slots.evaluation.groups import GROUPS, groups_of
from implicit_slots.evaluation.steps import starts_of
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.files import finite, write_atomically, write_json
from implicit_slots.runtime.workdir import (
    CONFIG_FILE,
    EVALUATION_FILE,
    absolute,
    is_same_place,
    read_config,
)

IMAGES_FILE = "images.csv"
SHIFTS_FILE = "shifts.csv"
# Keys of config.data that change no image.
UNSEEN = ("cache", "path", "placement", "workers", "flip")


def evaluate(subject: Subject) -> Findings:
    """Runs every group that the model has numbers of."""
    findings = Findings()
    for name in groups_of(subject.config.model.name):
        findings.shown[name] = GROUPS[name](subject, findings)
    return findings


def evaluate_group(subject: Subject, name: str) -> dict[str, float]:
    """Returns the means of one group, which a run logs at intervals while it trains."""
    findings = Findings()
    GROUPS[name](subject, findings)
    return {name: float(m["mean"]) for name, m in findings.metrics().items()}


def record(findings: Findings, about: dict[str, Any]) -> dict[str, Any]:
    """Returns what metrics.json holds: what was found, and what is told about it."""
    found = {
        "metrics": findings.metrics(),
        "absent": findings.absent,
        "notes": findings.notes,
        "curves": findings.curves,
    }
    if findings.shifts:
        found["shifts"] = findings.shifts
    return finite(about | found)


def table(record: Mapping[str, Any]) -> str:
    """The main numbers as lines for a terminal, and why others are not there."""
    lines = [shift_table.table(record["shifts"])] if "shifts" in record else []
    for group in catalogue.GROUPS:
        of_group = {
            name: metric
            for name, metric in record["metrics"].items()
            if describe(name).group == group and metric["mean"] is not None
        }
        lines += [group] if of_group else []
        for name in sorted(of_group, key=catalogue.listed):
            metric = of_group[name]
            spread = "" if metric["std"] is None else f" ± {metric['std']:.3g}"
            value = f"{metric['mean']:.4g}{spread}"
            lines.append(f"  {name:<36} {value:<20} {describe(name).unit}".rstrip())
    lines += [f"no {name}: {reason}" for name, reason in record["absent"].items()]
    return "\n".join(lines + list(record["notes"]))


def write(folder: pathlib.Path, findings: Findings, record: Mapping[str, Any]) -> None:
    """Writes metrics.json, image by image images.csv, and shifts.csv if there are."""
    folder.mkdir(parents=True, exist_ok=True)
    with io.StringIO() as text:
        names = sorted(findings.images, key=catalogue.listed)
        longest = max((len(v) for v in findings.images.values()), default=0)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["index", *names])
        for index in range(longest):
            writer.writerow([index, *(_cell(findings, n, index) for n in names)])
        write_atomically(folder / IMAGES_FILE, text.getvalue())
    if findings.shifts:
        write_atomically(folder / SHIFTS_FILE, shift_table.as_csv(findings.shifts))
    write_json(folder / EVALUATION_FILE, record)


def _cell(findings: Findings, name: str, index: int) -> str:
    """A value in the table of images; empty where there is none."""
    values = findings.images[name]
    if index >= len(values) or np.isnan(values[index]):
        return ""
    return f"{values[index]:.6g}"


def label(config: Config, workdir: pathlib.Path, checkpoint: str) -> str:
    """Names an evaluation: the split, data that are not the run's own, its starts."""
    name = config.evaluation.split
    section = config.data.to_dict()
    trained_on = absolute(read_config(workdir / CONFIG_FILE)).data.to_dict()
    places = trained_on.get("path"), section.get("path")
    if not is_same_place(*places) or {
        k: v for k, v in section.items() if k not in UNSEEN
    } != {k: v for k, v in trained_on.items() if k not in UNSEEN}:
        digest = hashlib.sha256(json.dumps(section, sort_keys=True).encode())
        name = f"{config.data.name}-{name}-{digest.hexdigest()[:4]}"
    if (starts := starts_of(config)) > 1:
        name = f"{name}-{starts}-starts"
    return f"{name}-best" if checkpoint == "best" else name
