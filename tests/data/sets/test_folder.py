"""Image folders: pixels, masks, attributes, splits, and what users get wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from implicit_slots.data.readers import frame_source, listing, pictures
from implicit_slots.data.sets.folder import ImageFolder
from implicit_slots.data.source import DataError

CLEVR = Path(__file__).parents[4] / "shared" / "data"
needs_clevr = pytest.mark.skipif(
    not CLEVR.is_dir(), reason=f"the rendered CLEVR images are not in {CLEVR}"
)


def noise(seed, height, width, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def save(file, array, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(file, **options)


def ids(seed, height, width):
    """A mask of many objects, none of void."""
    return noise(seed, height, width, 1)[..., 0] % 255


def numbered(mask):
    """Its objects from 1 on, in the order of their ids."""
    return np.searchsorted(np.unique(mask[mask > 0]), mask) + (mask > 0)


def everything(path, **options):
    """All images of a folder in one split, at 8 pixels unless told."""
    options = {"resolution": 8, "split": "train", "max_objects": 254, **options}
    return ImageFolder(
        path=str(path), validation_fraction=0.0, test_fraction=0.0, **options
    )


def silent(iterable, **_):
    return iterable


def check(source):
    source.check(silent)


def fill(path, count, folder="images"):
    for i in range(count):
        save(path / folder / f"{i:03}.png", np.full((8, 8, 3), i, np.uint8))


def test_more_masks_than_objects_is_a_sentence(tmp_path):
    fill(tmp_path, 1)
    save(
        tmp_path / "masks" / "000.png",
        np.arange(64, dtype=np.uint8).reshape(8, 8) // 10,
    )
    sentence = r"000\.png has 6 objects, more than max_objects = 5; set .*=6 or more"
    with pytest.raises(DataError, match=sentence):
        everything(tmp_path, max_objects=5)[0]


def test_images_at_the_training_resolution_keep_their_pixels(tmp_path):
    """Flat and nested files arrive in sorted order, bit for bit."""
    save(tmp_path / "b" / "c" / "2.PNG", noise(2, 8, 8))
    save(tmp_path / "a.png", noise(1, 8, 8))
    save(tmp_path / "z.png", noise(3, 8, 8))
    save(tmp_path / ".hidden.png", noise(4, 8, 8))
    (tmp_path / "notes.txt").write_text("not an image")
    source = everything(tmp_path)
    assert source.files == ["a.png", "b/c/2.PNG", "z.png"]
    batch = source.batch(np.array([2, 0, 1, 0]))
    assert batch.keys() == {"image"} and batch["image"].dtype == np.uint8
    for got, seed in zip(batch["image"], (3, 1, 2, 1), strict=True):
        np.testing.assert_array_equal(got, noise(seed, 8, 8))
    np.testing.assert_array_equal(source[1]["image"], noise(2, 8, 8))
    with pytest.raises(IndexError, match="index 3 of a source of 3"):
        source[3]


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    """Grey, 16-bit, palette, alpha and CMYK pictures show the same three colours."""
    grey = noise(0, 8, 8, 1)[..., 0]
    colour = noise(1, 8, 8)
    save(tmp_path / "grey.png", grey)
    save(tmp_path / "grey16.png", grey.astype(np.uint16) * 256 + 77)
    save(tmp_path / "alpha.png", np.dstack([colour, noise(2, 8, 8, 1)]))
    save(tmp_path / "grey_alpha.png", np.dstack([grey, grey]))
    palette = Image.new("P", (8, 8))
    palette.putpalette(noise(3, 256, 1).tobytes())
    palette.putdata(range(64))
    palette.save(tmp_path / "palette.png", transparency=bytes(range(64)))
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    source = everything(tmp_path)
    images = dict(zip(source.files, source.batch(np.arange(6))["image"], strict=True))
    as_rgb = np.repeat(grey[..., None], 3, -1)
    for name in ("grey.png", "grey16.png", "grey_alpha.png"):
        np.testing.assert_array_equal(images[name], as_rgb, err_msg=name)
    np.testing.assert_array_equal(images["alpha.png"], colour)
    np.testing.assert_array_equal(
        images["palette.png"], noise(3, 256, 1)[:64].reshape(8, 8, 3)
    )
    assert np.abs(images["red.jpg"].astype(int) - [254, 0, 0]).max() <= 4


@pytest.mark.parametrize(("height", "width"), [(8, 20), (20, 8)])
def test_center_crop_keeps_the_middle_of_image_and_mask(tmp_path, height, width):
    """At the frame's own scale the crop is the array's middle; "none" is not."""
    image = noise(0, height, width)
    mask = ids(1, height, width)
    save(tmp_path / "images" / "a.png", image)
    save(tmp_path / "masks" / "a.png", mask)
    example = everything(tmp_path)[0]
    middle = (slice((height - 8) // 2, (height + 8) // 2), slice(6, 14))
    middle = middle if width > height else (middle[0], slice(0, 8))
    np.testing.assert_array_equal(example["image"], image[middle])
    np.testing.assert_array_equal(example["segmentation"], numbered(mask)[middle])
    assert example["segmentation"].dtype == np.int32
    whole = everything(tmp_path, crop="none")[0]
    assert set(np.unique(whole["segmentation"])) <= set(np.unique(numbered(mask)))
    assert not np.array_equal(whole["image"], image[middle])


def test_resizing_is_anti_aliased_and_masks_take_no_new_ids(tmp_path):
    """A fine chequerboard becomes grey, and an id map shrinks to its own ids."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    blocks = np.kron(np.arange(16).reshape(4, 4) * 9, np.ones((16, 16), int))
    save(tmp_path / "images" / "a.png", np.dstack([board] * 3))
    save(tmp_path / "masks" / "a.png", blocks.astype(np.uint8))
    example = everything(tmp_path, resolution=16)[0]
    assert np.abs(example["image"][2:-2, 2:-2].astype(int) - 127).max() <= 2
    np.testing.assert_array_equal(example["segmentation"], blocks[::4, ::4] // 9)


def test_masks_may_lie_beside_images_that_have_no_folder(tmp_path):
    save(tmp_path / "a.png", noise(0, 8, 8))
    save(tmp_path / "masks" / "a.png", ids(1, 8, 8))
    source = everything(tmp_path)
    assert source.files == ["a.png"]
    np.testing.assert_array_equal(source[0]["segmentation"], numbered(ids(1, 8, 8)))


def test_opening_lists_files_and_checking_decodes_none(tmp_path, monkeypatch):
    """Whole files are recognised without their pixels, which is ten times faster."""
    for suffix in ("png", "jpg"):
        save(tmp_path / "images" / f"{suffix}.{suffix}", noise(0, 8, 8))
        save(tmp_path / "masks" / f"{suffix}.png", noise(0, 8, 8, 1)[..., 0])

    def refuse(*_):
        raise AssertionError("read")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    check(everything(tmp_path))
    monkeypatch.setattr(pictures.Image, "open", refuse)
    assert len(everything(tmp_path)) == 2


def test_jpeg_images_take_png_masks(tmp_path):
    save(tmp_path / "images" / "a.jpg", np.full((8, 8, 3), 90, np.uint8))
    save(tmp_path / "masks" / "a.png", np.full((8, 8), 3, np.uint8))
    example = everything(tmp_path)[0]
    assert (example["segmentation"] == 1).all()
    assert np.abs(example["image"].astype(int) - 90).max() <= 2


def test_shares_are_disjoint_complete_and_stable(tmp_path):
    """One pool is carved 90/5/5, the same whenever it is carved."""
    fill(tmp_path, 40, "images/train")
    shares = {
        split: ImageFolder(path=str(tmp_path), split=split, resolution=8).files
        for split in ("train", "validation", "test")
    }
    assert [len(files) for files in shares.values()] == [36, 2, 2]
    joined = sorted(file for files in shares.values() for file in files)
    assert joined == [f"train/{i:03}.png" for i in range(40)]
    # These may never change: a published number depends on them.
    assert shares["validation"] == ["train/020.png", "train/030.png"]
    half = ImageFolder(
        path=str(tmp_path), split="test", resolution=8, test_fraction=0.5
    )
    assert len(half) == 20


def test_split_folders_are_used_where_they_exist(tmp_path):
    """`val` is taken whole; the missing test split is carved out of `train`."""
    fill(tmp_path, 40, "images/train")
    fill(tmp_path, 3, "images/val")
    sources = {
        split: ImageFolder(path=str(tmp_path), split=split, resolution=8)
        for split in ("train", "validation", "test")
    }
    assert [len(source) for source in sources.values()] == [38, 3, 2]
    assert sources["validation"].files == [f"val/{i:03}.png" for i in range(3)]
    assert not set(sources["train"].files) & set(sources["test"].files)
    fill(tmp_path, 4, "images/test")
    assert len(ImageFolder(path=str(tmp_path), split="train", resolution=8)) == 40


def scene(name, objects, **more):
    return {"image_filename": name, "objects": objects, **more}


CUBE = {
    "shape": "cube",
    "size": "large",
    "color": "cyan",
    "material": "metal",
    "rotation": 7.0,
    "3d_coords": [1.0, -2.0, 0.7],
    "pixel_coords": [10, 6, 9.5],
}


def test_attributes_become_codes_padded_to_the_maximum(tmp_path):
    """Codes follow tensorflow-datasets; pixel positions follow the crop."""
    for split in ("train", "val"):
        save(tmp_path / "images" / split / "a.png", noise(0, 16, 32))
    small = {**CUBE, "color": "gray", "material": "rubber", "size": "small"}
    scenes = [
        scene("a.png", [CUBE, {**small, "shape": "cylinder"}], split="train"),
        scene("a.png", [], split="val"),
    ]
    (tmp_path / "scenes.json").write_text(json.dumps({"scenes": scenes}))
    objects = everything(tmp_path, max_objects=3)[0]["objects"]
    assert objects["present"].tolist() == [True, True, False]
    assert objects["color"].tolist() == [7, 0, 0]
    assert objects["material"].tolist() == [1, 0, 0]
    assert objects["shape"].tolist() == [0, 2, 0]
    assert objects["size"].tolist() == [1, 0, 0]
    np.testing.assert_allclose(objects["rotation"][0], 7.0 - 2 * np.pi, rtol=1e-6)
    np.testing.assert_allclose(objects["position"][0], CUBE["3d_coords"])
    # Columns 8:24 of the 32 are kept, and 16 pixels become 8.
    np.testing.assert_allclose(objects["pixel_position"][0], [1.0, 3.0])
    np.testing.assert_allclose(objects["pixel_position"][2], [0.0, 0.0])
    np.testing.assert_allclose(objects["depth"], [9.5, 9.5, 0.0])
    validation = everything(tmp_path, split="validation", max_objects=3)
    assert not validation[0]["objects"]["present"].any()


@needs_clevr
def test_rendered_clevr_masks_and_attributes_lie_on_their_objects():
    """Object k's centre is in mask k, and red, green and blue objects look so."""
    source = everything(CLEVR / "clevr_blender", resolution=64)
    examples = [source[i] for i in range(0, 300, 3)]
    hits, hues = [], {4: [], 5: [], 1: []}
    for example in examples:
        objects, ids = example["objects"], example["segmentation"]
        assert ids.max() <= objects["present"].sum()
        for k in np.flatnonzero(objects["present"]):
            column, row = np.floor(objects["pixel_position"][k]).astype(int)
            if 0 <= column < 64 and 0 <= row < 64:
                hits.append(ids[row, column] == k + 1)
            code, mask = int(objects["color"][k]), ids == k + 1
            if code in hues and objects["material"][k] == 0 and mask.sum() > 30:
                hues[code].append(example["image"][mask].mean(0))
    assert len(hits) > 300 and np.mean(hits) > 0.9
    for code, channel in ((4, 0), (5, 1), (1, 2)):
        assert (np.argmax(hues[code], -1) == channel).mean() > 0.95


@needs_clevr
def test_clevr_crop_is_iodines():
    """Rows 29:221 and columns 64:256 of the whole frames, image and mask alike."""
    folder = CLEVR / "clevr_frames"
    source = everything(folder, resolution=192, crop="clevr")
    for i in (0, 7):
        for key, kind in (("image", "images"), ("segmentation", "masks")):
            with Image.open(folder / kind / source.files[i]) as file:
                frame = np.asarray(file)
            np.testing.assert_array_equal(source[i][key], frame[29:221, 64:256])


def test_clevr_crop_shows_the_same_view_of_wider_frames(tmp_path):
    """320x480 frames show what 240x320 ones do, less a strip above and below."""
    yy, xx = np.mgrid[0:360, 0:480] / 1.5
    frame = np.dstack([yy, xx * 0.7, 0 * xx]).astype(np.uint8)
    save(tmp_path / "wide.png", frame[20:340])
    image = everything(tmp_path, resolution=192, crop="clevr")[0]["image"]
    rows, columns = np.mgrid[29:221, 64:256]
    expected = np.dstack([rows, columns * 0.7, 0 * rows])
    assert np.abs(image - expected)[3:-3, 3:-3].max() <= 1.5


def test_decoded_images_are_kept(tmp_path):
    """The second reading touches no file."""
    fill(tmp_path, 3)
    source = everything(tmp_path)
    first = source.batch(np.array([2, 1]))
    (tmp_path / "images" / "002.png").unlink()
    np.testing.assert_array_equal(
        source.batch(np.array([2, 1]))["image"], first["image"]
    )
    (tmp_path / "images" / "000.png").unlink()
    with pytest.raises(DataError, match=r"file .*000\.png cannot be read \(No such"):
        source[0]


def test_sets_beyond_the_limit_are_not_kept(tmp_path, monkeypatch):
    """Without room every reading decodes, and gives the same."""
    monkeypatch.setattr(frame_source, "KEPT_BYTES", 3 * 8 * 8 * 3 - 1)
    fill(tmp_path, 3)
    source = everything(tmp_path)
    batch = source.batch(np.array([2, 2, 0]))
    assert batch["image"][:, 0, 0, 0].tolist() == [2, 2, 0]
    (tmp_path / "images" / "002.png").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        source.batch(np.array([2, 2, 0]))


def truncate(file, share=0.6):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("skip", [False, True])
def test_unreadable_images_are_named_counted_and_skipped_if_asked(tmp_path, skip):
    """Cut-off PNG and JPEG, empty, alien and damaged files: all five are found."""
    images = tmp_path / "images"
    for i in range(4):
        save(images / f"good{i}.png", noise(i, 32, 32))
        save(images / f"good{i}.jpg", noise(i, 32, 32))
    with (images / "good0.jpg").open("ab") as file:
        file.write(b"\0\0 some cameras add bytes")
    for name in ("cut.png", "cut.jpg", "damaged.png"):
        save(images / name, noise(9, 32, 32))
    truncate(images / "cut.png")
    truncate(images / "cut.jpg")
    content = bytearray((images / "damaged.png").read_bytes())
    content[len(content) // 2] ^= 255
    (images / "damaged.png").write_bytes(content)
    (images / "empty.jpeg").touch()
    (images / "text.png").write_text("not a picture")
    if skip:
        source = everything(tmp_path, skip_unreadable=True)
        assert len(source) == 8 and all("good" in file for file in source.files)
        source.batch(np.arange(8))
        return
    source = everything(tmp_path)
    with pytest.raises(DataError) as error:
        check(source)
    sentence = str(error.value)
    assert "5 of 13 images (images/cut.jpg, images/cut.png, images/dam" in sentence
    assert "\n" not in sentence
    assert "--config.data.skip_unreadable=True" in sentence


def test_an_unreadable_mask_counts_as_its_image(tmp_path):
    fill(tmp_path, 3)
    for i in range(3):
        save(tmp_path / "masks" / f"{i:03}.png", ids(i, 8, 8))
    truncate(tmp_path / "masks" / "001.png")
    with pytest.raises(DataError, match=r"1 of 3 .*001\.png\).*their masks, cannot"):
        check(everything(tmp_path))
    source = everything(tmp_path, skip_unreadable=True)
    assert source.files == ["000.png", "002.png"]
    np.testing.assert_array_equal(source[1]["segmentation"], numbered(ids(2, 8, 8)))
    assert source.notes == [
        f"1 of 3 images (images/001.png) in {tmp_path} cannot be read and are left out"
    ]


def make_missing_mask(path):
    save(path / "masks" / "000.png", np.zeros((8, 8), np.uint8))


def make_other_size(path):
    for i in range(2):
        save(path / "masks" / f"{i:03}.png", np.zeros((8, 8 + i), np.uint8))


def make_number_mask(path):
    for i in range(2):
        file = path / "masks" / f"{i:03}.tif"
        save(file, np.zeros((8, 8), np.float32))


def make_jpeg_mask(path):
    for i in range(2):
        save(path / "images" / f"{i:03}.jpg", np.zeros((8, 8, 3), np.uint8))
        save(path / "masks" / f"{i:03}.jpg", np.zeros((8, 8), np.uint8))
        (path / "images" / f"{i:03}.png").unlink()


def write_scenes(path, objects, names=("000.png", "001.png")):
    scenes = [scene(name, objects) for name in names]
    (path / "scenes.json").write_text(json.dumps({"scenes": scenes}))


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (make_missing_mask, r"1 of 2 images \(images/001\.png\) in .* have no mask of"),
        (
            make_other_size,
            r"001\.png has 9 x 8 pixels and its image images/001\.png 8 x 8",
        ),
        (
            make_number_mask,
            r"000\.tif has pixels of mode F; it must hold object ids in",
        ),
        (make_jpeg_mask, r"000\.jpg is a JPEG, which does not keep ids exactly; save"),
        (
            lambda path: write_scenes(path, [CUBE] * 3),
            r"000\.png has 3 objects, more than max_objects = 2; set "
            r"--config\.data\.max_objects=3",
        ),
        (
            lambda path: write_scenes(path, [{**CUBE, "color": "mauve"}]),
            r"000\.png has an object of color 'mauve', which is none of CLEVR's: gray,",
        ),
        (
            lambda path: write_scenes(path, [{"color": "red"}]),
            r"000\.png has an object without CLEVR's attributes: 'material'",
        ),
        (
            lambda path: write_scenes(path, [], names=("001.png",)),
            r"1 of 2 images \(000\.png\) are not described in .*scenes\.json",
        ),
        (
            lambda path: (path / "scenes.json").write_text("{"),
            r"scenes\.json cannot be read \(Expecting",
        ),
        (
            lambda path: (path / "scenes.json").write_text("[]"),
            r"scenes\.json is not a list of scenes as CLEVR's",
        ),
    ],
)
def test_what_does_not_fit_the_images_is_one_sentence(tmp_path, prepare, sentence):
    fill(tmp_path, 2)
    prepare(tmp_path)
    with pytest.raises(DataError, match=sentence) as error:
        check(everything(tmp_path, max_objects=2))
    assert "\n" not in str(error.value)


def test_folders_that_cannot_be_used_are_one_sentence(tmp_path):
    """No folder named, none there, none in it, too few or other splits' images."""
    with pytest.raises(DataError, match=r"set it with --config\.data\.path=FOLDER"):
        everything("")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        everything(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no pictures; set --config\.data\.pa"):
        everything(tmp_path)
    fill(tmp_path, 2, "images/test")
    with pytest.raises(DataError, match="no images for split 'train': all are in fol"):
        everything(tmp_path)
    fill(tmp_path, 2, "images/train")
    with pytest.raises(DataError, match=r"split 'validation' of folder .* is empty"):
        everything(tmp_path, split="validation")
    with pytest.raises(DataError, match="unknown crop 'middle'; choose from 'center'"):
        check(everything(tmp_path, crop="middle"))
    save(tmp_path / "images" / "train" / "wide.png", noise(0, 8, 20))
    with pytest.raises(DataError, match="does not fit a frame of 20 x 8 pixels"):
        check(everything(tmp_path, crop="clevr"))


def cut(file):
    save(file, noise(9, 32, 32))
    truncate(file)


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("a.png", lambda file: file.touch(), "not a picture"),
        ("a.png", lambda file: file.write_text("text"), "not a picture"),
        ("a.png", cut, ".*truncated.*"),
        ("a.jpg", cut, ".*truncated.*"),
        ("a.png", lambda file: file.symlink_to("nowhere"), "No such file.*"),
    ],
    ids=["empty", "text", "truncated PNG", "truncated JPEG", "broken link"],
)
def test_reading_a_broken_file_is_one_sentence_that_names_it(
    tmp_path, name, write, reason
):
    """The same file is found by a check."""
    write(tmp_path / name)
    source = everything(tmp_path)
    sentence = rf"file .*/{name} cannot be read \({reason}\); put a whole, readable"
    with pytest.raises(DataError, match=sentence) as error:
        source.batch(np.array([0]))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"1 of 1 images \(a\."):
        check(source)


def test_files_and_folders_without_permission_are_one_sentence(tmp_path, monkeypatch):
    """The system's refusal is imitated, because root may read everything."""
    fill(tmp_path, 1)
    source = everything(tmp_path)

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(pictures.Image, "open", refuse)
        with pytest.raises(DataError, match=r"000\.png cannot be read \(Permission de"):
            source[0]
        with pytest.raises(DataError, match=r"1 of 1 images \(images/000\.png\)"):
            check(source)
    with monkeypatch.context() as patch:
        patch.setattr(listing.os, "scandir", refuse)
        with pytest.raises(DataError, match=r"images cannot be listed \(Permission de"):
            everything(tmp_path)


def test_masks_may_be_palettes_bits_or_sixteen_bit(tmp_path):
    """Indices, not colours; ids beyond a byte as others."""
    mask = ids(0, 8, 8)
    palette = Image.fromarray(mask, "P")
    palette.putpalette(noise(1, 256, 1).tobytes())
    for name in ("bits", "palette", "sixteen"):
        save(tmp_path / "images" / f"{name}.png", noise(2, 8, 8))
    save(tmp_path / "masks" / "sixteen.png", mask.astype(np.uint16) * 200)
    Image.fromarray(mask > 99).save(tmp_path / "masks" / "bits.png")
    palette.save(tmp_path / "masks" / "palette.png")
    source = everything(tmp_path)
    check(source)
    for index, expected in enumerate((mask > 99, numbered(mask), numbered(mask))):
        got = source[index]["segmentation"]
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.int32


def test_objects_are_counted_by_attributes_or_else_by_masks(tmp_path):
    """Whatever the batches hold; with neither it is a sentence."""
    fill(tmp_path, 2)
    with pytest.raises(DataError, match=r"000\.png has neither masks nor attributes"):
        everything(tmp_path).count_objects(silent)
    for i in range(2):
        save(
            tmp_path / "masks" / f"{i:03}.png",
            np.diag(np.array([0, 9, 9, i] * 2, np.uint8)),
        )
    only_images = everything(tmp_path, keys=("image",))
    assert only_images[0].keys() == {"image"}
    assert only_images.count_objects(silent).tolist() == [1, 2]
    write_scenes(tmp_path, [CUBE] * 3)
    assert everything(tmp_path).count_objects(silent).tolist() == [3, 3]


def test_the_fingerprint_tells_other_files(tmp_path):
    """Names and sizes of images and masks count; where the folder lies does not."""
    prints = []
    for folder in ("a", "b", "c", "d"):
        for i in range(2):
            save(tmp_path / folder / f"{i}.png", noise(i, 8, 8))
            save(tmp_path / folder / "masks" / f"{i}.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "c" / "1.png").rename(tmp_path / "c" / "2.png")
    (tmp_path / "c" / "masks" / "1.png").rename(tmp_path / "c" / "masks" / "2.png")
    save(tmp_path / "d" / "masks" / "1.png", noise(1, 8, 8, 1)[..., 0])
    prints = [everything(tmp_path / folder).fingerprint() for folder in "abcd"]
    assert prints[0] == prints[1] and prints[0]["files"] == 4
    assert len({entry["sha256"] for entry in prints}) == 3


def test_an_ambiguous_description_is_refused_and_a_split_resolves_it(tmp_path):
    """The same name in two splits, told apart by any name of the split's folder."""
    for folder in ("train", "validation"):
        save(tmp_path / "images" / folder / "0.png", noise(0, 4, 4))
    scenes = [
        {"image_filename": "0.png", "split": "train", "objects": []},
        {"image_filename": "0.png", "split": "val", "objects": [CUBE]},
    ]
    (tmp_path / "scenes.json").write_text(json.dumps({"scenes": scenes}))
    for split, count in (("train", 0), ("validation", 1)):
        source = everything(tmp_path, split=split)
        assert source[0]["objects"]["present"].sum() == count
    for scene in scenes:
        del scene["split"]
    (tmp_path / "scenes.json").write_text(json.dumps({"scenes": scenes}))
    with pytest.raises(DataError, match=r"describes 0\.png more than once; give each"):
        everything(tmp_path)[0]


@pytest.mark.parametrize("shares", [(-0.1, 0.5), (0.6, 0.5), (0.1, float("nan"))])
def test_shares_that_are_none_are_refused(tmp_path, shares):
    save(tmp_path / "0.png", noise(0, 4, 4))
    with pytest.raises(DataError, match="are no shares of the images; set"):
        ImageFolder(
            path=str(tmp_path),
            split="train",
            resolution=8,
            validation_fraction=shares[0],
            test_fraction=shares[1],
        )
