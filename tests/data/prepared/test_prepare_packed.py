"""Preparing a compressed record file, which is read from its start, once."""

import gzip
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from tfds_files import frame

from implicit_slots.data import registry
from implicit_slots.data.prepared import inspect, prepare
from implicit_slots.data.readers.tfrecords import GzipRecords
from implicit_slots.data.sets import multi_object
from implicit_slots.data.source import SPLITS, DataError

WRITTEN = Path(__file__).parents[1] / "sets" / "files" / "tetrominoes_train.tfrecords"


@pytest.fixture
def section(tmp_path):
    """210 scenes of one, two and three objects in turns, as gzip and unpacked."""
    # Cut in a block of the first split, and between the splits.
    splits = {"train": "0:150", "validation": "150:200", "test": "200:210"}
    whole = b"".join(map(frame, list(GzipRecords(WRITTEN).read(0, 3)) * 70))
    for place, content in (("packed", gzip.compress(whole, 1)), ("plain", whole)):
        (tmp_path / place).mkdir()
        (tmp_path / place / WRITTEN.name).write_bytes(content)
    return ml_collections.ConfigDict(
        {
            "name": "tetrominoes",
            "path": str(tmp_path / "packed"),
            "cache": str(tmp_path / "cache"),
            "resolution": 8,
            "max_objects": 3,
            "splits": splits,
        }
    )


def prepared(section, split="train"):
    return prepare.prepare(section, split, say=lambda line: None)


def content(section, split="train"):
    folder = registry.request(section, split).folder
    assert folder is not None
    return {file.name: file.read_bytes() for file in folder.glob("*.npy")}


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_packed_file_gives_what_the_unpacked_one_gives(section, tmp_path, keep):
    """In all splits, whichever examples are left out; then it can be trained on."""
    section.keep_objects = keep
    with pytest.raises(DataError, match=r"`python -m implicit_slots\.data prepare` wi"):
        registry.build(section, "train")
    for split in SPLITS:
        source = prepared(section, split)
        found = registry.build(section, split)
        plain = section.copy_and_resolve_references()
        plain.update(path=str(tmp_path / "plain"), cache="")
        expected = registry.build(plain, split)
        assert len(source) == len(found) == len(expected) > 0
        everything = np.arange(len(source))
        one, other = found.batch(everything), expected.batch(everything)
        assert keep == 0 or one["objects"]["present"].sum(-1).max() == keep
        for key in ("image", "segmentation"):
            np.testing.assert_array_equal(one[key], other[key])
        for key, values in other["objects"].items():
            np.testing.assert_array_equal(one["objects"][key], values)


def test_all_splits_are_prepared_in_one_pass(section, monkeypatch):
    passes = []
    opened = gzip.open
    multi_object._opened.cache_clear()
    monkeypatch.setattr(gzip, "open", lambda p: passes.append(p) or opened(p))
    monkeypatch.setattr(multi_object, "is_gzip", lambda file: True)
    for split in SPLITS:
        prepared(section, split)
    assert len(passes) == 1


@pytest.mark.parametrize("keep", [0, 2])
def test_an_interrupted_preparation_gives_the_same_bytes(section, monkeypatch, keep):
    """It passes over what is there, without decoding it."""
    section.keep_objects = keep
    prepared(section)
    whole = content(section)
    section.cache += "_again"
    frame_of, decoded = multi_object.MultiObject._frame, []

    def interrupted(self, index, record):
        decoded.append(index)
        if len(decoded) == 80:
            raise KeyboardInterrupt
        return frame_of(self, index, record)

    monkeypatch.setattr(multi_object.MultiObject, "_frame", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(section)
    monkeypatch.setattr(
        multi_object.MultiObject,
        "_frame",
        lambda *arguments: decoded.append(arguments[1]) or frame_of(*arguments),
    )
    decoded.clear()
    prepared(section)
    assert len(decoded) == (150 if keep == 0 else 100) - prepare.BLOCK
    assert content(section) == whole


def test_a_look_needs_no_preparation(section, monkeypatch):
    """It reads no more than it shows."""
    multi_object._opened.cache_clear()
    lines, batch = inspect.look(section, "validation", 4)
    assert lines.startswith("(read from the start): 50 examples\n  image  ")
    assert batch["objects"]["present"].sum(-1).tolist() == [1, 2, 3, 1]
    file = Path(section.path) / WRITTEN.name
    assert multi_object._opened(file, file.stat().st_mtime_ns).place == 154
    section.keep_objects = 1
    lines, batch = inspect.look(section, "train", 3)
    assert "150 examples, less those of more than 1 objects" in lines
    assert batch["objects"]["present"].sum(-1).tolist() == [1, 1, 1]


def test_no_example_that_is_kept_is_one_sentence(section):
    section.splits.train = "1:3"
    section.keep_objects = 1
    for use in (prepared, lambda s: inspect.look(s, "train", 3)):
        with pytest.raises(DataError, match="no example of split 'train' has at most"):
            use(section)
