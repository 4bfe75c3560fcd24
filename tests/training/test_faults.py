"""Whole runs that something happens to: what is saved, said, and goes on."""

import errno
import json
import pathlib
import shutil
import signal

import numpy as np
import pytest
from tqdm import tqdm
from training.test_run import final_state, smoke

from implicit_slots.data.source import DataError
from implicit_slots.runtime import progress
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.metric_writers import read_metrics
from implicit_slots.runtime.preemption import Preempted, noticed
from implicit_slots.runtime.workdir import METRICS_FILE, locked
from implicit_slots.training import loop, parts, run
from implicit_slots.training.device_batches import Sent
from implicit_slots.training.nonfinite import NonFiniteRun


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_finished_like(workdir, smoke_run):
    """Bit for bit the run that nothing happened to; only its speed is its own."""
    reference, wanted = smoke_run
    own = ("steps_per_second", "data_wait", "command", "wall_seconds", "versions")
    own = (*own, "goodput", "wall_time")

    def rest(values):
        return {name: value for name, value in values.items() if name not in own}

    want, got = final_state(reference), final_state(workdir)
    for ours, theirs in zip(*map(run.jax.tree.leaves, (got, want)), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert [*map(rest, read_metrics(workdir))] == [*map(rest, read_metrics(reference))]
    for picture in (reference / "images").iterdir():
        ours = workdir / "images" / picture.name
        assert ours.read_bytes() == picture.read_bytes()
    assert rest(json.loads((workdir / "summary.json").read_text())) == rest(wanted)


@pytest.fixture
def stopped_at(monkeypatch):
    """Makes the data thread fail, or a signal come, before a step."""

    def set_up(step, happen):
        original, count = Sent.next, iter(range(1, 1000))

        def next_batch(self, after=None):
            if next(count) == step:
                happen()
            return original(self, after)

        monkeypatch.setattr(Sent, "next", next_batch)

    return set_up


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_between_two_logged_steps(
    number, stopped_at, smoke_run, tmp_path, monkeypatch
):
    """The means of the steps before it are in the checkpoint too."""
    before = signal.getsignal(number)
    stopped_at(13, lambda: signal.raise_signal(number))
    with pytest.raises(Preempted) as stop:
        run.run(smoke(), tmp_path / "run")
    assert stop.value.step == 13 and steps_of(tmp_path / "run") == [10, 13]
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    if number == signal.SIGTERM:
        run.run(smoke(), tmp_path / "run", command="again")
        assert_finished_like(tmp_path / "run", smoke_run)


def test_a_second_ctrl_c_stops_at_once():
    with noticed() as notice:
        signal.raise_signal(signal.SIGINT)
        assert notice.reached(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_data_that_vanish_cost_no_step(stopped_at, smoke_run, tmp_path, monkeypatch):
    def vanish():
        raise DataError("x.png is gone")

    stopped_at(8, vanish)
    with pytest.raises(DataError, match=r"x\.png is gone"):
        run.run(smoke(), tmp_path / "run")
    assert steps_of(tmp_path / "run") == [7]
    monkeypatch.undo()
    run.run(smoke(), tmp_path / "run")
    assert_finished_like(tmp_path / "run", smoke_run)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_only_time(smoke_run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(smoke_run[0], workdir)
    for name in ("summary.json", "report.html"):
        (workdir / name).unlink()
    for file in (workdir / "checkpoints" / "20" / "state" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    record = run.run(smoke(), workdir, mode="evaluate")
    assert record["step"] == 10 and not (workdir / "damaged").exists()
    run.run(smoke(), workdir)
    assert "checkpoints/20 is damaged" in capsys.readouterr().out
    assert [path.name for path in (workdir / "damaged").iterdir()] == ["20"]
    (workdir / "summary.json").unlink()
    run.run(smoke(), workdir)
    assert_finished_like(workdir, smoke_run)


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_is_a_sentence(smoke_run, tmp_path, monkeypatch):
    whole = pathlib.Path.open

    def full(path, mode="r", *rest, **options):
        if path.name == METRICS_FILE and mode == "a":
            raise OSError(errno.ENOSPC, "no room")
        return whole(path, mode, *rest, **options)

    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(UserError, match=r"cannot be written: .* no room; put that "):
        run.run(smoke(), tmp_path / "run")
    monkeypatch.undo()
    run.run(smoke(), tmp_path / "run")
    assert_finished_like(tmp_path / "run", smoke_run)


@pytest.mark.slow
def test_a_second_run_of_the_same_workdir_is_refused(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with locked(workdir):
        before = sorted(workdir.iterdir())
        with pytest.raises(UserError, match=r"another run is writing to .*process \d+"):
            run.run(smoke(), workdir)
        assert sorted(workdir.iterdir()) == before
    with locked(workdir):
        pass


@pytest.mark.slow
def test_the_best_state_is_kept_and_evaluated(smoke_run, tmp_path, monkeypatch):
    """By validation loss; a worse one later does not take its place."""
    losses = iter([3.0, 1.0, float("nan"), 2.0])
    original = loop.validate

    def validate(*arguments):
        return original(*arguments) | {"loss": next(losses, 9.0)}

    monkeypatch.setattr(loop, "validate", validate)
    config = smoke(validate_every=5)
    run.run(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "best").iterdir()] == ["10"]
    monkeypatch.undo()
    best = run.run(config, tmp_path / "run", mode="evaluate", checkpoint="best")
    assert best["step"] == 10 and best["label"] == "test-best"
    assert (tmp_path / "run" / "evaluation" / "test-best" / "metrics.json").exists()
    with pytest.raises(UserError, match="--checkpoint is for --mode=evaluate"):
        run.run(config, tmp_path / "run", checkpoint="best")


def exploding():
    """Its first update throws the parameters out of float32's range."""
    config = smoke()
    config.optimizer.update(
        learning_rate=1e38, dvae_learning_rate=1e38, warmup_steps=0, schedule="constant"
    )
    config.nonfinite.stop_after = 4
    return config


@pytest.fixture(scope="module")
def exploded(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "exploded"
    with pytest.raises(NonFiniteRun) as stop:
        run.run(exploding(), workdir)
    return workdir, str(stop.value)


@pytest.mark.slow
def test_too_many_bad_steps_stop_the_run(exploded):
    workdir, sentence = exploded
    assert sentence.startswith("4 steps in a row were skipped; step 5 was skipped: the")
    assert "--mode=replay" in sentence
    assert not (workdir / "metrics.jsonl").exists()  # Nothing was due before.


@pytest.mark.slow
def test_the_bad_step_is_replayed_alone(exploded, capsys, monkeypatch):
    """From what the run left, without its data."""
    workdir, sentence = exploded
    monkeypatch.setattr(parts, "open_data", lambda *_: (None, {}))
    replayed = run.run(exploding(), workdir, mode="replay")
    said = capsys.readouterr().out
    assert replayed["step"] == 5
    assert f"step 5 was skipped: {replayed['failed']} was not finite" in sentence
    assert "step 5, replayed" in said
    assert (workdir / "replay" / "report.txt").read_text() in said
    with np.load(workdir / "replay" / "batch.npz") as batch:
        assert batch["image"].shape == (8, 16, 16, 3)


def test_nothing_to_replay_is_a_sentence(smoke_run):
    with pytest.raises(UserError, match="has no step to replay"):
        run.run(smoke(), smoke_run[0], mode="replay")


@pytest.mark.slow
def test_alarms_and_skipped_steps_are_said(smoke_run, tmp_path, capsys):
    config = smoke(validate_every=5)
    config.alarms.update(attention_entropy=0.01, patience=2)
    config.profile.update(start=3, steps=2)
    run.run(config, tmp_path / "run")
    said = capsys.readouterr().out
    (alarm,) = [line for line in said.splitlines() if line.startswith("alarm: ")]
    assert "attention" in alarm and "0.01" in alarm
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
@pytest.mark.parametrize("failure", [BrokenPipeError(), OSError(errno.ENOSPC, "full")])
def test_an_output_that_nobody_reads_costs_no_step(
    failure, smoke_run, tmp_path, monkeypatch
):
    """The terminal may be gone before its signal comes."""
    shown, count = tqdm.update, iter(range(1, 1000))

    def update(*arguments):
        if next(count) == 8:
            raise failure
        return shown(*arguments)

    monkeypatch.setattr(tqdm, "update", update)
    monkeypatch.setattr(progress, "silence", lambda _: None)
    with pytest.raises((BrokenPipeError, UserError)) as end:
        run.run(smoke(), tmp_path / "run")
    assert end.value is failure or "cannot be written any more (full)" in str(end.value)
    assert steps_of(tmp_path / "run") == [8]
    monkeypatch.undo()
    run.run(smoke(), tmp_path / "run")
    assert_finished_like(tmp_path / "run", smoke_run)
