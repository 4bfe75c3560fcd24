"""TFRecord files: what was written is read at any place, and damage is named."""

import bz2
import gzip
import io
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tensorflow_datasets import proto
from tfds_files import frame

from implicit_slots.data.readers import tfrecords
from implicit_slots.data.readers.tfrecords import (
    GzipRecords,
    RecordFile,
    is_gzip,
    parse_example,
)
from implicit_slots.data.source import DataError

messages: Any = proto.tf_example_pb2  # Made at run time: no checker knows them.


def content(number, size):
    """Bytes that compress well, badly, or not at all, by the record's number."""
    rng = np.random.default_rng(number)
    return rng.integers(0, (2, 19, 256)[number % 3], size, np.uint8).tobytes()


SMALL = [content(i, size) for i, size in enumerate([0, 5, 700, 1, 4096, 60])]
LARGE = [content(i, 3000 + 977 * i % 90000) for i in range(90)]


def save(path, data, packed):
    whole = b"".join(frame(d) for d in data)
    path.write_bytes(gzip.compress(whole, 1) if packed else whole)
    return path


def everything(path, packed):
    """All records, in order."""
    if packed:
        return list(GzipRecords(path).read(0, 1000))
    file = RecordFile(path)
    return [file[number] for number in range(len(file))]


def test_records_are_read_in_any_order(tmp_path):
    file = RecordFile(save(tmp_path / "a", LARGE, False))
    assert len(file) == len(LARGE)
    for number in [*range(len(LARGE))[::-1], *range(len(LARGE))]:
        assert file[number] == LARGE[number], number
    with pytest.raises(IndexError, match="record 90 of 90"):
        file[90]


def test_threads_read_side_by_side(tmp_path):
    file = RecordFile(save(tmp_path / "a", LARGE, False))
    numbers = np.random.default_rng(1).integers(0, len(LARGE), 300).tolist()
    with ThreadPoolExecutor(4) as pool:
        for number, data in zip(
            numbers, pool.map(file.__getitem__, numbers), strict=True
        ):
            assert data == LARGE[number]


def test_a_compressed_file_is_read_in_stretches(tmp_path, monkeypatch):
    """One behind the other in a single pass; one before it begins anew."""
    passes = []
    opened = gzip.open
    file = GzipRecords(save(tmp_path / "a", LARGE, True))
    monkeypatch.setattr(gzip, "open", lambda p: passes.append(p) or opened(p))
    for start, stop, count in ((5, 20, 1), (20, 25, 1), (60, 200, 1), (3, 5, 2)):
        assert list(file.read(start, stop)) == LARGE[start:stop]
        assert file.place == min(stop, 90) and len(passes) == count
    some = file.read(7, 90)
    assert [next(some), next(some)] == LARGE[7:9]
    assert list(file.read(9, 12)) == LARGE[9:12] and len(passes) == 2
    assert list(file.read(95, 99)) == [] and file.place == 90
    with pytest.raises(DataError, match=r"is compressed .* unpack it"):
        RecordFile(tmp_path / "a")


def test_gzip_files_that_were_appended_to_each_other_are_one(tmp_path):
    whole = b"".join(frame(data) for data in LARGE)
    seam = len(whole) // 2
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(whole[:seam], 1) + gzip.compress(whole[seam:], 1))
    assert everything(path, True) == LARGE


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_is_cut_off_tells_how_much_is_whole(tmp_path, packed):
    """Wherever the cut is, also between records; what lies before it is read."""
    path = save(tmp_path / "a", SMALL, packed)
    whole = path.read_bytes()
    ends = np.cumsum([len(frame(data)) for data in SMALL])
    for size in range(120, len(whole), 97):
        path.write_bytes(whole[:size])
        unpacked = zlib.decompressobj(31).decompress(whole[:size]) if packed else None
        got = size if unpacked is None else len(unpacked)
        number = int(np.sum(ends <= got))
        if not packed and got in ends:
            continue  # A plain file does not tell that there was more.
        with pytest.raises(DataError) as error:
            everything(path, packed)
        assert str(error.value) == (
            f"{path} is cut off after {number} whole records; download it again"
        )
        if packed:
            assert list(GzipRecords(path).read(0, number)) == SMALL[:number]
    if packed:
        path.write_bytes(whole[:-3])
        with pytest.raises(DataError, match="cut off after 6 whole records"):
            everything(path, packed)


@pytest.mark.parametrize("packed", [False, True])
def test_damage_is_named_by_record(tmp_path, packed):
    """In a plain file the others are read; so are those before it in any."""
    whole = bytearray(b"".join(frame(data) for data in SMALL))
    starts = np.cumsum([0] + [len(frame(data)) for data in SMALL])
    path = tmp_path / "a"

    def write():
        path.write_bytes(gzip.compress(whole) if packed else whole)
        return GzipRecords(path) if packed else RecordFile(path)

    whole[starts[2] + 100] ^= 4
    file = write()
    for _ in range(2):
        with pytest.raises(DataError, match=r"record 2 of .*a is damaged; download"):
            list(file.read(0, 6)) if isinstance(file, GzipRecords) else file[2]
        if isinstance(file, GzipRecords):
            assert list(file.read(0, 2)) == SMALL[:2]
        else:
            assert file[3] == SMALL[3] and file[1] == SMALL[1]
    whole[starts[2] + 100] ^= 4
    whole[starts[4] + 1] ^= 1
    write()
    with pytest.raises(DataError, match=r"record 4 of .*a is damaged"):
        everything(path, packed)


def test_a_damaged_gzip_stream_is_one_sentence(tmp_path):
    """Whether zlib, the record's checksum or gzip's own notices."""
    path = save(tmp_path / "a", SMALL, True)
    whole = path.read_bytes()
    for place in [*range(200, len(whole) - 8, 211), len(whole) - 6]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"(is damaged|is cut off|be read).*again"):
            is_gzip(path)
            everything(path, True)


def test_what_is_no_record_file_is_one_sentence(tmp_path):
    """Other compressions, gzip twice, other formats, and no file at all."""
    whole = b"".join(frame(data) for data in SMALL)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a", whole)
    for content in (
        zlib.compress(whole),
        bz2.compress(whole),
        packed.getvalue(),
        gzip.compress(gzip.compress(whole)),
        b"text" * 9,
        b"short",
    ):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(DataError, match="neither a TFRecord file nor a gzip-comp"):
            RecordFile(tmp_path / "a")
    for content in (b"", gzip.compress(b"")):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(DataError, match="a holds no record; download it again"):
            RecordFile(tmp_path / "a")
    with pytest.raises(DataError, match=r"no file .*nowhere; put it there, or set"):
        RecordFile(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot be read \(.*make it readable"):
        RecordFile(tmp_path)


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    path = save(tmp_path / "a", SMALL, False)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(DataError, match=r"a cannot be read \(.*Permission denied.*\)"):
        RecordFile(path)


def random_example(rng):
    """A `tf.train.Example` with all kinds of features, and what is to come back."""
    example, expected = messages.Example(), {}
    for name in ("image", "é", "", "other"):
        feature = example.features.feature[name]
        size = int(rng.integers(1, 300))
        match rng.integers(4):
            case 0:
                numbers = rng.standard_normal(size).astype(np.float32)
                feature.float_list.value.extend(numbers.tolist())
                expected[name] = numbers
            case 1:
                numbers = rng.integers(-(2**63), 2**63 - 1, size) >> rng.integers(64)
                feature.int64_list.value.extend(numbers.tolist())
                expected[name] = numbers
            case 2:
                strings = [content(i, rng.integers(300)) for i in range(size)]
                feature.bytes_list.value.extend(strings)
                expected[name] = strings
            case 3:
                expected[name] = []
    numbers = rng.integers(0, 256, 1000, np.uint8)
    strings = [bytes([number]) for number in numbers]
    example.features.feature["mask"].bytes_list.value.extend(strings)
    return example, {**expected, "mask": numbers}


def test_examples_are_parsed_as_protobuf_does():
    for seed in range(40):
        example, expected = random_example(np.random.default_rng(seed))
        got = parse_example(example.SerializeToString(), uint8={"mask"})
        assert got.keys() == expected.keys()
        for name, values in expected.items():
            assert type(got[name]) is type(values), name
            if isinstance(values, np.ndarray):
                assert got[name].dtype == values.dtype
            np.testing.assert_array_equal(got[name], values)
    example, expected = random_example(np.random.default_rng(0))
    some = parse_example(example.SerializeToString(), only={"mask", "none"})
    assert some == {"mask": [bytes([number]) for number in expected["mask"]]}


def test_numbers_that_are_not_packed_are_parsed_too():
    """Some writers give every number a field of its own."""
    floats = b"".join(b"\x0d" + struct.pack("<f", x) for x in (1.5, -2.0))
    integers = b"\x08\x05\x08\x80\x01"

    def feature(name, kind, values):
        value = bytes([kind, len(values)]) + values
        entry = b"\x0a\x01" + name + b"\x12" + bytes([len(value)]) + value
        return b"\x0a" + bytes([len(entry)]) + entry

    both = feature(b"f", 0x12, floats) + feature(b"i", 0x1A, integers)
    got = parse_example(b"\x0a" + bytes([len(both)]) + both)
    assert got["f"].tolist() == [1.5, -2.0] and got["i"].tolist() == [5, 128]


def test_what_is_no_example_is_a_value_error():
    """Other bytes, a record that ends early, and strings that are no numbers."""
    example, _ = random_example(np.random.default_rng(0))
    record = example.SerializeToString()
    for size in range(1, len(record) - 1, 53):
        with pytest.raises(ValueError):
            parse_example(record[:size])
    for noise in range(200):
        try:
            parse_example(content(3 * noise + 2, 50))
        except ValueError:
            pass
    example = messages.Example()
    example.features.feature["mask"].bytes_list.value.extend([b"a", b"bc", b"d"])
    with pytest.raises(ValueError, match="strings of other lengths than one"):
        parse_example(example.SerializeToString(), uint8={"mask"})


def test_the_checksum_is_the_published_one():
    """RFC 3720's CRC-32C of 32 zeros, with TFRecord's mask."""
    crc = 0x8A9136AA
    mask = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32
    assert tfrecords._checksum(bytes(32)) == mask


def test_a_file_that_is_gone_is_not_called_damaged(tmp_path):
    """Nobody should download 10 GB again for a file that was moved."""
    path = save(tmp_path / "x.tfrecords", SMALL, packed=True)
    records = GzipRecords(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(records.read(0, 1))
