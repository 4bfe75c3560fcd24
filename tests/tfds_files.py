"""Data sets as tensorflow-datasets prepares them, written without TensorFlow."""

import io
import struct

import google_crc32c
import numpy as np
from PIL import Image


def png(array):
    """A picture, encoded; tensorflow-datasets takes a file of it as an example's."""
    stream = io.BytesIO()
    Image.fromarray(np.asarray(array)).save(stream, "PNG")
    stream.seek(0)
    return stream


def write(root, name, features, splits, *, config="", version="1.0.0", shard=10):
    """Writes array_record files by tensorflow-datasets' own writer.

    Args:
      root: its `data_dir`.
      name: of the data set.
      features: its `FeaturesDict`.
      splits: the examples of each split, in order.
      config: the configuration's name, if it has one.
      version: of the data set.
      shard: examples in a file.

    Returns:
      The folder of this version.
    """
    import tensorflow_datasets as tfds

    home = root / name / config / version
    home.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=name,
            version=tfds.core.Version(version),
            data_dir=str(home),
            module_name=name,
            config_name=config or None,
        ),
        features=features,
    )
    writer = tfds.core.SequentialWriter(info, shard, file_format="array_record")
    writer.initialize_splits(list(splits))
    for split, examples in splits.items():
        writer.add_examples({split: examples})
    writer.close_all()
    return home


def as_tfrecord(home):
    """Turns array_record files into tfrecord ones, the default, in place."""
    from array_record.python import array_record_data_source

    for file in sorted(home.glob("*.array_record-*")):
        with array_record_data_source.ArrayRecordDataSource(str(file)) as records:
            framed = b"".join(frame(record) for record in records)
        (home / file.name.replace("array_record", "tfrecord")).write_bytes(framed)
        file.unlink()
    description = home / "dataset_info.json"
    description.write_text(
        description.read_text().replace('"array_record"', '"tfrecord"')
    )
    assert '"tfrecord"' in description.read_text()


def frame(record):
    """A record as TensorFlow's `record_writer.h` frames it."""
    length = struct.pack("<Q", len(record))
    return length + masked_crc(length) + record + masked_crc(record)


def masked_crc(content):
    """The masked checksum of TFRecord files."""
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
