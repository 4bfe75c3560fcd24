"""Files of weights: what is written is read, and what is refused is one sentence."""

import json
import pathlib
import sys

import numpy as np
import pytest

from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.weights import (
    SUFFIXES,
    find_module,
    read_weights,
    write_weights,
)

# Written by torch.save, see tests/record_official.py.
SAMPLE_FILE = pathlib.Path(__file__).parents[1] / "official" / "sample.pt"


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch reads and writes its files")


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


def test_a_checkpoint_of_pytorch_is_read(torch):
    """Its "model" alone, not the optimiser's state beside it."""
    found = read_weights(SAMPLE_FILE)
    assert found.keys() == {*SAMPLE, "weight", "bias"}
    for name, want in SAMPLE.items():
        got = found[name]
        assert got.dtype == want.dtype and np.array_equal(got, want), name
    assert found["weight"].shape == (2, 3)


@pytest.mark.parametrize("zipped", [True, False])  # False: before PyTorch 1.6
@pytest.mark.parametrize("entry", [None, "model", "state_dict", "ema", "net"])
def test_the_one_state_dictionary_of_a_checkpoint_is_read(
    tmp_path, torch, weights, zipped, entry
):
    tensors = {name: torch.tensor(w) for name, w in weights.items()}
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    beside = {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "scaler": {"scale": 65536.0},
        "logged": {"loss": torch.tensor(0.5)},
        "generators": {"cpu": torch.get_rng_state()},
        "callbacks": {},
    }
    whole = beside | {entry: tensors} if entry else tensors
    path = tmp_path / "checkpoint.pt.tar"
    torch.save(whole, path, _use_new_zipfile_serialization=zipped)
    assert (path.read_bytes()[:2] == b"PK") == zipped
    again = read_weights(path)
    assert again.keys() == weights.keys()
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


def test_of_two_state_dictionaries_none_is_guessed(tmp_path, torch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.nn.Linear(3, 2).state_dict()
    both = {"ema": state, "model": {name: w + 1 for name, w in state.items()}}
    torch.save(both, "both.ckpt")
    with pytest.raises(
        UserError, match=r"both\.ckpt holds several.*'ema', 'mod"
    ) as told:
        read_weights(pathlib.Path("both.ckpt"))
    # The sentence ends with the lines that choose one.
    exec(str(told.value).partition("alone: ")[2])
    assert np.array_equal(
        read_weights(pathlib.Path("weights.pt"))["bias"], state["bias"]
    )


def test_half_precision_is_read_as_float32(tmp_path):
    """The upper halves of a float32 are a bfloat16."""
    values = np.array([1 + 2**-7, -2.5, 2.0**100], np.float32)
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    tensor = {"dtype": "BF16", "shape": [3, 1], "data_offsets": [0, 6]}
    header = json.dumps({"short": tensor}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    short = read_weights(path)["short"]
    assert short.dtype == np.float32 and np.array_equal(short, values[:, None])
    for path in (tmp_path / "half.safetensors", tmp_path / "half.npz"):
        write_weights(path, {"half": values[:2].astype(np.float16)})
        half = read_weights(path)["half"]
        assert half.dtype == np.float32 and np.array_equal(half, values[:2])


def test_without_pytorch_its_files_are_refused(tmp_path, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    sentence = r"model\.pt needs PyTorch 2\.6 .*implicit_slots\[torch\]"
    instead = r"or write a \.npz or \.safetensors"
    with pytest.raises(UserError, match=f"writing .*{sentence}.*{instead}"):
        write_weights(tmp_path / "model.pt", weights)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.pt").touch()
    with pytest.raises(UserError, match=f"reading .*{sentence}.*numpy.savez") as told:
        read_weights(tmp_path / "model.pt")
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"nothing\.pt cannot be read: No such file"):
        read_weights(tmp_path / "nothing.pt")


def test_the_conversion_that_is_told_converts(tmp_path, torch, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    write_weights(pathlib.Path("model.pt"), weights)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(UserError) as told:
            read_weights(pathlib.Path("model.pt"))
    exec(str(told.value).partition("where it is: ")[2])
    again = read_weights(pathlib.Path("weights.npz"))
    assert again.keys() == weights.keys()
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


NAMES = ("0.weight", "0.bias", "head.weight")
OTHER = ("n_averaged", "loss.weight", "ema.head.weight")


@pytest.mark.parametrize(
    "wrap",
    [
        "{}",
        "module.{}",  # DataParallel
        "_orig_mod.{}",  # torch.compile
        "module._orig_mod.{}",
        "_fsdp_wrapped_module.{}",
        "model.{}",  # an attribute of a Lightning module
        "model.module.{}",
        "a.slate.0.{}",
    ],
)
def test_a_module_is_found_in_what_wraps_it(wrap):
    wrapped = {wrap.format(name): np.array(i) for i, name in enumerate(NAMES)}
    assert find_module(wrapped, NAMES) == dict(zip(NAMES, range(3), strict=True))
    # A name that is missing, or one that is too many, changes nothing.
    assert find_module(wrapped, (*NAMES[1:], "tail.weight")).keys() == {*NAMES}
    if wrap != "{}":
        more = wrapped | {name: np.array(9) for name in OTHER}
        assert find_module(more, NAMES) == dict(zip(NAMES, range(3), strict=True))


def test_parts_of_a_module_are_found_in_what_wraps_them():
    parts = ("0._orig_mod.weight", "0._checkpoint_wrapped_module.bias", "head.weight")
    wrapped = {f"module.{name}": np.array(i) for i, name in enumerate(parts)}
    assert find_module(wrapped, NAMES) == dict(zip(NAMES, range(3), strict=True))


def test_what_is_not_there_is_not_looked_for():
    other = {"module.a": np.array(1), "b": np.array(2)}
    assert find_module(other, NAMES) == other
    assert find_module({}, NAMES) == {}


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ("model.", "ema.", r"more than once, as model\.0\.weight and ema\.0\.weight"),
        ("", "ema.", r"more than once, as 0\.weight and ema\.0\.weight"),
        ("", "module.", r"more than once, as 0\.weight and module\.0\.weight"),
    ],
)
def test_of_two_modules_none_is_guessed(first, second, sentence):
    twice = {prefix + name: np.array(0) for prefix in (first, second) for name in NAMES}
    with pytest.raises(UserError, match=sentence):
        find_module(twice, NAMES)


def test_of_two_tensors_of_one_name_none_is_guessed():
    twice = {name: np.array(0) for name in (*NAMES, "0._orig_mod.bias")}
    with pytest.raises(UserError, match=r"twice, as 0\.bias and 0\._orig_mod\.bias"):
        find_module(twice, NAMES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch.compile
def test_pytorch_wraps_as_is_thought(torch):
    layer = torch.nn.Linear(3, 2)
    names = layer.state_dict().keys()
    for wrap in (
        torch.nn.DataParallel,
        torch.compile,
        torch.optim.swa_utils.AveragedModel,
        lambda layer: torch.nn.DataParallel(torch.compile(layer)),
    ):
        wrapped = {n: w.numpy() for n, w in wrap(layer).state_dict().items()}
        assert wrapped.keys().isdisjoint(names)
        assert find_module(wrapped, names).keys() == names


class Touch:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("executed"),)


def test_nothing_in_a_file_of_pytorch_is_executed(tmp_path, torch, monkeypatch):
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
