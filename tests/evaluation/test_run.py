"""An evaluation from its command to its files, on a run of seconds."""

import csv
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from configs import autoencoder_scenes, folder, scenes, set_prediction_scenes
from implicit_slots.data import registry
from implicit_slots.evaluation import groups
from implicit_slots.evaluation import run as evaluation
from implicit_slots.evaluation.catalogue import GROUPS, METRICS, describe
from implicit_slots.evaluation.findings import Findings, Subject
from implicit_slots.evaluation.metrics.segmentation import score_masks
from implicit_slots.evaluation.steps import build_evaluation_steps
from implicit_slots.models.build import build, split_model
from implicit_slots.models.images import as_float
from implicit_slots.runtime.devices import build_mesh
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.prng import Purpose, purpose_key
from implicit_slots.runtime.workdir import config_flag, get_config
from implicit_slots.training import checks, pretrained, run

ROOT = pathlib.Path(__file__).parents[2]


def smoke(**changes):
    config = scenes.get_config("tokens-smoke")
    config.data.cache = ""
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def workdir(smoke_run):
    return smoke_run[0]


@pytest.fixture(scope="module")
def history(workdir):
    return (workdir / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def record(workdir, history):
    return run.run(smoke(), workdir, mode="evaluate", command="again")


@pytest.mark.slow
def test_every_metric_of_the_table_is_measured_or_its_absence_explained(record):
    found = {name.rpartition("/")[2] for name in record["metrics"]}
    told = {
        metric.name
        for metric in METRICS.values()
        if metric.measured != "training" and metric.group != "Object properties"
    }
    # And of properties what a probe finds in slots.
    probed = {f"{name}_accuracy" for name in ("size", "material", "shape", "color")}
    probed |= {f"{name}_r2" for name in ("position", "pixel_position", "depth")}
    for name in ("linear", "mlp", "shuffled/linear", "shuffled/mlp"):
        assert {f"{name}/{one}" for one in probed} <= record["metrics"].keys()
    told |= probed
    assert found | record["absent"].keys() == told
    assert record["absent"].keys() == {"fid", "kid", "lpips"}
    for name in record["metrics"]:
        row = describe(name)
        assert row.group in GROUPS and row.label and row.range and row.meaning
    for kind in ("attention", "decoder"):
        assert record["metrics"][f"{kind}/fg_ari"]["count"] == 16
    assert {"dvae/psnr", "slots/psnr"} <= record["metrics"].keys()
    assert record["metrics"]["composed/frechet_random"]["count"] == 16
    assert "masks are scored at 16×16 pixels" in record["notes"]
    # Counted over objects: all images, none left out.
    found = {n: m["mean"] for n, m in record["metrics"].items()}
    for kind in ("attention", "decoder"):
        precision, recall = (found[f"{kind}/mask_{n}"] for n in ("precision", "recall"))
        assert 0 <= found[f"{kind}/mask_ap"] <= recall <= 1 and 0 <= precision <= 1
        assert found[f"{kind}/miou"] != found[f"{kind}/miou_objects"]


@pytest.mark.slow
def test_every_number_that_training_writes_is_in_the_table(workdir, history):
    names = {name for line in history.splitlines() for name in json.loads(line)}
    summary = json.loads((workdir / "summary.json").read_text())
    no_numbers = {"command", "versions", "wall_time"}
    names |= {name.rpartition("/")[2] for name in summary} - no_numbers
    for name in names - {"split"}:
        assert describe(name).measured in ("training", "both"), name


@pytest.mark.slow
def test_files_hold_what_was_returned_and_training_is_untouched(
    record, workdir, history
):
    folder = workdir / "evaluation" / "test"
    assert json.loads((folder / "metrics.json").read_text()) == record
    assert (workdir / "metrics.jsonl").read_text() == history
    with (folder / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == [str(i) for i in range(16)]
    for name in ("attention/fg_ari", "slots/mse", "residual"):
        values = [float(row[name]) for row in rows if row[name]]
        metric = record["metrics"][name]
        assert len(values) == metric["count"]
        assert np.isclose(np.mean(values), metric["mean"], rtol=1e-4)
        assert np.isclose(np.std(values, ddof=1), metric["std"], rtol=1e-3)
    for picture in record["pictures"]:
        with Image.open(folder / picture["file"]) as image:
            assert min(image.size) > 90
        if picture["file"] in ("best.png", "worst.png"):
            number = r"-?[\d.]+(e-\d+)?"
            one = rf"{number} / ARI {number} / mIoU {number} \(image \d+\)"
            said = rf"By attention/fg_ari: {one}(, {one})*\."
            assert re.fullmatch(said, picture["caption"])
    page = (workdir / "report.html").read_text()
    assert "masks are scored at 16×16 pixels" in page
    for told in ("Evaluation: test", "Foreground ARI", "decoder masks", "no weights"):
        assert told in page


@pytest.mark.slow
def test_masks_score_as_scikit_learn_scores_them(record, workdir):
    """From the model's own maps, by another road."""
    config, model = pretrained.load(workdir)
    config.data.cache = ""
    source = registry.build(config.data, "test")
    batch = source.batch(np.arange(8))
    from implicit_slots.evaluation.steps import build_evaluation_steps
    from implicit_slots.models.build import split_model

    graphdef, params = split_model(model)
    steps = build_evaluation_steps(graphdef, config)
    encoded = steps.encode(params, batch["image"], 0)
    maps = np.asarray(encoded.attention)
    with (workdir / "evaluation" / "test" / "images.csv").open() as file:
        rows = list(csv.DictReader(file))[:8]
    scored = 0
    for row, attention, true in zip(rows, maps, batch["segmentation"], strict=True):
        upsampled = np.stack(
            [
                np.asarray(
                    Image.fromarray(a).resize((16, 16), Image.Resampling.BILINEAR)
                )
                for a in attention
            ]
        )
        seen = true > 0
        want = adjusted_rand_score(true[seen], upsampled.argmax(axis=0)[seen])
        # Neither road rounds alike: a pixel of a tie may go elsewhere.
        assert abs(float(row["attention/fg_ari"]) - want) < 0.1
        scored += abs(float(row["attention/fg_ari"]) - want) < 1e-4
    assert scored >= 6


@pytest.mark.slow
def test_more_masks_than_slots_are_told(record):
    assert any("more masks (objects and ground)" in note for note in record["notes"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [scenes.get_config("tokens-smoke"), autoencoder_scenes.get_config("smoke")],
    ids=["scenes", "autoencoder_scenes"],
)
def test_of_several_starts_the_one_that_reconstructs_best_is_scored(config):
    config.data.cache = ""
    config.evaluation.masks.num_images = 4
    source, model = registry.build(config.data, "validation"), build(config)
    graphdef, params = split_model(model)
    mesh, found = build_mesh(4), {}
    for starts in (1, 3):
        config.evaluation.masks.starts = starts
        steps = build_evaluation_steps(graphdef, config, mesh)
        subject = Subject(config, steps, params, mesh, source, 4, quiet=True)
        found[starts] = Findings()
        groups.masks(subject, found[starts])
    assert not any("initial slots" in note for note in found[1].notes)
    assert any("best of 3 initial slots" in note for note in found[3].notes)

    # By hand: one start after the other.
    batch = source.batch(np.arange(4))
    image = as_float(jnp.asarray(batch["image"]))
    truth = jnp.asarray(batch["segmentation"])

    @jax.jit
    def by_hand(params, key):
        model = nnx.merge(graphdef, params)
        encoded = model.encode(image, key=key)
        forced = model.read(encoded.tokens, encoded.slots)
        scores = [
            score_masks(masks, truth, max_true=config.data.max_objects)["soft_iou"]
            for masks in (encoded.attention, forced.attention)
        ]
        if forced.cross_entropy is None:
            error = (model.render(encoded.slots) - image) ** 2
            return error.mean(axis=(1, 2, 3)), *scores
        return forced.cross_entropy.sum(axis=(1, 2)), *scores

    key = purpose_key(config.seed, Purpose.EVALUATE, 0)
    keys = [key, *(jax.random.fold_in(key, start) for start in (1, 2))]
    errors, *scores = np.array([by_hand(params, key) for key in keys]).swapaxes(0, 1)
    best = errors.argmin(axis=0)
    assert best.any()  # Else nothing is chosen here.
    for starts, chosen in ((1, 0 * best), (3, best)):
        images = found[starts].images
        for kind, score in zip(("attention", "decoder"), scores, strict=True):
            want = score[chosen, np.arange(4)]
            np.testing.assert_allclose(images[f"{kind}/soft_iou"], want, atol=1e-5)
        if "cross_entropy" in images:
            want = errors[chosen, np.arange(4)]
            np.testing.assert_allclose(images["cross_entropy"], want, rtol=1e-5)


def test_an_older_run_has_one_start_and_several_have_a_place_of_their_own(
    workdir, tmp_path
):
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    written = json.loads((copy / "config.json").read_text())
    del written["evaluation"]["masks"]["starts"], written["model"]["attention_gain"]
    (copy / "config.json").write_text(json.dumps(written))
    config = get_config(str(copy))
    assert config.evaluation.masks.starts == 1 and config.model.attention_gain == 1.0
    assert evaluation.label(config, copy, "best") == "test-best"
    config.evaluation.masks.starts = 3
    assert evaluation.label(config, copy, "best") == "test-3-starts-best"
    older, _ = pretrained.load(copy)
    assert older.evaluation.masks.starts == 1


def test_several_starts_are_refused_where_none_is_best():
    for config in (set_prediction_scenes.get_config(), scenes.get_config("learned")):
        config.evaluation.masks.starts = 2
        with pytest.raises(UserError, match=r"masks\.starts .* set it to 1"):
            checks.check(config, "evaluate")
        # An older version's configuration has no such key.
        del config.evaluation.masks.starts
        checks.check(config, "evaluate")
    with pytest.raises(UserError, match=r"masks\.starts must be at least 1"):
        checks.check(smoke(**{"evaluation.masks.starts": 0}), "evaluate")


@pytest.mark.slow
def test_other_data_have_a_place_of_their_own(workdir, record, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    config = smoke(**{"data.zoom": 1.0, "evaluation.split": "validation"})
    label = evaluation.label(config, copy, "latest")
    assert label.startswith("scenes-validation-") and len(label) == 22
    assert evaluation.label(smoke(**{"data.workers": 1}), copy, "best") == ("test-best")
    with pytest.raises(UserError, match=r"its data\.resolution is 16"):
        run.run(smoke(**{"data.resolution": 32}), copy, mode="evaluate")


@pytest.mark.parametrize(
    ("recorded", "now", "same"),
    [
        ("imgs", "imgs", True),  # As older versions recorded it.
        ("{}/imgs", "imgs", True),
        ("{}/gone/imgs", "imgs", True),  # They were moved.
        ("{}/gone/imgs", "others", False),
        ("{}/imgs", "others", False),
    ],
)
def test_a_runs_own_data_are_known_wherever_they_are(
    recorded, now, same, tmp_path, monkeypatch
):
    """An evaluation's label, and whether training may go on with them."""
    monkeypatch.chdir(tmp_path)
    config = folder.get_config("smoke")
    config.data.path = recorded.format(tmp_path)
    for place in ("imgs", "others"):
        (tmp_path / place).mkdir()
    (tmp_path / "config.json").write_text(config.to_json())
    config.data.path = str(tmp_path / now)
    label = evaluation.label(config, tmp_path, "latest")
    assert (label == "test") == same and label.startswith(("test", "folder-test-"))
    if same:
        checks.check_same_run(config, tmp_path)
    else:
        with pytest.raises(UserError, match=r"its data\.path is"):
            checks.check_same_run(config, tmp_path)


@pytest.mark.slow
def test_images_without_masks_leave_out_what_needs_them(workdir, record, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(40):
        pixels = rng.integers(0, 255, size=(20, 20, 3)).astype(np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index:02}.png")
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    config = smoke()
    other = folder.get_config().data
    other.update(path=str(tmp_path / "images"), cache="", resolution=16)
    other.update(test_fraction=0.2)
    config.data = other
    found = run.run(config, copy, mode="evaluate")
    assert found["label"].startswith("folder-test-") and found["images"] == 8
    assert found["absent"]["Segmentation"] == groups.NO_MASKS
    assert found["absent"]["counterfactual_error"] == groups.NO_RENDERER
    names = {name for name in found["metrics"] if name.startswith("attention/")}
    assert names == {"attention/dead_slots", "attention/doubled_slots"}
    assert {"slots/mse", "cross_entropy", "spill"} <= found["metrics"].keys()
    assert any("own decoder mask" in note for note in found["notes"])


@pytest.mark.slow
def test_training_logs_the_same_numbers_at_their_own_intervals(tmp_path):
    changes = {f"evaluation.{group}.every": 5 for group in ("masks", "deletion")}
    changes |= {"num_steps": 10, "evaluation.rendering.every": 10}
    config = smoke(**changes)
    run.run(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]

    def logged(name):
        return [r["step"] for r in records if name in r and r["split"] == "validation"]

    assert logged("decoder/miou") == [5, 10]
    assert logged("spill") == [5, 10]
    assert logged("slots/ssim") == [10]
    assert logged("spectral_radius") == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"evaluation.split": "tset"}, r"split must be one of train, validation, test"),
        ({"evaluation.masks.every": -1}, r"masks\.every must not be negative"),
        ({"evaluation.deletion.num_images": 0}, r"num_images must be at least 1"),
        ({"evaluation.fixed_points.iterations": 0}, r"iterations must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        checks.check(smoke(**changes), "evaluate")


@pytest.mark.parametrize("name", ["inception", "lpips"])
def test_weights_that_are_not_there_are_a_sentence(name, workdir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    config = smoke(**{f"evaluation.{name}": str(tmp_path / "nothing.pth")})
    with pytest.raises(UserError, match=rf"nothing\.pth.*evaluation\.{name}"):
        run.run(config, copy, mode="evaluate")


def test_a_run_brings_its_own_configuration(workdir):
    config = get_config(str(workdir))
    assert config.to_json() == smoke().to_json()
    flag = config_flag(str(workdir), f"{ROOT}/configs/folder.py")
    other = get_config(flag.partition(":")[2])
    assert other.data.name == "folder" and other.data.resolution == 16
    assert other.model.to_json() == config.model.to_json()


def test_what_is_no_run_brings_none(tmp_path):
    with pytest.raises(ValueError, match="holds no run; train one there first"):
        get_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a run's configuration"):
        get_config(str(tmp_path))
