"""Shifts of the data: from the flag to the table of what each costs."""

import csv
import json
import shutil
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from configs import folder, scenes
from implicit_slots.data import registry
from implicit_slots.data.scenes.sampling import Scene
from implicit_slots.data.scenes.shifts import SHIFTS, rearranged
from implicit_slots.evaluation import shift_table, shifts
from implicit_slots.report.page import write_report
from implicit_slots.runtime.errors import UserError
from implicit_slots.training import run

RESOLUTION = 32
OBJECTS = 4
SCENES = 16
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
    with config.unlocked():
        config.data.update(shift="occlusion", min_objects=1, max_objects=1)
    with pytest.raises(registry.DataError, match=r"one object hides no other: .*>= 2"):
        registry.build(config.data, "test")


def test_the_camera_moves_about_the_vertical_and_down():
    scene = Scene(*map(jnp.array, range(9)))  # of no sizes that a scene has
    scene = scene._replace(camera=jnp.array([2.0, 0.0, 5.0]))
    moved = rearranged(scene, SHIFTS["camera"])
    np.testing.assert_allclose(moved.camera, [3**0.5, 1.0, 3.0], rtol=1e-6)
    assert moved._replace(camera=scene.camera) == scene


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
        rows = 1 + len(found["shifts"]) * len(shift_table.SHOWN)
        assert len(list(csv.reader(file))) == rows
    assert "Out of distribution" in (copy / "report.html").read_text()


@pytest.fixture(scope="module")
def sources():
    """From the name of a shift to 16 scenes."""
    config = scenes.get_config("smoke")
    config.data.update(resolution=RESOLUTION, test_size=SCENES, max_objects=OBJECTS)
    config.data.cache = ""

    @cache
    def of(name):
        with config.unlocked():
            config.data.shift = name
        return registry.build(config.data, "test")

    return of


@pytest.fixture(scope="module")
def draw(sources):
    return cache(lambda name="": sources(name).batch(np.arange(SCENES)))


@pytest.mark.slow
def test_a_shift_changes_what_it_says_and_nothing_else(draw):
    plain = draw()
    image, ground = plain["image"].astype(int), plain["segmentation"] == 0
    for name in set(SHIFTS) - {"objects", "occlusion"}:
        for key in ("position", "color", "shape", "size", "material", "present"):
            np.testing.assert_array_equal(
                draw(name)["objects"][key], plain["objects"][key]
            )
    for name in ("colours", "light", "ground", "noise", "textures"):
        shifted = draw(name)
        np.testing.assert_array_equal(shifted["segmentation"], plain["segmentation"])
        assert (shifted["image"] != plain["image"]).any()
    # Light falls from elsewhere, and so do shadows; colours and patterns leave the
    # ground alone, but for what metal mirrors onto nothing.
    assert np.mean(draw("light")["shadow"] != plain["shadow"]) > 0.05
    interior = ground & (plain["shadow"] == 0)
    for name, least, most in (("colours", 0, 0.1), ("textures", 0.2, 0.6)):
        np.testing.assert_array_equal(draw(name)["shadow"], plain["shadow"])
        same = (draw(name)["image"] == plain["image"]).all(axis=-1)
        assert same[interior].mean() > 0.9 and least <= same[~ground].mean() < most
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
    middle = cropped["objects"]["pixel_position"] - RESOLUTION / 2
    np.testing.assert_allclose(
        middle, 1.5 * (plain["objects"]["pixel_position"] - RESOLUTION / 2), atol=1e-3
    )
    # Pyramids and cones are narrower than what they stand for, and so are shadows.
    for key in ("segmentation", "shadow"):
        areas = [np.mean(batch[key] > 0) for batch in (draw("shapes"), plain)]
        assert 0.1 < areas[0] / areas[1] < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "camera", "shapes"])
def test_objects_are_seen_where_their_attributes_say(draw, name):
    batch = draw(name)
    objects, found = batch["objects"], 0
    for i, k in zip(*np.nonzero(objects["present"]), strict=True):
        column, row = np.floor(objects["pixel_position"][i, k]).astype(int)
        if 0 <= column < RESOLUTION and 0 <= row < RESOLUTION:
            seen = batch["segmentation"][i, row, column]
            depths = objects["depth"][i]
            assert seen == k + 1 or (seen > 0 and depths[seen - 1] < depths[k])
            found += seen == k + 1
    assert found > 0.6 * objects["present"].sum()


@pytest.mark.slow
def test_occlusion_hides_a_share_of_an_object_in_every_scene(sources, draw):
    batch, there = draw("occlusion"), draw("occlusion")["objects"]["present"]
    seen, alone = np.zeros((2, SCENES, OBJECTS))
    for k in range(OBJECTS):
        only = np.tile(np.arange(OBJECTS) == k, (SCENES, 1))
        masks = sources("occlusion")._render(np.arange(SCENES), keep=only)
        seen[:, k] = np.sum(batch["segmentation"] == k + 1, axis=(1, 2))
        alone[:, k] = np.sum(masks["segmentation"] == k + 1, axis=(1, 2))
    assert (seen[there] > 0).all()
    hidden = np.where(there, 1 - seen / np.maximum(alone, 1), 0)
    most = hidden.max(axis=1)
    assert (most >= 0.3).all() and (most <= 0.7).all()
    assert hidden[there].mean() > 0.15  # of ordinary scenes 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", *(s for s in SHIFTS if s != "objects")])
def test_a_scene_without_an_object_has_the_same_shift(sources, draw, name):
    batch, mask = draw(name), draw(name)["segmentation"]
    scene, object_ = np.arange(SCENES), np.arange(OBJECTS)
    removed = np.tile(object_ == 0, (SCENES, 1))
    whole = sources(name).without(scene, removed & False)
    np.testing.assert_array_equal(whole, batch["image"])
    after = sources(name).without(scene, removed)
    change = np.abs(after.astype(int) - batch["image"]).max(axis=-1)
    assert change[mask == 1].mean() > 5
    # Metal mirrors what is beside it, edges are blended, and each of four lamps may
    # lose a tenth of its light: 6 levels.
    metal = np.pad(batch["objects"]["material"] == 1, ((0, 0), (1, 0)))
    metal = np.take_along_axis(metal, mask.reshape(SCENES, -1), 1).reshape(mask.shape)
    apart = (mask != 1) & (batch["shadow"] != 1) & ~metal
    for axis in (1, 2):
        apart &= np.roll(apart, 1, axis) & np.roll(apart, -1, axis)
    assert apart.mean() > 0.3
    assert change[apart].max() <= 24
