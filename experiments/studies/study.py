"""What every study shares: arms × seeds → runs → a table → a figure and a verdict.

A study's script says what is compared (`Arm`), what decides (`statistics.Rule`, written
before the runs), and how it is drawn; everything else is here:

    python -m experiments.studies.fig11_neumann_terms --scale=cpu --out=DIR

makes the runs that are not there yet, one process each (DIR/runs), then writes
DIR/STUDY.csv (tidy: a row a measurement), DIR/STUDY.png and .pdf, and DIR/STUDY.md with
a table, the verdict and how to make it again. Started again it goes on.
"""

import argparse
import ast
import csv
import io
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.studies import runs, statistics
from experiments.studies.runs import Arm, Done, Launch
from experiments.studies.scales import SCALES, SEEDS
from experiments.studies.statistics import Rule
from implicit_slots.drawing.figures import save_figure
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import write_whole
from implicit_slots.runtime.workdir import METRICS_FILE, read_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


# What a metric is taken of where several have its name: a run's losses are those of
# sampled tokens, a probe's of the most probable ones.
SPLITS = ("derived", "validation", "train", "probe")


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

    def curves(
        self, arm: str, metric: str, split: str | None = None
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
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
            seed: (
                np.array(sorted(values)),
                np.array([values[s] for s in sorted(values)]),
            )
            for seed, values in sorted(found.items())
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
        for one in self.done:
            if one.arm == arm and one.diverged:
                values[one.seed] = math.nan
        return values

    def runs(self, arm: str) -> list[Done]:
        """Returns the runs of an arm, by seed."""
        return [one for one in self.done if one.arm == arm]


@dataclass(frozen=True)
class Study:
    """What a script declares.

    Attributes:
      name: of its files; the script's own.
      title: of its figure and page.
      doc: its docstring: claim, question, rule, cost.
      arms: from a scale to what is compared.
      metrics: names whose measurements are kept, whole or as a beginning that ends in
        "*".
      summary: names of the metrics that the page's table shows.
      rules: what decides.
      draw: makes the figure.
      more: further figures, by their files' names.
      derive: measurements that are computed from others; the rules may name them.
    """

    name: str
    title: str
    doc: str
    arms: Callable[[str], list[Arm]]
    metrics: tuple[str, ...]
    summary: tuple[str, ...]
    rules: tuple[Rule, ...]
    draw: Callable[[Table], "Figure"]
    more: Mapping[str, Callable[[Table], "Figure"]] = field(default_factory=dict)
    derive: Callable[[Table], Iterable[Measurement]] = lambda table: ()


def main(study: Study, argv: Sequence[str] | None = None, **how) -> None:
    """Runs a study from the command line; what the user can put right is a sentence.

    Args:
      study: which.
      argv: flags; the process's own if not given.
      how: see `execute`.
    """
    command(study.doc, lambda options: execute(study, options, **how), argv)


def command(
    doc: str,
    run: Callable[[argparse.Namespace], object],
    argv: Sequence[str] | None,
) -> None:
    """Reads the flags of a study or of all, fills their defaults in, and runs it.

    Args:
      doc: shown by --help.
      run: what the options are for.
      argv: flags; the process's own if not given.
    """
    options = parser_of(doc).parse_args(argv)
    options.out = options.out or pathlib.Path("runs", "studies", options.scale)
    if not options.jobs:
        options.jobs = (os.cpu_count() or 1) if backend() == "cpu" else 1
    try:
        with runs.passing_on_sigterm():
            run(options)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Returns the flags that all studies have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument(
        "--out", type=pathlib.Path, help="default: runs/studies/SCALE; runs lie in it"
    )
    parser.add_argument(
        "--seeds", type=_positive, help="how many, from 0; default: of scale"
    )
    parser.add_argument(
        "--jobs",
        type=_positive,
        help="runs at a time; default: one a core, one on a GPU",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of every run's configuration: --set data.path=DIR",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text!r}")
    return int(text)


def settings(pairs: Sequence[str]) -> dict[str, object]:
    """Returns what --set says, values as Python writes them or else as text.

    Raises:
      UserError: if one is no key=value.
    """
    found: dict[str, object] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise UserError(f"--set takes KEY=VALUE, got {pair!r}")
        try:
            found[key] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            found[key] = text
    return found


def backend() -> str:
    """Which devices runs will have; asked by another process, to hold none here."""
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    found = subprocess.run(ask, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "cpu"


def execute(
    study: Study, options: argparse.Namespace, *, start: Launch = runs.launch
) -> Table:
    """Makes a study's runs, and writes table, figure and page.

    Args:
      study: which.
      options: of `command`.
      start: how a command is run.

    Returns:
      All that was measured.
    """
    out, jobs = options.out, options.jobs
    count = options.seeds or SEEDS[options.scale]
    changes = settings(options.set)
    arms = [
        arm._replace(changes={**arm.changes, **changes})
        for arm in study.arms(options.scale)
    ]
    print(f"{study.title} ({options.scale})", flush=True)
    done = runs.train_all(arms, range(count), out / "runs", jobs=jobs, start=start)
    table = gather(study, done)
    write_whole(out / f"{study.name}.csv", as_csv(table.rows))
    for name, draw in {study.name: study.draw, **study.more}.items():
        save_figure(draw(table), out / name)
    write_whole(out / f"{study.name}.md", page(study, options, table))
    print(verdict(study, table))
    print(f"{out / study.name}.md, .csv, .png, .pdf")
    return table


def gather(study: Study, done: Sequence[Done]) -> Table:
    """Reads what runs logged and what probes measured, and derives the rest."""
    rows = []
    for one in done:
        rows += [row for row in measured(one) if wanted(study.metrics, row.metric)]
    table = Table(tuple(rows), tuple(done))
    return Table((*rows, *study.derive(table)), table.done)


def measured(one: Done) -> Iterable[Measurement]:
    """Everything that is known of a run."""
    log = one.workdir / METRICS_FILE
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        step, split = entry.pop("step"), entry.pop("split")
        for metric, value in entry.items():
            yield Measurement(one.arm, one.seed, step, split, metric, number(value))
    summary = read_summary(one.workdir)
    for metric in ("slot_mse", "dvae_mse"):
        if (name := f"validation/{metric}") in summary:
            step, value = summary["step"], number(summary[name])
            yield Measurement(one.arm, one.seed, step, "validation", metric, value)
    # Others may have been asked for by other studies.
    for probe in one.probes:
        path = one.workdir / runs.PROBE_FOLDER / f"{probe}.json"
        if not path.exists():
            continue
        for row in json.loads(path.read_text()):
            value = number(row["value"])
            yield Measurement(
                one.arm, one.seed, row["step"], "probe", row["metric"], value
            )


def number(value: float | None) -> float:
    """What JSON writes as null was not finite."""
    return math.nan if value is None else float(value)


def wanted(patterns: Sequence[str], metric: str) -> bool:
    """Whether a metric is one of those, or begins as one that ends in "*"."""
    return any(fnmatchcase(metric, pattern) for pattern in patterns)


def as_csv(rows: Iterable[Measurement]) -> str:
    """A row a measurement; an empty value is one that was not finite."""
    with io.StringIO() as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Measurement._fields)
        for row in rows:
            value = "" if math.isnan(row.value) else f"{row.value:.6g}"
            writer.writerow([*row[:-1], value])
        return text.getvalue()


def verdict(study: Study, table: Table) -> str:
    """Returns the paragraph that the rules decide."""
    sentences = []
    for rule in study.rules:
        a, b = (table.last(arm, rule.metric) for arm in (rule.a, rule.b))
        effect = statistics.paired_effect(a, b, rule)
        sentences.append(statistics.sentence(effect, rule))
    return " ".join(sentences)


def page(study: Study, options: argparse.Namespace, table: Table) -> str:
    """Returns the study's page: verdict, figure, table, how to make it again."""
    command = [
        "python",
        "-m",
        f"experiments.studies.{study.name}",
        f"--scale={options.scale}",
    ]
    command += [f"--seeds={options.seeds}"] if options.seeds else []
    command += [f"--set={pair}" for pair in options.set]
    summaries = [read_summary(one.workdir) for one in table.done]
    versions = next((s["versions"] for s in summaries if "versions" in s), {})
    seeds = len({one.seed for one in table.done})
    counted = f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
    return "\n".join(
        [
            f"# {study.title}",
            "",
            verdict(study, table),
            "",
            *(f"![{study.title}]({name}.png)" for name in (study.name, *study.more)),
            "",
            f"Last values, median (least to greatest) of {counted}, without runs that "
            "diverged:",
            "",
            summary(study, table),
            "",
            study.doc.strip(),
            "",
            f"`{shlex.join(command)}`; "
            + ", ".join(f"{name} {value}" for name, value in versions.items()),
            "",
        ]
    )


def summary(study: Study, table: Table) -> str:
    """A row an arm: medians and ranges of the study's main metrics."""
    lines = [
        f"| | {' | '.join(study.summary)} | diverged |",
        "|---|" + "---|" * (len(study.summary) + 1),
    ]
    for arm in table.arms():
        cells = []
        for metric in study.summary:
            values = [v for v in table.last(arm, metric).values() if not math.isnan(v)]
            cells.append(spread(values))
        lost = sum(bool(one.diverged) for one in table.runs(arm))
        lines.append(f"| {arm} | {' | '.join(cells)} | {lost} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """The median and the range, in three digits."""
    if not values:
        return "none"
    median = f"{np.median(values):.3g}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):.3g} to {max(values):.3g})"
