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
import math
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from experiments.studies import drawing, runs, statistics
from experiments.studies.drawing import MASKS, Panel
from experiments.studies.runs import Arm, Launch
from experiments.studies.scales import SCALES, SEEDS
from experiments.studies.statistics import Rule
from experiments.studies.table import Measurement, Table, as_csv, gather
from implicit_slots.drawing.figures import save_figure
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand, write_atomically
from implicit_slots.runtime.workdir import read_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Scores of attention's and of the decoder's masks, as training logs them or else as a
# probe measures them.
SCORES = (("", "attention/"), ("decoder_", "decoder/"))


@dataclass(frozen=True)
class Study:
    """What a script declares.

    Attributes:
      name: of its files; the script's own.
      title: of its figure and page.
      doc: its docstring: claim, question, rule, cost.
      arms: from a scale to what is compared.
      metrics: names whose measurements are kept, whole or as a beginning that ends in
        "*"; the scores of masks always are.
      summary: names of the metrics that the page's table shows, before the scores of
        masks.
      rules: what decides.
      panels: of the figure.
      more: further figures, by their files' names.
      derive: measurements that are computed from others; the rules may name them.
      first_seed: of the runs; a search has seeds of its own.
    """

    name: str
    title: str
    doc: str
    arms: Callable[[str], list[Arm]]
    metrics: tuple[str, ...]
    summary: tuple[str, ...]
    rules: tuple[Rule, ...]
    panels: tuple[Panel, ...]
    more: Mapping[str, Callable[[Table], "Figure"]] = field(default_factory=dict)
    derive: Callable[[Table], Iterable[Measurement]] = lambda table: ()
    first_seed: int = 0

    def draw(self, table: Table) -> "Figure":
        """Makes the figure."""
        return drawing.figure(table, *self.panels)


def main(study: Study, argv: Sequence[str] | None = None, **how) -> None:
    """Runs a study from the command line; see `command` and `execute`."""
    command(study.doc, lambda options: execute(study, options, **how), argv)


def command(
    doc: str, run: Callable[[argparse.Namespace], object], argv: Sequence[str] | None
) -> None:
    """Reads the flags of a study or of all, fills their defaults in, and runs it.

    Args:
      doc: shown by --help.
      run: what the options are for.
      argv: flags; the process's own if not given.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scale", choices=SCALES, default="cpu")
    add("--out", type=expand, help="default: runs/studies/SCALE; runs lie in it")
    add("--seeds", type=_positive, help="how many, from 0; default: of scale")
    add("--jobs", type=_positive, help="at a time; default: one a core, one on a GPU")
    only = "names of arms that are made, with * and ?; default: all"
    add("--arms", type=lambda text: text.split(","), default=["*"], help=only)
    changes = "a key of every run's configuration: --set data.path=DIR"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=changes)
    options = parser.parse_args(argv)
    options.out = options.out or pathlib.Path("runs", "studies", options.scale)
    if not options.jobs:
        options.jobs = (os.cpu_count() or 1) if backend() == "cpu" else 1
    try:
        with runs.passing_on_signals():
            run(options)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")


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
    """Makes a study's runs; writes table, figure and page; returns the table.

    Args:
      study: which.
      options: of `command`.
      start: how a command is run.
    """
    out, changes = options.out, settings(options.set)
    first = study.first_seed
    seeds = range(first, first + (options.seeds or SEEDS[options.scale]))
    arms = [
        arm._replace(changes={**arm.changes, **changes})
        for arm in study.arms(options.scale)
        if any(fnmatchcase(arm.name, pattern) for pattern in options.arms)
    ]
    if not arms:
        raise UserError(f"--arms names none of {study.name}'s arms")
    print(f"{study.title} ({options.scale})", flush=True)
    done = runs.train_all(arms, seeds, out / "runs", jobs=options.jobs, start=start)
    table = measure(study, done)
    if options.arms != ["*"]:
        made = {row.arm for row in table.rows}
        rules = tuple(rule for rule in study.rules if {rule.a, rule.b} <= made)
        study = replace(study, rules=rules)
    write_atomically(out / f"{study.name}.csv", as_csv(table.rows))
    for name, draw in {study.name: study.draw, **study.more}.items():
        save_figure(draw(table), out / name)
    write_atomically(out / f"{study.name}.md", page(study, options, table))
    print(verdict(study, table))
    print(f"{out / study.name}.md, .csv, .png, .pdf")
    return table


def measure(study: Study, done: Sequence[runs.Done]) -> Table:
    """Returns what was measured of a study's runs, and what derives from it."""
    scores = [f"{kind}{name}" for kinds in SCORES for kind in kinds for name in MASKS]
    table = gather((*study.metrics, *scores), done)
    return Table((*table.rows, *study.derive(table)), table.done)


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
    command = ["python", "-m", f"experiments.studies.{study.name}"]
    command += [f"--scale={options.scale}"]
    command += [f"--seeds={options.seeds}"] if options.seeds else []
    command += [f"--arms={','.join(options.arms)}"] if options.arms != ["*"] else []
    command += [f"--set={pair}" for pair in options.set]
    summaries = [read_summary(one.workdir) for one in table.done]
    versions = next((s["versions"] for s in summaries if "versions" in s), {})
    stood_on = ", ".join(f"{name} {version}" for name, version in versions.items())
    seeds = len({one.seed for one in table.done})
    counted = f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
    pictures = [f"![{study.title}]({name}.png)" for name in (study.name, *study.more)]
    return f"""# {study.title}

{verdict(study, table)}

{chr(10).join(pictures)}

Last values, median (least to greatest) of {counted}, without runs that diverged:

{summary(study, table)}

{study.doc.strip()}

`{shlex.join(command)}`; {stood_on}
"""


def summary(study: Study, table: Table) -> str:
    """A row an arm: medians and ranges of the study's main metrics."""
    names = (*study.summary, *scores_of(table))
    lines = [f"| | {' | '.join(names)} | diverged |", "|---" * (len(names) + 2) + "|"]
    for arm in table.arms():
        cells = []
        for metric in names:
            values = [v for v in table.last(arm, metric).values() if not math.isnan(v)]
            cells.append(_spread(values))
        lost = sum(bool(one.diverged) for one in table.runs(arm))
        lines.append(f"| {arm} | {' | '.join(cells)} | {lost} |")
    return "\n".join(lines)


def scores_of(table: Table) -> list[str]:
    """The names of the scores of masks that were measured."""
    measured = {row.metric for row in table.rows}
    kinds = [
        next((kind for kind in kinds if f"{kind}fg_ari" in measured), None)
        for kinds in SCORES
    ]
    return [f"{kind}{name}" for kind in kinds if kind is not None for name in MASKS]


def _spread(values: Sequence[float]) -> str:
    """The median and the range, in three digits."""
    if not values:
        return "none"
    median = f"{np.median(values):.3g}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):.3g} to {max(values):.3g})"
