"""Whole runs: what they write, that they resume exactly, and what they refuse."""

import contextlib
import gc
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import folder, scenes
from implicit_slots.data import registry
from implicit_slots.data.batches import TrainBatches
from implicit_slots.models.build import build, split_model
from implicit_slots.runtime import garbage
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import write_json
from implicit_slots.runtime.goodput import read_starts
from implicit_slots.runtime.metric_writers import MetricWriter, read_metrics
from implicit_slots.runtime.prng import Purpose, purpose_key
from implicit_slots.runtime.workdir import LOCK_FILE
from implicit_slots.training.checkpoint import Checkpoints
from implicit_slots.training.checks import crowding
from implicit_slots.training.run import run

CLEVR = pathlib.Path(__file__).parents[3] / "shared" / "data" / "clevr_blender"


def smoke(**changes):
    config = scenes.get_config("tokens-smoke")
    config.data.cache = ""
    config.update(changes)
    return config


def final_state(workdir):
    """The last checkpoint's arrays, as Orbax stored them."""
    with contextlib.closing(
        Checkpoints(workdir / "checkpoints", keep=3)
    ) as checkpoints:
        names = ocp.args.Composite(state=ocp.args.StandardRestore())
        found = checkpoints._manager.restore(checkpoints.steps()[0], args=names)
    return jax.tree.map(np.asarray, found["state"])


@pytest.fixture(scope="module")
def finished(smoke_run):
    return smoke_run


def test_a_run_leaves_what_the_contract_says(finished):
    workdir, summary = finished
    assert {p.name for p in workdir.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "images",
        "report.html",
        "summary.json",
    }
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert summary["step"] == 20 and summary["parameters"] > 1000
    assert (
        json.loads((workdir / "config.json").read_text())["name"]
        == "scenes-tokens-smoke"
    )
    assert [p.name for p in sorted((workdir / "images").iterdir())] == [
        "step_00000000.png",
        "step_00000020.png",
    ]


def test_the_time_of_a_run_is_accounted_for(finished):
    workdir, summary = finished
    ((one),) = read_starts(workdir)
    assert (one["after"], one["step"]) == (0, 20)
    assert one["seconds"] == summary["wall_time"]
    whole = sum(summary["wall_time"].values())
    assert whole == pytest.approx(summary["wall_seconds"], abs=0.1)
    assert summary["goodput"] == pytest.approx(
        one["seconds"]["steps"] / whole, abs=1e-4
    )
    spent = {part for part, seconds in one["seconds"].items() if seconds > 0}
    expected = {"start", "compile", "steps", "validation", "pictures", "checkpoints"}
    assert expected <= spent and "repeated" not in spent


def test_metrics_say_what_happened(finished):
    workdir, summary = finished
    lines = read_metrics(workdir)
    assert [(line["step"], line["split"]) for line in lines] == [
        (10, "train"),
        (20, "train"),
        (20, "validation"),
    ]
    for line in lines:
        assert line["loss"] == pytest.approx(line["mse"] + line["cross_entropy"])
    for line in lines[:2]:
        assert line["grad_norm_l2"] >= line["grad_norm_inf"] > 0
        assert 0 < line["forward_residual"] < 10 and line["steps_per_second"] > 0
        # A cosine over 20 steps: of the update made last.
        share = 0.5 * (1 + math.cos(math.pi * (line["step"] - 1) / 20))
        full = smoke().optimizer.dvae_learning_rate
        assert line["dvae_learning_rate"] == pytest.approx(full * share, rel=1e-4)
        assert 0 < line["learning_rate"] <= smoke().optimizer.learning_rate * share
    assert -1 <= lines[2]["fg_ari"] <= 1 and -1 <= lines[2]["ari"] <= 1
    assert 0 < lines[2]["miou"] < 1
    # Of the decoder's masks too: one of the three alone misleads.
    for name in ("fg_ari", "ari", "miou"):
        assert -1 <= lines[2][f"decoder_{name}"] <= 1
        assert lines[2][f"decoder_{name}"] != lines[2][name]
    assert summary["validation/fg_ari"] == lines[2]["fg_ari"]
    assert summary["validation/slot_mse"] > 0


def test_an_error_of_ours_is_not_shown_as_the_users(tmp_path, monkeypatch):
    """Neither a shape error of the set-up nor a pipe that broke."""

    def fail(*_):
        raise ValueError("shapes (3,) and (4,)")

    monkeypatch.setattr("implicit_slots.training.parts.build_steps", fail)
    with pytest.raises(ValueError, match="shapes") as error:
        run(smoke(), tmp_path / "run")
    assert not isinstance(error.value, UserError)
    monkeypatch.undo()

    def broken(_):
        raise BrokenPipeError

    monkeypatch.setattr("implicit_slots.runtime.processes.say", broken)
    with pytest.raises(BrokenPipeError):
        run(smoke(), tmp_path / "run")


def test_training_lowers_the_loss(finished):
    first, second = (line["loss"] for line in read_metrics(finished[0])[:2])
    assert second < first


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(finished, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(finished[0], stopped)
    # As if killed after step 13: the checkpoint of step 10 is the last.
    shutil.rmtree(stopped / "checkpoints" / "20")
    (stopped / "images" / "step_00000020.png").unlink()
    for name in ("summary.json", "report.html"):
        (stopped / name).unlink()
    garbage.leave_out()
    resumed = run(smoke(), stopped)
    assert gc.isenabled()  # since its first step

    want, got = final_state(finished[0]), final_state(stopped)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert got["step"] == 20

    def without_rate(workdir):
        return [
            {
                k: v
                for k, v in line.items()
                if k not in ("steps_per_second", "data_wait")
            }
            for line in read_metrics(workdir)
        ]

    assert without_rate(stopped) == without_rate(finished[0])
    for picture in (finished[0] / "images").iterdir():
        assert picture.read_bytes() == (stopped / "images" / picture.name).read_bytes()
    for key in ("validation/loss", "validation/fg_ari", "validation/slot_mse"):
        assert resumed[key] == finished[1][key]
    # Steps 11 to 20 were made before: none of this start's counts as one.
    starts = read_starts(stopped)
    assert [(start["after"], start["step"]) for start in starts] == [(0, 20), (10, 20)]
    assert starts[1]["seconds"]["repeated"] > 0 == starts[1]["seconds"]["steps"]


@pytest.mark.slow
def test_diagnostics_and_backward_solve_are_logged(tmp_path):
    config = smoke(num_steps=10, log_every=5, checkpoint_every=10)
    config.model.solver.update(name="anderson", max_steps=12, rtol=1e-3)
    config.model.adjoint.name = "implicit"
    config.model.adjoint.solver.max_steps = 48  # three slots of 16: always enough
    config.diagnostics.update(every=5, num_examples=3)
    run(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    for line in (line for line in lines if line["split"] == "train"):
        assert 1 <= line["forward_steps"] <= 12
        assert 0 <= line["forward_converged"] <= 1 and line["forward_diverged"] == 0
        assert 1 <= line["backward_steps"] <= 48
        # An untrained J can have an eigenvalue so near to one that float32 fails.
        assert 0 <= line["backward_failed"] < 0.5 and line["backward_residual"] >= 0
    diagnosed = [line for line in lines if "spectral_radius" in line]
    assert [line["step"] for line in diagnosed] == [5, 10]
    for line in diagnosed:
        assert 0 < line["spectral_radius"] <= line["spectral_radius_max"]
        # No eigenvalue of one image's J is above its largest singular value.
        assert line["spectral_radius"] <= 1.001 * line["spectral_norm"]
        assert 0 <= line["diagnosed_residual"] < 1


@pytest.mark.parametrize(
    ("most", "kept", "slots", "said"),
    [(4, 0, 5, ""), (5, 0, 5, "hold 5 objects"), (10, 6, 7, ""), (10, 7, 7, "hold 7 ")],
)
def test_more_objects_than_slots_are_noted(most, kept, slots, said):
    """One slot is the ground's."""
    config = smoke()
    config.data.update(max_objects=most, keep_objects=kept)
    config.model.num_slots = slots
    note = crowding(config)
    assert bool(note) == bool(said) and said in note


@pytest.mark.slow
def test_another_seed_is_another_run():
    """Other parameters, other batches, other noise; each of all three."""
    one, other = (
        jax.tree.leaves(split_model(build(smoke(seed=seed)))[1]) for seed in (0, 1)
    )
    drawn = [i for i, leaf in enumerate(one) if np.unique(leaf).size > 1]
    assert len(drawn) > 20
    assert not any(np.array_equal(one[i], other[i]) for i in drawn)
    config = smoke()
    train = registry.build(config.data, "train")
    order, another = (TrainBatches(train, 8, seed).indices(9) for seed in (0, 1))
    assert not np.array_equal(order, another)
    for purpose in Purpose:
        key, second = (purpose_key(seed, purpose, 5) for seed in (0, 1))
        assert key != second


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.num_slots": 4}, r"its model\.num_slots is 3, this .* is 4"),
        ({"seed": 7}, r"its seed is 0, this .* is 7"),
        ({"num_steps": 10}, r"at step 20 already, past config\.num_steps = 10"),
    ],
)
def test_another_runs_workdir_is_refused_untouched(finished, changes, sentence):
    workdir = finished[0]

    def files():
        found = (path for path in workdir.rglob("*") if path.is_file())
        return {p: p.stat().st_mtime_ns for p in found if p.name != LOCK_FILE}

    before = files()
    config = smoke()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=sentence):
        run(config, workdir)
    assert files() == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 0}, r"config\.batch_size must be at least 1, got 0"),
        ({"num_steps": 0}, r"config\.num_steps must be at least 1, got 0"),
        ({"accumulate": 3}, r"1 devices in 3 parts each \(config\.accumulate\)"),
        ({"batch_size": 2**25}, r"noise for at most .* with --config\.accumulate"),
        ({"sharding": "x"}, r"config\.sharding must be one of replicated, fsdp"),
        ({"nonfinite.stop_after": 0}, r"nonfinite\.stop_after must be at least 1"),
        ({"profile.start": -1}, r"profile\.start must not be negative"),
        ({"alarms.patience": 0}, r"alarms\.patience must be at least 1"),
        ({"batch_size": 65}, "fewer than one batch of 65"),
        ({"data.resolution": 18}, "image size must be divisible by 4, got 18"),
        ({"model.num_slots": 0}, "num_slots must be at least 1"),
        ({"model.width": 0}, r"config\.model\.width must be at least 1, got 0"),
        ({"model.dropout": 1.0}, r"dropout must be in \[0, 1\), got 1"),
        ({"model.attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\)"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16, got"),
        ({"temperature.end": 0.0}, r"temperature\.end must be positive, got 0"),
        ({"penalty.slot_coupling": -0.1}, r"penalty\.slot_coupling must not be neg"),
        ({"diagnostics.every": -1}, r"diagnostics\.every must not be negative"),
        ({"diagnostics.krylov": 0}, r"diagnostics\.krylov must be at least 1, got 0"),
        ({"model.adjoint.terms": 0}, r"adjoint\.terms must be at least 1, got 0"),
        ({"seed": -1}, r"seed must not be negative, got -1"),
        ({"initial_noise.start": 1.0}, "initial_noise is for learned initial slots"),
        ({"initial_noise.end": -1.0}, r"end must not be negative, got -1"),
        ({"initial_noise.end": math.nan}, "end must be a number, got nan"),
        (
            {"model.tokenizer": "patches", "optimizer.dvae_steps": 3},
            "has no dVAE to train",
        ),
        ({"data.resolution": 2}, "image size must be divisible by 4, got 2"),
        (
            {"model.solver.name": "broyden", "model.adjoint.name": "unrolled"},
            "Broyden cannot be unrolled",
        ),
        ({"data.train_size": 0}, r"config\.data\.train_size must be at least 1, got 0"),
        ({"optimizer.schedule": "x"}, r"optimizer\.schedule must be one of"),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(changes, sentence, tmp_path):
    config = smoke()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=sentence):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_older_versions_configuration_is_a_sentence(tmp_path):
    config = smoke()
    with config.unlocked():
        del config.evaluation.properties
    with pytest.raises(UserError, match=r"properties\.every is missing: an older"):
        run(config, tmp_path / "run")


@pytest.mark.skipif(
    not CLEVR.is_dir(), reason=f"the rendered CLEVR images are not in {CLEVR}"
)
@pytest.mark.slow
def test_real_clevr_images_train_to_a_report(tmp_path):
    config = folder.get_config("smoke")
    config.data.path = str(CLEVR)
    summary = run(config, tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()
    assert -1 <= summary["validation/fg_ari"] <= 1


def test_running_a_finished_run_again_changes_no_number(finished, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    again = run(smoke(), workdir, command="another")
    assert again == finished[1]
    assert read_metrics(workdir) == read_metrics(finished[0])


def test_checkpoints_without_a_config_are_refused(finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.json"):
        run(smoke(), tmp_path)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": 1.0, "c": "x"})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a": None,
        "b": 1,
        "c": "x",
    }


def test_foreign_config_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("not JSON")
    with pytest.raises(UserError, match="is not a run's configuration"):
        run(smoke(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_nothing_to_evaluate_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no checkpoint to evaluate"):
        run(smoke(), tmp_path / "run", mode="evaluate")
    assert not (tmp_path / "run").exists()


def test_workdir_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run(smoke(), tmp_path / "file" / "run")


def test_writer_forgets_what_came_after_the_checkpoint(tmp_path):
    writer = MetricWriter(tmp_path, step=0)
    for step in (10, 20):
        writer.write(step, "train", {"loss": 1.0 / step, "bad": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "spl')  # killed while writing
    MetricWriter(tmp_path, step=10)
    assert read_metrics(tmp_path) == [
        {"step": 10, "split": "train", "loss": 0.1, "bad": None}
    ]
