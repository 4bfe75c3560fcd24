"""What every source of images is, and the error for data that cannot be used."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8

from implicit_slots.runtime.errors import UserError

Example = dict[str, Any]
Batch = dict[str, Any]

SPLITS = ("train", "validation", "test")
# In `segmentation`: nobody knows what is there, and no metric looks.
IGNORED = -1
# Integer codes, in the order of tensorflow-datasets' CLEVR.
CLEVR_CODES: Mapping[str, tuple[str, ...]] = {
    "color": ("gray", "blue", "brown", "yellow", "red", "green", "purple", "cyan"),
    "material": ("rubber", "metal"),
    "shape": ("cube", "sphere", "cylinder"),
    "size": ("small", "large"),
}


class DataError(UserError):
    """Data that a user asked for and that cannot be used: one sentence says why."""


class Source(abc.ABC):
    """A random-access data set that is read by whole batches of indices.

    Attributes:
      shuffle_first_epoch: False where the examples' own order is already random and
        reading them in that order is cheaper.
      notes: sentences on what of the files is left out, which a user wants to know.
      twin: the same examples mirrored, where that is not done by mirroring pixels.
    """

    shuffle_first_epoch: bool = True
    notes: Sequence[str] = ()
    twin: "Source | None" = None

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
          `segmentation` is 0 on the background and `IGNORED` where no metric counts.
        """

    def example(self) -> Example:
        """Arrays of the shapes and types of an example; what they hold means nothing.

        A source that knows them without reading says so at once.
        """
        return self[0]

    def once(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """As `batch`, of a few examples from all over that are read this once.

        A source that keeps what was dear to make need not keep these, nor what lies
        beside them.
        """
        return self.batch(indices)

    def without(
        self,
        indices: Int[np.ndarray, " batch"],
        removed: Bool[np.ndarray, "batch objects"],
    ) -> UInt8[np.ndarray, "batch height width 3"] | None:
        """Images of the same scenes without some of their objects.

        Their shadows and reflections go too, and what they hid is seen.

        Args:
          indices: as for `batch`.
          removed: which objects, by their place in the arrays of `objects`; true for
            one that is not there changes nothing.

        Returns:
          None where the source cannot draw its scenes again.
        """
        del indices, removed
        return None

    def __getitem__(self, index: int) -> Example:
        """One example: a batch's entry without its leading axis."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a source of {len(self)} examples")
        return jax.tree.map(lambda leaf: leaf[0], self.batch(np.array([index])))


def mark_present(
    count: int, max_objects: int, where: str
) -> Bool[np.ndarray, " {max_objects}"]:
    """The array `present` of a scene whose objects come first.

    Args:
      count: number of its objects.
      max_objects: length of the array.
      where: the scene's name in a sentence.

    Raises:
      DataError: more objects than fit.
    """
    if count > max_objects:
        raise DataError(
            f"{where} has {count} objects, more than max_objects = {max_objects}; set "
            f"--config.data.max_objects={count} or more"
        )
    return np.arange(max_objects) < count


def pack_objects(
    objects: Sequence[Mapping[str, Any]], max_objects: int, where: str
) -> dict[str, np.ndarray]:
    """One scene's objects as arrays, padded with zeros to `max_objects`.

    The keys are those of `scenes.sampling.objects`; `pixel_position` is in pixels of
    the frame.

    Args:
      objects: CLEVR's attributes by name: `color`, `material`, `shape` and `size` as
        words or codes, `rotation`, `3d_coords` and `pixel_coords`.
      max_objects: length of the arrays.
      where: the scene's name in a sentence.

    Raises:
      DataError: more objects than fit, or an attribute that CLEVR does not know.
    """
    if not isinstance(objects, Sequence):
        raise DataError(f"{where} has no list of objects but {objects!r}")
    arrays: dict[str, np.ndarray] = {
        "present": mark_present(len(objects), max_objects, where),
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
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} has an object without CLEVR's attributes: {error}"
        ) from error
    return arrays
