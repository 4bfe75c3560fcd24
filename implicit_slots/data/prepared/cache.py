"""Arrays of examples, made block by block, in memory or memory-mapped on disk."""

import errno
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from implicit_slots.data.prepared import cache_folder
from implicit_slots.data.prepared.cache_folder import BLOCKS, MANIFEST, PRESENT
from implicit_slots.data.source import Batch, DataError, Source
from implicit_slots.runtime.files import lock

# Makes the examples `first` … `first + block - 1`, stacked.
Make = Callable[[int], Batch]

# Blocks whose bytes are compared with their checksums whenever a cache is opened.
SAMPLED_BLOCKS = 8


class BlockCache:
    """Examples of fixed shapes, made on first use in blocks of neighbours.

    With a folder, blocks outlive the process. A block counts as there only when its
    marker is set, and the marker is set only when the block's bytes are on the disk:
    what a killed process leaves half written is made again. Processes of one host may
    share a folder, since whoever makes a block writes the same bytes.

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
        types = {name: cache_folder.field_type(leaf) for name, leaf in example.items()}
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
            "fields": cache_folder.describe_fields(empty, 0),
        }
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with lock(folder):
                if not cache_folder.is_whole(folder, self._manifest):
                    cache_folder.lay_out(folder, self._manifest, types)
                self._fields = cache_folder.open_fields(folder, types)
                self._blocks: Any = np.load(folder / BLOCKS, mmap_mode="r+")
                self._inodes = {
                    n: cache_folder.inode(folder / f"{n}.npy") for n in self._fields
                }
        except OSError as error:
            raise DataError(_unwritable(folder, error)) from error
        present = np.flatnonzero(self._blocks)
        for place in _sample(present):  # Bytes that have changed are made again.
            if not self._is_intact(place):
                self._blocks[place] = 0

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
        """Seals a folder whose blocks are all there: its manifest gets their hash.

        Raises:
          DataError: another process has put another cache there, or the disk is full.
        """
        if self._folder is None:
            return
        assert all(self._blocks)
        sealed = {**self._manifest, "hash": cache_folder.hash_blocks(self._blocks)}
        try:
            with lock(self._folder):
                self._check_inodes()
                cache_folder.write_manifest(self._folder / MANIFEST, sealed)
        except OSError as error:
            raise DataError(_unwritable(self._folder, error)) from error

    def verify(self, progress: Callable[..., Any]) -> None:
        """Compares every block with its checksum.

        Args:
          progress: wraps an iterable to show how far it is, as `tqdm` does.

        Raises:
          DataError: a block is missing, or has other bytes than when it was written.
        """
        for block in progress(range(self.num_blocks), desc="verifying"):
            if not self._blocks[block]:
                raise DataError(
                    f"the cache {self._folder} is not finished; prepare it first"
                )
            if self._folder is not None and not self._is_intact(block):
                raise DataError(
                    cache_folder.mismatch(self._folder, _other_bytes(block))
                )

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
                    if os.fstat(file.fileno()).st_ino != self._inodes[name]:
                        raise DataError(_replaced(self._folder))
                    file.seek(field.offset + first * field.strides[0])
                    file.write(values.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise DataError(_unwritable(self._folder, error)) from error
        self._blocks[block] = PRESENT + cache_folder.checksum(records)
        self._blocks.flush()

    def _is_intact(self, block: int) -> bool:
        return cache_folder.is_intact(self._fields, self._blocks, block, self._block)

    def _check_inodes(self) -> None:
        assert self._folder is not None
        for name, inode in self._inodes.items():
            if cache_folder.inode(self._folder / f"{name}.npy") != inode:
                raise DataError(_replaced(self._folder))


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
        self.manifest = cache_folder.read_manifest(folder)
        try:
            self._count: int = self.manifest["count"]
            self._block: int = self.manifest["block"]
            self._fields = cache_folder.open_fields(folder, self.manifest["fields"])
            self._blocks = np.load(folder / BLOCKS)
            found = cache_folder.describe_fields(self._fields, self._count)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise DataError(cache_folder.mismatch(folder, str(error))) from error
        if found != self.manifest["fields"]:
            raise DataError(cache_folder.mismatch(folder, f"its arrays are {found}"))
        if cache_folder.hash_blocks(self._blocks) != self.manifest["hash"]:
            raise DataError(cache_folder.mismatch(folder, f"{BLOCKS} has another hash"))
        self._verify(_sample(np.arange(len(self._blocks))))

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """Copies examples out of the mapped files."""
        return gather(self._fields, indices, self._keys)

    def verify(self, progress: Callable[..., Any]) -> None:
        """Compares every block with its checksum.

        Args:
          progress: wraps an iterable to show how far it is, as `tqdm` does.

        Raises:
          DataError: a block has other bytes than when it was written.
        """
        self._verify(progress(range(len(self._blocks)), desc="verifying"))

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuses a folder that holds other examples than these.

        Args:
          identity: as `cache_folder` had it.

        Raises:
          DataError: naming what differs, for example of a folder that was renamed.
        """
        for key, value in json.loads(json.dumps(identity)).items():
            if self.manifest.get(key) != value:
                found = self.manifest.get(key)
                why = f"its {key} is {found!r}, not {value!r}"
                raise DataError(cache_folder.mismatch(self._folder, why))

    def _verify(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if not cache_folder.is_intact(
                self._fields, self._blocks, block, self._block
            ):
                raise DataError(
                    cache_folder.mismatch(self._folder, _other_bytes(block))
                )


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


def _scatter(records: np.ndarray, examples: Any) -> None:
    """Writes stacked examples into records, as many as there is room for."""
    if records.dtype.names:
        for name in records.dtype.names:
            records[name] = np.asarray(examples[name])[: len(records)]
    else:
        records[:] = np.asarray(examples)[: len(records)]


def _sample(blocks: np.ndarray) -> list[int]:
    """A few of some blocks, first and last among them."""
    places = np.linspace(0, len(blocks) - 1, min(SAMPLED_BLOCKS, len(blocks)))
    return blocks[np.unique(places.round().astype(int))].tolist()


def _unwritable(folder: Path, error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return (
        f"the cache {folder} cannot be written: {error.strerror or error}; "
        f"{'make room, ' if full else ''}name another folder with "
        "--config.data.cache=FOLDER, or none to keep the examples in memory"
    )


def _other_bytes(block: int) -> str:
    return f"block {block} has another checksum"


def _replaced(folder: Path) -> str:
    return (
        f"the cache {folder} was replaced by another process while this one filled it; "
        "let one finish, then start the other"
    )
