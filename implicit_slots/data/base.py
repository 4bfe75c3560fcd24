"""What every source of images is, and the error for data that cannot be used."""

import abc
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

Example = dict[str, Any]
Batch = dict[str, Any]

# A source of decoded examples keeps them in memory up to this size.
KEPT_BYTES = 1 << 30

# Integer codes, in the order of tensorflow-datasets' CLEVR.
CLEVR_CODES: Mapping[str, tuple[str, ...]] = {
    "color": ("gray", "blue", "brown", "yellow", "red", "green", "purple", "cyan"),
    "material": ("rubber", "metal"),
    "shape": ("cube", "sphere", "cylinder"),
    "size": ("small", "large"),
}


class DataError(ValueError):
    """Data that a user asked for and that cannot be used: one sentence says why."""


class Source(abc.ABC):
    """A random-access data set that is read by whole batches of indices.

    Attributes:
      shuffle_first_epoch: False where the examples' own order is already random and
        reading them in that order is cheaper.
    """

    shuffle_first_epoch: bool = True

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abc.abstractmethod
    def batch(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """The examples of these indices, stacked; called from several threads.

        Args:
          indices: each in 0 … len(self) - 1; may repeat.

        Returns:
          `image` uint8 [batch, H, W, 3] and, where the source has them,
          `segmentation` and `shadow` int32 [batch, H, W] and `objects`, a dictionary
          of arrays [batch, max_objects, …] with `present` bool [batch, max_objects].
        """

    def __getitem__(self, index: int) -> Example:
        """One example: a batch's entry without its leading axis."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a source of {len(self)} examples")
        return jax.tree.map(lambda leaf: leaf[0], self.batch(np.array([index])))


class DecodedSource(Source):
    """A source that decodes examples one by one, and keeps all of them if they fit."""

    def __init__(self):
        self._kept: Batch | None = None
        self._is_kept = np.zeros(0, bool)
        self._lock = threading.Lock()

    @abc.abstractmethod
    def decode(self, index: int) -> Example:
        """Reads one example, with the keys of `batch` and no leading axis."""

    def batch(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """Gathers examples from memory, after decoding those that are not there."""
        with self._lock:
            if not len(self._is_kept):
                self._make_room(self.decode(int(indices[0])))
        if self._kept is None:
            examples = [self.decode(int(index)) for index in indices]
            return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
        # Two threads may decode the same example: that is harmless, and a lock here
        # would let only one thread decode at a time.
        for index in np.unique(indices[~self._is_kept[indices]]):
            example = self.decode(int(index))
            for room, leaf in zip(
                jax.tree.leaves(self._kept), jax.tree.leaves(example), strict=True
            ):
                room[index] = leaf
            self._is_kept[index] = True
        return jax.tree.map(lambda leaf: leaf[indices], self._kept)

    def _make_room(self, example: Example) -> None:
        """Allocates arrays for all examples like this one if they are few enough."""
        self._is_kept = np.zeros(len(self), bool)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(example))
        if size * len(self) <= KEPT_BYTES:
            # Pages are only taken from the system when an example is written.
            self._kept = jax.tree.map(
                lambda leaf: np.empty((len(self), *leaf.shape), leaf.dtype), example
            )


def pack_objects(
    objects: Sequence[Mapping[str, Any]], max_objects: int, where: str
) -> dict[str, np.ndarray]:
    """One scene's objects as arrays, padded with zeros to `max_objects`.

    The keys are those of `scenes.objects`; `pixel_position` is in pixels of the frame.

    Args:
      objects: CLEVR's attributes by name: `color`, `material`, `shape` and `size` as
        words or codes, `rotation`, `3d_coords` and `pixel_coords`.
      max_objects: length of the arrays.
      where: the scene's name in a sentence.

    Raises:
      DataError: more objects than fit, or an attribute that CLEVR does not know.
    """
    if len(objects) > max_objects:
        raise DataError(
            f"{where} has {len(objects)} objects, more than max_objects = "
            f"{max_objects}; set --config.data.max_objects={len(objects)} or more"
        )
    arrays: dict[str, np.ndarray] = {
        "present": np.arange(max_objects) < len(objects),
        **{name: np.zeros(max_objects, np.int32) for name in CLEVR_CODES},
        "rotation": np.zeros(max_objects, np.float32),
        "position": np.zeros((max_objects, 3), np.float32),
        "pixel_position": np.zeros((max_objects, 2), np.float32),
        "depth": np.zeros(max_objects, np.float32),
    }
    try:
        for place, attributes in enumerate(objects):
            for name, words in CLEVR_CODES.items():
                value = attributes[name]
                if isinstance(value, str) and value not in words:
                    raise DataError(
                        f"{where} has an object of {name} '{value}', which is none "
                        f"of CLEVR's: {', '.join(words)}"
                    )
                arrays[name][place] = (
                    words.index(value) if isinstance(value, str) else value
                )
            # A number in 0 … 360 that CLEVR's generator handed to Blender as radians.
            arrays["rotation"][place] = np.mod(attributes["rotation"], 2 * np.pi)
            arrays["position"][place] = attributes["3d_coords"]
            column, row, arrays["depth"][place] = attributes["pixel_coords"]
            arrays["pixel_position"][place] = column, row
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where} has an object without CLEVR's attributes: {error}"
        ) from error
    return arrays
