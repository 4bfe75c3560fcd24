"""Files of weights: what is written is read, and what is refused is one sentence."""

import pathlib
import sys

import numpy as np
import pytest

from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.weights import SUFFIXES, read_weights, write_weights

# Written by torch.save, see tests/record_official.py.
SAMPLE_FILE = pathlib.Path(__file__).parents[1] / "official" / "sample.pt"


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {
        "some.weight": rng.normal(size=(3, 4)).astype("f4"),
        "transposed": rng.normal(size=(3, 4)).T,
        "mask": np.triu(np.ones((3, 3), bool), 1),
    }


LINE = np.arange(12, dtype=np.float32)
SAMPLE = {
    "plain": LINE.reshape(3, 4),
    "transposed": LINE.reshape(3, 4).T,
    "offset": LINE[5:9],
    "strided": LINE[1::3],
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.full((2, 2), 0.5, np.float32),
    "bfloat16": np.array([1 + 2**-7, -2.5, 2**100], np.float32),
    "half": np.array([1.0, -2.5], np.float32),
    "double": np.array([1 / 3]),
    "long": np.array([2**40]),
    "mask": np.triu(np.ones((3, 3), bool), 1),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read(tmp_path, weights, suffix):
    if suffix == ".pt":
        pytest.importorskip("torch", reason="PyTorch reads and writes its files")
    path = tmp_path / f"model{suffix}"
    write_weights(path, weights)
    again = read_weights(path)
    assert again.keys() == weights.keys()
    for name, want in weights.items():
        assert again[name].dtype == want.dtype and np.array_equal(again[name], want)
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_pytorch_is_read():
    """Its "model" alone, not the optimiser's state beside it."""
    pytest.importorskip("torch", reason="PyTorch reads its files")
    found = read_weights(SAMPLE_FILE)
    assert found.keys() == {*SAMPLE, "weight", "bias"}
    for name, want in SAMPLE.items():
        got = found[name]
        assert got.dtype == want.dtype and np.array_equal(got, want), name
    assert found["weight"].shape == (2, 3)


def test_without_pytorch_its_files_are_refused(tmp_path, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    sentence = r"model\.pt needs PyTorch 2\.6 .*implicit_slots\[torch\].*\.safetensors"
    with pytest.raises(UserError, match=f"writing .*{sentence}"):
        write_weights(tmp_path / "model.pt", weights)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.pt").touch()
    with pytest.raises(UserError, match=f"reading .*{sentence}"):
        read_weights(tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"nothing\.pt cannot be read: No such file"):
        read_weights(tmp_path / "nothing.pt")


class Touch:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("executed"),)


def test_nothing_in_a_file_of_pytorch_is_executed(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch reads its files")
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(2), "more": Touch()}, "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt is damaged, or holds more than w"):
        read_weights(pathlib.Path("evil.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]
    torch.save([torch.zeros(2)], "list.pt")
    with pytest.raises(UserError, match=r"list\.pt holds no state dictionary"):
        read_weights(pathlib.Path("list.pt"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file_is_one_sentence(tmp_path, weights, suffix):
    if suffix == ".pt":
        pytest.importorskip("torch", reason="PyTorch reads and writes its files")
    path = tmp_path / f"model{suffix}"
    write_weights(path, weights)
    whole = path.read_bytes()
    for damaged in (b"", b"<html>", whole[:10], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path} is damaged") as error:
            read_weights(path)
        assert "\n" not in str(error.value)


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "model.npz", weight=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="holds more than weights"):
        read_weights(tmp_path / "model.npz")
