"""Files of weights: `.npz`, `.safetensors`, and PyTorch's files where it is installed.

PyTorch's files are pickles, which may name any function to be called while they are
read. They are read by PyTorch's own guarded reader (`weights_only=True`).
"""

import collections
import importlib
import io
import itertools
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from implicit_slots.runtime.errors import UserError

SUFFIXES = (".pt", ".npz", ".safetensors")
# Before it, `weights_only` could be got round (CVE-2025-32434).
_TORCH = (2, 6)
# What goes on where PyTorch is, for a file that is to be read where it is not.
_CONVERSION = (
    "import numpy, torch; "
    "numpy.savez('weights.npz', **torch.load({!r}, 'cpu', weights_only=True))"
)
# Where PyTorch puts a module into another: DataParallel and its kin, torch.compile,
# FSDP, checkpointing. They stand anywhere in a name.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
# safetensors' names of dtypes; bfloat16 is read as its bits.
_DTYPES = {
    "BOOL": "?",
    **{f"I{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": f"<f{size}" for size in (2, 4, 8)},
    "BF16": "<u2",
}


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a state dictionary.

    Args:
      path: `.npz`, `.safetensors`, or else a file of `torch.save`, those of PyTorch
        before 1.6 included: the state dictionary itself (official SLATE's
        `best_model.pt`) or a checkpoint in which one entry is one (`checkpoint.pt.tar`
        has it as "model", Lightning as "state_dict").

    Returns:
      Arrays by name, as the file names them. bfloat16 and float16 come as float32.

    Raises:
      UserError: the file cannot be read, holds something else or several state
        dictionaries, or needs PyTorch, which is not installed; in one sentence.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    torch = None
    if path.suffix not in (".npz", ".safetensors"):
        conversion = _CONVERSION.format(str(path))
        torch = _import_torch(
            f"reading {path}", f"convert the file where it is: {conversion}"
        )
    try:
        if path.suffix == ".npz":
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                found = dict(arrays)
        elif torch is None:
            found = _read_safetensors(data)
        else:
            found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # A damaged file raises whatever it runs into.
        why = "or holds more than weights; save the model's state_dict() alone"
        raise UserError(f"{path} is damaged, {why}") from error
    if torch:
        short = (torch.bfloat16, torch.float16)
        found = {
            name: (value.float() if value.dtype in short else value).detach().numpy()
            for name, value in _state_dict(path, found, torch).items()
        }
    return {
        name: value.astype(np.float32) if value.dtype == np.float16 else value
        for name, value in found.items()
    }


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    # Not safetensors.numpy, which refuses bfloat16.
    found = {}
    for name, tensor in safetensors.deserialize(data):
        kind = tensor["dtype"]
        array = np.frombuffer(tensor["data"], _DTYPES[kind]).reshape(tensor["shape"])
        if kind == "BF16":  # the upper half of a float32
            array = (array.astype("<u4") << 16).view("<f4")
        found[name] = array
    return found


def _state_dict(path: pathlib.Path, found: Any, torch: Any) -> Mapping[str, Any]:
    """The state dictionary that a file of PyTorch is, or has as one of its entries."""

    def is_state(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in value.items()
        )

    def is_trained(state: Mapping[str, Any]) -> bool:
        # Not a few numbers that were logged, nor the states of generators.
        return any(w.ndim and w.is_floating_point() for w in state.values())

    if is_state(found):
        return found
    entries = found.items() if isinstance(found, Mapping) else ()
    inner = {name: v for name, v in entries if is_state(v) and is_trained(v)}
    if len(inner) == 1:
        return inner.popitem()[1]
    if not inner:
        raise UserError(f"{path} holds no state dictionary (names to tensors)")
    raise UserError(
        f"{path} holds several state dictionaries, {', '.join(map(repr, inner))}; save "
        "one of them alone: import torch; "
        f"torch.save(torch.load({str(path)!r})[{next(iter(inner))!r}], 'weights.pt')"
    )


def find_module(
    weights: Mapping[str, np.ndarray], names: Collection[str]
) -> dict[str, np.ndarray]:
    """Returns the weights of a module that others may hold, under its own names.

    A training script may wrap what it trains, so that every name begins with
    `module.` (DataParallel), `_orig_mod.` (torch.compile), `model.` (an attribute of a
    Lightning module) or several of them, and may keep other tensors beside it.

    Args:
      weights: as `read_weights` returns them.
      names: some or all of the names that the module itself gives.

    Returns:
      The tensors whose names begin with the prefix under which most of `names` are
      found, without it and without what wrappers of parts put into them. All tensors,
      where none is found.

    Raises:
      UserError: the module or one of its tensors is there twice.
    """
    bare: dict[str, str] = {}
    for name in weights:
        if (other := bare.setdefault(_unwrapped(name), name)) != name:
            raise UserError(f"the weights hold a tensor twice, as {other} and {name}")
    prefixes = collections.Counter(
        found.removesuffix(name)
        for found in bare
        for name in names
        if f".{found}".endswith(f".{name}")
    )
    prefix, *others = [
        p for p in prefixes if prefixes[p] == max(prefixes.values())
    ] or [""]
    if others:
        where = " and ".join(f"{p}{next(iter(names))}" for p in (prefix, *others))
        raise UserError(f"the weights hold the model more than once, as {where}")
    return {
        found.removeprefix(prefix): weights[name]
        for found, name in bare.items()
        if found.startswith(prefix)
    }


def _unwrapped(name: str) -> str:
    """The name without wrappers of parts; those of the whole stay in front."""
    parts = name.split(".")
    whole = list(itertools.takewhile(_WRAPPERS.__contains__, parts))
    return ".".join(whole + [p for p in parts[len(whole) :] if p not in _WRAPPERS])


def write_weights(path: pathlib.Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes a state dictionary whole or not at all, in the format of its suffix.

    Args:
      path: ends in one of `SUFFIXES`.
      weights: arrays by name.

    Raises:
      UserError: a `.pt` is wanted and PyTorch is not installed.
    """
    data = io.BytesIO()
    if path.suffix == ".npz":
        np.savez(data, allow_pickle=False, **weights)
    elif path.suffix == ".safetensors":
        arrays = {name: np.asarray(w, order="C") for name, w in weights.items()}
        data.write(safetensors.numpy.save(arrays))
    else:
        torch = _import_torch(f"writing {path}", f"write a {' or '.join(SUFFIXES[1:])}")
        torch.save({name: torch.tensor(w) for name, w in weights.items()}, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.write_bytes(data.getbuffer())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _import_torch(task: str, otherwise: str) -> Any:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        torch = None
    if torch is None or tuple(map(int, torch.__version__.split(".")[:2])) < _TORCH:
        raise UserError(
            f"{task} needs PyTorch {_TORCH[0]}.{_TORCH[1]} or newer; install it with "
            f"pip install 'implicit_slots[torch]', or {otherwise}"
        )
    return torch
