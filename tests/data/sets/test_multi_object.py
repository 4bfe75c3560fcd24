"""Multi-object record files: pixels, masks and objects of all six sets, and damage.

`files/` holds two small files that TensorFlow 2.21 wrote by `write_with_tensorflow`
below: three Tetrominoes scenes and two of binarised sprites.
"""

import gzip
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets import proto
from tfds_files import frame

from implicit_slots.data.sets import multi_object
from implicit_slots.data.sets.multi_object import MultiObject
from implicit_slots.data.sets.multi_object_files import ROOM_TESTS
from implicit_slots.data.source import DataError

messages: Any = proto.tf_example_pb2  # Made at run time: no checker knows them.
FILES = Path(__file__).parent / "files"
FRAMES = Path(__file__).parents[4] / "shared" / "data" / "clevr_frames"

# Shape of an image, number of masks, and of those of backgrounds.
SETS = {
    "clevr_with_masks": ((240, 320, 3), 11, 1),
    "multi_dsprites_binarized": ((64, 64, 1), 4, 1),
    "multi_dsprites_colored_on_grayscale": ((64, 64, 3), 6, 1),
    "multi_dsprites_colored_on_colored": ((64, 64, 3), 5, 1),
    "objects_room": ((64, 64, 3), 7, 4),
    "six_objects": ((64, 64, 3), 10, 4),
    "empty_room": ((64, 64, 3), 4, 4),
    "identical_color": ((64, 64, 3), 10, 4),
    "tetrominoes": ((35, 35, 3), 4, 1),
}
SPLITS = ("train", "validation", "test")
COUNT = 3


def published(name):
    """A set's file by its published name."""
    if name in ROOM_TESTS:
        return f"objects_room_test_{name}.tfrecords"
    return f"{name}.tfrecords" if "dsprites" in name else f"{name}_train.tfrecords"


def scene(name, number):
    """The features of one example by a formula, as the official reader lists them."""
    (height, width, channels), entities, backgrounds = SETS[name]
    objects = (number + 1) % (entities - backgrounds + 1)
    rows, columns = np.indices((height, width))
    # Sixteen tiles, which the entities of the scene take in turn.
    owner = (rows * 4 // height * 4 + columns * 4 // width) % (backgrounds + objects)
    image = 50 * number + 2 * rows[..., None] + 3 * columns[..., None]
    image = image + 10 * np.arange(channels) + 30 * owner[..., None]
    if channels == 1:
        image = 255 * (owner > 0)[..., None]
    masks = 255 * (owner == np.arange(entities)[:, None, None])
    if "dsprites" in name:
        masks = masks.transpose(1, 2, 0)  # Entities last, in these files alone.
    features = {"image": image % 256, "mask": masks}
    features = {key: value.astype(np.uint8) for key, value in features.items()}
    if backgrounds == 4:
        return features
    entity = np.arange(entities)
    features["visibility"] = np.float32(entity <= objects)
    numbers = {"x": 0, "y": 1, "shape": 2}
    if name == "clevr_with_masks":
        numbers = {"x": 0, "y": 1, "z": 2, "rotation": 3}
        coordinates = [20 * entity + number, 200 - 9 * entity, 9 + entity / 4]
        features["pixel_coords"] = np.float32(np.stack(coordinates, -1))
        for code, key in enumerate(("color", "material", "shape", "size")):
            features[key] = np.uint8((entity + number + code) % (code + 2))
    else:
        shades = entity[:, None] + np.arange(channels) / 8 + number
        features["color"] = np.float32(shades)
    if "dsprites" in name:
        numbers |= {"orientation": 3, "scale": 4}
    for key, code in numbers.items():
        features[key] = np.float32(entity + number / 2 + code / 8)
    return features


def serialised(features):
    """A `tf.train.Example` with one string per byte, as in the published files."""
    example = messages.Example()
    for key, value in features.items():
        feature = example.features.feature[key]
        if value.dtype == np.uint8:
            strings = [bytes([number]) for number in range(256)]
            feature.bytes_list.value.extend([strings[n] for n in value.ravel()])
        else:
            feature.float_list.value.extend(value.ravel().tolist())
    return example.SerializeToString()


def save(file, scenes):
    """An unpacked TFRecord file without TensorFlow."""
    file.write_bytes(b"".join(frame(serialised(scene)) for scene in scenes))


def write_with_tensorflow(file, scenes):
    """The same by TensorFlow itself."""
    tf = pytest.importorskip("tensorflow")
    with tf.io.TFRecordWriter(str(file), "GZIP") as writer:
        for features in scenes:
            lists = {}
            for key, value in features.items():
                if value.dtype == "uint8":
                    strings = [bytes([number]) for number in value.ravel()]
                    content = tf.train.BytesList(value=strings)
                    lists[key] = tf.train.Feature(bytes_list=content)
                else:
                    content = tf.train.FloatList(value=value.ravel().tolist())
                    lists[key] = tf.train.Feature(float_list=content)
            example = tf.train.Example(features=tf.train.Features(feature=lists))
            writer.write(example.SerializeToString())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All nine published files, unpacked, with three examples each."""
    root = tmp_path_factory.mktemp("files")
    for name in SETS:
        scenes = [scene(name, number) for number in range(COUNT)]
        save(root / published(name), scenes)
    return root


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """The same as they are published: gzip files."""
    root = tmp_path_factory.mktemp("packed")
    for file in folder.iterdir():
        (root / file.name).write_bytes(gzip.compress(file.read_bytes(), 1))
    return root


def opened(folder, name, split="train", **options):
    """A set's own frames, uncropped, all of them in one split."""
    if name in ROOM_TESTS:
        split, options["test_set"] = "test", name
    options = {"resolution": SETS[name][0][0], "max_objects": 10, **options}
    options = {"splits": dict.fromkeys(SPLITS, f"0:{COUNT}"), **options}
    dataset = "objects_room" if name in ROOM_TESTS else name
    return MultiObject(dataset=dataset, path=str(folder), split=split, **options)


def check_example(example, name, number, size=10, columns=slice(None)):
    """Everything of one example against the formula."""
    (height, width, _), entities, backgrounds = SETS[name]
    features = scene(name, number)
    image = np.broadcast_to(features["image"], (height, width, 3))
    np.testing.assert_array_equal(example["image"], image[:, columns])
    masks = features["mask"]
    if "dsprites" in name:
        masks = np.moveaxis(masks, -1, 0)
    ids = np.argmax(masks, 0) - backgrounds + 1
    np.testing.assert_array_equal(
        example["segmentation"], np.maximum(ids, 0)[:, columns]
    )
    assert example["segmentation"].dtype == np.int32
    objects = (number + 1) % (entities - backgrounds + 1)
    got = dict(example["objects"])
    assert got.pop("present").tolist() == [k < objects for k in range(size)]
    expected = {
        key: value[backgrounds:][:objects]
        for key, value in features.items()
        if key not in ("image", "mask", "visibility")
    }
    if name == "clevr_with_masks":
        expected["position"] = np.stack([expected.pop(axis) for axis in "xyz"], -1)
        expected["rotation"] = expected["rotation"] % (2 * np.pi)
        coordinates = expected.pop("pixel_coords")
        expected["pixel_position"] = coordinates[:, :2] - [columns.start or 0, 0]
        expected["depth"] = coordinates[:, 2]
        for key in ("color", "material", "shape", "size"):
            assert got[key].dtype == np.int32
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].shape == (size, *value.shape[1:])
        np.testing.assert_allclose(got[key][:objects], value, rtol=1e-6, err_msg=key)
        assert not got[key][objects:].any(), key


@pytest.mark.parametrize("name", SETS)
def test_every_pixel_mask_and_attribute_is_what_was_written(folder, name):
    """In the file's order of objects; CLEVR's wide frames by their middle square."""
    wide = name == "clevr_with_masks"
    source = opened(folder, name, crop="center" if wide else "none")
    assert len(source) == COUNT
    batch = source.batch(np.array([2, 0, 1]))
    for place, number in enumerate((2, 0, 1)):
        example = {key: batch[key][place] for key in ("image", "segmentation")}
        example["objects"] = {k: v[place] for k, v in batch["objects"].items()}
        columns = slice(40, 280) if wide else slice(None)
        check_example(example, name, number, columns=columns)
    assert not source.is_packed
    objects = SETS[name][1] - SETS[name][2]
    counts = source.count_objects(lambda numbers, desc: numbers)
    assert counts.tolist() == [(i + 1) % (objects + 1) for i in range(COUNT)]


@pytest.mark.parametrize(
    ("name", "count"), [("tetrominoes", 3), ("multi_dsprites_binarized", 2)]
)
def test_files_written_by_tensorflow_are_read(name, count):
    """These are committed: see this module's docstring."""
    source = opened(FILES, name, splits=dict.fromkeys(SPLITS, f"0:{count}"))
    examples = streamed(source)
    assert len(examples) == count
    for number, example in enumerate(examples):
        check_example(example, name, number)


@pytest.mark.parametrize("name", ["tetrominoes", "multi_dsprites_colored_on_colored"])
def test_files_that_tensorflow_writes_now_are_read(tmp_path, name):
    scenes = [scene(name, number) for number in range(COUNT)]
    write_with_tensorflow(tmp_path / published(name), scenes)
    for number, example in enumerate(streamed(opened(tmp_path, name))):
        check_example(example, name, number)


@pytest.mark.skipif(not FRAMES.is_dir(), reason=f"no rendered frames in {FRAMES}")
def test_rendered_clevr_frames_are_cropped_as_iodine_does(tmp_path):
    """Rows 29:221 and columns 64:256 of real frames and their masks."""
    frames, scenes = [], []
    for file in sorted((FRAMES / "images").rglob("*.png"))[:2]:
        mask = FRAMES / "masks" / file.relative_to(FRAMES / "images")
        with Image.open(file) as image, Image.open(mask) as ids:
            frames.append((np.asarray(image.convert("RGB")), np.asarray(ids)))
        image, ids = frames[-1]
        masks = np.uint8(255 * (ids == np.arange(11)[:, None, None]))
        features = scene("clevr_with_masks", 0)
        scenes.append({**features, "image": image, "mask": masks})
    save(tmp_path / "clevr_with_masks_train.tfrecords", scenes)
    source = opened(
        tmp_path,
        "clevr_with_masks",
        resolution=192,
        crop="clevr",
        splits=dict.fromkeys(SPLITS, "0:2"),
    )
    for number, (image, ids) in enumerate(frames):
        example = source[number]
        np.testing.assert_array_equal(example["image"], image[29:221, 64:256])
        np.testing.assert_array_equal(example["segmentation"], ids[29:221, 64:256])


def test_splits_are_ranges_of_records(folder):
    """Slot Attention's and Genesis's by default, with no record in two of them."""

    def ranges(name):
        splits = [opened(folder, name, s, splits=None).fingerprint() for s in SPLITS]
        return [split["records"] for split in splits]

    assert ranges("clevr_with_masks") == [[0, 70000], [70000, 85000], [85000, 100000]]
    first = [[0, 60000], [60000, 61000], [61000, 61320]]
    assert ranges("tetrominoes") == first
    assert ranges("multi_dsprites_colored_on_grayscale") == first
    rooms = [[20000, 1000000], [10000, 20000], [0, 922]]
    assert ranges("objects_room") == rooms
    splits = {"train": "1:3", "validation": "0:1", "test": "0:1"}
    source = opened(folder, "tetrominoes", splits=splits)
    assert len(source) == 2
    check_example(source[0], "tetrominoes", 1)
    file = folder / "tetrominoes_train.tfrecords"
    assert source.where(0) == f"record 1 of {file}"
    assert source.fingerprint() == {
        "file": file.name,
        "size": file.stat().st_size,
        "records": [1, 3],
    }


def test_the_file_is_found_by_itself_in_its_folder_and_in_the_buckets(
    folder, tmp_path, monkeypatch
):
    """`gsutil cp -r` makes a folder per data set; a home directory is expanded."""
    check_example(
        opened(folder / "tetrominoes_train.tfrecords", "tetrominoes")[1],
        "tetrominoes",
        1,
    )
    (tmp_path / "tetrominoes").mkdir()
    content = (folder / "tetrominoes_train.tfrecords").read_bytes()
    (tmp_path / "tetrominoes" / "tetrominoes_train.tfrecords").write_bytes(content)
    monkeypatch.setenv("HOME", str(tmp_path))
    check_example(opened("~", "tetrominoes")[2], "tetrominoes", 2)


def streamed(source, **options):
    return [decode() for decode in source.stream(**options)]


def test_a_packed_file_is_read_in_order(folder, packed):
    """What it decodes is what the unpacked one decodes, and nothing else is offered."""
    for name in ("tetrominoes", "objects_room"):
        source, plain = opened(packed, name), opened(folder, name)
        examples = streamed(source)
        assert source.is_packed and len(examples) == COUNT
        for number, example in enumerate(examples):
            jax.tree.map(np.testing.assert_array_equal, example, plain[number])
    jax.tree.map(np.testing.assert_array_equal, streamed(source, skip=2)[0], plain[2])
    kept = streamed(source, most=2)
    np.testing.assert_array_equal(
        [example["objects"]["present"].sum() for example in kept], [1, 2]
    )
    (last,) = streamed(source, most=2, skip=1)
    jax.tree.map(np.testing.assert_array_equal, last, plain[1])
    for use in (source.check, source.count_objects, lambda _: source[0]):
        with pytest.raises(DataError, match=r"implicit_slots\.data prepare` with the"):
            use(no_progress)


def test_splits_of_a_packed_file_are_read_in_one_pass(packed, monkeypatch):
    passes = []
    opened_file = gzip.open
    splits = {"train": "0:1", "validation": "1:2", "test": "2:3"}
    sources = [opened(packed, "tetrominoes", s, splits=splits) for s in SPLITS]
    multi_object._opened.cache_clear()
    monkeypatch.setattr(gzip, "open", lambda p: passes.append(p) or opened_file(p))
    for number, source in enumerate(sources):
        (example,) = streamed(source)
        check_example(example, "tetrominoes", number)
    assert len(passes) == 1


def test_only_what_is_wanted_is_read(folder):
    """The shapes of arrays follow `max_objects`."""
    assert opened(folder, "objects_room", keys=("image",))[0].keys() == {"image"}
    example = opened(folder, "objects_room", keys=("image", "objects"))[1]
    assert example.keys() == {"image", "objects"}
    assert example["objects"]["present"].tolist() == [True, True] + [False] * 8
    for size in (4, 20):
        source = opened(folder, "multi_dsprites_colored_on_colored", max_objects=size)
        check_example(source[1], "multi_dsprites_colored_on_colored", 1, size=size)


def test_threads_decode_side_by_side(folder):
    source = opened(folder, "tetrominoes")
    numbers = [0, 2, 1] * 8
    with ThreadPoolExecutor(4) as pool:
        examples = list(pool.map(source.decode, numbers))
    for number, example in zip(numbers, examples, strict=True):
        check_example(example, "tetrominoes", number)


def no_progress(numbers, desc):
    return numbers


def test_options_that_fit_no_file_are_one_sentence(folder, tmp_path):
    for options, sentence in [
        ({"splits": {"tarin": "0:1"}}, r"unknown split 'tarin' in config\.data\.spl"),
        (
            {"split": "test", "splits": {"test": "5"}},
            r"cannot be '5'; set --config\.data\.splits\.test=",
        ),
        ({"split": "test", "splits": {"test": "5:5"}}, r"split 'test' cannot be '5:5'"),
        ({"max_objects": 0}, "max_objects must be 1 to 254, got 0"),
    ]:
        with pytest.raises(DataError, match=sentence):
            opened(folder, "tetrominoes", **options)
    common: dict[str, Any] = {"path": str(folder), "resolution": 8, "max_objects": 9}
    with pytest.raises(DataError, match=r"no test set 'seven'; .* six_objects, empty"):
        MultiObject(dataset="objects_room", split="test", test_set="seven", **common)
    with pytest.raises(DataError, match=r"set it with --config\.data\.path=FOLDER"):
        opened("", "tetrominoes")
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"no tetrominoes_train\.tfrecords in .*"):
            opened(place, "tetrominoes")
    with pytest.raises(DataError) as error:
        opened(tmp_path, "objects_room", "test")
    assert str(error.value) == (
        f"there is no objects_room_test_six_objects.tfrecords in {tmp_path}; download "
        "it from https://storage.googleapis.com/multi-object-datasets/objects_room/"
        "objects_room_test_six_objects.tfrecords and put it there, or set "
        "--config.data.path to where it is"
    )


def test_a_file_with_too_few_records_is_one_sentence(folder, packed, tmp_path):
    """Whether it is checked or read, whole or cut off."""
    splits = {"train": "0:2", "validation": "2:4", "test": "0:1"}
    assert opened(folder, "tetrominoes", splits=splits)[1]
    for root in (folder, packed):
        source = opened(root, "tetrominoes", "validation", splits=splits)
        uses = (source.check, source.count_objects)
        for use in uses if root == folder else (lambda _: streamed(source),):  # noqa: B023
            with pytest.raises(DataError) as error:
                use(no_progress)
            assert str(error.value) == (
                f"{root}/tetrominoes_train.tfrecords has 3 records, fewer than split "
                "'validation' asks for (2:4); download it again if it is not whole, or "
                "set --config.data.splits.validation"
            )
    content = (packed / "tetrominoes_train.tfrecords").read_bytes()
    (tmp_path / "tetrominoes_train.tfrecords").write_bytes(content[:-200])
    with pytest.raises(DataError, match=r"tfrecords is cut off after 2 whole records"):
        streamed(opened(tmp_path, "tetrominoes"))


def test_records_of_another_set_are_one_sentence(folder, tmp_path):
    file = folder / "objects_room_test_six_objects.tfrecords"
    with pytest.raises(
        DataError, match=r"has 40960 numbers of 'mask' where 'objects_r"
    ):
        opened(file, "objects_room").count_objects(no_progress)
    file = folder / "multi_dsprites_colored_on_colored.tfrecords"
    with pytest.raises(DataError, match=r"has 15 numbers of 'color' where .* has 18"):
        opened(file, "multi_dsprites_colored_on_grayscale")[0]
    with pytest.raises(DataError, match=r"has 0 numbers of 'rotation' where"):
        features = scene("clevr_with_masks", 0)
        del features["rotation"]
        save(tmp_path / "a", [features])
        opened(tmp_path / "a", "clevr_with_masks", splits=dict.fromkeys(SPLITS, "0:1"))[
            0
        ]
    save(tmp_path / "a", [{"image": np.ones(1, np.float32)}])
    with pytest.raises(DataError, match="a has 0 numbers of 'color' where"):
        opened(tmp_path / "a", "tetrominoes")[0]


def test_more_objects_than_there_is_room_for_is_one_sentence(folder):
    source = opened(folder, "six_objects", max_objects=2)
    assert source[1]["objects"]["present"].all()
    with pytest.raises(
        DataError, match=r"record 2 of .* object 3, more than .* = 2; se"
    ):
        source[2]
    source = opened(folder, "six_objects", max_objects=2, keys=("segmentation",))
    with pytest.raises(DataError, match=r"object 3, more than max_objects = 2; set"):
        source[2]
