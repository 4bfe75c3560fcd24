"""The one table of metrics: whole, told in the README, and found under every name."""

import pathlib

import numpy as np
import pytest

from implicit_slots.evaluation import catalogue
from implicit_slots.evaluation.findings import Findings
from implicit_slots.evaluation.run import record, table, write

README = pathlib.Path(catalogue.__file__).parent / "README.md"
ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def line(metric):
    values = "; ".join(filter(None, (metric.unit, metric.range)))
    cells = f"`{metric.name}`{ARROWS[metric.better]}", values, metric.measured
    return f"| {' | '.join((*cells, metric.meaning, metric.source))} |"


def test_the_readme_has_the_table():
    text = README.read_text().partition("## The numbers")[2]
    text = text[text.index("### ") :]
    told = [row for row in text.splitlines() if row.startswith("| `")]
    assert told == [line(metric) for metric in catalogue.METRICS.values()]
    headings = [row[4:] for row in text.splitlines() if row.startswith("### ")]
    assert headings == list(catalogue.GROUPS)


def test_every_row_is_whole():
    for metric in catalogue.METRICS.values():
        assert metric.label and metric.meaning
        assert metric.measured in ("evaluation", "training", "both")
        assert metric.measured == "training" or metric.range
    assert not catalogue.ALIASES.keys() - {"mse"} & catalogue.METRICS.keys()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("fg_ari", "Foreground ARI"),
        ("attention/fg_ari", "Foreground ARI, attention masks"),
        ("decoder_fg_ari", "Foreground ARI, decoder masks"),
        ("dvae_mse", "Squared error, tokens"),
        ("shuffled/one_left/spill", "Spill, shuffled, down to one"),
        ("of/no_row", "no_row, of"),
    ],
)
def test_a_title_tells_of_which_masks_or_images(name, label):
    assert catalogue.title(name) == label


def test_the_three_scores_of_masks_stand_together_wherever_metrics_are_listed(tmp_path):
    """On the terminal and in images.csv, of each kind of masks; as rows of a page."""
    three = ["fg_ari", "ari", "miou"]
    assert list(catalogue.METRICS)[:3] == three
    # As a compiled function returns them: by alphabet.
    names = sorted(
        f"{k}/{n}" for k in ("decoder", "attention") for n in catalogue.METRICS
    )
    findings = Findings(images={name: np.ones(2) for name in names})
    found = record(findings, {})
    printed = [line.split()[0] for line in table(found).splitlines() if line[0] == " "]
    write(tmp_path, findings, found)
    columns = (tmp_path / "images.csv").read_text().splitlines()[0].split(",")
    for listed in (printed, columns):
        for kind in ("attention", "decoder"):
            place = listed.index(f"{kind}/fg_ari")
            assert listed[place : place + 3] == [f"{kind}/{name}" for name in three]


def test_unknown_metrics_come_last():
    names = ["z", "loss", "a", "decoder_fg_ari", "fg_ari"]
    expected = ["fg_ari", "decoder_fg_ari", "loss", "a", "z"]
    assert sorted(names, key=catalogue.rank) == expected
