"""What folders of images look like: links, splits, kinds of files, names of masks."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from configs import base
from implicit_slots.data import registry
from implicit_slots.data.sets.folder import ImageFolder
from implicit_slots.data.source import DataError

SPLITS = ("train", "validation", "test")


def save(file, value=0):
    """A picture of one level of grey."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.full((8, 8, 3), value, np.uint8))
    picture.save(file, lossless=True)  # Of formats with a choice; others take no heed.


def save_mask(file, bottom=1):
    file.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((8, 8), np.uint8)
    mask[:bottom] = 1
    Image.fromarray(mask).save(file)


def fill(folder, count=20, first=0):
    for i in range(first, first + count):
        save(folder / f"{i:03}.png", i)


def read(path, split="train", **options):
    return ImageFolder(path=str(path), split=split, resolution=8, **options)


def whole(path, **options):
    return read(path, validation_fraction=0.0, test_fraction=0.0, **options)


def levels(source):
    """The level of grey of each image, which tells it from all others."""
    return source.batch(np.arange(len(source)))["image"][:, 0, 0, 0].tolist()


def silent(iterable, **_):
    return iterable


@pytest.mark.parametrize(
    ("link", "target"),
    [("latest", "."), ("up", ".."), ("top", "/"), ("a/back", ".."), ("a/itself", ".")],
)
def test_a_link_to_a_folder_that_it_lies_in_is_not_followed(tmp_path, link, target):
    fill(tmp_path / "images", 3)
    save(tmp_path / "images" / "a" / "003.png", 3)
    save(tmp_path / "other" / "004.png", 4)
    os.symlink(target, tmp_path / "images" / link)
    source = whole(tmp_path)
    assert source.files == ["000.png", "001.png", "002.png", "a/003.png"]
    assert not any("links" in note for note in source.notes)


def test_an_image_of_several_names_is_one_image(tmp_path):
    """Under the name without links, in one of the shares, and with a note."""
    fill(tmp_path / "images" / "run", 20)
    os.symlink("run", tmp_path / "images" / "best")
    os.symlink("run/000.png", tmp_path / "images" / "000.png")
    shares = {split: read(tmp_path, split) for split in SPLITS}
    files = sorted(file for source in shares.values() for file in source.files)
    assert files == [f"run/{i:03}.png" for i in range(20)]
    note = f"{tmp_path}/images has 21 links to images that are there under another name"
    assert shares["train"].notes == [f"{note}, which are left out"]


def test_folders_of_links_to_images_elsewhere_are_read(tmp_path):
    """As sets without copies are made: links to files, and to whole folders."""
    fill(tmp_path / "all", 4)
    (tmp_path / "set" / "images").mkdir(parents=True)
    os.symlink(tmp_path / "all", tmp_path / "set" / "images" / "val")
    for i in range(2):
        save(tmp_path / "set" / "images" / "train" / f"own{i}.png", 9)
        link = tmp_path / "set" / "images" / "train" / f"{i}.png"
        os.symlink(f"../../../all/00{i}.png", link)
    train = read(tmp_path / "set", test_fraction=0.0)
    assert levels(train) == [0, 1, 9, 9]
    assert levels(read(tmp_path / "set", "validation")) == [0, 1, 2, 3]
    note = f"{tmp_path}/set/images has links by which 2 images are in more than one"
    assert train.notes == [f"{note} split"]


def test_what_systems_leave_behind_is_no_image(tmp_path):
    """And needs no word."""
    fill(tmp_path / "images", 2)
    for name in (
        "__MACOSX/000.png",
        "@eaDir/000.png/SYNOPHOTO_THUMB_XL.jpg",
        ".ipynb_checkpoints/000-checkpoint.png",
        ".Trash-0/000.png",
        "$RECYCLE.BIN/000.png",
        "lost+found/000.png",
    ):
        save(tmp_path / "images" / name)
    for name in ("._000.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "images" / name).write_bytes(b"\0\5\26\7")
    os.mkfifo(tmp_path / "images" / "pipe.png")
    source = whole(tmp_path)
    source.check(silent)
    assert source.files == ["000.png", "001.png"] and not source.notes


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "valid", "test"),
        ("Train", "VAL", "Test"),
        ("training", "validation", "testing"),
        ("train2017", "val2017", "test2017"),
        ("Training_Set", "dev-set", "test set"),
        ("train_images", "images-val", "testset"),
    ],
)
@pytest.mark.parametrize("layout", ["images/{}", "{}/images", "{}"])
def test_names_of_splits_are_recognised(tmp_path, layout, train, validation, test):
    names = dict(zip(SPLITS, (train, validation, test), strict=True))
    for place, folder in enumerate(names.values()):
        fill(tmp_path / layout.format(folder), 2, 10 * place)
        masks = layout.replace("images", "masks")
        if "masks" in masks:
            for i in range(2):
                file = f"{10 * place + i:03}.png"
                save_mask(tmp_path / masks.format(folder) / file, place + 1)
    for place, split in enumerate(SPLITS):
        source = read(tmp_path, split)
        assert levels(source) == [10 * place, 10 * place + 1] and not source.notes
        if "images" in layout:
            ids = source[1]["segmentation"]
            assert ids.sum() == 8 * (place + 1)


def test_splits_may_be_deeper_than_the_first_folder(tmp_path):
    """As of sets with a folder for each category."""
    for place, kind in enumerate(("bottle", "cable")):
        fill(tmp_path / kind / "train" / "good", 2, 10 * place)
        fill(tmp_path / kind / "test" / "broken", 1, 10 * place + 5)
        fill(tmp_path / kind / "ground_truth" / "broken", 1, 10 * place + 5)
    train = read(tmp_path, validation_fraction=0.0)
    assert levels(train) == [0, 1, 10, 11]
    assert levels(read(tmp_path, "test")) == [5, 15]
    assert train.notes == [
        f"{tmp_path} has images in no split, which are left out: bottle/ (1), cable/ "
        "(1); a folder is called train, validation or test (or training, val, "
        "train2017 and so on, in any case)"
    ]


def test_images_in_no_split_are_named(tmp_path):
    for folder in ("train", "Val", "extra", "unlabeled2017", "trainval"):
        fill(tmp_path / "images" / folder, 2)
    save(tmp_path / "images" / "loose.png")
    for split in SPLITS[:2]:
        note = read(tmp_path, split).notes[0]
        assert (
            "left out: extra/ (2), trainval/ (2), unlabeled2017/ (2), no folder (1); a "
            "folder is called train, validation" in note
        )
    # Without a folder of training images they are the pool.
    (tmp_path / "images" / "train").rename(tmp_path / "images" / "more")
    pool = read(tmp_path, test_fraction=0.0)
    assert len(pool) == 9 and not pool.notes


def test_what_is_left_out_is_said_once(tmp_path, capsys):
    """By whatever opens the files, however many splits they have."""
    fill(tmp_path / "images", 40)
    (tmp_path / "images" / "notes.txt").touch()
    section = base.folder()
    section.update(path=str(tmp_path), cache="")
    for split in SPLITS:
        registry.build(section, split)
    note = "has files that are not read as pictures and are left out: .txt (1)"
    assert capsys.readouterr().out == f"note: {tmp_path}/images {note}\n"


def test_pictures_of_every_kind_are_read_and_the_others_named(tmp_path):
    names = ["a.PNG", "b.webp", "c.bmp", "d.tif", "e.TIFF", "f.gif", "g.ppm", "h.tga"]
    for value, name in enumerate(names):
        save(tmp_path / "images" / name, 10 * value)
    for name in ("x.heic", "y.HEIC", "z.svg", "labels.txt", "README"):
        (tmp_path / "images" / name).write_bytes(b"something")
    source = whole(tmp_path)
    source.check(silent)
    assert source.files == names
    assert levels(source) == [10 * value for value in range(len(names))]
    assert source.notes == [
        f"{tmp_path}/images has files that are not read as pictures and are left out: "
        ".heic (2), .svg (1), .txt (1), no ending (1)"
    ]


def test_of_several_pictures_in_a_file_the_first_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (7, 90)]
    for name in ("a.gif", "b.png", "c.tif", "d.webp"):
        file = tmp_path / name
        frames[0].save(file, save_all=True, append_images=frames[1:], lossless=True)
    assert levels(whole(tmp_path)) == [7] * 4


def test_folders_without_pictures_say_what_they_have(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"/images has no pictures; set --config"):
        whole(tmp_path)
    (tmp_path / "images" / "a.heic").touch()
    with pytest.raises(DataError, match=r"no pictures, but files: \.heic \(1\); set"):
        whole(tmp_path)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("A.JPG", "A.PNG"),
        ("A.JPG", "a.png"),
        ("sub/a.jpeg", "Sub/A.tif"),
        ("a.b.png", "a.b.bmp"),
        (unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")),
    ],
)
@pytest.mark.parametrize("folders", [("images", "masks"), ("Images", "MASKS")])
def test_a_mask_is_found_whatever_its_case_and_ending(tmp_path, image, mask, folders):
    save(tmp_path / folders[0] / image)
    save_mask(tmp_path / folders[1] / mask, 3)
    save_mask(tmp_path / folders[1] / "another.png")
    assert whole(tmp_path)[0]["segmentation"].sum() == 24


def test_the_mask_of_exactly_an_images_name_comes_first(tmp_path):
    for place, name in enumerate(("a.png", "A.png", "a.tif")):
        save(tmp_path / "images" / name)
        save_mask(tmp_path / "masks" / name, place + 1)
    source = whole(tmp_path)
    assert source.files == ["A.png", "a.png", "a.tif"]
    sums = [int(source[i]["segmentation"].sum()) for i in range(3)]
    assert sums == [16, 8, 24]


def test_a_mask_that_could_be_another_images_is_refused(tmp_path):
    for name in ("a.jpg", "a.png"):
        save(tmp_path / "images" / name)
    save_mask(tmp_path / "masks" / "a.png")
    sentence = (
        r"images images/a\.jpg and images/a\.png in .* have the same mask masks/a"
    )
    with pytest.raises(DataError, match=sentence):
        whole(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    save_mask(tmp_path / "masks" / "a.tif")
    sentence = (
        r"2 masks fit image images/a\.jpg in .*: masks/a\.png, masks/a\.tif; leav"
    )
    with pytest.raises(DataError, match=sentence):
        whole(tmp_path)


def test_folders_beside_the_images_that_may_be_masks_are_named(tmp_path):
    fill(tmp_path / "images", 2)
    save_mask(tmp_path / "labels" / "000.png")
    source = whole(tmp_path)
    assert "segmentation" not in source[0]
    note = "has no folder masks beside images; those that are there, labels, are not"
    assert source.notes == [f"{tmp_path} {note} read"]


def test_names_that_are_no_text_are_read_and_printed(tmp_path):
    (tmp_path / "images").mkdir()
    save(tmp_path / "a.png", 5)
    folder = os.fsencode(tmp_path / "images")
    os.rename(tmp_path / "a.png", folder + b"/caf\xe9.png")
    source = whole(tmp_path)
    source.check(silent)
    assert levels(source) == [5] and len(source.fingerprint()["sha256"]) == 64
    with open(folder + b"/d\xe9fait.png", "wb") as file:
        file.write(b"no picture")
    with pytest.raises(
        DataError, match=r"images/d\\xe9fait\.png\) in .* cannot"
    ) as error:
        whole(tmp_path).check(silent)
    assert str(error.value).encode()
