"""TFDS records: written by its own machinery in CLEVR's true features, read back."""

import io
import json
import os
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tfds_files
from PIL import Image

from implicit_slots.data.sets.tfds import Tfds
from implicit_slots.data.source import DataError


def picture(seed, height=320, width=480):
    """An RGBA picture of 320x480, like those that CLEVR publishes."""
    small = np.random.default_rng(seed).integers(0, 256, (10, 15, 3), np.uint8)
    colours = np.kron(small, np.ones((height // 10, width // 15, 1), np.uint8))
    return np.dstack([colours, np.full((height, width), 200, np.uint8)])


def cube(color, column):
    return {
        "3d_coords": [1.0, 2.0, 0.7],
        "color": color,
        "material": "metal",
        "pixel_coords": [column, 200.0, 9.0],
        "rotation": 10.0,
        "shape": "cube",
        "size": "large",
    }


def scene(i, with_objects=True):
    objects = [cube("red", 240.0), cube("gray", 96.0)][: 2 - i % 2]
    return {
        "file_name": f"CLEVR_{i:06}.png",
        "image": tfds_files.png(picture(i)),
        "objects": objects if with_objects else [],
        "question_answer": [{"question": "How many?", "answer": "2"}] * (i % 3),
    }


def write_clevr(root, train=3, shard=10, version="3.1.0"):
    return tfds_files.write(
        root,
        "clevr",
        tfds.builder("clevr", data_dir=str(root)).info.features,
        {
            "train": [scene(i) for i in range(train)],
            "test": [scene(i, with_objects=False) for i in range(2)],
        },
        version=version,
        shard=shard,
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """CLEVR with three training and two test images."""
    root = tmp_path_factory.mktemp("array_record")
    write_clevr(root)
    return str(root)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """CLEVR with seven training images, in each file format in three files."""
    roots = [tmp_path_factory.mktemp(kind) for kind in ("array_record", "tfrecord")]
    homes = [write_clevr(root, train=7, shard=3) for root in roots]
    tfds_files.as_tfrecord(homes[1])
    return homes


def clevr(path, split="train", **options):
    options = {"resolution": 8, "crop": "clevr", **options}
    return Tfds(dataset="clevr", split=split, path=str(path), **options)


def said(error):
    """The sentence of an error, after a look at its form."""
    sentence = str(error.value)
    assert "\n" not in sentence and sentence[-1] not in ".,;: "
    return sentence


def test_clevr_records_become_cropped_images_with_attributes(path):
    """Rows 24:312 and columns 96:384 of 320x480 are IODINE's crop; codes are TFDS's."""
    source = clevr(path, resolution=288, max_objects=3)
    assert len(source) == 3
    batch = source.batch(np.array([2, 1]))
    for image, i in zip(batch["image"], (2, 1), strict=True):
        np.testing.assert_array_equal(image, picture(i)[24:312, 96:384, :3])
    objects = batch["objects"]
    assert objects["present"].tolist() == [[True, True, False], [True, False, False]]
    assert objects["color"].tolist() == [[4, 0, 0], [4, 0, 0]]
    assert objects["material"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert objects["size"].tolist() == [[1, 1, 0], [1, 0, 0]]
    np.testing.assert_allclose(objects["pixel_position"][0, :2], [[144, 176], [0, 176]])
    np.testing.assert_allclose(objects["rotation"][0, 0], 10 - 2 * np.pi, rtol=1e-6)


def test_the_test_split_has_images_alone(path):
    source = clevr(path, "test", resolution=32)
    assert source[1].keys() == {"image"} and source[1]["image"].shape == (32, 32, 3)
    with pytest.raises(DataError, match=r"record 0 of .*test.* has neither masks nor"):
        source.count_objects(lambda indices, desc: indices)


@pytest.mark.parametrize("kind", [0, 1], ids=["array_record", "tfrecord"])
def test_slices_of_files_are_read_in_both_formats(sharded, kind):
    """TFDS's expressions pick records across its files, first to last."""
    everything = clevr(sharded[kind].parent.parent, resolution=320, crop="center")
    assert len(everything) == 7
    for i in range(7):
        np.testing.assert_array_equal(everything[i]["image"], picture(i)[:, 80:400, :3])
    splits = {"train": "train[2:5]", "validation": "train[5:]", "test": ""}
    parts = {
        split: clevr(sharded[kind].parent.parent, split, splits=splits)
        for split in splits
    }
    assert [len(part) for part in parts.values()] == [3, 2, 2]
    small = clevr(sharded[kind].parent.parent)
    for split, first in (("train", 2), ("validation", 5)):
        for i in range(len(parts[split])):
            np.testing.assert_array_equal(
                parts[split][i]["image"], small[first + i]["image"]
            )
    files = sorted(sharded[kind].glob("clevr-train*"))
    assert len(files) == 3
    assert parts["train"].where(0) == f"record 2 of {files[0]}"
    assert parts["train"].where(1) == f"record 0 of {files[1]}"
    everything.check(lambda files, desc: files)


def test_objects_are_counted_without_decoding_an_image(sharded, monkeypatch):
    source = clevr(sharded[0].parent.parent)
    monkeypatch.setattr(Image, "open", None)
    counts = source.count_objects(lambda indices, desc: indices)
    assert counts.tolist() == [2, 1, 2, 1, 2, 1, 2]


def test_only_what_is_asked_for_is_read(path):
    assert clevr(path, keys=("image",))[0].keys() == {"image"}
    assert clevr(path, keys=("objects",), max_objects=2)[0]["objects"]["color"][0] == 4


def test_the_fingerprint_tells_versions_splits_and_files_apart(path, sharded):
    one = clevr(path).fingerprint()
    assert one == clevr(path, resolution=16).fingerprint()
    assert (one["dataset"], one["split"]) == ("clevr/3.1.0", "train")
    assert one["examples"] == 3 and json.dumps(one)
    others = [
        clevr(path, "test"),
        clevr(path, splits={"train": "train[:2]"}),
        *(clevr(home.parent.parent) for home in sharded),
    ]
    prints = [json.dumps(one), *(json.dumps(other.fingerprint()) for other in others)]
    assert len(set(prints)) == 5


def test_the_highest_version_is_read_unless_another_is_named(tmp_path):
    for version, train in (("3.1.0", 1), ("3.10.0", 2), ("3.9.0", 3)):
        write_clevr(tmp_path, train, version=version)
    (tmp_path / "clevr" / "incomplete.AB_4.0.0").mkdir()
    assert len(clevr(tmp_path)) == 2
    assert (
        len(
            Tfds(dataset="clevr:3.9.0", path=str(tmp_path), split="train", resolution=8)
        )
        == 3
    )
    assert len(clevr(tmp_path / "clevr" / "3.1.0")) == 1
    assert Tfds.is_prepared("clevr", str(tmp_path))
    assert not Tfds.is_prepared("clevr:1.0.0", str(tmp_path))
    assert not Tfds.is_prepared("shapes3d", str(tmp_path))


def test_any_other_set_of_images_has_images_alone(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
    )
    pictures = [
        np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8) for i in range(2)
    ]
    examples = [{"image": tfds_files.png(p), "label": 1} for p in pictures]
    tfds_files.write(tmp_path, "my_images", features, {"train": examples})
    source = Tfds(dataset="my_images", path=str(tmp_path), split="train", resolution=8)
    for i in range(2):
        assert source[i].keys() == {"image"}
        np.testing.assert_array_equal(source[i]["image"], pictures[i])
    tfds_files.write(
        tmp_path,
        "numbers",
        tfds.features.FeaturesDict({"value": np.int64}),
        {"train": [{"value": 1}]},
    )
    with pytest.raises(DataError, match=r"record 0 of .* has no feature image; set"):
        Tfds(dataset="numbers", path=str(tmp_path), split="train", resolution=8)[0]


def test_pictures_are_upright_whatever_their_orientation(tmp_path):
    """Records hold the files as they were."""
    upright = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright)).save(file, "PNG", exif=exif)
    file.seek(0)
    features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
    tfds_files.write(tmp_path, "my_images", features, {"train": [{"image": file}]})
    source = Tfds(dataset="my_images", path=str(tmp_path), split="train", resolution=8)
    np.testing.assert_array_equal(source[0]["image"], upright[:, 2:10])


def test_what_is_not_prepared_is_one_sentence(path, tmp_path):
    """The sentence holds the command that prepares the data set."""
    with pytest.raises(DataError) as error:
        clevr(tmp_path)
    assert (
        "`python -m implicit_slots.data prepare` with the same --config does that (for "
        "which it needs TensorFlow; reading does not)"
    ) in said(error)
    with pytest.raises(DataError, match="no split 'validation', only test, train"):
        clevr(path, "validation")
    with pytest.raises(DataError, match=r"cannot be split by 'train\[:9\]'") as error:
        clevr(path, splits={"train": "train[:9]"})
    assert "--config.data.splits.train" in said(error)
    with pytest.raises(DataError, match=r"split 'train\[2:2\]' .* is empty; set"):
        clevr(path, splits={"train": "train[2:2]"})
    with pytest.raises(DataError, match="cannot find 'clever'"):
        Tfds(dataset="clever", path=str(tmp_path), split="train", resolution=8)
    with pytest.raises(DataError) as error:
        Tfds(dataset="movi_a/256x256", path=str(tmp_path), split="train", resolution=8)
    assert (
        f"gsutil -m cp -r gs://kubric-public/tfds/movi_a/256x256 {tmp_path}/movi_a/"
    ) in said(error)
    with pytest.raises(DataError, match="holds data set 'clevr', not 'movi_a'; take"):
        Tfds(dataset="movi_a", path=f"{path}/clevr/3.1.0", split="train", resolution=8)
    with pytest.raises(DataError, match=r"has 2 objects, more than max_objects = 1"):
        clevr(path, max_objects=1)[0]
    with pytest.raises(DataError, match="frame_step must be at least 1, got 0; set"):
        clevr(path, frame_step=0)


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_damaged_files_are_one_sentence(tmp_path, kind):
    """Truncated, empty, missing, foreign and swapped files name themselves."""
    home = write_clevr(tmp_path, train=4, shard=2)
    if kind == "tfrecord":
        tfds_files.as_tfrecord(home)
    first, second = sorted(home.glob("clevr-train*"))
    whole = second.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not records" * 999):
        second.write_bytes(content)
        source = clevr(tmp_path)
        assert source[1]["image"].any()
        for use in (lambda s: s.check(lambda files, desc: files), lambda s: s[2]):
            with pytest.raises(DataError) as error:
                use(source)
            assert second.name in said(error)
    second.unlink()
    with pytest.raises(DataError, match=r"1 of 2 files of the split \(.*00001\)") as e:
        clevr(tmp_path)
    assert str(home) in said(e)
    second.write_bytes(first.read_bytes() * (2 if kind == "tfrecord" else 1))
    if kind == "tfrecord":
        with pytest.raises(DataError, match="has 4 records instead of 2; prepare or"):
            clevr(tmp_path)[2]


def test_damaged_records_are_one_sentence(tmp_path):
    """A record that is no example, and an image that is cut off."""
    home = write_clevr(tmp_path, train=2)
    tfds_files.as_tfrecord(home)
    file = next(home.glob("clevr-train*"))
    features: Any = tfds.builder("clevr", data_dir=str(tmp_path)).info.features
    cut = scene(0)
    cut["image"] = tfds_files.png(picture(0))
    cut["image"].truncate(200)
    file.write_bytes(
        tfds_files.frame(b"\xff" * 50)
        + tfds_files.frame(features.serialize_example(cut))
    )
    source = clevr(tmp_path)
    with pytest.raises(DataError, match=r"record 0 of .* is not an example of clevr/3"):
        source[0]
    with pytest.raises(DataError, match=r"image of record 1 of .* cannot be decoded"):
        source[1]


def test_descriptions_that_cannot_be_used_are_one_sentence(tmp_path):
    home = write_clevr(tmp_path, train=1)
    info = home / "dataset_info.json"
    content = info.read_text()
    info.write_text(content.replace('"array_record"', '"riegeli"'))
    with pytest.raises(
        DataError, match="are riegeli, which is not read; prep"
    ) as error:
        clevr(tmp_path)
    said(error)
    info.write_text(content[:50])
    with pytest.raises(
        DataError, match=r"info\.json does not describe a data"
    ) as error:
        clevr(tmp_path)
    said(error)
    info.unlink()
    with pytest.raises(DataError, match="'clevr' is not prepared in"):
        clevr(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read_are_one_sentence(tmp_path):
    home = write_clevr(tmp_path, train=1)
    file = next(home.glob("clevr-train*"))
    file.chmod(0)
    with pytest.raises(DataError, match="Permission denied; change its permissions"):
        clevr(tmp_path)[0]
    home.chmod(0)
    with pytest.raises(DataError, match="Permission denied; change its permissions"):
        clevr(tmp_path)
    home.chmod(0o700)
    file.chmod(0o600)


def test_downloading_without_tensorflow_says_what_to_install(tmp_path, monkeypatch):
    """MOVi and unknown sets are refused before that."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs tensorflow and importlib_resources"):
        Tfds.download("clevr", str(tmp_path))
    with pytest.raises(DataError, match=r"gsutil -m cp -r gs://kubric-public/tfds/mov"):
        Tfds.download("movi_a", str(tmp_path))
    with pytest.raises(DataError, match="cannot find 'clever'"):
        Tfds.download("clever", str(tmp_path))


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_downloading_prepares_what_is_read(tmp_path, monkeypatch, kind):
    """TFDS's own CLEVR builder writes array_record from the published layout.

    Its own default is tfrecord.
    """
    pytest.importorskip("tensorflow")
    pytest.importorskip("importlib_resources")
    unpacked = tmp_path / "unpacked" / "CLEVR_v1.0"
    for folder in ("scenes", "questions"):
        (unpacked / folder).mkdir(parents=True)
    for split, count in (("train", 5), ("val", 2), ("test", 2)):
        names = [f"CLEVR_{split}_{i:06}.png" for i in range(count)]
        (unpacked / "images" / split).mkdir(parents=True)
        for i, name in enumerate(names):
            Image.fromarray(picture(i)).save(unpacked / "images" / split / name)
        questions = [
            {"image_filename": name, "question": "Which?", "answer": "no"}
            for name in names
        ]
        (unpacked / "questions" / f"CLEVR_{split}_questions.json").write_text(
            json.dumps({"questions": questions})
        )
        if split != "test":
            scenes = [
                {"image_filename": name, "objects": scene(i)["objects"]}
                for i, name in enumerate(names)
            ]
            (unpacked / "scenes" / f"CLEVR_{split}_scenes.json").write_text(
                json.dumps({"scenes": scenes})
            )
    monkeypatch.setattr(
        tfds.download.DownloadManager,
        "download_and_extract",
        lambda self, url: str(unpacked.parent),
    )
    root = tmp_path / "prepared"
    if kind == "array_record":
        Tfds.download("clevr", str(root))
    else:
        tfds.builder("clevr", data_dir=str(root)).download_and_prepare()
    for split, count in (("train", 5), ("validation", 2), ("test", 2)):
        source = clevr(root, split, resolution=320, crop="center")
        assert f".{kind}-00000-of-00001" in source.where(0) and len(source) == count
        expected = {picture(i)[:, 80:400, :3].tobytes(): i for i in range(count)}
        found = [expected[source[i]["image"].tobytes()] for i in range(count)]
        assert sorted(found) == list(range(count))
        if split != "test":
            counts = source.count_objects(lambda indices, desc: indices)
            assert counts.tolist() == [2 - i % 2 for i in found]


@pytest.mark.parametrize("place", ["clevr", "clevr/3.1.0", "."])
def test_the_path_may_be_that_of_the_set_or_of_a_version(path, monkeypatch, place):
    """Relative or not."""
    assert len(clevr(os.path.join(path, place))) == 3
    monkeypatch.chdir(os.path.join(path, place))
    assert len(clevr(".")) == 3


def test_a_name_and_a_version_must_fit(path):
    with pytest.raises(DataError, match="no data set of tensorflow-datasets is named"):
        Tfds(dataset="", path=path, split="train", resolution=8)
    with pytest.raises(
        DataError, match=r"holds version 3\.1\.0 of .*, not 3\.0\.0; set"
    ):
        Tfds(
            dataset="clevr:3.0.0",
            path=os.path.join(path, "clevr", "3.1.0"),
            split="train",
            resolution=8,
        )
