"""Pictures as cameras and programs write them: turned, cut off, or of other pixels."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from implicit_slots.data.readers import pictures
from implicit_slots.data.sets.folder import ImageFolder
from implicit_slots.data.source import DataError

ORIENTATION = 0x0112
# As EXIF defines it: where the first row and the first column of the upright picture
# are in the stored one.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def smooth(height, width):
    """A picture that JPEG keeps nearly."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 9, columns * 9, 0 * rows], -1).astype(np.uint8)


def save_turned(file, upright, orientation, **options):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, exif=exif, **options)


def read(folder, **options):
    source = ImageFolder(
        path=str(folder),
        split="train",
        validation_fraction=0.0,
        test_fraction=0.0,
        **{"resolution": 16, "crop": "none", **options},
    )
    source.check(lambda iterable, **_: iterable)
    return source


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp", "avif"])
def test_pictures_are_upright_whatever_their_orientation(tmp_path, ending):
    if f".{ending}" not in pictures.suffixes():
        pytest.skip("this Pillow has no AVIF")
    upright = smooth(16, 24)
    for orientation in STORED:
        file = tmp_path / f"{orientation}.{ending}"
        save_turned(file, upright, orientation, quality=100, lossless=True)
        got = np.asarray(pictures.read_image(file).convert("RGB"), int)
        assert got.shape == upright.shape
        assert np.abs(got - upright).max() <= (20 if ending in ("jpg", "avif") else 0)
        assert pictures.look(file).size == (24, 16)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_masks_of_turned_pictures_may_be_upright_or_as_stored(tmp_path, ending):
    """Their size tells which."""
    ids = np.zeros((16, 24), np.uint8)
    ids[:4, :20], ids[10:, 3:7] = 1, 2
    for orientation in STORED:
        save_turned(tmp_path / "images" / f"{orientation}.{ending}", smooth(16, 24), 1)
        stored = STORED[orientation](ids)
        for mask in [ids] if stored.shape == ids.shape else [ids, stored]:
            file = tmp_path / "images" / f"{orientation}.{ending}"
            save_turned(file, smooth(16, 24), orientation)
            (tmp_path / "masks").mkdir(exist_ok=True)
            Image.fromarray(np.ascontiguousarray(mask)).save(
                tmp_path / "masks" / f"{orientation}.png"
            )
            source = read(tmp_path, resolution=24)
            got = source[source.files.index(file.name)]["segmentation"]
            expected = read_mask(ids, 24)
            np.testing.assert_array_equal(got, expected, err_msg=str(orientation))


def test_a_turned_mask_is_still_refused_as_a_jpeg(tmp_path):
    save_turned(tmp_path / "a.png", smooth(8, 8)[..., 0], 3, format="JPEG")
    with pytest.raises(DataError, match=r"a\.png is a JPEG, which does not keep ids"):
        pictures.read_mask(tmp_path / "a.png")


def read_mask(ids, resolution):
    picture = Image.fromarray(ids)
    return np.asarray(picture.resize((resolution,) * 2, Image.Resampling.NEAREST))


def chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def test_orientation_behind_the_pixels_of_a_png_counts(tmp_path):
    """Where some programs add it; a check does not decode and still lets it pass."""
    upright = noise(16, 24, 3)
    save_turned(tmp_path / "images" / "a.png", upright, 6)
    content = (tmp_path / "images" / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    size = 12 + struct.unpack(">I", content[start : start + 4])[0]
    exif, end = content[start : start + size], chunk(b"IEND", b"")
    rest = (content[:start] + content[start + size :]).removesuffix(end)
    (tmp_path / "images" / "a.png").write_bytes(rest + exif + end)
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.ones((16, 24), np.uint8)).save(tmp_path / "masks" / "a.png")
    source = read(tmp_path, resolution=16, crop="center")
    np.testing.assert_array_equal(source[0]["image"], upright[:, 4:20])


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage!",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01six\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
        b"",
    ],
)
def test_broken_exif_says_nothing_and_spoils_nothing(tmp_path, exif):
    Image.fromarray(smooth(16, 24)).save(tmp_path / "a.jpg", exif=exif)
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of what it cannot read.
        assert pictures.look(tmp_path / "a.jpg").size == (24, 16)
        assert pictures.read_image(tmp_path / "a.jpg").size == (24, 16)


@pytest.mark.parametrize("ending", ["webp", "bmp", "tif", "gif", "tga", "ppm"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_picture_that_is_cut_off_is_found_in_every_format(tmp_path, ending, skip):
    for name in ("a", "b"):
        Image.fromarray(noise(32, 32, 3)).save(tmp_path / f"{name}.{ending}")
    file = tmp_path / f"b.{ending}"
    file.write_bytes(file.read_bytes()[:-200])
    if skip:
        assert read(tmp_path, skip_unreadable=True).files == [f"a.{ending}"]
        return
    with pytest.raises(DataError, match=rf"1 of 2 images \(b\.{ending}\) in .* cannot"):
        read(tmp_path)


def sixteen_bits(values):
    """A PNG of 16 bits a channel, which Pillow does not write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    values = np.random.default_rng(0).integers(0, 65_536, (16, 16, 3))
    (tmp_path / "colour.png").write_bytes(sixteen_bits(values))
    grey = values[..., 0].astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    header = b"P5 16 16 65535\n"
    (tmp_path / "portable.pgm").write_bytes(header + grey.astype(">u2").tobytes())
    source = read(tmp_path)
    assert source.files == ["colour.png", "grey.tif", "portable.pgm"]
    np.testing.assert_array_equal(source[0]["image"], values >> 8)
    for index in (1, 2):
        image = source[index]["image"]
        np.testing.assert_array_equal(image, (grey >> 8)[..., None].repeat(3, -1))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(tmp_path, dtype):
    """They would be black, or white, depending on what they mean."""
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "a.tif")
    Image.fromarray(noise(8, 8)).save(tmp_path / "b.tif")
    sentence = r"pixels of mode . have no range; save it with 8 bits a channel\); re"
    with pytest.raises(DataError, match=sentence):
        read(tmp_path)
    assert read(tmp_path, skip_unreadable=True).files == ["b.tif"]
    with pytest.raises(DataError, match=r"file .*a\.tif cannot be read \(pixels of mo"):
        pictures.read_image(tmp_path / "a.tif")


def test_a_picture_of_too_many_pixels_is_one_sentence(tmp_path, monkeypatch):
    Image.fromarray(noise(32, 32, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 // 2 - 1)
    with pytest.raises(
        DataError, match=r"\(more pixels than Pillow reads; scale it do"
    ):
        read(tmp_path)
    with pytest.raises(
        DataError, match=r"\(more pixels than Pillow reads; scale it do"
    ):
        pictures.read_image(tmp_path / "a.png")


def test_a_jpeg_of_several_pictures_is_its_first(tmp_path):
    """As telephones write them."""
    stream = io.BytesIO()
    first, second = Image.fromarray(smooth(8, 8)), Image.fromarray(noise(8, 8, 3))
    first.save(stream, "MPO", save_all=True, append_images=[second], quality=100)
    (tmp_path / "a.jpg").write_bytes(stream.getvalue())
    image = read(tmp_path, resolution=8)[0]["image"].astype(int)
    assert np.abs(image - smooth(8, 8)).max() <= 20
