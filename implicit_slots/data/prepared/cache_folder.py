"""The folders of a cache: what lies in one, and how it gets there whole.

manifest.json   what the examples depend on, their fields, and, once all blocks
                are there, `hash`
image.npy       one array [count, …] per key of a batch; `objects.npy` is
                structured
blocks.npy      uint64 per block: 0 while it is missing, else 2^32 + CRC-32 of its
                bytes in all fields, by name
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from implicit_slots.data.source import DataError
from implicit_slots.runtime.files import expand, write_atomically

MANIFEST = "manifest.json"
BLOCKS = "blocks.npy"
PRESENT = 1 << 32
# Of the manifest, what does not change the examples.
APART = ("hash", "path")


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
    return expand(cache) / f"{readable}-{key}"


def is_finished(folder: Path) -> bool:
    """Whether a folder claims to be a whole cache; `Prepared` checks the claim."""
    try:
        (folder / MANIFEST).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise DataError(
            f"the cache {folder} cannot be read ({error.strerror}); change its "
            "permissions, or name another with --config.data.cache=FOLDER"
        ) from error
    return "hash" in read_manifest(folder)


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
        raise DataError(mismatch(folder, f"{MANIFEST}: {error}")) from error
    return manifest


def describe_fields(fields: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Types and shapes of arrays of `count` examples, as the manifest has them."""
    described = {}
    for name, field in fields.items():
        if field.shape[0] != count:
            raise ValueError(f"{name} has {field.shape[0]} examples, not {count}")
        dtype = np.lib.format.dtype_to_descr(field.dtype)
        described[name] = {"dtype": dtype, "shape": field.shape[1:]}
    return json.loads(json.dumps(described))


def fields_of_unfinished(
    folder: Path, manifest: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The manifest's `fields` of a folder that was begun and can be gone on with.

    Args:
      folder: which may not exist.
      manifest: without `fields`; what is there must be of the same.

    Returns:
      None if there is nothing, something else, or files of another size.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text())
        described = found.pop("fields")
        fields = open_fields(folder, described)
        blocks = np.load(folder / BLOCKS)
        usable = (
            {k: v for k, v in found.items() if k not in APART}
            == {k: v for k, v in manifest.items() if k not in APART}
            and describe_fields(fields, manifest["count"]) == described
            and blocks.shape == (-(-manifest["count"] // manifest["block"]),)
            and blocks.dtype == np.uint64
        )
    except (OSError, ValueError, EOFError, AttributeError, TypeError, KeyError):
        return None
    return described if usable else None


def lay_out(
    folder: Path, manifest: Mapping[str, Any], fields: Mapping[str, Any]
) -> None:
    """Puts an empty cache where none is, or where one of another manifest is.

    It is laid out beside and moved into place whole.
    """
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        for name, (dtype, shape) in fields.items():
            # Sparse: the system gives out its blocks when they are written.
            np.lib.format.open_memmap(
                beside / f"{name}.npy", "w+", dtype, (manifest["count"], *shape)
            )
        blocks = -(-manifest["count"] // manifest["block"])
        np.save(beside / BLOCKS, np.zeros(blocks, np.uint64))
        write_manifest(beside / MANIFEST, manifest)
        if folder.is_dir():
            shutil.rmtree(folder)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def open_fields(folder: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays of a folder, mapped into memory."""
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}


def write_manifest(file: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a manifest so that it is there whole or not at all."""
    write_atomically(file, json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def shorten(folder: Path, fields: Mapping[str, np.ndarray], count: int) -> None:
    """Leaves the first `count` examples; NumPy keeps room in headers for lengths."""
    for name, field in fields.items():
        header = {
            "descr": np.lib.format.dtype_to_descr(field.dtype),
            "fortran_order": False,
            "shape": (count, *field.shape[1:]),
        }
        with (folder / f"{name}.npy").open("r+b") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + count * field.strides[0])


def hash_blocks(blocks: np.ndarray) -> str:
    """The manifest's `hash`: of the checksums of all blocks."""
    return hashlib.sha256(np.asarray(blocks).astype("<u8").tobytes()).hexdigest()


def checksum(block: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of a block's bytes, over all fields in the order of their names."""
    crc = 0
    for _, values in sorted(block.items()):
        crc = zlib.crc32(values.tobytes(), crc)
    return crc


def is_intact(
    fields: Mapping[str, np.ndarray], blocks: np.ndarray, number: int, size: int
) -> bool:
    """Whether a block is there with the bytes of its checksum.

    Args:
      fields: all arrays, of which `size` examples are a block.
      blocks: the content of `blocks.npy`.
      number: of the block.
      size: examples to a block.
    """
    rows = slice(number * size, (number + 1) * size)
    block = {name: field[rows] for name, field in fields.items()}
    return bool(blocks[number] == PRESENT + checksum(block))


def mismatch(folder: Path, why: str) -> str:
    """The sentence for a folder that is not what it says."""
    return (
        f"the cache {folder} does not match its manifest ({why}); remove the folder "
        "and prepare it again"
    )
