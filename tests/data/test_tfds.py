"""TFDS records: written by its own machinery in CLEVR's true features, read back."""

import numpy as np
import pytest
from PIL import Image

from implicit_slots.data.base import DataError
from implicit_slots.data.tfds import Tfds

tfds = pytest.importorskip("tensorflow_datasets")


def frame(seed):
    """A 320x480 RGBA picture, like those that CLEVR publishes."""
    small = np.random.default_rng(seed).integers(0, 256, (10, 15, 3), np.uint8)
    colours = np.kron(small, np.ones((32, 32, 1), np.uint8))
    return np.dstack([colours, np.full((320, 480), 255, np.uint8)])


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


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """CLEVR with three training and two test images, prepared without TensorFlow."""
    root = tmp_path_factory.mktemp("tfds")
    home = root / "clevr" / "3.1.0"
    home.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="clevr",
            version=tfds.core.Version("3.1.0"),
            data_dir=str(home),
            module_name="tensorflow_datasets.image.clevr",
        ),
        features=tfds.builder("clevr", data_dir=str(root)).info.features,
    )
    writer = tfds.core.SequentialWriter(info, 10, file_format="array_record")
    writer.initialize_splits(["train", "test"])
    for split, count in (("train", 3), ("test", 2)):
        for i in range(count):
            file = root / f"{split}{i}.png"
            Image.fromarray(frame(i)).save(file)
            objects = [cube("red", 240.0), cube("gray", 96.0)][: 2 - i % 2]
            example = {
                "file_name": file.name,
                "image": str(file),
                "objects": objects if split == "train" else [],
                "question_answer": [],
            }
            writer.add_examples({split: [example]})
    writer.close_all()
    return str(root)


def test_clevr_records_become_cropped_images_with_attributes(data_dir):
    """Rows 24:312 and columns 96:384 of 320x480 are IODINE's crop; codes are TFDS's."""
    source = Tfds(split="train", resolution=288, data_dir=data_dir, max_objects=3)
    assert len(source) == 3
    batch = source.batch(np.array([2, 1]))
    for image, i in zip(batch["image"], (2, 1), strict=True):
        np.testing.assert_array_equal(image, frame(i)[24:312, 96:384, :3])
    objects = batch["objects"]
    assert objects["present"].tolist() == [[True, True, False], [True, False, False]]
    assert objects["color"].tolist() == [[4, 0, 0], [4, 0, 0]]
    assert objects["material"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert objects["size"].tolist() == [[1, 1, 0], [1, 0, 0]]
    np.testing.assert_allclose(objects["pixel_position"][0, :2], [[144, 176], [0, 176]])
    np.testing.assert_allclose(objects["rotation"][0, 0], 10 - 2 * np.pi, rtol=1e-6)


def test_the_test_split_has_images_alone(data_dir):
    source = Tfds(split="test", resolution=32, data_dir=data_dir)
    assert source[1].keys() == {"image"} and source[1]["image"].shape == (32, 32, 3)


def test_what_is_not_prepared_is_one_sentence(data_dir, tmp_path):
    """The sentence holds the command that prepares the data set."""
    with pytest.raises(DataError) as error:
        Tfds(split="train", resolution=8, data_dir=str(tmp_path))
    assert (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('clevr', data_dir='{tmp_path}')"
        ".download_and_prepare(file_format='array_record')\""
    ) in str(error.value)
    with pytest.raises(DataError, match="no split 'validation', only test, train"):
        Tfds(split="validation", resolution=8, data_dir=data_dir)
    with pytest.raises(DataError, match="cannot find 'clever'"):
        Tfds(split="train", resolution=8, dataset="clever")
    with pytest.raises(DataError, match="has 2 objects, more than max_objects = 1"):
        Tfds(split="train", resolution=8, data_dir=data_dir, max_objects=1)[0]
