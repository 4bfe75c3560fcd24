"""From a source to batches in order: a pure function of (seed, step).

One epoch follows the other without a gap: step s holds positions s·B … (s + 1)·B - 1 of
the endless sequence of epochs, so that every epoch visits every example exactly once
whether or not the batch divides it, and any step can be computed without the ones
before it.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Int

from implicit_slots.data.source import Batch, DataError, Source

# In the place of an epoch's number: the stream of numbers that mirror images.
FLIPS = 2**64 - 1


@functools.lru_cache(maxsize=4)  # A batch touches two epochs, prefetching one more.
def epoch_order(seed: int, epoch: int, length: int) -> Int[np.ndarray, " length"]:
    """The order of one epoch: a permutation that only its arguments determine.

    It sorts raw Philox numbers, because NumPy promises that stream to stay the same
    from version to version, and does not promise it of `Generator.permutation`.

    Args:
      seed: seed of the run, not negative.
      epoch: which epoch, from 0.
      length: number of examples.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    order = np.argsort(bits.random_raw(length), kind="stable")
    order.setflags(write=False)  # The cache hands the same array to everybody.
    return order


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """The endless sequence of one process's training batches, by step.

    Attributes:
      source: where the examples come from.
      batch_size: examples of a step over all processes.
      seed: of the order of examples.
      process_index: which share of each batch this process reads.
      process_count: number of equal shares.
      flip: whether half of the examples are mirrored, left to right.
    """

    source: Source
    batch_size: int
    seed: int
    process_index: int = 0
    process_count: int = 1
    flip: bool = False

    def __post_init__(self):
        _check_share(self.batch_size, self.process_index, self.process_count)
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if len(self.source) < self.batch_size:
            raise DataError(
                f"the training set has {len(self.source)} examples, fewer than one "
                f"batch of {self.batch_size}; use a smaller batch or more examples"
            )

    def __len__(self) -> int:
        return sys.maxsize  # Epochs repeat without end.

    def indices(self, step: int) -> Int[np.ndarray, " share"]:
        """Indices into the source of this process's share of one step."""
        share = self.batch_size // self.process_count
        start = step * self.batch_size + self.process_index * share
        epochs, places = np.divmod(np.arange(start, start + share), len(self.source))
        indices = places
        for epoch in np.unique(epochs):
            if epoch > 0 or self.source.shuffle_first_epoch:
                order = epoch_order(self.seed, int(epoch), len(self.source))
                here = epochs == epoch
                indices = np.where(here, order[places], indices)
        return indices

    def flips(self, step: int) -> Bool[np.ndarray, " share"]:
        """Which examples of this process's share of one step are mirrored."""
        if not self.flip:
            return np.zeros(self.batch_size // self.process_count, bool)
        key = np.array([self.seed, FLIPS], np.uint64)
        bits = np.random.Philox(key=key, counter=[0, step, 0, 0])
        share = self.batch_size // self.process_count
        start = self.process_index * share
        odd = bits.random_raw(self.batch_size) % 2 == 1
        return odd[start : start + share]

    def __getitem__(self, index: int) -> Batch:
        indices = self.indices(index)
        batch = self.source.batch(indices)
        if not self.flip:
            return batch
        flips = self.flips(index)
        if self.source.twin is None:
            return mirror(batch, flips, np.where)
        twin = self.source.twin.batch(indices)
        return {name: _chosen(flips, twin[name], batch[name]) for name in batch}


def mirror(
    batch: Batch, flips: Bool[Any, " batch"], where: Callable[..., Any]
) -> Batch:
    """Mirrors some examples, left to right.

    Args:
      batch: as `Source.batch` describes it. `pixel_position` goes along with the
        pixels; attributes in the world stay.
      flips: which ones.
      where: NumPy's or JAX's.
    """
    width = batch["image"].shape[2]
    mirrored = dict(batch)
    for name in batch.keys() & {"image", "segmentation", "shadow"}:
        values = batch[name]
        mirrored[name] = _chosen(flips, values[:, :, ::-1], values, where)
    if "pixel_position" in batch.get("objects", {}):
        position = batch["objects"]["pixel_position"]
        moved = position * np.array([-1, 1], np.float32)
        moved = moved + np.array([width, 0], np.float32)
        there = batch["objects"]["present"] & flips[:, None]
        mirrored["objects"] = {
            **batch["objects"],
            "pixel_position": where(there[..., None], moved, position),
        }
    return mirrored


def _chosen(
    flips: Any, mirrored: Any, values: Any, where: Callable[..., Any] = np.where
) -> Any:
    """Of some examples these values, of the others those."""
    return where(flips.reshape(-1, *[1] * (values.ndim - 1)), mirrored, values)


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """Every example once, in order; the last batch is padded.

    Attributes:
      source: where the examples come from.
      batch_size: examples of a batch over all processes, padding included.
      process_index: which share of each batch this process reads.
      process_count: number of equal shares.
    """

    source: Source
    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        _check_share(self.batch_size, self.process_index, self.process_count)

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        share = self.batch_size // self.process_count
        start = index * self.batch_size + self.process_index * share
        places = np.arange(start, start + share)
        # Padding repeats the last example, so that it is an image like any other.
        batch = self.source.batch(np.minimum(places, len(self.source) - 1))
        return {**batch, "mask": places < len(self.source)}


def read_ahead(
    batches: TrainBatches, *, start_step: int = 0, threads: int = 2, ahead: int = 16
) -> grain.DatasetIterator:
    """Training batches from `start_step` on, without end, read ahead in threads.

    The batch of step s is the same whatever the start, the number of threads and how
    often the run was interrupted. Nothing before `start_step` is read.

    Args:
      batches: the sequence.
      start_step: the first step to yield.
      threads: number of reading threads, each of which reads a batch at a time; 0
        reads in the caller's.
      ahead: number of batches to have ready.

    Returns:
      Batches of host arrays, as `Source.batch` describes them. Its `close()` ends the
      threads.
    """
    return _read_ahead(grain.MapDataset.source(batches)[start_step:], threads, ahead)


def evaluation_batches(
    source: Source,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    ahead: int = 4,
) -> grain.DatasetIterator:
    """Every example exactly once, in order, in batches of one size.

    Args:
      source: where the examples come from.
      batch_size: examples of a batch over all processes.
      process_index: which share of each batch this process reads.
      process_count: number of equal shares.
      threads: number of reading threads; 0 reads in the caller's.
      ahead: number of batches to have ready.

    Returns:
      Batches of host arrays, as `Source.batch` describes them, with `mask` bool
      [batch]: False marks the padding at the end of the last one.

    Raises:
      ValueError: the processes do not divide the batch.
    """
    batches = EvaluationBatches(source, batch_size, process_index, process_count)
    return _read_ahead(grain.MapDataset.source(batches), threads, ahead)


def _read_ahead(
    batches: grain.MapDataset, threads: int, ahead: int
) -> grain.DatasetIterator:
    """Iterates over whole batches as Grain's elements.

    Grain costs some tens of microseconds an element: with a batch for an element that
    is paid once a step.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(batches.to_iter_dataset(options))


def _check_share(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count} does not exist")
    if batch_size % process_count:
        raise ValueError(
            f"a batch of {batch_size} cannot be split evenly over "
            f"{process_count} processes"
        )
