"""The cache: written in order, gone on with, and trusted only when it is whole."""

import os

import numpy as np
import pytest

from implicit_slots.data.prepared.cache import Prepared, Writer
from implicit_slots.data.prepared.cache_folder import is_finished
from implicit_slots.data.readers.frame_source import MOST_OBJECTS
from implicit_slots.data.source import IGNORED, DataError

BLOCK = 4


def examples(first, stop):
    """Examples that show their index."""
    index = np.arange(first, stop)
    return {
        "image": np.broadcast_to(
            index[:, None, None, None], (len(index), 2, 2, 3)
        ).astype(np.uint8),
        "objects": {
            "code": (index[:, None] * 1000 + np.arange(3)).astype(np.int32),
            "present": index[:, None] % 3 == np.arange(3),
        },
    }


def check(batch, indices):
    indices = np.asarray(indices)
    assert batch["image"].shape == (len(indices), 2, 2, 3)
    assert (batch["image"] == indices[:, None, None, None] % 256).all()
    expected = indices[:, None] * 1000 + np.arange(3)
    np.testing.assert_array_equal(batch["objects"]["code"], expected)
    expected = indices[:, None] % 3 == np.arange(3)
    np.testing.assert_array_equal(batch["objects"]["present"], expected)
    assert (
        batch["image"].dtype == np.uint8 and batch["objects"]["code"].dtype == "int32"
    )


def opened(folder, count=10, **manifest):
    return Writer(folder / "cache", manifest, count=count, block=BLOCK)


def fill(writer, count=10):
    """Writes what is missing; returns at which example it began."""
    began = writer.count
    for first in range(began, count, BLOCK):
        writer.append(examples(first, min(first + BLOCK, count)))
    return began


def test_a_writer_goes_on_after_the_blocks_that_are_there(tmp_path):
    writer = opened(tmp_path)
    assert writer.count == 0 and not list(tmp_path.iterdir())
    writer.append(examples(0, 4))
    writer = opened(tmp_path)
    assert writer.count == 4
    assert fill(writer) == 4
    writer.finish()
    check(Prepared(tmp_path / "cache").batch(np.arange(10)), np.arange(10))


def test_bytes_without_their_marker_are_written_again(tmp_path):
    """As a process leaves them that is killed while it writes."""
    opened(tmp_path).append(examples(0, 4))
    with (tmp_path / "cache" / "image.npy").open("r+b") as file:
        file.seek(-50, os.SEEK_END)
        file.write(b"\xff" * 40)
    writer = opened(tmp_path)
    assert fill(writer) == 4
    writer.finish()
    check(Prepared(tmp_path / "cache").batch(np.arange(10)), np.arange(10))


def test_the_marker_waits_for_the_bytes(tmp_path, monkeypatch):
    """A full disk is a sentence, and the block counts as missing afterwards."""
    writer = opened(tmp_path)
    writer.append(examples(0, 4))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written: No space left on device"):
        writer.append(examples(4, 8))
    assert np.load(tmp_path / "cache" / "blocks.npy").astype(bool).tolist() == [
        True,
        False,
        False,
    ]
    monkeypatch.undo()
    assert fill(opened(tmp_path)) == 4


def test_what_another_manifest_left_is_thrown_away(tmp_path):
    for other in ({"manifest": 1}, {"seed": 1}, {"seed": 0, "count": 9}, {"seed": 0}):
        assert fill(opened(tmp_path, **other), other.get("count", 10)) == 0
    assert fill(opened(tmp_path, seed=0)) == 10
    assert {file.name for file in tmp_path.iterdir()} == {"cache"}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("manifest.json", lambda file: file.write_text("{}")),
        ("manifest.json", lambda file: file.write_text("[]")),
        ("manifest.json", lambda file: file.unlink()),
        ("image.npy", lambda file: file.write_bytes(file.read_bytes()[:-1])),
        ("image.npy", lambda file: file.write_bytes(b"")),
        ("objects.npy", lambda file: file.unlink()),
        ("blocks.npy", lambda file: np.save(file, np.ones(7, np.uint64))),
    ],
)
def test_a_damaged_folder_is_not_gone_on_with(tmp_path, name, damage):
    fill(opened(tmp_path))
    damage(tmp_path / "cache" / name)
    writer = opened(tmp_path)
    assert fill(writer) == 0
    writer.finish()
    check(Prepared(tmp_path / "cache").batch(np.arange(10)), np.arange(10))


def test_changed_bytes_are_written_again(tmp_path):
    fill(opened(tmp_path))
    flip(tmp_path / "cache" / "image.npy", -60)
    assert opened(tmp_path).count == 4


def test_fewer_examples_than_there_might_have_been_are_a_cache_as_well(tmp_path):
    """Its files are those of a cache that was laid out for their number."""
    few = None
    for count in (300, 10):
        writer = opened(tmp_path, count=count)
        fill(writer)
        writer.finish()
        files = {
            file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()
        }
        few = few or files
        check(Prepared(tmp_path / "cache").batch(np.arange(10)), np.arange(10))
        (tmp_path / "cache" / "manifest.json").unlink()
    assert few == files


@pytest.fixture
def finished(tmp_path):
    writer = opened(tmp_path, seed=3)
    fill(writer)
    assert not is_finished(tmp_path / "cache")
    writer.finish()
    return tmp_path / "cache"


def test_a_finished_cache_is_read(finished):
    """Whole, by parts, and as plain NumPy files."""
    assert is_finished(finished)
    source = Prepared(finished)
    assert len(source) == 10 and source.manifest["seed"] == 3
    check(source.batch(np.array([9, 1, 9])), [9, 1, 9])
    assert Prepared(finished, keys=["image"]).batch(np.arange(2)).keys() == {"image"}
    np.testing.assert_array_equal(
        np.load(finished / "image.npy"), source.batch(np.arange(10))["image"]
    )
    source.verify(lambda blocks, desc: blocks)


def test_ids_are_bytes_on_the_disk_and_come_back_as_they_were(tmp_path):
    """Up to the largest, and what no metric counts."""
    ids = np.array([[[IGNORED, 0], [1, MOST_OBJECTS]]], np.int32)
    writer = opened(tmp_path, count=1)
    writer.append({**examples(0, 1), "segmentation": ids, "shadow": ids})
    writer.finish()
    batch = Prepared(tmp_path / "cache").batch(np.array([0]))
    for name in ("segmentation", "shadow"):
        np.testing.assert_array_equal(batch[name], ids)
        assert batch[name].dtype == np.int32
        assert np.load(tmp_path / "cache" / f"{name}.npy").dtype == np.uint8


def test_a_finished_cache_of_something_else_is_refused(finished):
    source = Prepared(finished)
    source.check({"seed": 3})
    with pytest.raises(DataError, match=r"\(its seed is 3, not 4\); remove the folder"):
        source.check({"seed": 4})
    with pytest.raises(DataError, match=r"\(its split is None, not 'test'\)"):
        source.check({"split": "test"})


def flip(file, place=-1):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("image.npy", flip, "block 2 has another checksum"),
        ("objects.npy", flip, "block 2 has another checksum"),
        ("blocks.npy", flip, "blocks.npy has another hash"),
        ("image.npy", lambda file: file.unlink(), "No such file"),
        ("image.npy", lambda file: file.write_bytes(file.read_bytes()[:-1]), "mmap"),
        ("image.npy", lambda f: np.save(f, np.zeros((10, 2, 2))), "its arrays are"),
        ("image.npy", lambda f: np.save(f, np.zeros((9, 2, 2, 3))), "has 9 examples"),
        ("manifest.json", lambda file: file.write_text('{"hash": 1}'), "'count'"),
        ("manifest.json", lambda file: file.write_text("["), "manifest.json: Expect"),
    ],
)
def test_a_finished_cache_that_was_changed_is_refused(finished, name, damage, why):
    damage(finished / name)
    with pytest.raises(DataError, match=r"does not match its manifest \(.*") as error:
        Prepared(finished)
    assert why in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("remove the folder and prepare it again")


def test_a_change_between_sampled_blocks_is_found_by_verifying(tmp_path):
    writer = opened(tmp_path, count=400)
    fill(writer, 400)
    writer.finish()
    folder = tmp_path / "cache"
    flip(folder / "image.npy", -12 * 30)
    source = Prepared(folder)
    with pytest.raises(DataError, match="block 92 has another checksum"):
        source.verify(lambda blocks, desc: blocks)
