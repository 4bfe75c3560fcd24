"""Gzip files unpacked from anywhere: access points, and streams that start at them.

Formats: RFC 1951 and 1952, and `zran.h` of indexed_gzip for its index. That library
finds the points; unpacking is zlib's, because its own readers start anew at every call
and each keeps all windows, uncompressed.
"""

import bisect
import concurrent.futures
import dataclasses
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import indexed_gzip

# zlib's names for a stream with a gzip header, and for one with none.
WITH_HEADER, RAW = 31, -15
TRAILER = 8
PACKED_CHUNK = 1 << 15
SKIPPED_CHUNK = 1 << 20
WINDOW = 1 << 15
# An access point takes 32 KiB while the index is made, and a read at random unpacks
# half a spacing in the mean. Files that unpack 30-fold get 8,000 points by this share.
SPACING_SHARE = 256
LEAST_SPACING = 1 << 22
# The index of access points follows the pass over the records by this many spacings,
# because every call unpacks from the last point on.
STRIDE = 16


def _prefixes() -> dict[int, tuple[int, int]]:
    """Deflate blocks without content, by the number of bits that are to follow them.

    zlib in Python cannot start within a byte, so that blocks of 10 and 91 bits fill
    the byte up to where the stream goes on: as (value, width), lowest bit first.
    """
    fixed = [(0, 1), (1, 2), (0, 7)]  # Not the last, fixed codes, end of block.
    dynamic = [(0, 1), (2, 2)]
    # 257 codes of literals, 2 of distances, and 18 lengths that encode their lengths:
    # those of the words "0, 11 to 138 times" (the 3rd) and "1" (the 18th) are one bit.
    dynamic += [(0, 5), (1, 5), (14, 4)]
    dynamic += [(int(place in (2, 17)), 3) for place in range(18)]
    # 138 and 118 literals have no code; the end of a block and two distances have one.
    dynamic += [(1, 1), (138 - 11, 7), (1, 1), (118 - 11, 7), (0, 1), (0, 1), (0, 1)]
    dynamic += [(0, 1)]  # End of block.
    prefixes = {}
    for bits in range(1, 8):
        fields = dynamic if bits % 2 else []
        while (sum(width for _, width in fields) + bits) % 8:
            fields = fields + fixed
        value = width = 0
        for field, size in fields:
            value, width = value | field << width, width + size
        prefixes[bits] = value, width
    return prefixes


PREFIXES = _prefixes()


@dataclasses.dataclass(frozen=True)
class Point:
    """Where unpacking can start.

    Attributes:
      unpacked: offset in the unpacked bytes.
      packed: offset of the first whole byte in the file.
      bits: how many bits of the byte before belong to the stream's rest.
      window: the unpacked 32 KiB before, compressed.
    """

    unpacked: int
    packed: int
    bits: int
    window: bytes


class Plain:
    """Reads a file that is not compressed; `cut` is for its sibling below."""

    cut = False

    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        file.seek(0)

    def go(self, offset: int, points: list[Point]) -> None:
        """Goes to an offset; there are no points."""
        self._file.seek(offset)

    def read(self, count: int) -> bytes:
        """So many bytes, fewer at the end."""
        return self._file.read(count)

    def skip(self, count: int) -> int:
        """Goes on by so many bytes, or to the end; returns by how many."""
        start = self._file.tell()
        return self._file.seek(min(start + count, self._size)) - start


class Unpacked:
    """Reads a gzip file, forward from its start or from an access point.

    Attributes:
      cut: whether the file ended before the compressed stream did.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._start()

    def go(self, offset: int, points: list[Point]) -> None:
        """Goes to an offset in the unpacked bytes; on from here where that is near."""
        place = bisect.bisect_right(points, offset, key=lambda point: point.unpacked)
        point = points[place - 1] if place else None
        if not (0 if point is None else point.unpacked) <= self._position <= offset:
            self._start() if point is None else self._resume(point)
        self.skip(offset - self._position)

    def read(self, count: int) -> bytes:
        """So many unpacked bytes, fewer at the end."""
        parts = []
        while count > 0:
            if self._stream.eof and not self._next_member():
                break
            chunk = self._rest or self._file.read(PACKED_CHUNK)
            part = self._stream.decompress(chunk, count)
            self._rest = self._stream.unused_data or self._stream.unconsumed_tail
            if not (chunk or part or self._stream.eof):
                self.cut = True
                break
            parts.append(part)
            count -= len(part)
            self._position += len(part)
        return b"".join(parts)

    def skip(self, count: int) -> int:
        """Goes on by so many bytes, or to the end; returns by how many."""
        start, goal = self._position, self._position + count
        while self.read(min(goal - self._position, SKIPPED_CHUNK)):
            pass
        return self._position - start

    def _start(self) -> None:
        self._file.seek(0)
        self._stream = zlib.decompressobj(WITH_HEADER)
        self._rest = b""
        self._position = 0
        self._raw = self.cut = False

    def _resume(self, point: Point) -> None:
        """Starts within the stream, after a prefix that brings the bits into place."""
        self._file.seek(point.packed - (point.bits > 0))
        self._stream = zlib.decompressobj(RAW, zdict=zlib.decompress(point.window))
        self._rest = b""
        if point.bits:
            before, width = PREFIXES[point.bits]
            bits = int.from_bytes(self._file.read(1)) >> (8 - point.bits)
            self._rest = (before | bits << width).to_bytes(
                (width + point.bits) // 8, "little"
            )
        self._position = point.unpacked
        self._raw, self.cut = True, False

    def _next_member(self) -> bool:
        """Goes on with the next gzip file, if another was appended to this one."""
        self._rest += self._file.read(PACKED_CHUNK)
        if self._raw:
            self._rest = self._rest[TRAILER:]
        if not self._rest:
            return False
        self._stream = zlib.decompressobj(WITH_HEADER)
        self._raw = False
        return True


class PointsMaker:
    """Makes the access points of a gzip file in a thread of its own."""

    def __init__(self, path: Path | None):
        self._path = path
        self._pending: concurrent.futures.Future[Any] | None = None
        self._reached = 0

    def __enter__(self) -> "PointsMaker":
        if self._path is not None:
            self._spacing = max(
                LEAST_SPACING, self._path.stat().st_size // SPACING_SHARE
            )
            self._file: Any = indexed_gzip.IndexedGzipFile(
                str(self._path),
                spacing=self._spacing,
                window_size=WINDOW,
                skip_crc_check=True,  # The pass and the records' own sums see to that.
                buffer_size=WINDOW,
            )
            self._thread = concurrent.futures.ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._thread.shutdown(cancel_futures=True)
            self._file.close()

    def follow(self, offset: int) -> None:
        """Lets the points come up to an offset that the pass has reached."""
        if self._path is None or offset - self._reached < STRIDE * self._spacing:
            return
        if self._pending is not None:
            self._pending.result()
        self._pending = self._thread.submit(self._file.seek, offset)
        self._reached = offset

    def finish(self, offset: int) -> list[Point]:
        """All points up to an offset."""
        if self._path is None:
            return []
        self._thread.submit(self._file.seek, offset).result()
        exported = io.BytesIO()
        self._file.raw.export_index(fileobj=exported)
        return _read_points(exported.getbuffer())


def _read_points(exported: memoryview) -> list[Point]:
    """The points of indexed_gzip's index, but those at the start of a gzip file."""
    head = struct.Struct("<5sBBQQIII")
    place = struct.Struct("<QQBB")
    magic, version, _, _, _, _, window, count = head.unpack_from(exported)
    assert (magic, version) == (b"GZIDX", 1)
    start = head.size + count * place.size
    points = []
    for packed, unpacked, bits, has_window in place.iter_unpack(
        exported[head.size : start]
    ):
        if has_window:
            content = zlib.compress(exported[start : start + window], 1)
            points.append(Point(unpacked, packed, bits, content))
            start += window
    return points
