"""The embedded scenes as a source: rendered on first use, and kept."""

import hashlib
import inspect
import os
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8

from implicit_slots.data.prepared.cache import BlockCache
from implicit_slots.data.prepared.cache_folder import cache_folder
from implicit_slots.data.scenes import rendering, sampling
from implicit_slots.data.source import Batch, DataError, Example, Source

# Scenes rendered at once. No more than a usual batch, so that neighbouring batches,
# which different threads read, are different blocks and are rendered side by side.
SCENES_BLOCK = 32
# Bytes of another renderer must not pass for this one's. Read beside the import,
# because the files may be edited while a process runs.
RENDERER = hashlib.sha256(
    "".join(inspect.getsource(module) for module in (sampling, rendering)).encode()
).hexdigest()


class Scenes(Source):
    """The embedded scenes: rendered on first use, block by block, and kept.

    The three splits are disjoint because a scene's key is folded from its split. Scenes
    are independent draws, so that the first epoch reads them in order: rendering then
    proceeds block by block while the model already trains.

    Attributes:
      folder: where the scenes are kept; None without a cache.
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
        keys: Collection[str] | None = None,
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
          keys: what `batch` returns; None for all there is.

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
        # The same for all splits, however small: they then share a program.
        block = SCENES_BLOCK
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
        if split == "train" and not with_masks:
            example = {"image": example["image"]}
        self._example = {n: v for n, v in example.items() if keys is None or n in keys}
        # Ids fit into a byte; `batch` hands them out as the contract's int32.
        example |= {
            name: example[name].astype(np.uint8)
            for name in ("segmentation", "shadow")
            if name in example
        }
        manifest = {
            "name": "scenes",
            **arguments,
            "with_masks": "segmentation" in example,
            "renderer": RENDERER,
            # The same source rounds some pixels differently with these.
            "jax": jax.__version__,
            "optimised": not jax.config.read("jax_disable_most_optimizations"),
            "backend": jax.default_backend(),
            "count": self._size,
        }
        self._keys = keys
        self._block = block
        self._arguments = arguments
        # Hosts that share a file system must not share memory-mapped files.
        if cache and jax.process_count() > 1:
            cache = os.path.join(cache, f"process-{jax.process_index()}")
        self.folder = cache_folder(cache, manifest) if cache else None
        self._blocks = BlockCache(
            make,
            example,
            count=self._size,
            block=block,
            folder=self.folder,
            manifest=manifest,
        )

    def __len__(self) -> int:
        return self._size

    def example(self) -> Example:
        """As `Source.example`; renders nothing."""
        return self._example

    def batch(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """Gathers scenes, after rendering the blocks that are missing."""
        return self._blocks.read(indices, self._keys)

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
        # By whole blocks, as `batch` renders: the same program gives the same bytes.
        blocks = []
        for start in range(0, len(indices), self._block):
            chunk = slice(start, start + self._block)
            pad = self._block - len(indices[chunk])
            batch = rendering.render_batch(
                indices=np.pad(indices[chunk], (0, pad), "edge").astype(np.int32),
                keep=~np.pad(removed[chunk], ((0, pad), (0, 0)), "edge"),
                **self._arguments,
            )
            blocks.append(np.asarray(batch["image"])[: self._block - pad])
        return np.concatenate(blocks)

    def render_all(self, progress: Callable[..., Any]) -> None:
        """Renders every block that is missing.

        Args:
          progress: wraps an iterable to show how far it is, as `tqdm` does.
        """
        for block in progress(range(self._blocks.num_blocks), desc="rendering"):
            self._blocks.fill(block)
        self._blocks.finish()

    def verify(self, progress: Callable[..., Any]) -> None:
        """Compares every block in the cache with its checksum.

        Args:
          progress: wraps an iterable to show how far it is, as `tqdm` does.

        Raises:
          DataError: a block is missing, or has other bytes than when it was rendered.
        """
        self._blocks.verify(progress)
