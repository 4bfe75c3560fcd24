"""MOVi's videos, in the features of kubric's builders."""

import importlib
import importlib.util
import io
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tfds_files

from implicit_slots.data import registry
from implicit_slots.data.sets.tfds import Tfds
from implicit_slots.data.source import CLEVR_CODES, DataError


def silent(iterable, **_):
    return iterable


FRAMES, SIDE = 24, 8
MOVI_WORDS = {
    "shape": ["cube", "cylinder", "sphere"],
    "size": ["small", "large"],
    "color": ["blue", "brown", "cyan", "gray", "green", "purple", "red", "yellow"],
    "material": ["metal", "rubber"],
}
CATEGORIES = ["Action Figures", "Bag", "Board Games", "Toys"]


# To write videos and ragged boxes, tensorflow-datasets needs TensorFlow. Without it,
# these tests write the same bytes as a sequence of images, and no boxes.
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None


def movi_features(letter):
    """The features of kubric's movi_a.py, movi_c.py and movi_e.py, at 8 x 8 pixels."""
    feature = tfds.features
    s, h, w = FRAMES, SIDE, SIDE

    def video(shape, dtype: Any = np.uint8):
        if HAS_TENSORFLOW:
            return feature.Video(shape=shape, dtype=dtype)
        return feature.Sequence(feature.Image(shape=shape[1:], dtype=dtype), length=s)

    def tensor(*shape, dtype: Any = np.float32):
        return feature.Tensor(shape=shape, dtype=dtype)

    boxes = {
        "bboxes": feature.Sequence(feature.BBoxFeature()),
        "bbox_frames": feature.Sequence(tensor(dtype=np.int32)),
    }
    ranges = ("depth_range", "forward_flow_range", "backward_flow_range")
    own = {
        "a": {
            **{
                f"{n}_label": feature.ClassLabel(names=w) for n, w in MOVI_WORDS.items()
            },
            "color": tensor(3),
        },
        "c": {
            "asset_id": feature.Text(),
            "category": feature.ClassLabel(names=CATEGORIES),
            "scale": np.float32,
        },
    }
    own["e"] = {**own["c"], "is_dynamic": np.bool_}
    return feature.FeaturesDict(
        {
            "metadata": {
                "video_name": feature.Text(),
                **dict.fromkeys(("width", "height", "num_frames"), np.int32),
                "num_instances": np.uint16,
                **{name: tensor(2) for name in ranges},
            },
            **({"background": feature.Text()} if letter in "ce" else {}),
            "instances": feature.Sequence(
                {
                    **dict.fromkeys(("mass", "friction", "restitution"), np.float32),
                    "positions": tensor(s, 3),
                    "quaternions": tensor(s, 4),
                    "velocities": tensor(s, 3),
                    "angular_velocities": tensor(s, 3),
                    "bboxes_3d": tensor(s, 8, 3),
                    "image_positions": tensor(s, 2),
                    **(boxes if HAS_TENSORFLOW else {}),
                    "visibility": tensor(s, dtype=np.uint16),
                    **own[letter],
                }
            ),
            "camera": {
                **dict.fromkeys(
                    ("focal_length", "sensor_width", "field_of_view"), np.float32
                ),
                "positions": tensor(s, 3),
                "quaternions": tensor(s, 4),
            },
            "events": {
                "collisions": feature.Sequence(
                    {
                        "instances": tensor(2, dtype=np.uint16),
                        "frame": np.int32,
                        "force": np.float32,
                        "position": tensor(3),
                        "image_position": tensor(2),
                        "contact_normal": tensor(3),
                    }
                )
            },
            "video": video(shape=(s, h, w, 3)),
            "segmentations": feature.Sequence(
                feature.Image(shape=(h, w, 1), dtype=np.uint8), length=s
            ),
            "forward_flow": feature.Sequence(
                tensor(h, w, 2, dtype=np.uint16), length=s
            ),
            "backward_flow": feature.Sequence(
                tensor(h, w, 2, dtype=np.uint16), length=s
            ),
            "depth": feature.Sequence(
                feature.Image(shape=(h, w, 1), dtype=np.uint16), length=s
            ),
            "normal": video(shape=(s, h, w, 3), dtype=np.uint16),
            "object_coordinates": video(shape=(s, h, w, 3), dtype=np.uint16),
        }
    )


def movi_frame(video, frame, count):
    """Image, mask, and the objects' places of one frame."""
    rng = np.random.default_rng([video, frame])
    image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    mask = rng.integers(0, count + 1, (SIDE, SIDE), np.uint8)
    return image, mask, rng.random((count, 3), np.float32)


def movi_example(letter, video, count):
    frames = [movi_frame(video, frame, count) for frame in range(FRAMES)]
    flow = np.zeros((SIDE, SIDE, 2), np.uint16)
    places = np.stack([frame[2] for frame in frames], 1)

    def instance(k):
        label = {n: MOVI_WORDS[n][(video + k) % len(w)] for n, w in MOVI_WORDS.items()}
        own = {
            "a": {
                **{f"{name}_label": word for name, word in label.items()},
                "color": np.zeros(3, np.float32),
            },
            "c": {"asset_id": "x", "category": CATEGORIES[k % 4], "scale": 1.0},
        }
        own["e"] = {**own["c"], "is_dynamic": k > 19}
        boxes = {
            "bboxes": [tfds.features.BBox(0.0, 0.0, 1.0, 1.0)] * (k + 1),
            "bbox_frames": list(range(k + 1)),
        }
        return {
            **dict.fromkeys(("mass", "friction", "restitution"), 1.0),
            "positions": 10 * places[k],
            "quaternions": np.zeros((FRAMES, 4), np.float32),
            "velocities": np.zeros((FRAMES, 3), np.float32),
            "angular_velocities": np.zeros((FRAMES, 3), np.float32),
            "bboxes_3d": np.zeros((FRAMES, 8, 3), np.float32),
            "image_positions": places[k, :, :2],
            **(boxes if HAS_TENSORFLOW else {}),
            "visibility": np.full(FRAMES, 9, np.uint16),
            **own[letter],
        }

    return {
        "metadata": {
            "video_name": str(video),
            "width": SIDE,
            "height": SIDE,
            "num_frames": FRAMES,
            "num_instances": count,
            "depth_range": np.ones(2, np.float32),
            "forward_flow_range": np.ones(2, np.float32),
            "backward_flow_range": np.ones(2, np.float32),
        },
        **({"background": "alps"} if letter in "ce" else {}),
        "instances": [instance(k) for k in range(count)],
        "camera": {
            **dict.fromkeys(("focal_length", "sensor_width", "field_of_view"), 1.0),
            "positions": np.arange(3 * FRAMES, dtype=np.float32).reshape(FRAMES, 3),
            "quaternions": np.zeros((FRAMES, 4), np.float32),
        },
        "events": {"collisions": []},
        "video": [tfds_files.png(frame[0]) for frame in frames],
        "segmentations": [tfds_files.png(frame[1]) for frame in frames],
        "forward_flow": [flow] * FRAMES,
        "backward_flow": [flow] * FRAMES,
        # Never decoded: not even pictures.
        **{
            name: [io.BytesIO(b"none") for _ in range(FRAMES)]
            for name in ("depth", "normal", "object_coordinates")
        },
    }


@pytest.fixture(scope="module")
def movi_path(tmp_path_factory):
    """As published: tfrecord files, and a test split of MOVi-C and MOVi-E."""
    root = tmp_path_factory.mktemp("movi")
    for letter in "ace":
        splits = {
            "train": [movi_example(letter, v, 3 + v % 2) for v in range(3)],
            "validation": [movi_example(letter, 7, 2)],
            **({"test": [movi_example(letter, 9, 1)] * 2} if letter == "c" else {}),
        }
        if letter == "e":
            splits = {"train": splits["train"][:1], "test": [movi_example("e", 4, 23)]}
        home = tfds_files.write(
            root,
            f"movi_{letter}",
            movi_features(letter),
            splits,
            config="128x128",
            shard=2,
        )
        tfds_files.as_tfrecord(home)
    return root


def movi(path, letter="a", split="train", **options):
    options = {"resolution": SIDE, "max_objects": 5, **options}
    name = f"movi_{letter}/128x128"
    return Tfds(dataset=name, path=str(path), split=split, **options)


def check_movi(source, index, video, frame, count, most=5):
    example = source[index]
    image, mask, places = movi_frame(video, frame, count)
    np.testing.assert_array_equal(example["image"], image)
    np.testing.assert_array_equal(example["segmentation"], mask)
    assert example["segmentation"].dtype == np.int32
    objects = example["objects"]
    assert objects["present"].tolist() == [k < count for k in range(most)]
    np.testing.assert_allclose(objects["position"][:count], 10 * places, rtol=1e-6)
    np.testing.assert_allclose(
        objects["pixel_position"][:count], SIDE * places[:, :2], rtol=1e-5
    )
    assert not objects["pixel_position"][count:].any()
    return objects


def test_every_frame_of_a_video_is_an_example(movi_path):
    """Frames, masks and places of the moment; MOVi-A's words become CLEVR's codes."""
    source = movi(movi_path)
    assert len(source) == 3 * FRAMES
    for video in range(3):
        for frame in (0, 1, 13, 23):
            count = 3 + video % 2
            objects = check_movi(source, video * FRAMES + frame, video, frame, count)
            for name, words in MOVI_WORDS.items():
                expected = [words[(video + k) % len(words)] for k in range(count)]
                found = [CLEVR_CODES[name][c] for c in objects[name][:count]]
                assert found == expected
    assert source.where(FRAMES + 2).startswith("frame 2 of record 1 of ")
    assert source.count_objects(silent).tolist() == [3] * 24 + [4] * 24 + [3] * 24
    source.check(silent)


def test_frames_can_be_skipped_and_cropped(movi_path):
    source = movi(movi_path, frame_step=5)
    assert len(source) == 3 * 5
    for index, frame in ((0, 0), (1, 5), (4, 20)):
        check_movi(source, index, 0, frame, 3)
    check_movi(source, 5, 1, 0, 4)
    assert source.count_objects(silent).tolist() == [3] * 5 + [4] * 5 + [3] * 5
    cropped = movi(movi_path, crop="center-4", resolution=4)[0]
    image, mask, places = movi_frame(0, 0, 3)
    np.testing.assert_array_equal(cropped["image"], image[2:6, 2:6])
    np.testing.assert_array_equal(cropped["segmentation"], mask[2:6, 2:6])
    np.testing.assert_allclose(
        cropped["objects"]["pixel_position"][:3], SIDE * places[:, :2] - 2, atol=1e-5
    )


def test_a_video_is_parsed_once_for_all_its_frames(movi_path, monkeypatch):
    source = movi(movi_path)
    calls = []
    parse = source._parse
    monkeypatch.setattr(
        source, "_parse", lambda *arguments: calls.append(1) or parse(*arguments)
    )
    for index in range(3 * FRAMES):
        source.decode(index)
    assert len(calls) == 3


def test_movi_tests_on_its_own_split_where_there_is_one(movi_path):
    """MOVi-A tests on validation; MOVi-C has categories and a test split."""
    check_movi(movi(movi_path, split="validation"), 3, 7, 3, 2)
    check_movi(movi(movi_path, split="test"), 3, 7, 3, 2)
    source = movi(movi_path, "c", "test")
    assert len(source) == 2 * FRAMES
    objects = check_movi(source, 5, 9, 5, 1)
    assert objects.keys() == {"present", "position", "pixel_position", "category"}
    objects = check_movi(movi(movi_path, "c"), FRAMES, 1, 0, 4)
    assert objects["category"].tolist() == [0, 1, 2, 3, 0]
    home = movi_path / "movi_c" / "128x128" / "1.0.0"
    check_movi(
        Tfds(
            dataset="movi_c",
            path=str(home),
            split="validation",
            resolution=SIDE,
            max_objects=5,
        ),
        23,
        7,
        23,
        2,
    )


@pytest.mark.parametrize("name", ["movi_e", "dinosaur_movi_e"])
def test_movi_e_has_up_to_23_objects_and_a_test_split(movi_path, name):
    """By its configurations, which have a slot for each object and one more."""
    config = importlib.import_module(f"configs.{name}").get_config()
    data = config.data
    assert config.model.num_slots == data.max_objects + 1 == 24
    assert config.name == name and data.path == "data"
    data.update(path=str(movi_path), cache="", resolution=SIDE)
    source = registry.build(data, "test")
    assert len(source) == FRAMES
    for frame in (0, 23):
        objects = check_movi(source, frame, 4, frame, 23, most=23)
        assert objects["category"].tolist() == [k % 4 for k in range(23)]
    assert len(registry.build(data, "train")) == FRAMES


def test_videos_of_another_length_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "FRAMES", 23)
    example = movi_example("a", 0, 3)
    tfds_files.write(tmp_path, "movi_a", movi_features("a"), {"train": [example]})
    source = Tfds(dataset="movi_a", path=str(tmp_path), split="train", resolution=8)
    with pytest.raises(
        DataError, match=r"record 0 of .* is not an .*\(23 frames instead of 24\); pr"
    ):
        source[0]
    with pytest.raises(DataError, match=r"record 0 of .* is not an example of movi_a"):
        source.count_objects(silent)


def test_more_instances_than_objects_is_one_sentence(movi_path):
    with pytest.raises(
        DataError, match=r"frame 1 of record 1 of .* has 4 objects, more than max_obj"
    ):
        movi(movi_path, max_objects=3).decode(25)
    with pytest.raises(DataError, match=r"mask of frame 0 of rec.* has object 3, more"):
        movi(movi_path, max_objects=2, keys=("image", "segmentation"))[0]
