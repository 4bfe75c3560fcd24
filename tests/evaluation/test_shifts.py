"""Shifts of the data: from the flag to the table of what each costs."""

import csv
import json
import shutil

import numpy as np
import pytest

from configs import folder, scenes
from implicit_slots.data import registry
from implicit_slots.data.scenes.shifts import SHIFTS
from implicit_slots.evaluation import shift_table, shifts
from implicit_slots.report.page import write_report
from implicit_slots.runtime.errors import UserError
from implicit_slots.training import run

MEANS = {
    "none": {"attention/fg_ari": 0.75, "attention/ari": 0.5, "slots/mse": 20.0},
    "noise": {"attention/fg_ari": 0.25, "attention/ari": 0.625, "slots/mse": None},
}


@pytest.fixture
def record():
    return {
        name: {
            "meaning": f"what {name} means",
            "metrics": {
                n: {"mean": m, "std": 0.0, "count": 8} for n, m in means.items()
            },
        }
        for name, means in MEANS.items()
    }


def test_a_shift_costs_the_difference_to_the_unshifted_mean(record):
    assert shift_table.costs(record)["noise"] == {
        "attention/fg_ari": (0.25, -0.5),
        "attention/ari": (0.625, 0.125),
    }
    assert shift_table.table(record).splitlines() == [
        "shift  attention/fg_ari  attention/ari   slots/mse",
        "none   0.75              0.5             20",
        "noise  0.25 (-0.5)       0.625 (+0.125)  nan (+nan)",
    ]
    rows = list(csv.reader(shift_table.as_csv(record).splitlines()))
    assert rows[0] == ["shift", "metric", "mean", "difference", "images"]
    assert rows[4:] == [
        ["noise", "attention/fg_ari", "0.25", "-0.5", "8"],
        ["noise", "attention/ari", "0.625", "0.125", "8"],
    ]


def test_the_page_has_the_table(record, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    place = tmp_path / "evaluation" / "test-shifts"
    place.mkdir(parents=True)
    found = {"metrics": record["none"]["metrics"], "shifts": record}
    (place / "metrics.json").write_text(json.dumps(found))
    page = write_report(tmp_path).read_text()
    assert "Out of distribution" in page and "what noise means" in page
    row = page[page.index('<th scope="row">noise') :]
    cells = " ".join(row[: row.index("</tr>")].split())
    assert "0.25 <span>-0.5</span>" in cells and "0.625 <span>+0.12</span>" in cells
    # Without a shift there is no such table.
    del found["shifts"]
    (place / "metrics.json").write_text(json.dumps(found))
    assert "Out of distribution" not in write_report(tmp_path).read_text()


def test_shifts_that_cannot_be_are_a_sentence():
    config = scenes.get_config("smoke")
    assert shifts.chosen("all", config, "evaluate") == ["none", *SHIFTS]
    assert shifts.chosen("noise,light,noise", config, "evaluate") == [
        *("none", "noise", "light")
    ]
    with pytest.raises(UserError, match=r"all or some of objects, .*got 'dust'"):
        shifts.chosen("noise,dust", config, "evaluate")
    with pytest.raises(UserError, match=r"--shift is for --mode=evaluate"):
        shifts.chosen("all", config, "train")
    with pytest.raises(UserError, match=r"embedded scenes anew; 'folder' cannot be"):
        shifts.chosen("all", folder.get_config("smoke"), "evaluate")
    config.data.shift = "dust"
    with pytest.raises(registry.DataError, match=r"no shift 'dust', but objects, "):
        registry.build(config.data, "test")


@pytest.mark.slow
def test_every_shift_is_measured_from_the_command_to_the_files(smoke_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(smoke_run[0], copy)
    config = scenes.get_config("tokens-smoke")
    config.data.cache = ""
    found = run.run(config, copy, mode="evaluate", shift="all")
    assert found["label"] == "test-shifts" and list(found["shifts"]) == [
        "none",
        *SHIFTS,
    ]
    for shift in found["shifts"].values():
        assert list(shift["metrics"]) == sorted(
            shift["metrics"], key=shift_table.SHOWN.index
        )
        assert set(shift["metrics"]) == {*shift_table.SHOWN}
        assert all(m["count"] == 16 for m in shift["metrics"].values())
    means = {
        name: shift["metrics"]["slots/mse"]["mean"]
        for name, shift in found["shifts"].items()
    }
    assert len(set(means.values())) == len(means)
    for name in ("attention/fg_ari", "slots/mse"):
        plain = found["shifts"]["none"]["metrics"][name]
        assert found["metrics"][name] == plain
    place = copy / "evaluation" / "test-shifts"
    with (place / "shifts.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 7 * len(shift_table.SHOWN)
    assert "Out of distribution" in (copy / "report.html").read_text()


@pytest.mark.slow
def test_a_shift_changes_what_it_says_and_nothing_else():
    config = scenes.get_config("smoke")
    config.data.update(resolution=32, test_size=16, max_objects=4)
    config.data.cache = ""

    def draw(name="", **changes):
        with config.unlocked():
            config.data.shift = name
            config.data.update(changes)
        return registry.build(config.data, "test").batch(np.arange(16))

    plain = draw()
    image, ground = plain["image"].astype(int), plain["segmentation"] == 0
    for name in ("colours", "light", "ground", "noise"):
        shifted = draw(name)
        np.testing.assert_array_equal(shifted["segmentation"], plain["segmentation"])
        assert (shifted["image"] != plain["image"]).any()
        for key in ("position", "color", "shape"):
            np.testing.assert_array_equal(
                shifted["objects"][key], plain["objects"][key]
            )
    # Light falls from elsewhere, and so do shadows; colours leave the ground alone,
    # but for what metal mirrors onto nothing.
    assert np.mean(draw("light")["shadow"] != plain["shadow"]) > 0.05
    np.testing.assert_array_equal(draw("colours")["shadow"], plain["shadow"])
    interior = ground & (plain["shadow"] == 0)
    same = (draw("colours")["image"] == plain["image"]).all(axis=-1)
    assert same[interior].mean() > 0.9 and same[~ground].mean() < 0.1
    brown = draw("ground")["image"].astype(int)
    redder = brown[interior][:, 0] > brown[interior][:, 2] + 10
    assert redder.mean() > 0.9  # all but the edges of objects
    assert (brown[interior] <= image[interior]).all()
    noise = (draw("noise")["image"].astype(int) - image)[(image > 80) & (image < 175)]
    assert abs(noise.std() / 255 - 0.1) < 0.01 and abs(noise.mean()) < 1
    # The middle two thirds: what is seen in the middle is seen there, larger.
    cropped = draw("cropped")
    area = [(b["segmentation"] > 0).mean() for b in (plain, cropped)]
    assert area[1] > 1.2 * area[0]
    middle = cropped["objects"]["pixel_position"] - 16
    np.testing.assert_allclose(
        middle, 1.5 * (plain["objects"]["pixel_position"] - 16), atol=1e-3
    )
    # And a batch anywhere has the same bytes.
    again = registry.build(config.data, "test").batch(np.arange(8, 16))
    np.testing.assert_array_equal(again["image"], cropped["image"][8:])
