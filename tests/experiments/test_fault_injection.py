"""What the fault injection draws, reads, damages and reports; its runs are by hand."""

import argparse
import json
import signal

import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import scenes
from experiments.benchmarks import fault_report, other_faults, victims
from experiments.benchmarks.fault_injection import check_end, draw_kills
from experiments.benchmarks.victims import Ended


def test_kills_follow_from_the_seed():
    kills = draw_kills(30, seed=0)
    assert kills == draw_kills(30, seed=0) != draw_kills(30, seed=1)
    assert len(kills) == 30 and sum(kill.aimed for kill in kills) == 12
    assert {kill.signal for kill in kills} == {signal.SIGTERM, signal.SIGKILL}
    assert all(0 <= kill.when <= 1.05 and 0 <= kill.delay <= 1 for kill in kills)


def test_the_command_sets_keys_that_exist(tmp_path):
    config = scenes.get_config("smoke")
    for flag in victims.command(tmp_path):
        key = flag.partition("=")[0].removeprefix("--config.")
        if not key.startswith(("-", "/")) and key != "implicit_slots.main":
            section, _, name = key.rpartition(".")
            assert name in (config[section] if section else config)


def test_what_a_start_said_is_understood():
    errors = "told to stop: saved at step 44; the same command resumes runs/a"
    ended = Ended(75, "resumed runs/a at step 30\n", errors)
    assert (ended.resumed, ended.saved, ended.refused) == (30, 44, False)
    assert "told to stop" in str(ended)
    ended = Ended(1, "", "error: no room\n")
    assert (ended.resumed, ended.saved, ended.refused) == (0, None, True)


@pytest.mark.parametrize(
    ("errors", "good"),
    [
        ("error: one\n", True),
        ("error: one\nerror: two\n", False),
        ("Traceback (most recent call last):\n", False),
        ("", False),
    ],
)
def test_one_sentence_is_one_line(errors, good):
    assert victims.is_sentence(errors) == good


def test_checkpoints_are_complete_or_unfinished(tmp_path):
    assert victims.steps_of(tmp_path / "checkpoints") == []
    assert victims.unfinished(tmp_path) == set()
    for name in ("checkpoints/100", "checkpoints/20", "best/20.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir(parents=True)
    assert victims.steps_of(tmp_path / "checkpoints") == [20, 100]
    assert victims.unfinished(tmp_path) == {"best/20.orbax-checkpoint-tmp"}


@pytest.mark.parametrize(
    ("name", "phase", "late", "code", "good"),
    [
        ("SIGKILL", victims.STEPPING, False, -9, True),
        ("SIGKILL", victims.STEPPING, False, 75, False),
        ("SIGTERM", victims.STARTING, False, -15, True),
        ("SIGTERM", victims.STEPPING, False, -15, False),
        ("SIGTERM", victims.STEPPING, False, 75, True),
        ("SIGTERM", victims.STEPPING, False, 0, False),
        ("SIGTERM", victims.SAVING, True, 0, True),
        ("SIGTERM", victims.STEPPING, False, 1, False),
    ],
)
def test_exit_codes_of_killed_starts(name, phase, late, code, good):
    row = {"signal": name, "phase": phase, "late": late, "code": code}
    row |= {"saved": 30, "latest": 30}
    assert bool(check_end(row, Ended(code, "", ""))) != good


@pytest.mark.parametrize(
    ("phase", "late", "saved", "good"),
    [
        (victims.STEPPING, False, 30, True),
        (victims.STEPPING, False, 44, False),
        (victims.STEPPING, False, None, False),
        (victims.STARTING, False, None, True),
        (victims.ENDING, True, None, True),
    ],
)
def test_what_is_said_to_be_saved_is_there(phase, late, saved, good):
    row = {"signal": "SIGTERM", "phase": phase, "late": late, "code": 75}
    row |= {"saved": saved, "latest": 30}
    assert bool(check_end(row, Ended(75, "", ""))) != good


@pytest.mark.parametrize("name", [n for n in other_faults.DAMAGES if "anew" not in n])
def test_damage_is_done(name, tmp_path):
    sizes = {
        "state/d/small": 10,
        "state/ocdbt.process_0/d/large": 100,
        "state/manifest.ocdbt": 20,
        "state/_METADATA": 200,
        "loop/metadata": 50,
    }
    for file, size in sizes.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(bytes(size))
    other_faults.damage(name, tmp_path, seed=0)
    after = {
        file: (tmp_path / file).read_bytes() if (tmp_path / file).exists() else None
        for file in sizes
    }
    changed = {f: content for f, content in after.items() if content != bytes(sizes[f])}
    small, large, index, largest, record = sizes
    if "bit" in name:
        assert list(changed) == ([small, large] if "each" in name else [largest])
        for file, content in changed.items():
            assert content is not None and len(content) == sizes[file]
            assert np.unpackbits(np.frombuffer(content, np.uint8)).sum() == 1
    else:
        assert changed == {
            "the files of arrays cut to half": {small: bytes(5), large: bytes(50)},
            "the arrays' index emptied": {index: b""},
            "the files of arrays removed": {small: None, large: None},
            "the record removed": {record: None},
            "the record cut to half": {record: bytes(25)},
            "all checkpoints emptied": dict.fromkeys(sizes, b""),
        }.get(name)


def test_a_number_that_is_stored_anew_is_another(tmp_path):
    tree = {"params": {"a": np.arange(4, dtype=np.float32)}, "step": np.int32(3)}
    for name in ("one", "other"):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name / "state", tree)
    one, other = (victims.arrays(tmp_path / n / "state") for n in ("one", "other"))
    assert one == other and len(one) == 2
    other_faults.damage(other_faults.DAMAGES[1], tmp_path / "other", seed=0)
    other = victims.arrays(tmp_path / "other" / "state")
    assert [name for name in one if one[name] != other[name]] == ["['params']['a']"]
    arrays = (victims.read_arrays(tmp_path / n / "state") for n in ("one", "other"))
    one, other = (np.asarray(found["params"]["a"]).view(np.uint8) for found in arrays)
    assert np.unpackbits(one ^ other).sum() == 1


def test_differences_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(victims, "finals", lambda workdir: {"a": 1, "b": 2})
    assert victims.differences(tmp_path, {"a": 1, "b": 2}) == []
    assert victims.differences(tmp_path, {"a": 1, "b": 3, "c": 4}) == ["b", "c"]


def test_a_workdir_that_cannot_be_read_is_a_difference(tmp_path):
    (only,) = victims.differences(tmp_path, {})
    assert only.startswith("cannot be read")


def test_what_is_wrong_names_no_temporary_folder():
    errors = "E1 thread.py:3\nerror: the run /some/x/run cannot be written\nE1 more\n"
    ended = Ended(1, "", errors)
    assert ended.sentence == "error: the run …/run cannot be written"
    assert "3 lines" in str(ended) and not ended.refused and not ended.traceback
    assert Ended(0, "", "Traceback (most recent call last):\n").traceback


def test_report(tmp_path, capsys):
    kill = {"signal": "SIGTERM", "aimed": False, "planned": 3.0, "at": 3.01}
    kill |= {"phase": victims.SAVING, "late": False, "code": 75, "latest": 30}
    kill |= {"saved": 30, "resumed": 30, "wrong": []}
    fault = {"fault": "Ctrl-C", "code": 75, "outcome": "saved", "wrong": []}
    flags = argparse.Namespace(kills=1, seed=0, keep=None, out=tmp_path / "out")
    versions = {"device": "cpu", "jax": "1", "orbax-checkpoint": "2"}
    rows = {"kills": [kill], "others": [fault]}
    assert fault_report.write(flags, versions, rows, minutes=1.0)
    text = (tmp_path / "out.md").read_text()
    assert text in capsys.readouterr().out
    assert "1 of 1 killed runs, 1 of them killed inside a checkpoint, equal" in text
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["results"]["kills"] == [kill] and numbers["versions"] == versions
    fault["wrong"] = ["metrics.jsonl"]
    assert not fault_report.write(flags, versions, rows, minutes=1.0)
    assert "0 of 1 other faults" in (tmp_path / "out.md").read_text()
