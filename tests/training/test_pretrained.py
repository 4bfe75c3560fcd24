"""Trained models as folders, and the one that comes with the package."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from configs import scenes
from implicit_slots import load, save_pretrained
from implicit_slots.data import registry
from implicit_slots.evaluation.metrics.segmentation import score_masks
from implicit_slots.interop import convert
from implicit_slots.models.build import split_model
from implicit_slots.models.images import as_float
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.workdir import find_trained, packaged
from implicit_slots.training.checks import check_same_run


@pytest.fixture(scope="module")
def trained():
    return load("scenes")


def params_of(model):
    return split_model(model)[1]


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_the_packaged_model_finds_what_anyone_would(trained, tmp_path, monkeypatch):
    """Each of two squares on a floor is all that a slot has."""
    config, model = trained
    assert config.name == "scenes" and issubclass(type(model), nnx.Module)
    image = np.full((48, 48, 3), 0.5, np.float32)
    image[8:22, 6:20], image[26:42, 26:42] = (0.6, 0.1, 0.1), (0.1, 0.2, 0.6)
    encode = jax.jit(lambda image: model.encode(image, key=jax.random.key(0)))
    found = encode(image[None])
    assert found.slots.shape == (1, 5, 64) and found.attention.shape == (1, 5, 24, 24)
    ids = np.argmax(found.attention[0], axis=0)
    for square in (np.s_[4:11, 3:10], np.s_[13:21, 13:21]):
        drawn = np.zeros_like(ids, bool)
        drawn[square] = True
        np.testing.assert_array_equal(ids == ids[square][0, 0], drawn)
    # A folder of the user's own that has the name comes first.
    monkeypatch.chdir(tmp_path)
    assert find_trained("scenes") == packaged()["scenes"]
    (tmp_path / "scenes").mkdir()
    with pytest.raises(UserError, match="a model that comes with the package: scenes"):
        load("scenes")


@pytest.mark.slow
def test_the_packaged_model_scores_as_its_card_says(trained):
    config, model = trained
    config = config.copy_and_resolve_references()
    config.data.with_masks = True
    source = registry.build(config.data, "validation")
    batch = source.batch(np.arange(256))
    image, true = map(jnp.asarray, (batch["image"], batch["segmentation"]))
    masks = model.encode(as_float(image), key=jax.random.key(0)).attention
    found = score_masks(masks, true, max_true=config.data.max_objects)
    means = {name: float(np.nanmean(found[name])) for name in ("fg_ari", "ari", "miou")}
    assert means["fg_ari"] == pytest.approx(0.859, abs=0.01)
    assert means["ari"] == pytest.approx(0.820, abs=0.01)
    assert means["miou"] == pytest.approx(0.685, abs=0.01)


def test_a_model_goes_through_a_folder_unchanged(trained, tmp_path):
    config, model = trained
    config = config.copy_and_resolve_references()
    config.data.cache = "/home/someone/cache"
    numbers = {"validation/ari": 0.82023}
    save_pretrained(model, config, tmp_path / "mine", numbers=numbers)
    files = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    weights = load_file(tmp_path / "mine" / "model.safetensors")
    assert sum(array.size for array in weights.values()) == 138_147
    kernel = model.slot_attention.step.project_q.kernel[...]
    named = weights["slot_attention.step.project_q.kernel"]
    np.testing.assert_array_equal(named, kernel)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "138,147 parameters" in card and "| validation/ari | 0.8202 |" in card
    assert 'load("mine")' in card
    # It goes to other machines.
    assert "someone" not in (tmp_path / "mine" / "config.json").read_text()
    got_config, got = load(tmp_path / "mine")
    assert equal(params_of(got), params_of(model))
    config.data.cache = ""
    assert got_config.to_dict() == config.to_dict()


def test_a_folder_that_holds_a_run_is_not_written_over(trained, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds a run; choose another folder"):
        save_pretrained(trained[1], trained[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("training", [True, False])
def test_a_folder_of_a_model_alone_is_no_workdir(trained, training):
    """Training would add a run's files to the package's own model."""
    with pytest.raises(UserError, match=r"without its run; .*interop --source="):
        check_same_run(trained[0], packaged()["scenes"], training=training)


def test_keys_may_change_that_leave_the_arrays_as_they_are(trained):
    config, model = load("scenes", changes={"model.solver.max_steps": 3})
    assert config.model.solver.max_steps == 3
    assert model.slot_attention.solver.max_steps == 3
    assert equal(params_of(model), params_of(trained[1]))
    for changes, sentence in (
        ({"model.num_slots": 7}, r"model\.num_slots=7 needs .*learned initial slots"),
        ({"model.solver.max_steps": 0}, r"max_steps must be at least 1, got 0"),
        ({"model.solver.steps": 3}, r"no key model\.solver\.steps"),
    ):
        with pytest.raises(UserError, match=sentence):
            load("scenes", changes=changes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("out.kernel"), r"has no out\.kernel, .* shape \(64, 64\)"),
        (
            lambda w: w.update({"out.kernel": w["out.kernel"][:5]}),
            r"has an array of shape \(5, 64\) as out\.kernel, .* shape \(64, 64\)",
        ),
    ],
)
def test_weights_of_another_model_are_one_sentence(tmp_path, change, sentence):
    shutil.copytree(packaged()["scenes"], tmp_path / "mine")
    weights = load_file(tmp_path / "mine" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "mine" / "model.safetensors")
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / "mine")


@pytest.mark.slow
def test_a_folder_becomes_a_run_and_a_run_a_folder(trained, tmp_path):
    config = scenes.get_config()
    config.data.cache = ""
    convert(packaged()["scenes"], tmp_path / "run", config)
    summary = {"validation/ari": 0.5, "wall_seconds": 1.0}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    record = {"metrics": {"attention/ari": {"mean": 0.25}, "decoder/ari": {}}}
    (tmp_path / "run" / "evaluation" / "test").mkdir(parents=True)
    file = tmp_path / "run" / "evaluation" / "test" / "metrics.json"
    file.write_text(json.dumps(record))
    convert(tmp_path / "run", tmp_path / "mine")
    assert equal(params_of(load(tmp_path / "mine")[1]), params_of(trained[1]))
    card = (tmp_path / "mine" / "README.md").read_text()
    rows = [line for line in card.splitlines() if "/ari" in line or "wall" in line]
    assert rows == ["| validation/ari | 0.5 |", "| test/attention/ari | 0.25 |"]
    config.model.num_slots = 4
    with pytest.raises(UserError, match="which the configuration's model has with"):
        convert(tmp_path / "mine", tmp_path / "other", config)
    assert not (tmp_path / "other").exists()
