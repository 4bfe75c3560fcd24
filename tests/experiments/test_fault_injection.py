"""What the fault injection reads, damages and compares; its runs are by hand."""

import os
import types

import numpy as np
import pytest

from experiments.benchmarks import fault_injection as faults
from implicit_slots.runtime.errors import UserError


def ended(tmp_path, code, said="", errors=""):
    """A start that has ended so."""
    start = object.__new__(faults.Start)
    start.workdir = tmp_path / "run"
    start.code, start.said, start.errors = code, said, errors
    return start


def test_what_a_start_said_is_understood(tmp_path):
    start = ended(tmp_path, 0, "resumed runs/a at step 30\n")
    assert (start.resumed, start.refused) == (30, False)
    assert ended(tmp_path, 0).resumed == 0


@pytest.mark.parametrize(
    ("code", "errors", "good"),
    [
        (1, "error: one\n", True),
        (2, "error: one\n", False),
        (1, "error: one\nerror: two\n", False),
        (1, "Traceback (most recent call last):\n", False),
        (1, "", False),
    ],
)
def test_one_sentence_is_one_line(tmp_path, code, errors, good):
    assert ended(tmp_path, code, "", errors).refused == good


def test_what_is_wrong_names_no_temporary_folder(tmp_path):
    start = ended(tmp_path, 1, "", "error: the run /some/x/run cannot be written\n")
    assert str(start) == "exit code 1: error: the run …/run cannot be written"


@pytest.mark.parametrize(
    ("said", "unfinished", "phase"),
    [
        ("", True, faults.STARTING),
        ("first step done", False, faults.STEPPING),
        ("first step done", True, faults.SAVING),
        (
            f"first step done\nstep {faults.STEPS}/{faults.STEPS}  train",
            1,
            faults.ENDING,
        ),
        (f"resumed runs/a at step {faults.STEPS}\n", False, faults.ENDING),
    ],
)
def test_the_phase_is_read_from_what_is_printed_and_from_unfinished_checkpoints(
    tmp_path, said, unfinished, phase
):
    start = ended(tmp_path, 0)
    (start.workdir / "best").mkdir(parents=True)
    if unfinished:
        (start.workdir / "best" / "20.orbax-checkpoint-tmp").mkdir()
    start._files = [tmp_path / "out"]
    start._files[0].write_text(said)
    assert start.phase() == phase


def test_complete_checkpoints_are_listed(tmp_path):
    assert faults.steps_of(tmp_path) == []
    for name in ("100", "20", "30.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert faults.steps_of(tmp_path) == [20, 100]


def test_a_flipped_bit_is_one_bit(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10))
    faults.flip_bit(tmp_path / "file")
    content = np.frombuffer((tmp_path / "file").read_bytes(), np.uint8)
    assert len(content) == 10 and np.unpackbits(content).sum() == 1


def test_a_disk_is_filled_but_for_some_room(tmp_path, monkeypatch):
    left = iter((12 * 1024, 8 * 1024, 4 * 1024))
    usage = lambda _: types.SimpleNamespace(free=next(left))  # noqa: E731
    monkeypatch.setattr(faults.shutil, "disk_usage", usage)
    faults.fill(tmp_path / "ballast", 4)
    assert (tmp_path / "ballast").stat().st_size == 2 * 4096


def test_differences_are_named(monkeypatch, tmp_path):
    lab = object.__new__(faults.Lab)
    lab.reference = {"a": 1, "b": 3, "c": 4}
    start = ended(tmp_path, 0, "resumed runs/a at step 30\n")
    monkeypatch.setattr(faults, "finals", lambda workdir: {"a": 1, "b": 2})
    assert lab.compare(start) == ["b", "c"]
    lab.reference = {"a": 1, "b": 2}
    assert lab.compare(start) == lab.compare(start, 30) == []
    assert lab.compare(start, 15) == ["not from 15"]
    (failed,) = lab.compare(ended(tmp_path, 1, "", "error: no room\n"))
    assert "no room" in failed


def test_a_workdir_that_cannot_be_read_is_a_difference(tmp_path):
    lab = object.__new__(faults.Lab)
    lab.reference = {}
    (only,) = lab.compare(ended(tmp_path, 0))
    assert only.startswith("cannot be read")


def test_a_run_that_fails_uninterrupted_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    start = ended(tmp_path, 1, "", "error: no room\n")
    start.end = lambda: start
    monkeypatch.setattr(faults, "Start", lambda workdir, logs: start)
    with pytest.raises(UserError, match=r"the run fails uninterrupted: .*no room"):
        faults.Lab(tmp_path)
