"""What a run logged: metrics.jsonl read, and as plots of the page."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from implicit_slots.evaluation.catalogue import describe, rank, title
from implicit_slots.report.plots import Line, Panel, plot
from implicit_slots.report.render import to_number

Curve = tuple[Int[np.ndarray, " records"], Float[np.ndarray, " records"]]
Curves = dict[str, dict[str, Curve]]


def read_curves(path: pathlib.Path) -> tuple[Curves, int]:
    """Reads metrics.jsonl: per metric and split its steps and values.

    A run that was killed and resumed logs some steps twice, of which the last counts,
    and may have left half a line.

    Returns:
      The curves, and how many lines made no sense. No file: none, and 0.
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
            number = to_number(value)
            if number is not None:
                values.setdefault(name, {}).setdefault(split, {})[step] = number
    curves: Curves = {}
    for name in sorted(values, key=rank):
        for split, by_step in sorted(values[name].items()):
            steps = np.array(sorted(by_step))
            points = steps, np.array([by_step[step] for step in steps.tolist()])
            curves.setdefault(name, {})[split] = points
    return curves, unreadable


def kind_of(split: str) -> str:
    """The kind of line of a split."""
    return "train" if split == "train" else "validation"


def plots(curves: Mapping[str, Mapping[str, Curve]]) -> list[Panel]:
    """A plot per metric, its splits on the same axes."""
    found = []
    for name, by_split in curves.items():
        values = np.concatenate([values for _, values in by_split.values()])
        lines = [Line(kind_of(split), *curve) for split, curve in by_split.items()]
        last = [(line.kind, float(line.y[-1])) for line in lines]
        bad = int(np.count_nonzero(~np.isfinite(values)))
        note = describe(name).note
        found.append(Panel(title(name), note, plot(lines), name, last, bad))
    return found
