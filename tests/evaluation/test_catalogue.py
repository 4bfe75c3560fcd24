"""The one table of metrics: whole, told in the README, and found under every name."""

import pathlib

import pytest

from implicit_slots.evaluation import catalogue

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


def test_unknown_metrics_come_last():
    names = ["z", "loss", "a", "decoder_fg_ari", "fg_ari"]
    expected = ["fg_ari", "decoder_fg_ari", "loss", "a", "z"]
    assert sorted(names, key=catalogue.rank) == expected
