"""TFRecord files, plain or gzip, read at random without TensorFlow.

Formats: TensorFlow's `record_writer.h` for the file, and its `example.proto` and
`feature.proto` for what is in most records.
"""

import dataclasses
import itertools
import os
import struct
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from jaxtyping import Int

from implicit_slots.data.readers.frames import Progress
from implicit_slots.data.readers.unpacking import Plain, Point, PointsMaker, Unpacked
from implicit_slots.data.source import DataError

# A record is a length (8 bytes), its checksum, the data, and their checksum.
HEADER = struct.Struct("<QI")
CHECKSUM = struct.Struct("<I")
GZIP_MAGIC = b"\x1f\x8b"


@dataclasses.dataclass(frozen=True)
class Index:
    """What a pass over a file found.

    Attributes:
      offsets: of each record in the unpacked bytes, and where the last one ends.
      values: of each record, what `inspect` said.
      points: in ascending order; none in a file that is not compressed.
      whole: whether the pass got to the file's end.
    """

    offsets: Int[np.ndarray, " records_and_end"]
    values: Int[np.ndarray, " records"]
    points: list[Point]
    whole: bool


class RecordFile:
    """A file of records, by number.

    The offsets are found in one pass over the file, on the first access or by `build`,
    and can be kept in a file beside it. Reading is thread-safe, and threads unpack side
    by side: each has its own stream, which goes on where it is as long as the numbers
    ascend.
    """

    def __init__(
        self,
        path: Path,
        *,
        stop: int | None = None,
        index: Path | None = None,
        inspect: Callable[[bytes], int] | None = None,
    ):
        """Looks at the first record's length; finds no others.

        Args:
          path: the file.
          stop: how many records are wanted at most, so that the pass can end there.
          index: file which keeps what the pass found for later runs; None keeps it in
            memory. It is made anew if the record file was changed, or if more records
            are wanted.
          inspect: a number for each record, found in the pass; see `values`. Raises
            `ValueError` if it does not understand the record.

        Raises:
          DataError: the file is missing or does not hold records.
        """
        self.path = path
        self._stop = stop
        self._index_file = index
        self._inspect = inspect
        self._index: Index | None = None
        self._lock = threading.Lock()
        self._threads = threading.local()
        try:
            with path.open("rb") as file:
                self._packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
                header = self._open(file).read(HEADER.size)
            state = path.stat()
        except FileNotFoundError as error:
            raise DataError(
                f"there is no file {path}; put it there, or set --config.data.path to "
                "where it is"
            ) from error
        except (OSError, zlib.error) as error:
            raise DataError(
                f"{path} cannot be read ({error}); make it readable, or download it "
                "again"
            ) from error
        self._identity = np.array([state.st_size, state.st_mtime_ns], np.int64)
        if not header:
            raise DataError(f"{path} holds no record; download it again")
        if len(header) < HEADER.size or not _is_header(header):
            raise DataError(
                f"{path} is neither a TFRecord file nor a gzip-compressed one; unpack "
                "it if it is packed otherwise, or download it again"
            )

    def __len__(self) -> int:
        """Number of records, or `stop` if there are more."""
        found = len(self._built().offsets) - 1
        return found if self._stop is None else min(found, self._stop)

    def __getitem__(self, number: int) -> bytes:
        """One record's data, after a comparison with its checksum.

        Raises:
          DataError: the record is damaged.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)} in {self.path}")
        index = self._built()
        offset, end = (int(i) for i in index.offsets[number : number + 2])
        try:
            if not hasattr(self._threads, "reader"):
                file = self.path.open("rb")
                self._threads.reader = self._open(file)
                weakref.finalize(self._threads.reader, file.close)
            reader = self._threads.reader
            reader.go(offset + HEADER.size, index.points)
            data = reader.read(end - offset - HEADER.size - CHECKSUM.size)
            checksum = reader.read(CHECKSUM.size)
        except (OSError, zlib.error) as error:
            # Whatever state the stream is in, the next read starts afresh.
            self._threads.__dict__.clear()
            raise self._damaged(number) from error
        if checksum != CHECKSUM.pack(_checksum(data)):
            self._threads.__dict__.clear()
            raise self._damaged(number)
        return data

    def build(self, progress: Progress | None = None) -> None:
        """Finds the records unless that was done before; `progress` as tqdm's.

        Raises:
          DataError: the file is cut off or damaged before `stop`, or the index cannot
            be written.
        """
        self._built(progress)

    @property
    def values(self) -> Int[np.ndarray, " records"]:
        """What `inspect` said of each record; zeros if there is no such function."""
        return self._built().values[: len(self)]

    def _open(self, file: BinaryIO) -> Plain | Unpacked:
        return Unpacked(file) if self._packed else Plain(file)

    def _built(self, progress: Progress | None = None) -> Index:
        if self._index is None:
            with self._lock:
                if self._index is None:
                    self._index = self._load() or self._pass(progress)
        return self._index

    def _pass(self, progress: Progress | None) -> Index:
        """Finds the offsets, and the access points alongside in another thread."""
        offsets, values, whole = [0], [], False
        numbers = itertools.count() if self._stop is None else range(self._stop)
        if progress is not None:
            numbers = progress(numbers, desc=f"indexing {self.path.name}")
        with (
            self.path.open("rb") as file,
            PointsMaker(self.path if self._packed else None) as points,
        ):
            reader = self._open(file)
            for number in numbers:
                try:
                    length = self._read_header(reader, number)
                    if length is None:
                        whole = True
                        break
                    if self._inspect is None:
                        got = reader.skip(length + CHECKSUM.size)
                    else:
                        data = reader.read(length)
                        got = len(data) + reader.skip(CHECKSUM.size)
                        if got == length + CHECKSUM.size:
                            values.append(self._inspect(data))
                    if got < length + CHECKSUM.size:
                        raise self._cut(number)
                    offsets.append(offsets[-1] + HEADER.size + got)
                    points.follow(offsets[-1])
                except DataError:
                    raise
                except (OSError, zlib.error, ValueError) as error:
                    raise self._damaged(number) from error
            try:
                found = points.finish(offsets[-1])
            except (OSError, ValueError) as error:
                raise self._damaged(len(offsets) - 1) from error
        filled = np.zeros(len(offsets) - 1, np.int64)
        filled[: len(values)] = values
        index = Index(np.array(offsets, np.int64), filled, found, whole)
        self._save(index)
        return index

    def _read_header(self, reader: Plain | Unpacked, number: int) -> int | None:
        """Length of the next record; None at the end of the file."""
        header = reader.read(HEADER.size)
        if not header and not reader.cut:
            return None
        if len(header) < HEADER.size:
            raise self._cut(number)
        if not _is_header(header):
            raise self._damaged(number)
        return HEADER.unpack(header)[0]

    def _cut(self, number: int) -> DataError:
        return DataError(
            f"{self.path} is cut off after {number} whole records; download it again"
        )

    def _damaged(self, number: int) -> DataError:
        return DataError(
            f"record {number} of {self.path} is damaged; download the file again"
        )

    def _save(self, index: Index) -> None:
        if self._index_file is None:
            return
        windows = [point.window for point in index.points]
        temporary = self._index_file.with_name(
            f"{self._index_file.name}.{os.getpid()}.partial"
        )
        try:
            self._index_file.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(
                    file,
                    identity=self._identity,
                    offsets=index.offsets,
                    values=index.values,
                    inspected=self._inspect is not None,
                    whole=index.whole,
                    points=np.array(
                        [(p.unpacked, p.packed, p.bits) for p in index.points], np.int64
                    ).reshape(-1, 3),
                    window_sizes=np.array([len(w) for w in windows], np.int64),
                    windows=np.frombuffer(b"".join(windows), np.uint8),
                )
            temporary.replace(self._index_file)
        except OSError as error:
            raise DataError(
                f"the index of {self.path} cannot be written to {self._index_file} "
                f"({error}); set --config.data.cache to a folder that can be written"
            ) from error

    def _load(self) -> Index | None:
        """The index file's content, if it is of this record file and long enough."""
        if self._index_file is None:
            return None
        try:
            with np.load(self._index_file) as saved:
                content = {name: saved[name] for name in saved.files}
            ends = np.cumsum(content["window_sizes"])
            windows = content["windows"].tobytes()
            points = [
                Point(*place, window=windows[end - size : end])
                for place, size, end in zip(
                    content["points"].tolist(),
                    content["window_sizes"].tolist(),
                    ends.tolist(),
                    strict=True,
                )
            ]
            index = Index(
                content["offsets"], content["values"], points, bool(content["whole"])
            )
            usable = np.array_equal(content["identity"], self._identity) and (
                self._inspect is None or bool(content["inspected"])
            )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # Missing, or of some other program: made anew.
        records = len(index.offsets) - 1
        enough = index.whole or (self._stop is not None and records >= self._stop)
        return index if usable and enough else None


def _checksum(data: bytes) -> int:
    """TFRecord's masked CRC-32C."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _is_header(header: bytes) -> bool:
    return HEADER.unpack(header)[1] == _checksum(header[:8])


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
