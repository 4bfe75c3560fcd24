"""Arrays of examples that are made block by block, once, in memory or on disk."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from implicit_slots.data.base import Batch, DataError

# Makes the examples `first` … `first + block - 1`, stacked.
Make = Callable[[int], Batch]


class BlockCache:
    """Examples of fixed shapes, made on first use in blocks of neighbours.

    With a folder, blocks outlive the process. A block counts as there only when its
    marker is set, and the marker is set only when the block's bytes are on the disk:
    what a killed process leaves half written is made again. Processes may share a
    folder, since whoever makes a block writes the same bytes.
    """

    def __init__(
        self,
        make: Make,
        example: Mapping[str, Any],
        *,
        count: int,
        block: int,
        folder: Path | None = None,
        manifest: Mapping[str, Any] | None = None,
    ):
        """Prepares the arrays; makes no example.

        Args:
          make: returns the block of examples that starts at an index, all `block` of
            them, even where `count` ends within.
          example: shapes and data types by name, nested, for one example.
          count: number of examples.
          block: examples to a block.
          folder: where to keep the blocks; None keeps them in memory.
          manifest: what the bytes depend on, as JSON. Each manifest has a folder of
            its own within `folder`.

        Raises:
          DataError: the folder cannot be written.
        """
        self._make = make
        self._block = block
        self._dtype = _record(example)
        blocks = -(-count // block)
        self._locks = [threading.Lock() for _ in range(blocks)]
        if folder is None:
            self._file = None
            self._records = np.zeros(count, self._dtype)
            self._done = np.zeros(blocks, bool)
            return
        described = {**(manifest or {}), "record": str(self._dtype), "count": count}
        text = json.dumps({**described, "block": block}, indent=2, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        try:
            self._file = _open(folder / key, text, count * self._dtype.itemsize, blocks)
            self._records = np.memmap(self._file, self._dtype, "r", shape=(count,))
            markers = self._file.with_name("done.bin")
            self._done = np.memmap(markers, bool, "r+", shape=(blocks,))
        except OSError as error:
            raise DataError(_unwritable(folder, error)) from error

    def read(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """The examples of these indices, stacked; makes the blocks that are missing."""
        blocks = np.unique(indices // self._block)
        for block in blocks[~self._done[blocks]]:
            with self._locks[block]:  # A second thread waits and finds it made.
                if not self._done[block]:
                    self._fill(int(block))
        return _gather(self._records, indices)

    def _fill(self, block: int) -> None:
        first = block * self._block
        made = self._make(first)
        records = np.zeros(min(self._block, len(self._records) - first), self._dtype)
        _scatter(records, made)
        if self._file is None:
            self._records[first : first + len(records)] = records
            self._done[block] = True
            return
        try:
            # Written through the file and not through the map: a full disk is then an
            # error, where a map would kill the process.
            with self._file.open("r+b") as file:
                file.seek(first * self._dtype.itemsize)
                file.write(records.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(_unwritable(self._file.parent, error)) from error
        self._done[block] = True
        if isinstance(self._done, np.memmap):
            self._done.flush()


def _open(folder: Path, manifest: str, size: int, blocks: int) -> Path:
    """The file of records in a folder that belongs to this manifest alone."""
    folder.mkdir(parents=True, exist_ok=True)
    described, records, done = (
        folder / name for name in ("manifest.json", "records.bin", "done.bin")
    )
    whole = (
        described.is_file()
        and described.read_text() == manifest
        and records.is_file()
        and records.stat().st_size == size
        and done.is_file()
        and done.stat().st_size == blocks
    )
    if not whole:  # New, or somebody else's doing: trust nothing in it.
        with records.open("ab") as file:
            file.truncate(size)
        _replace(done, bytes(blocks))
        _replace(described, manifest.encode())
    return records


def _replace(file: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(file)


def _unwritable(folder: Path, error: OSError) -> str:
    return (
        f"the cache {folder} cannot be written: {error.strerror or error}; make room, "
        "name another folder with --config.data.cache=FOLDER, or none to keep the "
        "examples in memory"
    )


def _record(example: Mapping[str, Any]) -> np.dtype:
    """NumPy's structured type of one example."""
    return np.dtype(
        [
            (name, _record(leaf))
            if isinstance(leaf, Mapping)
            else (name, leaf.dtype, leaf.shape)
            for name, leaf in example.items()
        ],
        align=True,
    )


def _scatter(records: np.ndarray, examples: Mapping[str, Any]) -> None:
    """Writes stacked examples into records, as many as there is room for."""
    for name in records.dtype.names or ():
        if isinstance(examples[name], Mapping):
            _scatter(records[name], examples[name])
        else:
            records[name] = np.asarray(examples[name])[: len(records)]


def _gather(records: np.ndarray, indices: np.ndarray) -> Batch:
    """Copies examples out of records, stacked."""
    return {
        name: _gather(records[name], indices)
        if records.dtype[name].names
        else np.asarray(records[name][indices])
        for name in records.dtype.names or ()
    }
