"""Examples at the training resolution on disk: written once, in order, then mapped."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from implicit_slots.data.prepared import cache_folder
from implicit_slots.data.prepared.cache_folder import BLOCKS, MANIFEST, PRESENT
from implicit_slots.data.source import IGNORED, Batch, DataError, Source

# Fields of ids, which are stored as bytes.
IDS = ("segmentation", "shadow")
IGNORED_BYTE = IGNORED % 256
# Blocks whose bytes are compared with their checksums whenever a cache is opened.
SAMPLED_BLOCKS = 8


class Writer:
    """A folder of the cache that is being filled, a block of neighbours at a time.

    A block counts as there only when its marker is set, and the marker is set only when
    the block's bytes are on the disk: what a killed process leaves half written is
    written again. One process at a time writes to a folder.

    Attributes:
      count: number of examples that are there, from the first on.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        *,
        count: int,
        block: int,
        is_exact: bool = True,
    ):
        """Goes on with what lies in the folder, if it is of the same manifest.

        Args:
          folder: of the cache; its parent exists.
          manifest: what the bytes depend on, as JSON.
          count: most examples that there can be.
          block: examples to a block.
          is_exact: whether there will be `count`, so that they must have room.
        """
        self._is_exact = is_exact
        self._folder = folder
        self._block = block
        self._manifest = {
            **json.loads(json.dumps(manifest)),
            "count": count,
            "block": block,
        }
        self._fields: Mapping[str, np.ndarray] = {}
        self.count = 0
        fields = cache_folder.fields_of_unfinished(folder, self._manifest)
        if fields is None:
            return
        self._open(fields)
        blocks = int(np.argmin(np.append(self._blocks != 0, False)))
        for place in _sample(np.arange(blocks)):
            if not cache_folder.is_intact(self._fields, self._blocks, place, block):
                blocks = min(blocks, place)
        self.count = min(blocks * block, count)

    def append(self, examples: Batch) -> None:
        """Writes the next block; the last one may be shorter.

        Args:
          examples: as `Source.batch` describes them; ids are stored as bytes.

        Raises:
          DataError: the disk is full, or the folder cannot be written.
        """
        try:
            if not self._fields:
                self._lay_out(examples)
            records = {
                name: _pack(examples[name], field.dtype)
                for name, field in self._fields.items()
            }
            # Written through files and not through maps: a full disk is then an
            # error, where a map would kill the process.
            for name, values in records.items():
                field: Any = self._fields[name]
                with (self._folder / f"{name}.npy").open("r+b") as file:
                    file.seek(field.offset + self.count * field.strides[0])
                    file.write(values.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
            checksum = PRESENT + cache_folder.checksum(records)
            self._blocks[self.count // self._block] = checksum
            self._blocks.flush()
        except OSError as error:
            raise unwritable(self._folder, error) from error
        self.count += len(next(iter(records.values())))

    def finish(self) -> None:
        """Seals the folder, with as many examples as were written.

        Raises:
          DataError: the disk is full, or the folder cannot be written.
        """
        blocks = np.array(self._blocks[: -(-self.count // self._block)])
        sealed = {
            **self._manifest,
            "count": self.count,
            "hash": cache_folder.hash_blocks(blocks),
        }
        try:
            if self.count < self._manifest["count"]:
                cache_folder.shorten(self._folder, self._fields, self.count)
                np.save(self._folder / BLOCKS, blocks)
            cache_folder.write_manifest(self._folder / MANIFEST, sealed)
        except OSError as error:
            raise unwritable(self._folder, error) from error

    def _lay_out(self, examples: Batch) -> None:
        """Makes the files, empty, for examples like these."""
        types = {name: _stored_type(name, leaf) for name, leaf in examples.items()}
        empty = {name: np.empty((0, *s), d) for name, (d, s) in types.items()}
        self._manifest["fields"] = cache_folder.describe_fields(empty, 0)
        need = self._manifest["count"] * sum(
            dtype.itemsize * math.prod(shape) for dtype, shape in types.values()
        )
        free = shutil.disk_usage(self._folder.parent).free
        if self._is_exact and free < need:
            raise DataError(
                f"{self._folder.parent} has {free / 1e6:,.1f} MB free and the examples "
                f"need {need / 1e6:,.1f} MB; make room, or name another folder with "
                "--config.data.cache=FOLDER"
            )
        cache_folder.lay_out(self._folder, self._manifest, types)
        self._open(self._manifest["fields"])

    def _open(self, fields: Mapping[str, Any]) -> None:
        self._manifest["fields"] = fields
        self._fields = cache_folder.open_fields(self._folder, fields)
        self._blocks: Any = np.load(self._folder / BLOCKS, mmap_mode="r+")


class Prepared(Source):
    """A finished folder of the cache: opened in no time, and read without a decoder.

    Attributes:
      folder: where it is.
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
        self.folder = folder
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
                raise DataError(cache_folder.mismatch(self.folder, why))

    def _verify(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if not cache_folder.is_intact(
                self._fields, self._blocks, block, self._block
            ):
                why = f"block {block} has another checksum"
                raise DataError(cache_folder.mismatch(self.folder, why))


def gather(
    fields: Mapping[str, np.ndarray],
    indices: Int[np.ndarray, " batch"],
    keys: Collection[str] | None = None,
) -> Batch:
    """Copies the examples of these indices out of arrays, as a batch.

    Ids of `segmentation` and `shadow` are stored as bytes and come as int32, 255 as
    `IGNORED`.
    """
    batch: Batch = {}
    for name, field in fields.items():
        if keys is not None and name not in keys:
            continue
        # Without np.memmap's bookkeeping for each slice.
        values = np.take(field.view(np.ndarray), indices, axis=0)
        if (names := values.dtype.names) is not None:
            batch[name] = {n: np.ascontiguousarray(values[n]) for n in names}
        elif name in IDS:
            batch[name] = np.where(values == IGNORED_BYTE, np.int32(IGNORED), values)
        else:
            batch[name] = values
    return batch


def _stored_type(name: str, leaf: Any) -> tuple[np.dtype, tuple[int, ...]]:
    """NumPy's type and shape of one example of a stacked field, as it is stored.

    Dictionaries become structured, and ids fit into a byte.
    """
    if isinstance(leaf, Mapping):
        columns = [(n, v.dtype, v.shape[1:]) for n, v in sorted(leaf.items())]
        return np.dtype(columns), ()
    dtype = np.uint8 if name in IDS else leaf.dtype
    return np.dtype(dtype), leaf.shape[1:]


def _pack(examples: Any, dtype: np.dtype) -> np.ndarray:
    """Stacked examples of a field as they are stored."""
    if dtype.names is None:
        return np.asarray(examples).astype(dtype)
    records = np.zeros(len(examples[dtype.names[0]]), dtype)
    for name in dtype.names:
        records[name] = examples[name]
    return records


def _sample(blocks: np.ndarray) -> list[int]:
    """A few of some blocks, first and last among them."""
    places = np.linspace(0, len(blocks) - 1, min(SAMPLED_BLOCKS, len(blocks)))
    return blocks[np.unique(places.round().astype(int))].tolist()


def unwritable(folder: Path, error: OSError) -> DataError:
    """The sentence for a folder that cannot be written, to be raised."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return DataError(
        f"the cache {folder} cannot be written: {error.strerror or error}; "
        f"{'make room, or ' if full else ''}name another folder with "
        "--config.data.cache=FOLDER"
    )
