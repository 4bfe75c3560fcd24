"""Several runs on one page: spread over seeds by hand, and runs that failed."""

import json

import numpy as np
import pytest
from test_report import Page

from implicit_slots.training.comparison import write_comparison
from implicit_slots.training.report import write_report

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
    with pytest.raises(ValueError, match="none of these runs has an evaluation"):
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
