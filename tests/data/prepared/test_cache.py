"""The cache of blocks: made once, and trusted only when it is whole."""

import os
import threading
import time

import numpy as np
import pytest

from implicit_slots.data.prepared.cache import BlockCache, Prepared
from implicit_slots.data.prepared.cache_folder import is_finished
from implicit_slots.data.source import DataError

EXAMPLE = {
    "objects": {"code": np.zeros(3, np.int32), "present": np.zeros(3, bool)},
    "image": np.zeros((2, 2, 3), np.uint8),
}


class Maker:
    """Examples that show their index, and a record of which blocks were asked for."""

    def __init__(self, block=4):
        self.block = block
        self.asked = []

    def __call__(self, first):
        """Makes one block."""
        self.asked.append(first)
        index = np.arange(first, first + self.block)
        return {
            "image": np.broadcast_to(index[:, None, None, None], (self.block, 2, 2, 3)),
            "objects": {
                "code": index[:, None] * 1000 + np.arange(3),
                "present": index[:, None] % 3 == np.arange(3),
            },
        }


def check(batch, indices):
    indices = np.asarray(indices)
    assert batch["image"].shape == (len(indices), 2, 2, 3)
    assert (batch["image"] == indices[:, None, None, None]).all()
    expected = indices[:, None] * 1000 + np.arange(3)
    np.testing.assert_array_equal(batch["objects"]["code"], expected)
    expected = indices[:, None] % 3 == np.arange(3)
    np.testing.assert_array_equal(batch["objects"]["present"], expected)
    assert (
        batch["image"].dtype == np.uint8 and batch["objects"]["code"].dtype == "int32"
    )


def opened(maker, folder=None, count=10, **manifest):
    return BlockCache(
        maker,
        EXAMPLE,
        count=count,
        block=4,
        folder=folder and folder / "cache",
        manifest=manifest,
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_blocks_are_made_when_first_read_and_only_then(tmp_path, on_disk):
    """Any indices in any order, the cut-off last block included."""
    maker = Maker()
    cache = opened(maker, tmp_path if on_disk else None)
    assert maker.asked == []
    check(cache.read(np.array([9, 1, 9, 0])), [9, 1, 9, 0])
    assert sorted(maker.asked) == [0, 8]
    check(cache.read(np.arange(10)), np.arange(10))
    check(cache.read(np.arange(10)[::-1]), np.arange(10)[::-1])
    assert sorted(maker.asked) == [0, 4, 8]


@pytest.mark.parametrize("on_disk", [False, True])
def test_threads_do_not_make_a_block_twice(tmp_path, on_disk):
    maker = Maker()

    def slow(first):
        time.sleep(0.01)
        return maker(first)

    cache = opened(slow, tmp_path if on_disk else None, count=40)
    start = threading.Barrier(8)

    def read():
        start.wait()
        for first in range(0, 40, 5):
            check(cache.read(np.arange(first, first + 5)), np.arange(first, first + 5))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert maker.asked == list(range(0, 40, 4))


def test_a_later_run_finds_the_blocks(tmp_path):
    opened(Maker(), tmp_path).read(np.array([0, 9]))
    maker = Maker()
    cache = opened(maker, tmp_path)
    check(cache.read(np.array([1, 8])), [1, 8])
    assert maker.asked == []
    cache.read(np.array([5]))
    assert maker.asked == [4]


def test_a_run_killed_while_writing_leaves_nothing_to_trust(tmp_path):
    """Bytes without their marker, as a killed process leaves them, are made again."""
    opened(Maker(), tmp_path).read(np.array([0]))
    records = tmp_path / "cache" / "image.npy"
    with records.open("r+b") as file:
        file.seek(-50, os.SEEK_END)
        file.write(b"\xff" * 40)
    maker = Maker()
    check(opened(maker, tmp_path).read(np.arange(10)), np.arange(10))
    assert sorted(maker.asked) == [4, 8]


def test_the_marker_waits_for_the_bytes(tmp_path, monkeypatch):
    """A full disk is a sentence, and the block counts as missing afterwards."""
    cache = opened(Maker(), tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written: No space left on device"):
        cache.read(np.array([0]))
    assert not np.load(tmp_path / "cache" / "blocks.npy").any()
    monkeypatch.undo()
    check(cache.read(np.array([0])), [0])
    assert np.load(tmp_path / "cache" / "blocks.npy").astype(bool).tolist() == [
        True,
        False,
        False,
    ]


def test_what_another_manifest_left_is_thrown_away(tmp_path):
    for other in ({"manifest": 1}, {"seed": 1}, {"seed": 0, "count": 9}, {"seed": 0}):
        maker = Maker()
        opened(maker, tmp_path, **other).read(np.arange(9))
        assert len(maker.asked) == 3
    maker = Maker()
    opened(maker, tmp_path, seed=0).read(np.arange(10))
    assert maker.asked == []
    assert {file.name for file in tmp_path.iterdir()} == {"cache", ".cache.lock"}


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
def test_a_damaged_folder_is_not_trusted(tmp_path, name, damage):
    opened(Maker(), tmp_path).read(np.arange(10))
    damage(tmp_path / "cache" / name)
    maker = Maker()
    check(opened(maker, tmp_path).read(np.arange(10)), np.arange(10))
    assert sorted(maker.asked) == [0, 4, 8]


def test_processes_that_start_at_once_share_one_folder(tmp_path):
    """Neither throws the other's blocks away."""
    first, second = Maker(), Maker()
    one, other = opened(first, tmp_path), opened(second, tmp_path)
    one.read(np.array([0]))
    check(other.read(np.arange(10)), np.arange(10))
    assert (sorted(first.asked), sorted(second.asked)) == ([0], [4, 8])


def test_the_order_of_attributes_is_none_of_the_manifests(tmp_path):
    """A reader may name them in the order of a set, which changes by process."""
    opened(Maker(), tmp_path).read(np.arange(10))
    maker = Maker()
    example = {
        "image": EXAMPLE["image"],
        "objects": dict(reversed(EXAMPLE["objects"].items())),
    }
    cache = BlockCache(maker, example, count=10, block=4, folder=tmp_path / "cache")
    check(cache.read(np.arange(10)), np.arange(10))
    assert maker.asked == []


def test_a_cache_that_was_replaced_is_not_written_to(tmp_path):
    """Of two processes with other manifests, the later one has the folder."""
    first, second = Maker(), Maker()
    old = opened(first, tmp_path, files=1)
    old.read(np.array([0]))
    new = opened(second, tmp_path, files=2)
    with pytest.raises(DataError, match="was replaced by another process while this"):
        old.read(np.array([9]))
    check(new.read(np.arange(10)), np.arange(10))
    assert second.asked == [0, 4, 8]
    new.finish()
    check(Prepared(tmp_path / "cache").batch(np.arange(10)), np.arange(10))


def test_changed_bytes_are_made_again_while_they_can_be(tmp_path):
    opened(Maker(), tmp_path).read(np.arange(10))
    flip(tmp_path / "cache" / "image.npy")
    maker = Maker()
    cache = opened(maker, tmp_path)
    check(cache.read(np.arange(10)), np.arange(10))
    assert maker.asked == [8]
    cache.verify(lambda blocks, desc: blocks)
    flip(tmp_path / "cache" / "image.npy")
    with pytest.raises(DataError, match="block 2 has another checksum"):
        cache.verify(lambda blocks, desc: blocks)


@pytest.fixture
def finished(tmp_path):
    cache = opened(Maker(), tmp_path, seed=3)
    cache.read(np.arange(10))
    assert not is_finished(tmp_path / "cache")
    cache.finish()
    return tmp_path / "cache"


def test_a_finished_cache_is_read_without_its_maker(finished):
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
    cache = opened(Maker(), tmp_path, count=400)
    cache.read(np.arange(400))
    cache.finish()
    folder = tmp_path / "cache"
    flip(folder / "image.npy", -12 * 30)
    source = Prepared(folder)
    with pytest.raises(DataError, match="block 92 has another checksum"):
        source.verify(lambda blocks, desc: blocks)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cache .*file.* cannot be written: File ex"):
        opened(Maker(), tmp_path / "file")
