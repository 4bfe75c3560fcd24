"""The other two models through the same run: train, evaluate, report, refuse."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs import (
    autoencoder_scenes,
    dinosaur_scenes,
    scenes,
    set_prediction_scenes,
)
from implicit_slots.data import registry
from implicit_slots.evaluation.catalogue import describe
from implicit_slots.evaluation.metrics.average_precision import THRESHOLDS
from implicit_slots.evaluation.run import GROUPS, groups_of
from implicit_slots.models.build import build, split_model
from implicit_slots.runtime.errors import UserError
from implicit_slots.training import replay, run
from implicit_slots.training.checks import check
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.pretrained import load
from implicit_slots.training.state import TrainState, initial_state


def smoke(module):
    config = module.get_config("smoke")
    config.data.cache = ""
    config.num_steps = 4
    config.update(log_every=2, validate_every=4, draw_every=4, checkpoint_every=4)
    config.evaluation.fixed_points.iterations = 5
    return config


def trained(module, workdir):
    config = smoke(module)
    summary = run.run(config, workdir, command="first")
    record = run.run(config, workdir, mode="evaluate", command="again")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return summary, record, [json.loads(line) for line in lines], workdir


@pytest.mark.slow
def test_slate_with_a_codebook_trains_evaluates_and_goes_on(tmp_path):
    """The codes are found once, and no step and no later session changes them."""
    config = scenes.get_config("smoke")
    config.num_steps = 4
    config.update(log_every=2, validate_every=4, draw_every=4, checkpoint_every=2)
    config.evaluation.fixed_points.iterations = 5
    whole = tmp_path / "whole"
    summary = run.run(config, whole)
    record = run.run(config, whole, mode="evaluate")
    assert record["metrics"]["attention/fg_ari"]["count"] > 0
    assert summary["validation/dvae_mse"] > 0
    # Learned slots begin in one place.
    assert "every start is the same" in record["absent"]["fixed_points"]
    assert "fixed_points" not in record["metrics"]
    before, end, again = halted_and_resumed(config, whole)
    same = jax.tree.map(np.array_equal, end, again)
    assert all(jax.tree.leaves(same))
    assert np.array_equal(end["dvae"]["codes"], before["dvae"]["codes"])
    assert not np.array_equal(end["out"]["kernel"], before["out"]["kernel"])


@pytest.mark.slow
def test_slate_that_reads_the_image_trains_freezes_evaluates_and_goes_on(tmp_path):
    """Through the whole run; the frozen dVAE is the same after it."""
    config = scenes.get_config("tokens-smoke")
    config.model.inputs = "image"
    config.num_steps, config.optimizer.dvae_steps = 4, 2
    config.update(log_every=2, validate_every=4, draw_every=4, checkpoint_every=2)
    config.evaluation.fixed_points.iterations = 5
    whole = tmp_path / "whole"
    summary = run.run(config, whole)
    record = run.run(config, whole, mode="evaluate")
    assert record["metrics"]["attention/fg_ari"]["count"] > 0
    assert summary["validation/slot_mse"] > 0
    # Killed before the step that freezes: the same end, bit for bit.
    before, end, again = halted_and_resumed(config, whole)
    assert jax.tree.all(jax.tree.map(np.array_equal, end, again))
    assert jax.tree.all(jax.tree.map(np.array_equal, end["dvae"], before["dvae"]))
    assert not jax.tree.all(
        jax.tree.map(np.array_equal, end["image_encoder"], before["image_encoder"])
    )


def halted_and_resumed(config, whole):
    """Parameters of a run of four steps at step 2, at its end, and at another end.

    The other one lost its last checkpoint and went on.
    """
    halted = whole.with_name("halted")
    shutil.copytree(whole, halted)
    shutil.rmtree(halted / "checkpoints" / "4")
    (halted / "summary.json").unlink()
    run.run(config, halted)
    models = load(whole, step=2)[1], load(whole)[1], load(halted)[1]
    return [split_model(model)[1] for model in models]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return trained(autoencoder_scenes, tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return trained(set_prediction_scenes, tmp_path_factory.mktemp("predictor"))


@pytest.mark.slow
def test_slots_of_frozen_features_train_evaluate_and_go_on(tmp_path):
    """Features are standardised once, and no step changes the transformer."""
    config = smoke(dinosaur_scenes)
    config.update(checkpoint_every=2)
    whole = tmp_path / "whole"
    summary = run.run(config, whole)
    record = run.run(config, whole, mode="evaluate")
    assert {"validation/feature_mse", "validation/decoder_fg_ari"} <= summary.keys()
    assert not any("slot_mse" in name for name in summary)
    for name in ("attention/fg_ari", "decoder/fg_ari", "decoder/mbo_class"):
        assert record["metrics"][name]["count"] > 0
    files = {picture["file"] for picture in record["pictures"]}
    assert "decoder_masks.png" in files and "deletion.png" not in files
    assert "Feature error" in (whole / "report.html").read_text()
    before, end, again = halted_and_resumed(config, whole)
    assert jax.tree.all(jax.tree.map(np.array_equal, end, again))
    assert jax.tree.all(jax.tree.map(np.array_equal, end["vit"], before["vit"]))
    assert not np.array_equal(end["vit"]["norm"]["scale"], np.ones(64))
    assert not jax.tree.all(
        jax.tree.map(np.array_equal, end["encoder"], before["encoder"])
    )


@pytest.mark.slow
def test_the_autoencoder_logs_and_reports_its_decoders_masks(autoencoder):
    summary, record, lines, workdir = autoencoder
    (held_out,) = (line for line in lines if line["split"] == "validation")
    assert {"reconstruction", "fg_ari", "decoder_fg_ari"} <= held_out.keys()
    assert "temperature" not in lines[0] and "mse" not in lines[0]
    assert "validation/slot_mse" in summary and "validation/dvae_mse" not in summary
    metrics = record["metrics"]
    for name in ("decoder/fg_ari", "attention/fg_ari", "slots/psnr", "spill_share"):
        assert metrics[name]["count"] > 0
    assert not any(name.startswith("dvae/") or "ap_" in name for name in metrics)
    files = {picture["file"] for picture in record["pictures"]}
    assert {"decoder_masks.png", "deletion.png", "composition.png"} <= files
    page = (workdir / "report.html").read_text()
    assert "Foreground ARI, decoder" in page and "dVAE" not in page.split("<details")[0]
    assert "error, tokens" not in page.split("<details")[0]


@pytest.mark.slow
def test_the_predictor_logs_and_reports_average_precision(predictor):
    summary, record, lines, workdir = predictor
    (held_out,) = (line for line in lines if line["split"] == "validation")
    found = [held_out[f"ap_{name}"] for name in THRESHOLDS]
    assert found == sorted(found, reverse=True)
    assert "validation/ap_inf" in summary
    metrics = record["metrics"]
    for name in (*(f"ap_{name}" for name in THRESHOLDS), "count_error"):
        assert metrics[name]["count"] == 16
        assert describe(name).group == "Object properties"
    assert not any("psnr" in name or name.startswith("decoder/") for name in metrics)
    files = {picture["file"] for picture in record["pictures"]}
    assert "precision_recall.png" in files and "deletion.png" not in files
    folder = workdir / "evaluation" / "test" / "precision_recall"
    assert folder.with_suffix(".pdf").exists()
    assert "AP, within 0.5" in (workdir / "report.html").read_text()


def test_every_group_is_some_models_and_slate_predicts_nothing():
    by_model = {
        name: set(groups_of(name))
        for name in ("slate", "autoencoder", "set_prediction", "feature_slots")
    }
    assert set.union(*by_model.values()) == set(GROUPS)
    assert by_model["slate"] == by_model["autoencoder"] == {*GROUPS} - {"properties"}
    of_all = {"masks", "probes", "fixed_points"}
    assert by_model["set_prediction"] == {*of_all, "properties"}
    assert by_model["feature_slots"] == of_all


def test_data_that_a_model_cannot_learn_from_is_refused(tmp_path):
    config = smoke(set_prediction_scenes)
    config.data.with_masks = False
    with pytest.raises(UserError, match=r"learns from 'objects'.*with_masks=True"):
        run.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = smoke(set_prediction_scenes)
    config.data.flip = True
    with pytest.raises(UserError, match=r"data\.flip=False"):
        check(config, "train")
    config = smoke(scenes)
    config.model.name = "sltae"
    with pytest.raises(UserError, match="autoencoder, set_prediction, feature_slots"):
        check(config, "train")


def test_fewer_slots_than_objects_are_refused(tmp_path):
    config = smoke(set_prediction_scenes)
    config.model.num_slots = 3
    with pytest.raises(UserError, match="num_slots=4"):
        run.run(config, tmp_path / "run")


@pytest.mark.slow
def test_a_step_of_nested_arrays_is_replayed(predictor):
    _, _, _, workdir = predictor
    config = smoke(set_prediction_scenes)
    config.data.with_masks = True
    state = _state(config)
    reads = ("image", "objects")
    source = registry.build(config.data, "train", reads)
    faults = state.faults._replace(last=np.int32(2), skipped=np.int32(1))
    replay.write(config, workdir, source, state._replace(faults=faults))
    found = run.run(config, workdir, mode="replay")
    assert found == {"step": 2, "failed": None}


def _state(config) -> TrainState:
    params = split_model(build(config))[1]
    optimizer = build_optimizer(config.optimizer, params, num_steps=config.num_steps)
    return initial_state(params, optimizer, config.optimizer)
