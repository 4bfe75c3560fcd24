"""Several runs on one page: spread over seeds by hand, and runs that failed."""

import json
import re

import numpy as np
import pytest
from pages import Page, paths

from implicit_slots.report.comparison import write_comparison
from implicit_slots.report.page import write_report
from implicit_slots.runtime.errors import UserError

VALUES = {"a": 0.5, "b": 0.75, "c": 0.6, "d": None}


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one configuration, another one, and one that was not evaluated."""
    workdirs = []
    for seed, (name, value) in enumerate(VALUES.items()):
        workdir = tmp_path / name
        adjoint = "unrolled" if name == "c" else "neumann"
        config = {"name": name, "seed": seed, "model": {"adjoint": {"name": adjoint}}}
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps(config))
        if value is not None:
            folder = workdir / "evaluation" / "test"
            folder.mkdir(parents=True)
            metric = {"mean": value, "std": 0.1, "count": 9}
            record = {
                "title": "Test split",
                "step": 10,
                "command": f"evaluate {name}",
                "metrics": {"attention/fg_ari": metric, "decoder/fg_ari": metric},
                "absent": {"fid": "no weights"},
                "notes": ["A note <that> is escaped."],
                "curves": {
                    "residual": {
                        "title": "Residual",
                        "x_label": "iteration",
                        "y_label": "size",
                        "x": [3, 2, 1],
                        "series": {"median": [0.1, 0.2, None]},
                    }
                },
                "pictures": [{"file": "x.png", "title": "X", "caption": "not there"}],
            }
            (folder / "metrics.json").write_text(json.dumps(record))
        workdirs.append(workdir)
    return workdirs


def test_seeds_are_one_configuration_with_their_spread(runs, tmp_path):
    page = Page(write_comparison(runs, tmp_path / "report.html"))
    assert "4 runs, evaluated on test" in page.text
    assert "model.adjoint.name=neumann (n = 2)" in page.text
    assert "model.adjoint.name=unrolled (n = 1)" in page.text
    spread = np.std([0.5, 0.75], ddof=1)
    assert "0.625" in page.text and f"± {spread:.2g}" in page.text
    assert "0.75" in page.text  # Each run's own
    assert "it has no evaluation on test" in page.text
    assert all(f"evaluate {name}" in page.text for name in "abc")
    assert not [link for link in page.links if not link.startswith("data:")]


def test_runs_without_any_evaluation_are_a_sentence(runs, tmp_path):
    with pytest.raises(UserError, match="none of these runs has an evaluation"):
        write_comparison(runs[3:], tmp_path / "report.html")


def test_a_report_shows_the_evaluation(runs):
    page = Page(write_report(runs[0]))
    for told in (
        "Evaluation: test",
        "attention masks",
        "decoder masks",
        "FID: no weights",
        "A note <that> is escaped.",
        "x.png is not there",
        "evaluate a",
        "Residual",
    ):
        assert told in page.text, told


def test_a_broken_evaluation_is_a_sentence(runs):
    path = runs[0] / "evaluation" / "test" / "metrics.json"
    for text in ("{", "[]", '{"metrics": {"x": 1}}', '{"metrics": {"x": {}}}'):
        path.write_text(text)
        page = Page(write_report(runs[0]))
        assert "cannot be read; evaluate again" in page.text


def edit(workdir, **changes):
    """Changes what an evaluation's metrics.json holds."""
    path = workdir / "evaluation" / "test" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "broken",
    [
        {"curves": None},
        {"curves": {"r": {"title": "t", "x": [1]}}},
        {"curves": {"r": {"title": "t", "x": ["a"]}}},
        {"pictures": [{"file": "x.png", "title": "X"}]},
        {"metrics": {"ari": {"mean": 1.0, "std": "x"}}},
    ],
)
def test_an_evaluation_of_another_version_is_a_sentence(runs, broken):
    edit(runs[0], **broken)
    assert "cannot be read; evaluate again" in Page(write_report(runs[0])).text


def test_few_values_are_told_and_a_spread_that_is_none_is_not(runs):
    many = {"mean": 0.5, "std": float("nan"), "count": 512}
    metrics = {"attention/ari": many, "spectral_radius": many | {"count": 8}}
    edit(runs[0], metrics=metrics)
    page = Page(write_report(runs[0]))
    assert "0.5 n = 8 " in page.text and "n = 512" not in page.text
    assert "± nan" not in page.text


def test_quartiles_are_a_band_around_the_median(runs):
    columns = {"median": [3.0, 2.0, 1.0], "low": [2.0, 1.0, 0.5]}
    curve = {"title": "R", "x_label": "x", "y_label": "y", "x": [3, 2, 1]}
    edit(
        runs[0],
        curves={"r": curve | {"series": columns | {"high": [4.0, 3.0, None]}}},
    )
    page = Page(write_report(runs[0]))
    assert page.shapes.count(("path", "line validation")) == 1
    assert page.shapes.count(("use", "band validation")) == 1
    # The upper edge is unknown at x = 1: the band spans two of the three points.
    band, line = (
        {float(point.split()[0]) for point in re.findall(r"[ML] ([\d. ]+)", drawn[0])}
        for drawn in (paths(page, "band validation"), paths(page, "line validation"))
    )
    assert len(line) == 3 and band == line - {min(line)}


def test_runs_of_the_same_folder_name_are_all_shown(runs, tmp_path):
    pairs = [(runs[0], tmp_path / "p" / "seed0"), (runs[2], tmp_path / "q" / "seed0")]
    for old, new in pairs:
        new.parent.mkdir()
        old.rename(new)
    workdirs = [new for _, new in pairs]
    page = Page(write_comparison(workdirs, tmp_path / "report.html"))
    single = page.source.partition("<summary>Each run</summary>")[2]
    assert all(f"{workdir}: attention masks" in single for workdir in workdirs)


def test_a_run_counts_once_and_only_finite_means_count(runs, tmp_path):
    edit(runs[1], metrics={"attention/fg_ari": {"mean": float("nan"), "std": None}})
    workdirs = [runs[0], runs[0], runs[1]]
    page = Page(write_comparison(workdirs, tmp_path / "report.html"))
    assert "2 runs, evaluated on test" in page.text
    row = page.source.partition("Foreground ARI")[2].partition("</tr>")[0]
    assert ">\n0.5\n<" in row and "±" not in row and "none" not in row


def test_an_unreadable_evaluation_is_not_a_missing_one(runs, tmp_path):
    (runs[1] / "evaluation" / "test" / "metrics.json").write_text("{")
    page = Page(write_comparison(runs, tmp_path / "report.html"))
    assert "metrics.json cannot be read; evaluate again" in page.text
    assert "2 of 4 runs are not in the means." in page.text
    assert "model.adjoint.name=neumann (n = 1)" in page.text


def test_evaluations_that_are_not_alike_are_told(runs, tmp_path):
    path = tmp_path / "report.html"
    edit(runs[0], images=512, data={"name": "scenes", "cache": "here"})
    edit(runs[1], images=512, data={"cache": "there", "name": "scenes"})
    assert "Not evaluated alike" not in Page(write_comparison(runs[:2], path)).text
    edit(runs[1], images=16)
    assert "care: images: 512, 16." in Page(write_comparison(runs[:2], path)).text
    edit(runs[1], images=512, data={"name": "clevr"})
    assert "care: data." in Page(write_comparison(runs[:2], path)).text


def test_validation_curves_of_all_runs_lie_on_each_other(runs, tmp_path):
    for workdir in runs[:3]:
        records = [
            {"step": step, "split": split, "loss": 1.0 + step}
            for step in range(3)
            for split in ("train", "validation")
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (workdir / "metrics.jsonl").write_text(lines)
    page = Page(write_comparison(runs[:3], tmp_path / "report.html"))
    # Two runs of one configuration, one of the other; both in the legend
    assert page.shapes.count(("path", "line series-0")) == 2
    assert page.shapes.count(("path", "line series-1")) == 1
    assert all(f"{name} " in page.text for name in ("neumann", "unrolled"))
