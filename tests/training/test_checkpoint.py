"""Checkpoints: whole, exact, and never silently something else."""

import contextlib
import errno
import os
import pathlib
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from implicit_slots.runtime.errors import UserError
from implicit_slots.training.checkpoint import (
    Checkpoints,
    Damaged,
    SavedLoop,
    restore,
)
from implicit_slots.training.state import Faults, TrainState


def state(step=7, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "dvae": {"kernel": jnp.asarray(rng.normal(size=(5, 30, 20)), jnp.float32)},
        "scale": jnp.float32(np.pi),
    }
    faults = Faults(*(jnp.int32(n) for n in (3, 0, 2, 1)))
    counts = (jnp.asarray(rng.integers(0, 9, 50), jnp.int32),)
    return TrainState(jnp.int32(step), params, counts, (), (), faults)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)


@pytest.fixture
def checkpoints(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", keep=2)) as made:
        yield made


def test_what_is_read_is_what_was_written_and_is_no_pickle(checkpoints, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a pickle")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    # As the loop has them: float32, not finite, missing.
    window = [float(np.float32(1 / 3)), 16777217.0, float("nan"), float("inf")]
    loop = SavedLoop(window=window, best=None)
    checkpoints.save(state(), loop)
    got, record = checkpoints.read(7, state(seed=1))
    assert_same(got, state())
    assert record["best"] is None
    np.testing.assert_array_equal(record["window"], window)


def test_the_last_ones_are_kept(checkpoints):
    for step in (1, 2, 5, 9):
        checkpoints.save(state(step))
    assert checkpoints.steps() == [9, 5]


def biggest(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def truncate(folder):
    file = biggest(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "truncated": truncate,
    "emptied": lambda folder: biggest(folder).write_bytes(b""),
    "file missing": lambda folder: biggest(folder).unlink(),
    "state missing": lambda folder: shutil.rmtree(folder / "state"),
    "loop missing": lambda folder: shutil.rmtree(folder / "loop"),
    "checksums cut": lambda folder: (folder / "checksums.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("set_aside", [True, False])
def test_a_damaged_one_is_set_aside_and_the_one_before_used(
    checkpoints, tmp_path, capsys, damage, set_aside
):
    for step in (5, 9):
        checkpoints.save(state(step))
    DAMAGES[damage](tmp_path / "checkpoints" / "9")
    found = restore(checkpoints, state(), set_aside=set_aside)
    assert found is not None
    assert_same(found[0], state(5))
    assert (tmp_path / "damaged" / "9").is_dir() == set_aside
    assert (tmp_path / "checkpoints" / "9").is_dir() != set_aside
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "checkpoints/9 is damaged (" in said
    if set_aside:
        assert checkpoints.steps() == [5]
        checkpoints.save(state(9))  # It may come again.
        assert_same(checkpoints.read(9, state())[0], state(9))


OTHERS = (".DS_Store", "._process_0", ".nfs000000000000a1b2", "Thumbs.db", "x")


@pytest.mark.parametrize("set_aside", [True, False])
def test_files_of_other_programs_are_no_damage(
    checkpoints, tmp_path, capsys, set_aside
):
    """What a Mac, NFS and Windows leave: the arrays are whole."""
    checkpoints.save(state(5))
    folders = [d for d in (tmp_path / "checkpoints").rglob("*") if d.is_dir()]
    assert len(folders) > 5
    for folder in (tmp_path / "checkpoints", *folders):
        for name in OTHERS:
            (folder / name).write_bytes(b"x")
    (tmp_path / "checkpoints" / "__MACOSX").mkdir()
    found = restore(checkpoints, state(seed=1), set_aside=set_aside)
    assert found is not None
    assert_same(found[0], state(5))
    assert not (tmp_path / "damaged").exists() and capsys.readouterr().out == ""
    checkpoints.save(state(9))
    assert checkpoints.steps() == [9, 5]


def test_a_file_that_vanishes_after_the_save_is_none_of_the_checkpoints(
    checkpoints, tmp_path, monkeypatch
):
    """NFS keeps the name of a file that was removed while it was open."""
    save = checkpoints._manager.save
    left = tmp_path / "checkpoints" / "5" / "state" / ".nfs000000000000a1b2"
    monkeypatch.setattr(
        checkpoints._manager,
        "save",
        lambda *rest, **more: (save(*rest, **more), left.write_bytes(b"x")),
    )
    checkpoints.save(state(5))
    left.unlink()
    assert_same(checkpoints.read(5, state(seed=1))[0], state(5))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_now_is_left_as_it_is(
    checkpoints, tmp_path, monkeypatch, number
):
    for step in (5, 9):
        checkpoints.save(state(step))
    whole = pathlib.Path.read_bytes

    def refuse(path):
        if "9" in path.parts and path.name == "manifest.ocdbt":
            raise OSError(number, os.strerror(number), str(path))
        return whole(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=rf"9 cannot be read.*{os.strerror(number)}"):
        restore(checkpoints, state(), set_aside=True)
    monkeypatch.undo()
    assert checkpoints.steps() == [9, 5] and not (tmp_path / "damaged").exists()


def test_what_orbax_cannot_read_is_not_damaged_if_it_is_as_it_was_written(
    checkpoints, tmp_path, monkeypatch
):
    """A copy that a synchronised folder has made, of a file that Orbax looks for."""

    def refuse(*_, **__):
        raise ValueError("Expecting value: line 1")

    for step in (5, 9):
        checkpoints.save(state(step))
    state_of_9 = tmp_path / "checkpoints" / "9" / "state"
    (state_of_9 / "array_metadatas" / "process_0 (conflicted copy)").write_text("x")
    monkeypatch.setattr(checkpoints._manager, "restore", refuse)
    with pytest.raises(UserError, match=r"9 cannot be read.*process_0 \(conflicted"):
        restore(checkpoints, state(), set_aside=True)
    assert checkpoints.steps() == [9, 5] and not (tmp_path / "damaged").exists()


def test_a_folder_that_cannot_take_a_damaged_one_is_a_sentence(checkpoints, tmp_path):
    for step in (5, 9):
        checkpoints.save(state(step))
    truncate(tmp_path / "checkpoints" / "9")
    (tmp_path / "damaged").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written.*damaged"):
        restore(checkpoints, state(), set_aside=True)
    assert (tmp_path / "checkpoints" / "9").is_dir()


def test_no_flipped_bit_goes_unnoticed(checkpoints, tmp_path):
    """Wherever it is: what is read is refused, or is what was written."""
    checkpoints.save(state())
    folder = tmp_path / "checkpoints" / "7"
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    rng = np.random.default_rng(0)
    refused = 0
    assert len(files) > 8
    for _ in range(40):
        file = files[rng.integers(len(files))]
        before = file.read_bytes()
        damaged = bytearray(before)
        damaged[rng.integers(len(before))] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        try:
            assert_same(checkpoints.read(7, state(seed=1))[0], state())
        except Damaged:
            refused += 1
        file.write_bytes(before)
    assert refused == 40  # Every byte is covered.
    assert_same(checkpoints.read(7, state(seed=1))[0], state())


def test_where_all_are_damaged_nothing_is_moved(checkpoints, tmp_path):
    for step in (5, 9):
        checkpoints.save(state(step))
        truncate(tmp_path / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"no checkpoint of .* can be read \(step 9"):
        restore(checkpoints, state(), set_aside=True)
    assert not (tmp_path / "damaged").exists() and checkpoints.steps() == [9, 5]


def test_an_empty_folder_restores_nothing(checkpoints):
    assert restore(checkpoints, state(), set_aside=True) is None


def test_what_a_killed_write_left_is_cleared(checkpoints, tmp_path):
    checkpoints.save(state(5))
    left = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "5", left)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", keep=2)) as again:
        assert again.steps() == [5]
        again.save(state(9))
        assert again.steps() == [9, 5] and not left.exists()


def test_who_reads_does_not_disturb_who_writes(checkpoints, tmp_path):
    """An evaluation beside a training run, in the middle of a write."""
    checkpoints.save(state(5))
    writing = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    writing.mkdir()
    before = sorted(tmp_path.rglob("*"))
    for folder in ("checkpoints", "best"):  # There is no best one yet.
        with contextlib.closing(Checkpoints(tmp_path / folder, keep=None)) as reader:
            found = restore(reader, state(seed=1), set_aside=False)
            if folder == "checkpoints":
                assert found is not None
                assert_same(found[0], state(5))
            else:
                assert found is None
    assert sorted(tmp_path.rglob("*")) == before


def test_without_checksums_it_is_as_orbax_left_it(checkpoints, tmp_path):
    """Killed between the two: the checkpoint is complete."""
    checkpoints.save(state(5))
    (tmp_path / "checkpoints" / "5" / "checksums.json").unlink()
    assert_same(checkpoints.read(5, state(seed=1))[0], state(5))


def test_a_write_that_fails_is_a_sentence(checkpoints, tmp_path, monkeypatch):
    checkpoints.save(state(5))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError, match=r"step 9 cannot .* \(No space left on device"):
        checkpoints.save(state(9))
    assert checkpoints.steps() == [5]
