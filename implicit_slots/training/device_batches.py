"""Batches onto the devices: from the host while steps run, or gathered where they lie.

Both give the same batches, bit for bit, on any number of devices and processes.
"""

import abc
import contextlib
import queue
import threading
import time
from collections.abc import Iterable
from multiprocessing.pool import ThreadPool
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from implicit_slots.data.batches import TrainBatches, mirror, read_ahead
from implicit_slots.data.source import DataError, Source
from implicit_slots.runtime.devices import DATA_AXIS, shard_batch
from implicit_slots.runtime.progress import bar

# Batches that are on their way to the devices while a step runs.
AHEAD = 2
# How much of a device's memory a training set may take.
MEMORY_SHARE = 0.8
# Examples that a process reads at once on their way into the devices' memory.
CHUNK = 256


class Feed(abc.ABC):
    """Training batches on the devices, in order.

    Attributes:
      waited: seconds that the devices had nothing to do but wait for a batch.
    """

    waited: float = 0.0

    @abc.abstractmethod
    def next(self, after: PyTree = None) -> PyTree:
        """The batch of the next step.

        Args:
          after: what the step before returned. Where the batch is not there yet, its
            arrays are waited for first: only then do the devices wait.

        Raises:
          Exception: whatever reading this batch raised; those before it are good.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends what reads ahead."""


def train_batches(
    source: Source,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    placement: str = "host",
    workers: int = 2,
    flip: bool = False,
) -> Feed:
    """Endless training batches on the devices, from `start_step` on.

    Args:
      source: this process's view of the data.
      mesh: the devices; a batch is split over them.
      batch_size: examples of a step over all processes.
      seed: of the order of examples.
      start_step: the first step to yield.
      placement: "host" reads batches ahead and sends them; "device" sends the whole
        training set once, a share to each device, and gathers batches there.
      workers: reading threads.
      flip: whether half of the examples are mirrored.

    Raises:
      DataError: the training set does not fit into the devices' memory.
    """
    if placement == "device":
        # Every device gathers from its own share what of the whole batch lies there.
        batches = TrainBatches(source, batch_size, seed, flip=flip)
        return Gathered(batches, Resident(source, mesh, workers), start_step)
    share = TrainBatches(
        source, batch_size, seed, jax.process_index(), jax.process_count(), flip
    )
    return Sent(share, mesh, start_step, workers)


class Sent(Feed):
    """Batches that a thread reads and sends while steps run."""

    def __init__(
        self,
        batches: TrainBatches,
        mesh: jax.sharding.Mesh,
        start_step: int,
        workers: int,
    ):
        """Starts the thread; see `train_batches`."""
        self._sent: queue.Queue[Any] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        reader = read_ahead(batches, start_step=start_step, threads=workers)
        self._thread = threading.Thread(
            target=self._send, args=(reader, mesh), daemon=True
        )
        self._thread.start()

    def next(self, after: PyTree = None) -> PyTree:
        """The batch of the next step, as `Feed.next`."""
        try:
            item = self._sent.get_nowait()
        except queue.Empty:
            jax.block_until_ready(after)
            began = time.perf_counter()
            item = self._sent.get()
            self.waited += time.perf_counter() - began
        if isinstance(item, BaseException):
            self._sent.put(item)  # For whoever asks again.
            raise item
        return item

    def close(self) -> None:
        """Ends the threads."""
        self._closed.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._sent.get(timeout=0.01)  # The thread may wait for room.

    def _send(self, reader: Any, mesh: jax.sharding.Mesh) -> None:
        with contextlib.closing(reader):
            while not self._closed.is_set():
                try:
                    item = shard_batch(next(reader), mesh)
                except BaseException as error:
                    item = error
                self._sent.put(item)
                if isinstance(item, BaseException):
                    return


class Gathered(Feed):
    """Batches that the devices gather from their memory."""

    def __init__(self, batches: TrainBatches, resident: "Resident", start_step: int):
        """Begins at a step; see `train_batches`."""
        self._batches = batches
        self._resident = resident
        self._step = start_step

    def next(self, after: PyTree = None) -> PyTree:
        """The batch of the next step, as `Feed.next`; the devices never wait."""
        step, self._step = self._step, self._step + 1
        flips = self._batches.flips(step) if self._batches.flip else None
        return self._resident.gather(self._batches.indices(step), flips)

    def close(self) -> None:
        """Does nothing: nothing is read ahead."""


class Resident:
    """A data set in the devices' memory, an equal share of its examples on each."""

    def __init__(self, source: Source, mesh: jax.sharding.Mesh, workers: int = 2):
        """Sends the examples; each process reads those of its own devices.

        Args:
          source: whose batches' arrays are all sent.
          mesh: the devices.
          workers: reading threads.

        Raises:
          DataError: a share does not fit into a device's memory.
        """
        self._mesh = mesh
        self._share = share = -(-len(source) // mesh.size)
        example = source[0]
        size = share * sum(leaf.nbytes for leaf in jax.tree.leaves(example))
        _check_memory(mesh.local_devices, size)
        rows = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
        places = {device: n for n, device in enumerate(mesh.devices.flat)}
        shares = [
            jax.tree.map(
                lambda leaf, device=device: jax.device_put(leaf, device),
                _read(source, example, places[device] * share, share, workers),
            )
            for device in rows.addressable_devices
        ]
        self._arrays = jax.tree.map(
            lambda *leaves: jax.make_array_from_single_device_arrays(
                (share * mesh.size, *leaves[0].shape[1:]), rows, list(leaves)
            ),
            *shares,
        )
        self._gather = jax.jit(
            jax.shard_map(
                self._local,
                mesh=mesh,
                in_specs=(PartitionSpec(DATA_AXIS), PartitionSpec(), PartitionSpec()),
                out_specs=PartitionSpec(DATA_AXIS),
            )
        )

    def gather(self, indices: np.ndarray, flips: np.ndarray | None = None) -> PyTree:
        """The examples of these indices as a batch that is split over the devices.

        Args:
          indices: int [batch], the same in every process.
          flips: bool [batch], which ones to mirror; None for none.
        """
        return self._gather(self._arrays, indices.astype(np.int32), flips)

    def _local(self, share: PyTree, indices: jax.Array, flips: jax.Array | None):
        """One device: sends what lies here, keeps its part of the batch."""
        first = lax.axis_index(DATA_AXIS) * self._share
        here = (indices >= first) & (indices < first + self._share)

        def exchange(leaf):
            mine = leaf[jnp.where(here, indices - first, 0)]
            mine = jnp.where(here.reshape(-1, *[1] * (leaf.ndim - 1)), mine, 0)
            # One device alone has each example, so that the sum is the example.
            number = mine.astype(jnp.uint8) if leaf.dtype == bool else mine
            scattered = lax.psum_scatter(number, DATA_AXIS, tiled=True)
            return scattered.astype(leaf.dtype)

        batch = jax.tree.map(exchange, share)
        if flips is None:
            return batch
        size = len(indices) // self._mesh.size
        part = lax.axis_index(DATA_AXIS) * size
        mine = lax.dynamic_slice_in_dim(flips, part, size)
        return mirror(batch, mine, jnp.where)


def _read(
    source: Source, example: PyTree, first: int, count: int, workers: int
) -> PyTree:
    """Examples `first` … `first + count - 1`; past the end the last one again."""
    rows = jax.tree.map(
        lambda leaf: np.empty((count, *leaf.shape), leaf.dtype), example
    )

    def fill(start: int) -> None:
        stop = min(start + CHUNK, count)
        places = np.minimum(np.arange(first + start, first + stop), len(source) - 1)
        for room, leaf in zip(
            jax.tree.leaves(rows), jax.tree.leaves(source.batch(places)), strict=True
        ):
            room[start:stop] = leaf

    with ThreadPool(workers) as pool:
        chunks = pool.imap_unordered(fill, range(0, count, CHUNK))
        for _ in bar(chunks, total=-(-count // CHUNK), desc="to the device"):
            pass
    return rows


def _check_memory(devices: Iterable[Any], size: int) -> None:
    """Refuses a share that leaves a device too little for the model."""
    for device in devices:
        memory: Any = device.memory_stats() or {}
        free = memory.get("bytes_limit", 2 * size) - memory.get("bytes_in_use", 0)
        if MEMORY_SHARE * free < size:
            raise DataError(
                f"a device's share of the training set takes {size / 1e9:.1f} GB and "
                f"{device} has {free / 1e9:.1f} GB left; set "
                "--config.data.placement=host"
            )
