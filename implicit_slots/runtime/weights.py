"""Files of weights: `.npz`, `.safetensors`, and PyTorch's files where it is installed.

PyTorch's files are pickles, which may name any function to be called while they are
read. They are read by PyTorch's own guarded reader (`weights_only=True`).
"""

import importlib
import io
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from implicit_slots.runtime.errors import UserError

SUFFIXES = (".pt", ".npz", ".safetensors")
# Before it, `weights_only` could be got round (CVE-2025-32434).
_TORCH = (2, 6)


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a state dictionary.

    Args:
      path: `.npz`, `.safetensors`, or else a file of `torch.save`: the state dictionary
        itself (official SLATE's `best_model.pt`) or a checkpoint that has it as "model"
        (`checkpoint.pt.tar`).

    Returns:
      Arrays by name. PyTorch's bfloat16 and float16 come as float32.

    Raises:
      UserError: the file cannot be read, holds something else, or needs PyTorch, which
        is not installed; in one sentence.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    torch = None
    if path.suffix not in (".npz", ".safetensors"):
        torch = _import_torch(f"reading {path}")
    try:
        if path.suffix == ".npz":
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return dict(arrays)
        if torch is None:
            return safetensors.numpy.load(data)
        found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # A damaged file raises whatever it runs into.
        why = "or holds more than weights; save the model's state_dict() alone"
        raise UserError(f"{path} is damaged, {why}") from error
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in found.items()
    ):
        raise UserError(f"{path} holds no state dictionary (names to tensors)")
    short = (torch.bfloat16, torch.float16)
    return {
        name: (value.float() if value.dtype in short else value).detach().numpy()
        for name, value in found.items()
    }


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
        arrays = {name: np.ascontiguousarray(w) for name, w in weights.items()}
        data.write(safetensors.numpy.save(arrays))
    else:
        torch = _import_torch(f"writing {path}")
        torch.save({name: torch.tensor(w) for name, w in weights.items()}, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.write_bytes(data.getbuffer())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _import_torch(task: str) -> Any:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        torch = None
    if torch is None or tuple(map(int, torch.__version__.split(".")[:2])) < _TORCH:
        raise UserError(
            f"{task} needs PyTorch {_TORCH[0]}.{_TORCH[1]} or newer; install it with "
            "pip install 'implicit_slots[torch]', or use a .safetensors or .npz file, "
            "which need no PyTorch"
        )
    return torch
