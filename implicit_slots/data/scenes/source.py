"""The embedded scenes as a source: rendered on first use, and kept in memory."""

import threading
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8

from implicit_slots.data.scenes import rendering
from implicit_slots.data.scenes.shifts import SHIFTS
from implicit_slots.data.source import Batch, DataError, Example, Source

# Scenes rendered at once. No more than a usual batch, so that neighbouring batches,
# which different threads read, are different blocks and are rendered side by side.
SCENES_BLOCK = 32
# Renderers that are compiled, by what they are compiled for; the first call of each is
# alone, so that no second thread compiles it, too.
_COMPILED: set[tuple[Any, ...]] = set()
_COMPILING = threading.Lock()
# Ids fit into a byte; `batch` hands them out as the contract's int32.
IDS = ("segmentation", "shadow")


class Scenes(Source):
    """The embedded scenes: rendered on first use, block by block, and kept.

    The three splits are disjoint because a scene's key is folded from its split. Scenes
    are independent draws, so that the first epoch reads them in order: rendering then
    proceeds block by block while the model already trains. An image takes 3 bytes a
    pixel of memory, with masks 5.
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
        shift: str = "",
        with_masks: bool = False,
        keys: Collection[str] | None = None,
    ):
        """Makes room; renders nothing.

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
          shift: one of `SHIFTS`, for scenes as no training scene is; "" for none.
          with_masks: whether the training split, too, has `segmentation`, `shadow` and
            `objects`; validation and test always have them.
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: an empty split, impossible numbers of objects, a zoom below 1, an
            unknown shift, or one that these scenes cannot have.
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
        self._arguments: dict[str, Any] = {
            "seed": seed,
            "split": split,
            "resolution": resolution,
            "min_objects": min_objects,
            "max_objects": max_objects,
            "zoom": zoom,
        }
        if shift:
            if shift not in SHIFTS:
                raise DataError(
                    f"scenes have no shift {shift!r}, but {', '.join(SHIFTS)}"
                )
            if SHIFTS[shift].hidden and max_objects == 1:
                raise DataError(
                    "one object hides no other: the shift 'occlusion' needs scenes of "
                    "max_objects >= 2; name the other shifts"
                )
            self._arguments["shift"] = SHIFTS[shift]
        shapes = jax.eval_shape(lambda: self._render(np.arange(SCENES_BLOCK)))
        has_masks = split != "train" or with_masks
        names = shapes.keys() if has_masks else {"image"}
        names = [name for name in names if keys is None or name in keys]
        self._example = jax.tree.map(
            lambda leaf: np.empty(leaf.shape[1:], leaf.dtype),
            {name: shapes[name] for name in names},
        )
        # The system gives out memory as it is written.
        self._kept: Batch = {
            name: jax.tree.map(
                lambda leaf, name=name: np.empty(
                    (self._size, *leaf.shape), np.uint8 if name in IDS else leaf.dtype
                ),
                field,
            )
            for name, field in self._example.items()
        }
        blocks = -(-self._size // SCENES_BLOCK)
        self._is_kept = np.zeros(blocks, bool)
        self._locks = [threading.Lock() for _ in range(blocks)]

    def __len__(self) -> int:
        return self._size

    def example(self) -> Example:
        """As `Source.example`; renders nothing."""
        return self._example

    def batch(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """Gathers scenes, after rendering the blocks that are missing."""
        blocks = np.unique(indices // SCENES_BLOCK)
        for block in blocks[~self._is_kept[blocks]].tolist():
            with self._locks[block]:  # A second thread waits and finds it rendered.
                if not self._is_kept[block]:
                    self._fill(block)
        batch = jax.tree.map(lambda leaf: leaf[indices], self._kept)
        return batch | {k: batch[k].astype(np.int32) for k in IDS if k in batch}

    def once(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """As `Source.once`: renders these scenes, not the blocks that they lie in."""
        if self._is_kept[indices // SCENES_BLOCK].all():
            return self.batch(indices)
        return self._rendered(indices, self._kept)

    def without(
        self,
        indices: Int[np.ndarray, " batch"],
        removed: Bool[np.ndarray, "batch objects"],
    ) -> UInt8[np.ndarray, "batch height width 3"]:
        """Renders the scenes again, without some of their objects; keeps nothing.

        Args:
          indices: of the scenes.
          removed: which of each one's `max_objects` objects to leave out.
        """
        return self._rendered(indices, ("image",), keep=~removed)["image"]

    def _rendered(
        self,
        indices: Int[np.ndarray, " batch"],
        names: Collection[str],
        keep: Bool[np.ndarray, "batch objects"] | None = None,
    ) -> Batch:
        """Renders scenes from anywhere; `keep` as in `rendering.render`."""
        # By whole blocks, as `batch` renders: the same program gives the same bytes.
        blocks = []
        for start in range(0, len(indices), SCENES_BLOCK):
            chunk = slice(start, start + SCENES_BLOCK)
            pad = SCENES_BLOCK - len(indices[chunk])
            kept = {}
            if keep is not None:
                kept["keep"] = np.pad(keep[chunk], ((0, pad), (0, 0)), "edge")
            batch = self._draw(np.pad(indices[chunk], (0, pad), "edge"), **kept)
            whole = {name: batch[name] for name in names}
            size = SCENES_BLOCK - pad
            blocks.append(
                jax.tree.map(lambda leaf, size=size: np.asarray(leaf)[:size], whole)
            )
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *blocks)

    def _draw(self, indices: Int[np.ndarray, " batch"], **keep: Any) -> Batch:
        """Renders a block; waits where another thread compiles what renders."""
        split = {"split": ""}  # The splits share a program.
        program = tuple((self._arguments | split).values())
        if program in _COMPILED:
            return self._render(indices, **keep)
        with _COMPILING:
            batch = self._render(indices, **keep)
            _COMPILED.add(program)
            return batch

    def _render(self, indices: Int[np.ndarray, " batch"], **keep: Any) -> Batch:
        # Whatever a program of the user's has set: the same bytes.
        with (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
        ):
            return rendering.render_batch(
                indices=indices.astype(np.int32), **keep, **self._arguments
            )

    def _fill(self, block: int) -> None:
        first = block * SCENES_BLOCK
        rendered = self._draw(np.arange(first, first + SCENES_BLOCK))
        rendered = {name: rendered[name] for name in self._kept}
        for room, leaf in zip(
            jax.tree.leaves(self._kept), jax.tree.leaves(rendered), strict=True
        ):
            rows = room[first : first + SCENES_BLOCK]  # Fewer in the last block.
            rows[:] = np.asarray(leaf)[: len(rows)]
        self._is_kept[block] = True
