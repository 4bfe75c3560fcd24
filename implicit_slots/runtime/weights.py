"""Files of weights: PyTorch's `.pt`, read without PyTorch, and NumPy's `.npz`.

A `.pt` file is a zip archive: a pickle of everything but the numbers, and one raw
record per storage. A pickle may name any function to be called while it is read;
PyTorch's own guard, `weights_only`, could be got round before version 2.6. Here the
pickle reaches nothing of Python: the few names that weights need stand for functions of
this file, every other name is refused. It also spares this package a dependency of
gigabytes whose CUDA libraries clash with those of JAX.
"""

import functools
import importlib
import math
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

SUFFIXES = (".pt", ".npz")

# Of the format that came before the zip archive.
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
# How many times a file's size its tensors may have together.
SHARING = 8
_RE_SAVE = "read it with PyTorch and save its state_dict() again with torch.save"


class _Dtype(NamedTuple):
    """The numbers of a storage: as they lie in the file, and what they become."""

    raw: str
    decode: Callable[[np.ndarray], np.ndarray] = lambda values: values


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


_DTYPES = {
    "FloatStorage": _Dtype("f4"),
    "DoubleStorage": _Dtype("f8"),
    "HalfStorage": _Dtype("f2", lambda values: values.astype(np.float32)),
    "BFloat16Storage": _Dtype("u2", _from_bfloat16),
    "LongStorage": _Dtype("i8"),
    "IntStorage": _Dtype("i4"),
    "ShortStorage": _Dtype("i2"),
    "CharStorage": _Dtype("i1"),
    "ByteStorage": _Dtype("u1"),
    "BoolStorage": _Dtype("u1", lambda values: values != 0),
}


class _Storage(NamedTuple):
    dtype: _Dtype
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Constructor(NamedTuple):
    """What a name in the pickle becomes: can be called, and not be changed."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _rebuild_tensor(storage, offset, size, stride, *_):
    """Stands for `torch._utils._rebuild_tensor_v2`."""
    if not isinstance(storage, _Storage):
        raise ValueError("it holds a tensor without a storage")
    return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(data, *_):
    """Stands for `torch._utils._rebuild_parameter`."""
    return data


_NAMES = {
    ("collections", "OrderedDict"): _Constructor(OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2"): _Constructor(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Constructor(_rebuild_parameter),
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


# What torch.save writes for numbers, strings, lists, tuples and dictionaries.
_OPCODES = (
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "GLOBAL REDUCE BUILD BINPERSID"
).split()
_CODES = {getattr(pickle, name)[0] for name in _OPCODES}


# The one written in Python: in C an index of its memo is an allocation of that size.
_InPython: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]


class _Unpickler(_InPython):
    dispatch: ClassVar[dict] = {
        code: load for code, load in _InPython.dispatch.items() if code in _CODES
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise ValueError(
                f"it holds {module}.{name}, which is not weights; nothing of it was "
                "run: save a model's state_dict() alone"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, _Dtype):
            raise ValueError("it holds a storage of an unknown kind")
        return _Storage(dtype, str(key), int(count))

    def load_build(self) -> None:
        """Drops the attributes of a dictionary; nothing else may be given any."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError("it changes an object that is not a dictionary")

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def _check_keys(self, keys: list) -> None:
        # Hashing a tuple of tuples of … overflows the interpreter's stack.
        if not all(isinstance(key, str | int | float | None) for key in keys):
            raise ValueError(
                "it holds a dictionary whose keys are not names or numbers"
            )

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def read_torch_file(path: pathlib.Path) -> Any:
    """Returns what `torch.save` wrote to a file, with NumPy arrays for tensors.

    Numbers, strings, lists, tuples (as lists) and dictionaries come back as they are;
    bfloat16 and float16 as float32. Views are honoured; what shared its numbers does
    not share them any more.

    Args:
      path: a file of PyTorch 1.6 or newer.

    Raises:
      ValueError: if it is no such file, is damaged, or holds more than weights. Nothing
        of it was executed.
      OSError: if there is no such file.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if _LEGACY_MAGIC in start:
        raise ValueError(f"{path} has the format of PyTorch before 1.6; {_RE_SAVE}")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is not a whole file of PyTorch 1.6 or newer ({error}); {_RE_SAVE}"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever it runs into
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} cannot be read as weights: {reason}") from error


def _read(archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    roots = [name.removesuffix("/data.pkl") for name in names if "/data.pkl" in name]
    if len(roots) != 1 or "/" in roots[0]:
        raise ValueError(f"it is a zip archive, but not PyTorch's; {_RE_SAVE}")
    (root,) = roots
    if f"{root}/constants.pkl" in names:
        raise ValueError(f"it is a TorchScript archive, which is code; {_RE_SAVE}")
    for entry in archive.infolist():
        # So that no record can be larger than the file.
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {entry.filename} is compressed")
    order = "little"
    if f"{root}/byteorder" in names:
        order = archive.read(f"{root}/byteorder").decode()
    if order not in ("little", "big"):
        raise ValueError(f"its byte order is {order!r}, not little or big")
    with archive.open(f"{root}/data.pkl") as file:
        found = _Unpickler(file).load()

    @functools.cache
    def stored(storage: _Storage) -> np.ndarray:
        raw = np.dtype(storage.dtype.raw).newbyteorder(order)
        data = archive.read(f"{root}/data/{storage.key}")
        if len(data) != storage.numel * raw.itemsize:
            raise ValueError(
                f"its record {storage.key} has {len(data)} bytes instead of "
                f"{storage.numel * raw.itemsize}"
            )
        return np.frombuffer(data, raw)

    # Tensors may share their numbers, but not without end.
    room = SHARING * sum(entry.file_size for entry in archive.infolist())

    def array(tensor: _Tensor) -> np.ndarray:
        nonlocal room
        values = stored(tensor.storage)
        room -= math.prod(tensor.size) * values.itemsize
        if room < 0:
            raise ValueError("its tensors are many times larger than the file")
        values = _view(values, tensor)
        return tensor.storage.dtype.decode(
            values.astype(values.dtype.newbyteorder("="))
        )

    return _with_arrays(found, array)


def _view(values: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """The tensor's view of its storage; NumPy itself checks no bound of it."""
    _, offset, size, stride = tensor
    numbers = (offset, *size, *stride)
    # No tensor has more entries than its storage: nothing is broadcast.
    inside = (
        all(type(number) is int and number >= 0 for number in numbers)
        and len(size) == len(stride)
        and math.prod(size) <= len(values)
        and (
            0 in size
            or offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
            < len(values)
        )
    )
    if not inside:
        raise ValueError(
            f"a tensor of size {size}, stride {stride} and offset {offset} does not "
            f"lie in its {len(values)} stored numbers"
        )
    if 0 in size:
        return np.zeros(size, values.dtype)
    return np.lib.stride_tricks.as_strided(
        values[offset:], size, [s * values.itemsize for s in stride], writeable=False
    )


def _with_arrays(found: Any, array: Callable[[_Tensor], np.ndarray]) -> Any:
    """Replaces every tensor, and every dictionary and sequence by a plain one."""
    # What is referred to twice is made once: nesting cannot multiply it.
    made: dict[int, Any] = {}

    def visit(value: Any) -> Any:
        if id(value) in made:
            return made[id(value)]
        if isinstance(value, _Tensor):
            made[id(value)] = array(value)
        elif isinstance(value, dict):
            made[id(value)] = plain = {}
            plain.update((key, visit(entry)) for key, entry in value.items())
        elif isinstance(value, list | tuple):
            made[id(value)] = plain = []
            plain.extend(visit(entry) for entry in value)
        else:
            return value
        return made[id(value)]

    return visit(found)


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a state dictionary.

    Args:
      path: `.npz`, or a file of `torch.save`: the state dictionary itself
        (official SLATE's `best_model.pt`) or a checkpoint that has it as "model"
        (`checkpoint.pt.tar`).

    Raises:
      ValueError: if there is none, in one sentence.
    """
    try:
        found = _read_arrays(path) if path.suffix == ".npz" else read_torch_file(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        found = found["model"]
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, np.ndarray)
        for name, value in found.items()
    ):
        raise ValueError(f"{path} holds no state dictionary (names to tensors)")
    return found


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except OSError:
        raise
    except Exception as error:  # a damaged file raises whatever it runs into
        raise ValueError(f"{path} is not a file of NumPy arrays: {error}") from error


def write_weights(path: pathlib.Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes a state dictionary whole or not at all: `.npz`, or `.pt` with PyTorch.

    Raises:
      ValueError: if a `.pt` is wanted and PyTorch is not installed.
    """
    if path.suffix == ".npz":
        save = functools.partial(np.savez, allow_pickle=False, **weights)
    else:
        try:
            torch = importlib.import_module("torch")
        except ImportError as error:
            raise ValueError(
                f"writing {path} needs PyTorch, which is not installed; write "
                f"{path.with_suffix('.npz')} instead"
            ) from error
        state = OrderedDict((name, torch.tensor(w)) for name, w in weights.items())
        save = functools.partial(torch.save, state)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            save(file)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
