"""3D Shapes and COCO's panoptic masks, in tensorflow-datasets' features."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tfds_files
from PIL import Image
from tensorflow_datasets.core import hashing

from implicit_slots.data.sets import tfds as reader
from implicit_slots.data.sets import tfds_formats
from implicit_slots.data.sets.tfds import Tfds
from implicit_slots.data.source import IGNORED, DataError


def noise(seed, height, width, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def silent(iterable, **_):
    return iterable


FACTORS = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")


def shapes3d_row(row):
    """A row: orientation changes fastest, then shape, then scale and so on."""
    labels = np.unravel_index(row, (10, 10, 10, 8, 4, 15))
    return {
        "image": tfds_files.png(noise(row, 64, 64)),
        **{f"label_{f}": int(v) for f, v in zip(FACTORS, labels, strict=True)},
        **{f"value_{f}": float(v) for f, v in zip(FACTORS, labels, strict=True)},
    }


def write_shapes3d(root, rows):
    features = tfds.builder("shapes3d", data_dir=str(root)).info.features
    examples = [shapes3d_row(row) for row in rows]
    tfds_files.write(
        root, "shapes3d", features, {"train": examples}, version="2.0.0", shard=25
    )


@pytest.fixture
def few_rows(monkeypatch):
    """The published file has 60 rows, for once."""
    splits = {
        "train": slice(0, 40),
        "validation": slice(41, 50),
        "test": slice(51, 58),
    }
    for module in (reader, tfds_formats):
        monkeypatch.setattr(module, "SHAPES3D_ROWS", 60)
    monkeypatch.setattr(reader, "SHAPES3D_SPLITS", splits)
    return splits


def shuffled(count):
    """Rows in the order in which TFDS writes them: by its hash of their number."""
    return sorted(range(count), key=hashing.Hasher("train").hash_key)


def shapes3d(path, split="train", **options):
    options = {"resolution": 64, "max_objects": 1, **options}
    return Tfds(dataset="shapes3d", path=str(path), split=split, **options)


def test_shapes3d_is_split_by_rows_of_the_published_file(tmp_path, few_rows):
    """Whatever TFDS's order, example i of a split is row first + i; labels are kept."""
    write_shapes3d(tmp_path, shuffled(60))
    for split, rows in few_rows.items():
        source = shapes3d(tmp_path, split)
        assert len(source) == rows.stop - rows.start
        for i in (0, 3, len(source) - 1):
            row = rows.start + i
            example = source[i]
            np.testing.assert_array_equal(example["image"], noise(row, 64, 64))
            assert example.keys() == {"image", "objects"}
            objects = example["objects"]
            assert objects.pop("present").tolist() == [True]
            labels = np.unravel_index(row, (10, 10, 10, 8, 4, 15))
            assert {f: v.tolist() for f, v in objects.items()} == {
                f: [v] for f, v in zip(FACTORS, labels, strict=True)
            }
            assert all(v.dtype == np.int32 for v in objects.values())
    assert shapes3d(tmp_path).count_objects(silent).tolist() == [1] * 40


def test_shapes3d_is_found_in_the_order_in_which_its_builder_writes_it(
    tmp_path, few_rows, monkeypatch
):
    """TFDS's own builder, from a file like the published one, to Pillow's pixels."""
    pytest.importorskip("tensorflow")
    h5py = pytest.importorskip("h5py")
    labels = np.stack(np.unravel_index(range(60), (10, 10, 10, 8, 4, 15)), -1)
    with h5py.File(tmp_path / "3dshapes.h5", "w") as file:
        file["images"] = np.stack([noise(row, 64, 64) for row in range(60)])
        file["labels"] = labels / 10.0
    monkeypatch.setattr(
        tfds.download.DownloadManager,
        "download",
        lambda self, url: str(tmp_path / "3dshapes.h5"),
    )
    Tfds.download("shapes3d", str(tmp_path / "prepared"))
    for split, rows in few_rows.items():
        source = shapes3d(tmp_path / "prepared", split)
        for i in range(len(source)):
            row = rows.start + i
            np.testing.assert_array_equal(source[i]["image"], noise(row, 64, 64))
            found = [int(source[i]["objects"][factor][0]) for factor in FACTORS]
            assert found == labels[row].tolist()


def test_slices_of_shapes3d_are_in_tensorflow_datasets_order(tmp_path, few_rows):
    write_shapes3d(tmp_path, shuffled(60))
    source = shapes3d(tmp_path, splits={"train": "train[30:]"}, max_objects=2)
    assert len(source) == 30
    np.testing.assert_array_equal(source[0]["image"], noise(shuffled(60)[30], 64, 64))
    assert source[0]["objects"]["present"].tolist() == [True, False]


def test_shapes3d_in_another_order_or_incomplete_is_refused(tmp_path, few_rows):
    write_shapes3d(tmp_path / "ordered", range(60))
    with pytest.raises(DataError, match=r"shapes3d/2\.0\.0 is not in the order in whi"):
        shapes3d(tmp_path / "ordered")
    write_shapes3d(tmp_path / "part", range(30))
    with pytest.raises(
        DataError, match=r"has 30 records where the published file has "
    ):
        shapes3d(tmp_path / "part")
    assert len(shapes3d(tmp_path / "part", splits={"train": "train"})) == 30


def test_official_slates_splits_leave_out_two_rows():
    """To the letter of its code: [:400000], [400001:430000] and [430001:460000]."""
    sizes = [
        len(range(*s.indices(480_000))) for s in tfds_formats.SHAPES3D_SPLITS.values()
    ]
    assert sizes == [400_000, 29_999, 29_999]
    assert np.prod(list(tfds_formats.SHAPES3D_FACTORS.values())) == 480_000


def coco_features(number=np.int64):
    """`coco/2017_panoptic`: its builder needs TensorFlow to say so."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": number,
            "panoptic_image": tfds.features.Image(encoding_format="png"),
            "panoptic_image/filename": tfds.features.Text(),
            "panoptic_objects": tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(num_classes=133),
                    "is_crowd": np.bool_,
                }
            ),
        }
    )


SEGMENTS = [  # id, label, crowd: a person, sky, a crowd, a toothbrush, a banner
    (7, 0, False),
    (256 * 3 + 1, 119, False),
    (65536 * 200 + 256 * 100 + 50, 0, True),
    (65536 + 2, 79, False),
    (16777215, 80, False),
]


def coco_example(seed, segments=SEGMENTS, size=(12, 20)):
    """A scene whose ids are drawn per pixel, 0 (unlabelled) among them."""
    ids = np.array([0, *(segment[0] for segment in segments)])
    codes = np.random.default_rng(seed).choice(ids, size)
    colours = np.stack([codes % 256, codes // 256 % 256, codes // 65536], -1)
    jpeg = io.BytesIO()
    Image.fromarray(noise(seed, 12, 20)).save(jpeg, "JPEG", quality=95)
    jpeg.seek(0)
    example = {
        "image": jpeg,
        "image/filename": f"{seed}.jpg",
        "image/id": seed,
        "panoptic_image": tfds_files.png(colours.astype(np.uint8)),
        "panoptic_image/filename": f"{seed}.png",
        "panoptic_objects": [
            {
                "id": segment,
                "area": int((codes == segment).sum()),
                "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
                "label": label,
                "is_crowd": crowd,
            }
            for segment, label, crowd in segments
        ],
    }
    return example, codes, Image.open(io.BytesIO(jpeg.getvalue()))


@pytest.fixture(scope="module")
def coco_path(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    tfds_files.write(
        root,
        "coco",
        coco_features(),
        {
            "train": [coco_example(i)[0] for i in range(2)] + [coco_example(2, [])[0]],
            "validation": [coco_example(9, SEGMENTS[::-1])[0]],
        },
        config="2017_panoptic",
        version="1.1.0",
    )
    return root


def coco(path, split="train", **options):
    options = {"resolution": 12, "max_objects": 5, **options}
    return Tfds(dataset="coco/2017_panoptic", path=str(path), split=split, **options)


@pytest.mark.parametrize(
    ("masks", "kept"), [("instances", [0, 3]), ("panoptic", [0, 1, 3, 4])]
)
def test_panoptic_segments_become_ids_in_their_order(coco_path, masks, kept):
    """Crowds are ignored; stuff is background, or what is unlabelled is ignored."""
    source = coco(coco_path, masks=masks)
    assert len(source) == 3
    for i in range(2):
        _, codes, jpeg = coco_example(i)
        example = source[i]
        middle = np.s_[:, 4:16]
        np.testing.assert_array_equal(example["image"], np.asarray(jpeg)[middle])
        expected = np.zeros((12, 20), int)
        expected[codes == SEGMENTS[2][0]] = IGNORED
        if masks == "panoptic":
            expected[codes == 0] = IGNORED
        for place, segment in enumerate(kept):
            expected[codes == SEGMENTS[segment][0]] = place + 1
        assert len(np.unique(expected)) == len(kept) + 2 - (masks == "panoptic")
        np.testing.assert_array_equal(example["segmentation"], expected[middle])
        labels = [SEGMENTS[segment][1] for segment in kept]
        objects = example["objects"]
        assert objects["label"].tolist() == labels + [0] * (5 - len(kept))
        assert objects["label"].dtype == np.int32
        assert objects["present"].tolist() == [k < len(kept) for k in range(5)]
    empty = source[2]
    assert (empty["segmentation"] == (IGNORED if masks == "panoptic" else 0)).all()
    assert not empty["objects"]["present"].any()
    assert source.count_objects(silent).tolist() == [len(kept)] * 2 + [0]
    test = coco(coco_path, "test", masks=masks)
    assert test.fingerprint()["split"] == "validation"
    labels = [SEGMENTS[segment][1] for segment in kept[::-1]]
    assert test[0]["objects"]["label"][: len(kept)].tolist() == labels


def test_panoptic_records_that_do_not_fit_are_one_sentence(coco_path, tmp_path):
    """Too many objects, masks of another size, a configuration that is not named."""
    for keys in (("image", "segmentation"), ("image", "objects")):
        with pytest.raises(
            DataError,
            match=r"record 0 of .*/coco-tr.* has 4 objects, more than max_obj",
        ):
            coco(coco_path, masks="panoptic", max_objects=3, keys=keys)[0]
    assert coco(coco_path, max_objects=1, keys=("image",))[0].keys() == {"image"}
    small = coco_example(0, size=(11, 20))[0]
    tfds_files.write(
        tmp_path, "coco", coco_features(), {"train": [small]}, config="2017_panoptic"
    )
    with pytest.raises(
        DataError, match="image of 20 x 12 pixels and a mask of 20 x 11"
    ):
        coco(tmp_path)[0]
    with pytest.raises(DataError, match="unknown masks 'all'; set"):
        coco(coco_path, masks="all")
    with pytest.raises(DataError, match=r"dataset=coco/2017_panoptic if that is"):
        Tfds(dataset="coco", path=str(coco_path), split="train", resolution=8)


def test_cocos_features_are_those_of_its_builder(tmp_path):
    pytest.importorskip("tensorflow")
    builder = tfds.builder("coco/2017_panoptic", data_dir=str(tmp_path))
    assert repr(builder.info.features) == repr(coco_features())
