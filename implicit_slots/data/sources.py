"""The table of data sets, and how a configuration's section becomes a source."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Int

from implicit_slots.data import rendering, scenes
from implicit_slots.data.base import Batch, DataError, Source
from implicit_slots.data.cache import BlockCache
from implicit_slots.data.folder import ImageFolder
from implicit_slots.data.tfds import Tfds

__all__ = [
    "SOURCES",
    "SPLITS",
    "DataError",
    "ImageFolder",
    "Scenes",
    "Source",
    "Tfds",
    "build",
]

SPLITS = ("train", "validation", "test")

# Scenes rendered at once. No more than a usual batch, so that neighbouring batches,
# which different threads read, are different blocks and are rendered side by side.
SCENES_BLOCK = 32
# Bytes of another renderer must not pass for this one's. Read beside the import,
# because the files may be edited while a process runs.
RENDERER = hashlib.sha256(
    "".join(inspect.getsource(module) for module in (scenes, rendering)).encode()
).hexdigest()


class Scenes(Source):
    """The embedded scenes: rendered on first use, block by block, and kept.

    The three splits are disjoint because a scene's key is folded from its split. Scenes
    are independent draws, so that the first epoch reads them in order: rendering then
    proceeds block by block while the model already trains.
    """

    shuffle_first_epoch = False

    def __init__(
        self,
        *,
        split: str,
        resolution: int,
        train_size: int,
        validation_size: int,
        test_size: int,
        seed: int = 0,
        min_objects: int = 3,
        max_objects: int = 6,
        zoom: float = 1.0,
        with_masks: bool = False,
        cache: str = "",
    ):
        """Prepares the arrays; renders nothing.

        Args:
          split: "train", "validation" or "test".
          resolution: height and width of the images, in pixels.
          train_size: number of scenes of the training split.
          validation_size: the same for validation.
          test_size: the same for the test split.
          seed: of the data set, not of the run.
          min_objects: fewest objects in a scene.
          max_objects: most objects in a scene, and length of the attributes' arrays.
          zoom: images are the middle 1/zoom of CLEVR's crop in each direction, and
            scenes are placed for that; at least 1.
          with_masks: whether the training split, too, has `segmentation`, `shadow` and
            `objects`; validation and test always have them.
          cache: folder that keeps what was rendered for later runs; empty for none.

        Raises:
          DataError: an empty split, impossible numbers of objects, a zoom below 1, or
            a cache that cannot be written.
        """
        sizes = {"train": train_size, "validation": validation_size, "test": test_size}
        self._size = sizes[split]
        if self._size < 1:
            raise DataError(
                f"split '{split}' has {self._size} scenes; set "
                f"--config.data.{split}_size to at least 1"
            )
        if not 1 <= min_objects <= max_objects:
            raise DataError(
                "scenes need 1 <= min_objects <= max_objects, got "
                f"{min_objects} and {max_objects}"
            )
        if not zoom >= 1:
            raise DataError(f"scenes need zoom >= 1, got {zoom}")
        block = min(SCENES_BLOCK, self._size)
        arguments: dict[str, Any] = {
            "seed": seed,
            "split": split,
            "resolution": resolution,
            "min_objects": min_objects,
            "max_objects": max_objects,
            "zoom": zoom,
        }

        def make(first: int) -> Batch:
            indices = np.arange(first, first + block, dtype=np.int32)
            return rendering.render_batch(indices=indices, **arguments)

        shapes = jax.eval_shape(lambda: make(0))
        example = jax.tree.map(
            lambda leaf: np.empty(leaf.shape[1:], leaf.dtype), shapes
        )
        # Ids fit into a byte; `batch` hands them out as the contract's int32.
        for name in ("segmentation", "shadow"):
            example[name] = example[name].astype(np.uint8)
        if split == "train" and not with_masks:
            example = {"image": example["image"]}
        self._cache = BlockCache(
            make,
            example,
            count=self._size,
            block=block,
            folder=Path(cache).expanduser() / "scenes" if cache else None,
            manifest={
                **arguments,
                "renderer": RENDERER,
                # The same source rounds some pixels differently on these.
                "jax": jax.__version__,
                "backend": jax.default_backend(),
            },
        )

    def __len__(self) -> int:
        return self._size

    def batch(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """Gathers scenes, after rendering the blocks that are missing."""
        batch = self._cache.read(indices)
        for name in batch.keys() & {"segmentation", "shadow"}:
            batch[name] = batch[name].astype(np.int32)
        return batch


SOURCES: Mapping[str, Callable[..., Source]] = {
    "scenes": Scenes,
    "folder": ImageFolder,
    "tfds": Tfds,
}


def build(
    config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict, split: str
) -> Source:
    """The source that a configuration's section describes.

    Args:
      config: `name`, a key of `SOURCES`, and that source's arguments but `split`.
      split: "train", "validation" or "test".

    Raises:
      DataError: an unknown name, split or option, or data that cannot be used.
    """
    arguments: dict[str, Any] = config.to_dict()
    name = arguments.pop("name", None)
    if name not in SOURCES:
        raise DataError(
            f"unknown data set '{name}'; choose config.data.name from "
            f"{', '.join(SOURCES)}"
        )
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; choose from {', '.join(SPLITS)}")
    source = SOURCES[name]
    parameters = dict(inspect.signature(source).parameters)
    del parameters["split"]
    unknown = sorted(arguments.keys() - parameters)
    if unknown:
        raise DataError(
            f"data set '{name}' has no option {', '.join(unknown)}; it has "
            f"{', '.join(parameters)}"
        )
    missing = [
        option
        for option, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and option not in arguments
    ]
    if missing:
        raise DataError(
            f"data set '{name}' needs {', '.join(missing)}; set "
            f"--config.data.{missing[0]}"
        )
    if arguments["resolution"] < 1:
        raise DataError(f"resolution must be at least 1, got {arguments['resolution']}")
    return source(split=split, **arguments)
