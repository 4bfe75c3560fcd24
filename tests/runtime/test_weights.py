"""The reader of PyTorch's files: what it reads, and that nothing in one is executed."""

import pathlib
import struct
import sys
import zipfile

import numpy as np
import pytest

from implicit_slots.runtime.weights import read_torch_file, read_weights, write_weights

# Written by torch.save, see tests/record_official.py.
SAMPLE_FILE = pathlib.Path(__file__).parents[1] / "official" / "sample.pt"


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {
        "some.weight": rng.normal(size=(3, 4)).astype("f4"),
        "some.bias": rng.normal(size=3).astype("f4"),
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


def test_a_file_of_pytorch_is_read():
    found = read_torch_file(SAMPLE_FILE)
    for name, want in SAMPLE.items():
        got = found["model"][name]
        assert got.dtype == want.dtype and np.array_equal(got, want), name
    assert found["model"]["weight"].shape == (2, 3)
    assert found["epoch"] == 3 and found["best_val_loss"] == float("inf")
    adam = found["optimizer"]
    assert adam["param_groups"][0]["betas"] == [0.9, 0.999]
    assert adam["state"][0]["exp_avg"].shape == (2, 3)
    assert read_weights(SAMPLE_FILE).keys() == found["model"].keys()


def test_a_file_is_read_as_pytorch_reads_it(tmp_path, weights):
    torch = pytest.importorskip("torch", reason="compares with PyTorch itself")
    path = SAMPLE_FILE
    for name, want in torch.load(path, weights_only=True)["model"].items():
        got = read_weights(path)[name]
        assert np.array_equal(got, want.detach().to(torch.float64).numpy()), name
    write_weights(tmp_path / "model.pt", weights)
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    again = read_weights(tmp_path / "model.pt")
    assert loaded.keys() == again.keys() == weights.keys()
    for name, want in weights.items():
        assert np.array_equal(loaded[name].numpy(), want)
        assert again[name].dtype == want.dtype and np.array_equal(again[name], want)


def test_without_pytorch_a_pt_is_refused_and_an_npz_written(
    tmp_path, weights, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"needs PyTorch.*write .*model\.npz instead"):
        write_weights(tmp_path / "model.pt", weights)
    assert not list(tmp_path.iterdir())
    write_weights(tmp_path / "model.npz", weights)
    again = read_weights(tmp_path / "model.npz")
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


def text(string):
    """A string, as torch.save pickles it."""
    data = string.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(
    *, count=6, key="0", kind="FloatStorage", offset=0, size=(2, 3), stride=(3, 1)
):
    """A pickled tensor; by default all six numbers of storage 0."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key)
    storage += text("cpu") + integer(count) + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + integer(offset)
        + numbers(size)
        + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n(tRtR"
    )


def write_archive(path, value, *, records=(), compression=zipfile.ZIP_STORED):
    """Writes a file of PyTorch's format whose dictionary has one pickled value."""
    members = {
        "data.pkl": b"}" + text("weight") + value + b"s.",
        "data/0": np.arange(6, dtype="<f4").tobytes(),
        **dict(records),
    }
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


def test_strides_and_byte_order_are_honoured(tmp_path):
    got = read_torch_file(write_archive(tmp_path / "a.pt", tensor()))
    assert np.array_equal(got["weight"], np.arange(6.0).reshape(2, 3))
    view = tensor(offset=1, size=(2, 2), stride=(1, 3))
    got = read_torch_file(write_archive(tmp_path / "b.pt", view))
    assert np.array_equal(got["weight"], [[1, 4], [2, 5]])
    big = {"byteorder": b"big", "data/0": np.arange(6, dtype=">f4").tobytes()}
    got = read_torch_file(write_archive(tmp_path / "c.pt", tensor(), records=big))
    assert np.array_equal(got["weight"], np.arange(6.0).reshape(2, 3))
    assert got["weight"].dtype == np.float32 and got["weight"].dtype.isnative


BAD_TENSORS = {
    "behind the end": {"offset": 1},
    "before the beginning": {"offset": -1},
    "too many rows": {"size": (3, 3)},
    "too wide a stride": {"stride": (4, 1)},
    "a negative stride": {"stride": (3, -1)},
    "a negative size": {"size": (-2, -3)},
    "more strides than sizes": {"stride": (3, 1, 1)},
    "a size that overflows": {"size": (2**62, 8)},
    "repeated without end": {"size": (2**40,), "stride": (0,)},
    "more numbers than stored": {"count": 7},
    "no such record": {"key": "1"},
    "a record outside": {"key": "../data.pkl"},
    "an unknown kind of numbers": {"kind": "ComplexFloatStorage"},
}


@pytest.mark.parametrize("bad", BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_tensors_outside_their_storage_are_refused(tmp_path, bad):
    path = write_archive(tmp_path / "bad.pt", tensor(**bad))
    with pytest.raises(ValueError, match=f"{path} cannot be read as weights"):
        read_torch_file(path)


CALLS = {
    "os.system": b"cos\nsystem\n(" + text("touch executed") + b"tR",
    "posix.system": b"cposix\nsystem\n(" + text("touch executed") + b"tR",
    "builtins.eval": b"cbuiltins\neval\n(" + text("open('executed', 'w')") + b"tR",
    "builtins.getattr": b"cbuiltins\ngetattr\n(" + text("a") + text("upper") + b"tR",
    "instance": b"(" + text("executed") + text("w") + b"ibuiltins\nopen\n",
    "numpy": b"cnumpy.core.multiarray\n_reconstruct\n(tR",
    "torch": b"ctorch\nload\n(" + text("executed") + b"tR",
    "torch's storage": b"ctorch.storage\n_load_from_bytes\n(" + text("a") + b"tR",
    "a dotted name": b"\x80\x04ccollections\nOrderedDict.fromkeys\n(tR",
    "an extension": b"\x82\x01",
    "a changed function": b"ctorch._utils\n_rebuild_parameter\n}"
    + text("function")
    + b"K\x01sb",
    "a changed kind": b"ctorch\nFloatStorage\n}" + text("raw") + text("O") + b"sb",
    "a changed tensor": tensor() + b"(" + text("a") + b"tb",
    "another id": b"(" + text("module") + b"tQ",
    "no dictionary of tensors": b"ctorch\nFloatStorage\n)R",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    path = write_archive(tmp_path / "evil.pt", call)
    with pytest.raises(ValueError, match=f"{path} cannot be read as weights"):
        read_torch_file(path)
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pt"]
    assert np.array_equal(
        read_torch_file(write_archive(path, tensor()))["weight"].shape, (2, 3)
    )


def test_nesting_cannot_multiply_what_is_read(tmp_path):
    # A pair of twice the pair before it, forty times over.
    doubled = b"]q\x00" + b"".join(b"h%c\x86q%c" % (n, n + 1) for n in range(40))
    found = read_torch_file(write_archive(tmp_path / "bomb.pt", doubled))["weight"]
    assert found[0] is found[1]


ALL = {"count": 4000, "size": (4000,), "stride": (1,)}
BOMBS = {
    # Hashed by C code that calls itself for each level: it would end the process.
    "a deep key": b"}" + b")" + 100_000 * b"\x85" + b"Ns",
    # Each is as large as the file.
    "many views of one storage": b"](" + 50 * tensor(**ALL) + b"e",
    "a forged storage": b"ccollections\nOrderedDict\n)R}" + text("numel") + b"K\x06sb"
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + 4 * b")" + b"tR",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_what_would_exhaust_the_process_is_refused(tmp_path, bomb):
    records = {"data/0": bytes(4 * ALL["count"])}
    path = write_archive(tmp_path / "bomb.pt", bomb, records=records)
    with pytest.raises(ValueError, match=f"{path} cannot be read as weights"):
        read_torch_file(path)


def test_a_high_memo_index_takes_no_memory(tmp_path):
    path = write_archive(tmp_path / "memo.pt", b"}r" + struct.pack("<I", 2**31 - 1))
    assert read_torch_file(path) == {"weight": {}}


def test_files_of_other_formats_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    whole = write_archive(path, tensor()).read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole file of PyTorch"):
            read_torch_file(path)
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    with pytest.raises(ValueError, match=r"before 1\.6.*torch\.save"):
        read_torch_file(path)
    for records, sentence in (
        ({"constants.pkl": b"."}, "TorchScript"),
        ({"byteorder": b"middle"}, "byte order"),
        ({"other/data.pkl": b"."}, "not PyTorch's"),
    ):
        write_archive(path, tensor(), records=records)
        with pytest.raises(ValueError, match=sentence):
            read_torch_file(path)
    write_archive(path, tensor(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        read_torch_file(path)


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "model.npz", weight=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="pickle"):
        read_weights(tmp_path / "model.npz")
