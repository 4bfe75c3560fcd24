"""Arrays of examples, made block by block, in memory or memory-mapped on disk.

A folder of the cache:

    manifest.json   what the examples depend on, their fields, and, once all blocks
                    are there, `hash`
    image.npy       one array [count, …] per key of a batch; `objects.npy` is
                    structured
    blocks.npy      uint64 per block: 0 while it is missing, else 2^32 + CRC-32 of its
                    bytes in all fields, by name
"""

import hashlib
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from implicit_slots.data.base import Batch, DataError, Source

# Makes the examples `first` … `first + block - 1`, stacked.
Make = Callable[[int], Batch]

MANIFEST = "manifest.json"
BLOCKS = "blocks.npy"
PRESENT = 1 << 32
# Blocks whose bytes are compared with their checksums whenever a cache is opened.
SAMPLED_BLOCKS = 8


class BlockCache:
    """Examples of fixed shapes, made on first use in blocks of neighbours.

    With a folder, blocks outlive the process. A block counts as there only when its
    marker is set, and the marker is set only when the block's bytes are on the disk:
    what a killed process leaves half written is made again. Processes may share a
    folder, since whoever makes a block writes the same bytes.

    Attributes:
      num_blocks: how many blocks there are.
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
          folder: where to keep the blocks; None keeps them in memory. What lies there
            of another manifest is thrown away.
          manifest: what the bytes depend on, as JSON.

        Raises:
          DataError: the folder cannot be written.
        """
        self._make = make
        self._block = block
        self._count = count
        self._folder = folder
        self.num_blocks = -(-count // block)
        self._locks = [threading.Lock() for _ in range(self.num_blocks)]
        types = {name: _type(leaf) for name, leaf in example.items()}
        if folder is None:
            self._fields = {
                name: np.zeros((count, *shape), dtype)
                for name, (dtype, shape) in types.items()
            }
            self._blocks = np.zeros(self.num_blocks, np.uint64)
            return
        empty = {name: np.empty((0, *s), d) for name, (d, s) in types.items()}
        self._manifest = {
            **json.loads(json.dumps(manifest or {})),
            "count": count,
            "block": block,
            "fields": _described(empty, 0),
        }
        try:
            if not _is_whole(folder, self._manifest):
                _start(folder, self._manifest, types)
            self._fields = _opened(folder, types)
            self._blocks: Any = np.load(folder / BLOCKS, mmap_mode="r+")
        except OSError as error:
            raise DataError(_unwritable(folder, error)) from error

    def read(
        self, indices: Int[np.ndarray, " batch"], keys: Collection[str] | None = None
    ) -> Batch:
        """The examples of these indices, stacked; makes the blocks that are missing.

        Args:
          indices: each below `count`; may repeat.
          keys: which fields; None for all.
        """
        blocks = np.unique(indices // self._block)
        for block in blocks[self._blocks[blocks] == 0]:
            self.fill(int(block))
        return gather(self._fields, indices, keys)

    def has(self, block: int) -> bool:
        """Whether a block is there."""
        return bool(self._blocks[block])

    def fill(self, block: int) -> None:
        """Makes a block unless it is there; a second thread waits and finds it made.

        Raises:
          DataError: the disk is full, or the folder can no longer be written.
        """
        with self._locks[block]:
            if not self._blocks[block]:
                self._fill(block)

    def finish(self) -> None:
        """Seals a folder whose blocks are all there: its manifest gets their hash."""
        assert self._folder is not None and all(self._blocks)
        sealed = {**self._manifest, "hash": _hash(self._blocks)}
        try:
            _replace(self._folder / MANIFEST, sealed)
        except OSError as error:
            raise DataError(_unwritable(self._folder, error)) from error

    def _fill(self, block: int) -> None:
        made = self._make(first := block * self._block)
        stop = min(first + self._block, self._count)
        records = {}
        for name, field in self._fields.items():
            records[name] = np.zeros((stop - first, *field.shape[1:]), field.dtype)
            _scatter(records[name], made[name])
        if self._folder is None:
            for name, field in self._fields.items():
                field[first:stop] = records[name]
            self._blocks[block] = PRESENT
            return
        try:
            # Written through files and not through maps: a full disk is then an
            # error, where a map would kill the process.
            for name, values in records.items():
                field: Any = self._fields[name]
                with (self._folder / f"{name}.npy").open("r+b") as file:
                    file.seek(field.offset + first * field.strides[0])
                    file.write(values.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise DataError(_unwritable(self._folder, error)) from error
        self._blocks[block] = PRESENT + _checksum(records)
        self._blocks.flush()


class Prepared(Source):
    """A finished folder of the cache: opened in no time, and read without a decoder.

    Attributes:
      manifest: what the folder says of itself.
    """

    def __init__(self, folder: Path, keys: Collection[str] | None = None):
        """Opens the arrays; compares a sample of their blocks with the checksums.

        Args:
          folder: of a cache that `is_finished`.
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: the folder does not match its manifest.
        """
        self._folder = folder
        self._keys = keys
        self.manifest = read_manifest(folder)
        try:
            self._count: int = self.manifest["count"]
            self._block: int = self.manifest["block"]
            self._fields = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r")
                for name in self.manifest["fields"]
            }
            self._blocks = np.load(folder / BLOCKS)
            found = _described(self._fields, self._count)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise DataError(_mismatch(folder, str(error))) from error
        if found != self.manifest["fields"]:
            raise DataError(_mismatch(folder, f"its arrays are {found}"))
        if _hash(self._blocks) != self.manifest["hash"]:
            raise DataError(_mismatch(folder, f"{BLOCKS} has another hash"))
        sample = np.linspace(0, len(self._blocks) - 1, SAMPLED_BLOCKS).round()
        self._verify(np.unique(sample.astype(int)))

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """Copies examples out of the mapped files."""
        return gather(self._fields, indices, self._keys)

    def array(self, key: str) -> np.ndarray:
        """The mapped array [len(self), …] of a key."""
        return self._fields[key]

    def verify(self, progress: Callable[..., Any]) -> None:
        """Compares every block with its checksum.

        Args:
          progress: wraps an iterable to show how far it is, as `tqdm` does.

        Raises:
          DataError: a block has other bytes than when it was written.
        """
        self._verify(progress(range(len(self._blocks)), desc="verifying"))

    def _verify(self, blocks: Any) -> None:
        for block in blocks:
            rows = slice(block * self._block, (block + 1) * self._block)
            values = {name: field[rows] for name, field in self._fields.items()}
            if self._blocks[block] != PRESENT + _checksum(values):
                raise DataError(
                    _mismatch(self._folder, f"block {block} has another checksum")
                )


def cache_folder(cache: str, identity: Mapping[str, Any]) -> Path:
    """The folder within a cache that belongs to examples of this description.

    Args:
      cache: a folder, with ~ for the user's home.
      identity: what tells these examples from others, as JSON; its `name`, `split` and
        `resolution` are in the folder's name.
    """
    text = json.dumps(identity, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    readable = "-".join(str(identity[k]) for k in ("name", "split", "resolution"))
    return Path(cache).expanduser() / f"{readable}-{key}"


def is_finished(folder: Path) -> bool:
    """Whether a folder claims to be a whole cache; `Prepared` checks the claim."""
    return (folder / MANIFEST).is_file() and "hash" in read_manifest(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder of the cache says of itself.

    Raises:
      DataError: the manifest cannot be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise DataError(_mismatch(folder, f"{MANIFEST}: {error}")) from error
    return manifest


def gather(
    fields: Mapping[str, np.ndarray],
    indices: Int[np.ndarray, " batch"],
    keys: Collection[str] | None = None,
) -> Batch:
    """Copies the examples of these indices out of arrays, as a batch.

    Ids of `segmentation` and `shadow` are stored as bytes and come as int32.
    """
    batch: Batch = {}
    for name, field in fields.items():
        if keys is not None and name not in keys:
            continue
        # Without np.memmap's bookkeeping for each slice.
        values = np.take(field.view(np.ndarray), indices, axis=0)
        if (names := values.dtype.names) is not None:
            batch[name] = {n: np.ascontiguousarray(values[n]) for n in names}
        elif name in ("segmentation", "shadow"):
            batch[name] = values.astype(np.int32)
        else:
            batch[name] = values
    return batch


def _type(leaf: Any) -> tuple[np.dtype, tuple[int, ...]]:
    """NumPy's type, structured for a dictionary, and shape of one example's field."""
    if isinstance(leaf, Mapping):
        columns = [(name, value.dtype, value.shape) for name, value in leaf.items()]
        return np.dtype(columns), ()
    return leaf.dtype, leaf.shape


def _described(fields: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Types and shapes of arrays of `count` examples, as the manifest has them."""
    described = {}
    for name, field in fields.items():
        if field.shape[0] != count:
            raise ValueError(f"{name} has {field.shape[0]} examples, not {count}")
        dtype = np.lib.format.dtype_to_descr(field.dtype)
        described[name] = {"dtype": dtype, "shape": field.shape[1:]}
    return json.loads(json.dumps(described))


def _is_whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a folder belongs to this manifest and all its files have their size."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        found.pop("hash", None)
        fields = _opened(folder, manifest["fields"])
        blocks = np.load(folder / BLOCKS)
        return (
            found == manifest
            and _described(fields, manifest["count"]) == manifest["fields"]
            and blocks.shape == (-(-manifest["count"] // manifest["block"]),)
            and blocks.dtype == np.uint64
        )
    except (OSError, ValueError, EOFError, AttributeError, TypeError):
        return False


def _start(folder: Path, manifest: Mapping[str, Any], fields: Mapping[str, Any]):
    """Puts an empty cache where none is, or where one of another manifest is.

    It is laid out beside and moved into place whole: of two processes that start at
    once, the second finds the first one's folder.
    """
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        for name, (dtype, shape) in fields.items():
            # Sparse: the system gives out its blocks when they are written.
            np.lib.format.open_memmap(
                beside / f"{name}.npy", "w+", dtype, (manifest["count"], *shape)
            )
        blocks = -(-manifest["count"] // manifest["block"])
        np.save(beside / BLOCKS, np.zeros(blocks, np.uint64))
        _replace(beside / MANIFEST, manifest)
        try:
            beside.rename(folder)
        except OSError:  # Somebody's folder is there.
            if not _is_whole(folder, manifest):
                shutil.rmtree(folder)
                beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _opened(folder: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}


def _replace(file: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a manifest so that it is there whole or not at all."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    temporary.replace(file)


def _hash(blocks: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(blocks).astype("<u8").tobytes()).hexdigest()


def _checksum(block: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of a block's bytes, over all fields in the order of their names."""
    checksum = 0
    for _, values in sorted(block.items()):
        checksum = zlib.crc32(values.tobytes(), checksum)
    return checksum


def _unwritable(folder: Path, error: OSError) -> str:
    return (
        f"the cache {folder} cannot be written: {error.strerror or error}; make room, "
        "name another folder with --config.data.cache=FOLDER, or none to keep the "
        "examples in memory"
    )


def _mismatch(folder: Path, why: str) -> str:
    return (
        f"the cache {folder} does not match its manifest ({why}); remove the folder "
        "and prepare it again"
    )


def _scatter(records: np.ndarray, examples: Any) -> None:
    """Writes stacked examples into records, as many as there is room for."""
    if records.dtype.names:
        for name in records.dtype.names:
            records[name] = np.asarray(examples[name])[: len(records)]
    else:
        records[:] = np.asarray(examples)[: len(records)]
