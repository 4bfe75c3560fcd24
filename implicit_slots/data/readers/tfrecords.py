"""TFRecord files, plain or gzip, and the examples in them, without TensorFlow.

Formats: TensorFlow's `record_writer.h` for the file, and its `example.proto` and
`feature.proto` for what is in most records.
"""

import functools
import gzip
import os
import struct
import weakref
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Int

from implicit_slots.data.source import DataError

# A record is a length (8 bytes), its checksum, the data, and their checksum.
HEADER = struct.Struct("<QI")
CHECKSUM = struct.Struct("<I")
GZIP_MAGIC = b"\x1f\x8b"


def is_gzip(path: Path) -> bool:
    """Whether a record file is compressed by gzip; looks at its first header alone.

    Raises:
      DataError: the file is missing or does not hold records.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        with gzip.open(path) if packed else path.open("rb") as file:
            header = file.read(HEADER.size)
    except FileNotFoundError as error:
        raise DataError(
            f"there is no file {path}; put it there, or set --config.data.path to "
            "where it is"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}); make it readable, or download it again"
        ) from error
    if not header:
        raise DataError(f"{path} holds no record; download it again")
    if not _is_header(header):
        raise DataError(
            f"{path} is neither a TFRecord file nor a gzip-compressed one; unpack "
            "it if it is packed otherwise, or download it again"
        )
    return packed


class RecordFile:
    """A file of records that is not compressed, by number; thread-safe."""

    def __init__(self, path: Path):
        """Opens the file; finds its records on the first access.

        Raises:
          DataError: the file is missing, compressed or does not hold records.
        """
        if is_gzip(path):
            raise DataError(
                f"{path} is compressed and its records are read at random; unpack it"
            )
        self.path = path
        file = path.open("rb")
        weakref.finalize(self, file.close)
        self._number = file.fileno()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> bytes:
        """One record's data, after a comparison with its checksum.

        Raises:
          DataError: the record is damaged.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)} in {self.path}")
        start, end = (int(i) for i in self._offsets[number : number + 2])
        try:
            record = os.pread(self._number, end - start, start)[HEADER.size :]
        except OSError as error:
            raise _unreadable(self.path, error) from error
        data, checksum = record[: -CHECKSUM.size], record[-CHECKSUM.size :]
        if checksum != CHECKSUM.pack(_checksum(data)):
            raise _damaged(self.path, number)
        return data

    @functools.cached_property
    def _offsets(self) -> Int[np.ndarray, " records_and_end"]:
        """Where each record begins, and where the last one ends; reads the headers.

        Raises:
          DataError: the file is cut off or damaged.
        """
        offsets = [0]
        size = os.fstat(self._number).st_size
        while offsets[-1] < size:
            number = len(offsets) - 1
            header = os.pread(self._number, HEADER.size, offsets[-1])
            if len(header) < HEADER.size:
                raise _cut(self.path, number)
            end = offsets[-1] + HEADER.size + _length(header, self.path, number)
            offsets.append(end + CHECKSUM.size)
            if offsets[-1] > size:
                raise _cut(self.path, number)
        return np.array(offsets, np.int64)


class GzipRecords:
    """A compressed file of records, which is read forward.

    A stretch that begins behind the one read last goes on from there; any other starts
    at the file's beginning.

    Attributes:
      place: number of the record that comes next.
    """

    def __init__(self, path: Path):
        self.path = path
        self._rest = self._from_start()
        self.place = 0

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The records of these numbers, as far as there are any; for one thread.

        Raises:
          DataError: the file is cut off or damaged before `stop`.
        """
        if start < self.place:
            self._rest, self.place = self._from_start(), 0
        while self.place < stop:
            try:
                record = next(self._rest)
            except StopIteration:
                return
            except DataError:
                self._rest, self.place = self._from_start(), 0
                raise
            self.place += 1
            if self.place > start:
                yield record

    def _from_start(self) -> Iterator[bytes]:
        number = 0
        try:
            with gzip.open(self.path) as file:
                while header := file.read(HEADER.size):
                    if len(header) < HEADER.size:
                        raise EOFError
                    data = file.read(_length(header, self.path, number))
                    checksum = file.read(CHECKSUM.size)
                    if len(checksum) < CHECKSUM.size:
                        raise EOFError
                    if checksum != CHECKSUM.pack(_checksum(data)):
                        raise _damaged(self.path, number)
                    yield data
                    number += 1
        except EOFError as error:
            raise _cut(self.path, number) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(self.path, number) from error
        except OSError as error:
            raise _unreadable(self.path, error) from error


def _length(header: bytes, path: Path, number: int) -> int:
    """Length of a record's data."""
    if not _is_header(header):
        raise _damaged(path, number)
    return HEADER.unpack(header)[0]


def _cut(path: Path, whole: int) -> DataError:
    return DataError(
        f"{path} is cut off after {whole} whole records; download it again"
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror}")


def _damaged(path: Path, number: int) -> DataError:
    return DataError(f"record {number} of {path} is damaged; download the file again")


def _checksum(data: bytes) -> int:
    """TFRecord's masked CRC-32C."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _is_header(header: bytes) -> bool:
    """Whether these bytes are a record's length and its checksum."""
    return len(header) == HEADER.size and (
        HEADER.unpack(header)[1] == _checksum(header[:8])
    )


def parse_example(
    record: bytes,
    only: Collection[str] | None = None,
    uint8: Collection[str] = (),
) -> dict[str, Any]:
    """The features of a record that holds a `tf.train.Example`.

    Args:
      record: the serialised protocol buffer.
      only: names of the features to parse, which saves time; None for all.
      uint8: names of features that are lists of one-byte strings, one per number.

    Returns:
      By name, float32 [n], int64 [n] or a list of strings; uint8 [n] for those of
      `uint8`. A feature without a value is an empty list.

    Raises:
      ValueError: the record holds something else.
    """
    features = {}
    try:
        for field, example in _fields(memoryview(record)):
            for entry_field, entry in _fields(example) if field == 1 else ():
                # Fields of an entry of the map: 1 is its key and 2 its value.
                parts = dict(_fields(entry)) if entry_field == 1 else {}
                name = str(parts.get(1, b""), "utf-8")
                if only is None or name in only:
                    value = parts.get(2, memoryview(b""))
                    features[name] = _values(value, name in uint8)
    except (IndexError, OverflowError, TypeError) as error:
        raise ValueError("the record is no tf.train.Example") from error
    return features


def _values(feature: memoryview, uint8: bool) -> Any:
    """A feature's list, which is one of bytes (1), floats (2) or integers (3)."""
    for kind, content in _fields(feature):
        if kind == 1 and uint8:
            # Every string takes three bytes: field 1 as bytes, length 1, and itself.
            table = np.frombuffer(content, np.uint8)
            if len(table) % 3 or np.any(table[0::3] != 10) or np.any(table[1::3] != 1):
                raise ValueError("strings of other lengths than one")
            return table[2::3]
        values = [value for field, value in _fields(content) if field == 1]
        if kind == 1:
            return [bytes(value) for value in values]
        # Numbers are packed into one field, or each is a field.
        if kind == 2:
            return np.frombuffer(b"".join(values), "<f4").astype(np.float32)
        integers = []
        for value in values:
            integers += [value] if isinstance(value, int) else _varints(value)
        return np.array(integers, np.uint64).astype(np.int64)
    return []


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and content of a message's fields: an integer, or a part of the view."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        match tag & 7:
            case 0:
                content, place = _varint(message, place)
                yield tag >> 3, content
                continue
            case 1:
                length = 8
            case 2:
                length, place = _varint(message, place)
            case 5:
                length = 4
            case other:
                raise ValueError(f"no protocol buffer has a field of type {other}")
        if place + length > len(message):
            raise ValueError("a protocol buffer ends within a field")
        yield tag >> 3, message[place : place + length]
        place += length


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """An integer in groups of seven bits, lowest first, and the place behind it."""
    value = shift = 0
    while (byte := message[place]) & 128:
        value |= (byte & 127) << shift
        shift, place = shift + 7, place + 1
    return value | byte << shift, place + 1


def _varints(packed: memoryview) -> list[int]:
    values, place = [], 0
    while place < len(packed):
        value, place = _varint(packed, place)
        values.append(value)
    return values
