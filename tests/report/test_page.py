"""The page is parsed as a browser would, for runs whole and broken."""

import base64
import json

import numpy as np
import pytest
from pages import Page, paths

from implicit_slots.drawing.grids import save_png
from implicit_slots.report.page import write_report

CONFIG = {
    "name": "scenes-vanilla",
    "seed": 3,
    "num_steps": 2000,
    "batch_size": 64,
    "model": {"name": "slate", "adjoint": {"name": "unrolled", "terms": 1}},
    "data": {"name": "scenes", "resolution": 32},
}


def write_run(workdir, records=(), summary=None, config=None, pictures=()):
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config or CONFIG))
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (workdir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if summary is not None:
        (workdir / "summary.json").write_text(json.dumps(summary))
    for step in pictures:
        picture = np.full((2, 2, 3), step % 256, np.uint8)
        save_png(picture, workdir / "images" / f"step_{step:08d}.png")
    return Page(write_report(workdir))


def train(step, **values):
    return {"step": step, "split": "train", **values}


def validation(step, **values):
    return {"step": step, "split": "validation", **values}


def whole_run(workdir):
    records = [
        train(s, loss=1e4 / s, grad_norm_l2=2.0, odd_name=s % 7) for s in range(1, 2001)
    ]
    records += [validation(s, loss=1e4 / s, fg_ari=0.5) for s in range(100, 2001, 100)]
    summary = {
        "step": 2000,
        "validation/fg_ari": 0.87654,
        "train/loss": 5.0,
        "wall_seconds": 4321.0,
        "wall_time": {"steps": 90.0, "repeated": 30.0},
        "versions": {"jax": "0.10.2"},
        "command": "python -m implicit_slots.main --config=configs/scenes.py",
    }
    workdir.mkdir(exist_ok=True)
    starts = [
        {"after": 0, "step": 150, "seconds": {"steps": 60.0}},
        {"after": 100, "step": 2000, "seconds": {"repeated": 30.0, "steps": 30.0}},
    ]
    (workdir / "goodput.json").write_text(json.dumps(starts))
    return write_run(workdir, records, summary, pictures=range(0, 1000, 100))


def test_says_what_was_run_and_how_it_ended(tmp_path):
    page = whole_run(tmp_path)
    assert "SLATE, trained on scenes at 32 x 32 pixels" in page.text
    assert "for 2,000 steps of 64 images, seed 3. Backward: unrolled." in page.text
    assert "Foreground ARI validation 0.8765 agreement of" in page.text
    assert "Loss train 5 what is minimised" in page.text
    assert "Time 1 h 12 min" in page.text
    assert "jax 0.10.2" in page.text
    assert "2 min 0 s in 2 starts; 50 steps were made again." in page.text
    assert "steps 1 min 30 s 75.0 % training steps, each counted once" in page.text
    assert "repeated 0 min 30 s 25.0 % steps that an earlier start had" in page.text
    assert "wall_time" not in page.text
    assert "python -m implicit_slots.main --config=configs/scenes.py" in page.text
    assert page.headings == [
        "Final numbers",
        "Pictures",
        "Curves",
        "Where the time went",
        "Run it again",
        "Versions",
    ]


def test_names_every_metric(tmp_path):
    page = whole_run(tmp_path)
    for name in ("loss", "grad_norm_l2", "odd_name", "fg_ari"):
        assert f"<code>{name}</code>" in page.source
    assert page.source.count('role="img"') == 4


def test_holds_everything_itself(tmp_path):
    page = whole_run(tmp_path)
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    for outside in ("http:", "https:", "url(", "@import", "<script"):
        assert outside not in page.source


def test_shows_the_latest_picture_first_and_some_earlier_from_the_first(tmp_path):
    page = whole_run(tmp_path)
    shown = [base64.b64decode(link.partition(",")[2]) for link in page.links]
    files = sorted((tmp_path / "images").iterdir())
    names = [next(f.stem for f in files if f.read_bytes() == data) for data in shown]
    assert len(names) == 7
    assert names[0] == "step_00000900"
    assert names[1] == "step_00000000"
    assert names[-1] == "step_00000800"
    assert names[1:] == sorted(names[1:])


def test_many_records_become_a_band_of_bounded_size(tmp_path):
    page = whole_run(tmp_path)
    assert ("use", "band train") in page.shapes
    assert len(page.source) < 100_000


def test_splits_share_axes_and_far_values_are_logarithmic(tmp_path):
    records = [train(s, loss=10.0**-s) for s in range(5)]
    records += [validation(s, loss=10.0**-s) for s in range(5)]
    page = write_run(tmp_path, records)
    line, same = paths(page, "line train") + paths(page, "line validation")
    assert line == same
    heights = [float(point.split()[1]) for point in line[1:].split("L")]
    np.testing.assert_allclose(np.diff(heights), np.diff(heights)[0], atol=0.11)
    assert page.heights == ["0.0001", "0.001", "0.01", "0.1", "1"]


def test_values_that_are_not_finite_are_marked_and_break_the_line(tmp_path):
    records = [train(s, loss=1.0 + s) for s in range(6)]
    records[2]["loss"] = None
    records[4]["loss"] = "NaN"
    text = json.dumps(train(6, loss=float("-inf")))  # -Infinity, as Python writes it
    page = write_run(tmp_path, [*records, text], {"train/loss": None, "mse": np.nan})
    assert "3 not finite" in page.text
    (line,) = paths(page, "line train")
    assert line.count("M") == 3
    assert page.shapes.count(("use", "notfinite")) == 3
    assert "nan" not in page.source.lower().replace("ui-monospace", "")
    assert page.text.count("not finite") == 4  # two in the table, note, last value


def test_the_last_record_of_a_step_counts_and_half_a_line_is_told(tmp_path):
    records = [train(1, loss=7.0), train(1, loss=9.0), '{"step": 2, "spl', "[]"]
    page = write_run(tmp_path, records)
    assert "Loss 9 " in page.text
    assert "Unreadable lines of metrics.jsonl: 2" in page.text


def test_a_run_in_progress_tells_its_last_numbers(tmp_path):
    page = write_run(tmp_path, [train(10, loss=3.0), validation(20, loss=4.0)])
    assert page.headings == ["Last numbers logged (not finished)", "Curves"]
    assert "Loss validation 4 " in page.text
    assert "Steps 20" in page.text


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-300, 1e30, None])
def test_a_single_record_is_a_page(tmp_path, value):
    page = write_run(tmp_path, [train(0, loss=value)])
    assert "<code>loss</code>" in page.source
    assert page.shapes.count(("use", "dots train")) == (value is not None)


@pytest.mark.parametrize("low", [-1.0, 0.0, 1e-12, 1.0, 999.0])
@pytest.mark.parametrize("span", [1e-15, 1e-6, 2e-3, 0.3, 1.0, 6.0, 1e7])
def test_axes_of_every_range_have_a_few_ticks(tmp_path, low, span):
    page = write_run(tmp_path, [train(0, loss=low), train(1, loss=low + span)])
    assert 1 <= page.shapes.count(("path", "grid")) == len(page.heights) <= 8
    assert len(set(page.heights)) == len(page.heights)
    assert max(map(len, page.heights)) <= 7


def test_a_run_without_anything_logged_is_a_page(tmp_path):
    page = write_run(tmp_path)
    assert "Nothing is logged yet." in page.text
    (tmp_path / "metrics.jsonl").unlink()
    assert "Nothing is logged yet." in Page(write_report(tmp_path)).text


def test_text_is_escaped(tmp_path):
    evil = "<b onload='x'>&\"{body}"
    page = write_run(
        tmp_path,
        [{"step": 1, "split": evil, evil: 1.0}],
        {evil: evil, "command": evil, "versions": {evil: evil}},
        {"name": evil, "data": {"name": evil}, evil: evil},
    )
    assert "<b " not in page.source
    assert "b" not in page.open
    assert page.source.count("<main>") == 1


def test_the_same_files_give_the_same_page(tmp_path):
    assert whole_run(tmp_path / "one").source == whole_run(tmp_path / "two").source


def test_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a run: it holds no config\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
