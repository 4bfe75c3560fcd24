"""Data sets that tensorflow-datasets prepared, read without TensorFlow."""

from typing import Any

import numpy as np
from PIL import Image

from implicit_slots.data.base import DataError, DecodedSource, Example, pack_objects
from implicit_slots.data.images import crop_box, into_crop, resize_image


class Tfds(DecodedSource):
    """Images of a data set in tensorflow-datasets' array_record files.

    CLEVR's objects come with the splits that have them, which are train and
    validation.
    """

    def __init__(
        self,
        *,
        split: str,
        resolution: int,
        dataset: str = "clevr",
        data_dir: str = "",
        crop: str = "clevr",
        max_objects: int = 10,
    ):
        """Opens the prepared files; decodes nothing and downloads nothing.

        Args:
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          dataset: the data set's name, with `/config` and `:version` where wanted.
          data_dir: where data sets were prepared; empty for
            tensorflow-datasets' own default.
          crop: what part of a frame is kept, see `images.crop_box`.
          max_objects: length of the arrays of attributes.

        Raises:
          DataError: no such data set or split, or it was not prepared.
        """
        super().__init__()
        # Slow to import, and only this source needs it.
        import tensorflow_datasets as tfds

        where = f", data_dir={data_dir!r}" if data_dir else ""
        try:
            builder: Any = tfds.builder(dataset, data_dir=data_dir or None)
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise DataError(
                f"tensorflow-datasets cannot find '{dataset}': "
                f"{str(error).splitlines()[0]}"
            ) from error
        try:
            self._records: Any = builder.as_data_source(split)
        except (NotImplementedError, ValueError, OSError) as error:
            splits = sorted(builder.info.splits)
            if splits and split not in splits:
                raise DataError(
                    f"data set '{dataset}' has no split '{split}', only "
                    f"{', '.join(splits)}"
                ) from error
            raise DataError(
                f"data set '{dataset}' is not prepared as array_record in "
                f'{builder.data_dir}; prepare it once with: python -c "import '
                f"tensorflow_datasets as tfds; tfds.builder({dataset!r}{where})"
                ".download_and_prepare(file_format='array_record')\" (which needs "
                "TensorFlow; reading does not)"
            ) from error
        self._name = f"{dataset}/{split}"
        self._has_objects = builder.name == "clevr" and split != "test"
        self._resolution = resolution
        self._crop = crop
        self._max_objects = max_objects

    def __len__(self) -> int:
        return len(self._records)

    def decode(self, index: int) -> Example:
        """Reads one record."""
        record: dict[str, Any] = self._records[index]
        # The published PNGs have an alpha channel, which this reader keeps.
        image = Image.fromarray(np.asarray(record["image"]))
        box = crop_box(self._crop, *image.size)
        example: Example = {"image": resize_image(image, box, self._resolution)}
        if self._has_objects:
            columns = record["objects"]
            rows = [
                dict(zip(columns, row, strict=True))
                for row in zip(*columns.values(), strict=True)
            ]
            objects = pack_objects(rows, self._max_objects, f"{self._name}[{index}]")
            example["objects"] = into_crop(objects, box, self._resolution)
        return example
