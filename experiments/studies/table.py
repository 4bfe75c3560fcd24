"""All measurements of a study: read from its runs, kept as tidy rows."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from experiments.studies.runs import PROBE_FOLDER, Done
from implicit_slots.runtime.metric_writers import read_metrics
from implicit_slots.runtime.workdir import METRICS_FILE, read_summary

# What a metric is taken of where several have its name: a run's losses are those of
# sampled tokens, a probe's of the most probable ones.
SPLITS = ("derived", "validation", "train", "probe")
Curve = tuple[np.ndarray, np.ndarray]


class Measurement(NamedTuple):
    """A row of a study's table.

    Attributes:
      arm: the setting's name.
      seed: of the run.
      step: of training at which it was measured.
      split: "train" (mean since the last logged step), "validation", "probe", or
        "derived" from others.
      metric: name; logged ones are in implicit_slots/training/README.md, others in
        implicit_slots/evaluation/README.md.
      value: NaN where it is not defined.
    """

    arm: str
    seed: int
    step: int
    split: str
    metric: str
    value: float


@dataclass(frozen=True)
class Table:
    """All measurements of a study.

    Attributes:
      rows: the measurements.
      done: the runs.
    """

    rows: tuple[Measurement, ...]
    done: tuple[Done, ...]

    def arms(self) -> list[str]:
        """The arms, in the study's order."""
        return list(dict.fromkeys(one.arm for one in self.done))

    def runs(self, arm: str) -> list[Done]:
        """Returns the runs of an arm, by seed."""
        return [one for one in self.done if one.arm == arm]

    def curves(
        self, arm: str, metric: str, split: str | None = None
    ) -> dict[int, Curve]:
        """Returns per seed the steps and the values of a metric.

        Args:
          arm: whose.
          metric: of which.
          split: of which; if not given, the first of `SPLITS` that any arm has it of.
        """
        if split is None:
            known = {row.split for row in self.rows if row.metric == metric}
            split = next((one for one in SPLITS if one in known), None)
        found: dict[int, dict[int, float]] = {}
        for row in self.rows:
            if (row.arm, row.metric, row.split) == (arm, metric, split):
                found.setdefault(row.seed, {})[row.step] = row.value
        return {
            seed: (np.array(sorted(by)), np.array([by[step] for step in sorted(by)]))
            for seed, by in sorted(found.items())
        }

    def last(self, arm: str, metric: str, split: str | None = None) -> dict[int, float]:
        """Returns per seed the last value of a metric.

        NaN if the run diverged; no value where it is not defined for another reason.
        """
        values = {
            seed: float(curve[1][-1])
            for seed, curve in self.curves(arm, metric, split).items()
            if not math.isnan(curve[1][-1])
        }
        lost = {one.seed: math.nan for one in self.runs(arm) if one.diverged}
        return values | lost


def gather(metrics: Sequence[str], done: Sequence[Done]) -> Table:
    """Reads what runs logged and what probes measured of them.

    Args:
      metrics: the names that are kept, whole or as a beginning that ends in "*".
      done: the runs.
    """
    rows = (row for one in done for row in _measured(one))
    kept = (row for row in rows if any(fnmatchcase(row.metric, m) for m in metrics))
    return Table(tuple(kept), tuple(done))


def _measured(one: Done) -> Iterable[Measurement]:
    """Everything that is known of a run."""

    def measurement(step: int, split: str, metric: str, value: float | None):
        # What JSON writes as null was not finite.
        known = math.nan if value is None else float(value)
        return Measurement(one.arm, one.seed, step, split, metric, known)

    for line in (
        read_metrics(one.workdir) if (one.workdir / METRICS_FILE).exists() else ()
    ):
        step, split = line.pop("step"), line.pop("split")
        for metric, value in line.items():
            yield measurement(step, split, metric, value)
    summary = read_summary(one.workdir)
    for metric in ("slot_mse", "dvae_mse"):
        if (name := f"validation/{metric}") in summary:
            yield measurement(summary["step"], "validation", metric, summary[name])
    # Others may have been asked for by other studies.
    for probe in one.probes:
        path = one.workdir / PROBE_FOLDER / f"{probe}.json"
        for row in json.loads(path.read_text()) if path.exists() else ():
            yield measurement(row["step"], "probe", row["metric"], row["value"])


def as_csv(rows: Iterable[Measurement]) -> str:
    """A row a measurement; an empty value is one that was not finite."""
    with io.StringIO() as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Measurement._fields)
        for row in rows:
            value = "" if math.isnan(row.value) else f"{row.value:.6g}"
            writer.writerow([*row[:-1], value])
        return text.getvalue()
