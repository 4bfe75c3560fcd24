"""What each number of a run or an evaluation is: the rows of catalogue.csv."""

import csv
import pathlib
from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """A row of the table.

    Attributes:
      name: in records, after the prefix.
      group: the heading that it stands under; "" for a number of no row.
      label: what a reader sees.
      unit: of the number; "" where it has none.
      range: what values it can take.
      better: "higher", "lower", or "" where neither is.
      measured: "evaluation", "training" (logged, or in the summary), or "both".
      meaning: in a line.
      source: where it is defined.
    """

    name: str
    group: str
    label: str
    unit: str = ""
    range: str = ""
    better: str = ""
    measured: str = ""
    meaning: str = ""
    source: str = ""

    @property
    def note(self) -> str:
        """The meaning, then unit and range."""
        values = "; ".join(part for part in (self.unit, self.range) if part)
        return f"{self.meaning} ({values})" if values else self.meaning


# Of which masks or images a number is: the prefix of its name.
PREFIXES: Mapping[str, str] = {
    "": "",
    "attention": "attention masks",
    "decoder": "decoder masks",
    "dvae": "tokens",  # the image that they stand for
    "relaxed": "relaxed tokens",
    "slots": "through the slots",
    "composed": "slots of different images",
    "linear": "linear probe",
    "mlp": "MLP probe",
    "one_left": "down to one slot",
    "shuffled": "shuffled slots",
    "shuffled/one_left": "shuffled, down to one",
    "shuffled/linear": "linear probe, shuffled",
    "shuffled/mlp": "MLP probe, shuffled",
    "by_loss/linear": "linear probe, matched by loss",
    "by_loss/mlp": "MLP probe, matched by loss",
    "by_loss/shuffled/linear": "linear probe, matched by loss, shuffled",
    "by_loss/shuffled/mlp": "MLP probe, matched by loss, shuffled",
}
# Names that training logs, and what an evaluation calls the same.
ALIASES: Mapping[str, str] = {
    "decoder_ari": "decoder/ari",
    "decoder_fg_ari": "decoder/fg_ari",
    "decoder_miou": "decoder/miou",
    "mse": "relaxed/mse",  # the dVAE's loss; an evaluation measures without noise
    "dvae_mse": "dvae/mse",
    "slot_mse": "slots/mse",
    "diagnosed_residual": "residual",
}
with pathlib.Path(__file__).with_suffix(".csv").open(encoding="utf-8") as _file:
    METRICS: Mapping[str, Metric] = {
        row["name"]: Metric(**row) for row in csv.DictReader(_file, strict=True)
    }
GROUPS = tuple(dict.fromkeys(metric.group for metric in METRICS.values()))
_PLACES = {name: place for place, name in enumerate(METRICS)}


def split(name: str) -> tuple[str, str]:
    """Returns the prefix of a metric's name and the name of its row."""
    prefix, _, last = ALIASES.get(name, name).rpartition("/")
    return prefix, last


def describe(name: str) -> Metric:
    """Returns the row of a metric, whatever its prefix; a plain one if unknown."""
    last = split(name)[1]
    return METRICS.get(last, Metric(last, "", last))


def title(name: str) -> str:
    """Returns a metric's label and, after a comma, the meaning of its prefix."""
    prefix = split(name)[0]
    parts = (describe(name).label, PREFIXES.get(prefix, prefix))
    return ", ".join(part for part in parts if part)


def listed(name: str) -> tuple[int, str, tuple[int, str]]:
    """Sorts metrics of one prefix together, then as the table does; as `rank` else."""
    prefix, last = split(name)
    place = list(PREFIXES).index(prefix) if prefix in PREFIXES else len(PREFIXES)
    return place, prefix, (_PLACES.get(last, len(_PLACES)), last)


def rank(name: str) -> tuple[int, tuple[str, str]]:
    """Sorts metrics as the table does; unknown ones follow by alphabet."""
    prefix, last = split(name)
    return _PLACES.get(last, len(_PLACES)), (prefix, last)
