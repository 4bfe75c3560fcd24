"""Batches onto the devices: from the host while steps run, or gathered where they lie.

Both give the same batches, bit for bit, on any number of devices and processes.
"""

import collections
import contextlib
from collections.abc import Generator, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from implicit_slots.data import pipeline
from implicit_slots.data.base import DataError, Source
from implicit_slots.training.sharding import DATA_AXIS, shard_batch

PLACEMENTS = ("host", "device")
# Batches that are on their way to the devices while a step runs.
AHEAD = 2
# Examples that a process reads at once on their way into the devices' memory.
CHUNK = 1024


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
) -> Generator[PyTree]:
    """Endless training batches on the devices, from `start_step` on.

    Args:
      source: this process's view of the data.
      mesh: the devices; a batch is split over them.
      batch_size: examples of a step over all processes.
      seed: of the order of examples.
      start_step: the first step to yield.
      placement: "host" reads batches ahead and sends them; "device" sends the whole
        training set once, a share to each device, and gathers batches there.
      workers: reading threads; "host" alone.
      flip: whether half of the examples are mirrored.

    Raises:
      DataError: the training set does not fit into the devices' memory.
    """
    if placement == "device":
        # Every device gathers from its own share what of the whole batch lies there.
        batches = pipeline.TrainBatches(source, batch_size, seed, flip=flip)
        return _gathered(batches, Resident(source, mesh), start_step)
    share = pipeline.TrainBatches(
        source, batch_size, seed, jax.process_index(), jax.process_count(), flip
    )
    return _sent(share, mesh, start_step, workers)


def _sent(
    batches: pipeline.TrainBatches,
    mesh: jax.sharding.Mesh,
    start_step: int,
    workers: int,
) -> Generator[PyTree]:
    """Keeps some batches on their way: transfers do not wait, and steps run on."""
    reader = pipeline.read_ahead(batches, start_step=start_step, threads=workers)
    with contextlib.closing(reader):
        sent = collections.deque(shard_batch(next(reader), mesh) for _ in range(AHEAD))
        while True:
            yield sent.popleft()
            sent.append(shard_batch(next(reader), mesh))


def _gathered(
    batches: pipeline.TrainBatches, resident: "Resident", start_step: int
) -> Generator[PyTree]:
    step = start_step
    while True:
        flips = batches.flips(step) if batches.flip else None
        yield resident.gather(batches.indices(step), flips)
        step += 1


class Resident:
    """A data set in the devices' memory, an equal share of its examples on each."""

    def __init__(self, source: Source, mesh: jax.sharding.Mesh):
        """Sends the examples; each process reads those of its own devices.

        Args:
          source: whose batches' arrays are all sent.
          mesh: the devices.

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
                _read(source, places[device] * share, share),
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
        return pipeline.mirror(batch, mine, jnp.where)


def _read(source: Source, first: int, count: int) -> PyTree:
    """Examples `first` … `first + count - 1`; past the end the last one again."""
    stop = first + count
    parts = [
        source.batch(np.minimum(np.arange(i, min(i + CHUNK, stop)), len(source) - 1))
        for i in range(first, stop, CHUNK)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _check_memory(devices: Iterable[Any], size: int) -> None:
    """Refuses a share that is larger than what a device has left."""
    for device in devices:
        memory: Any = device.memory_stats() or {}
        free = memory.get("bytes_limit", size) - memory.get("bytes_in_use", 0)
        if free < size:
            raise DataError(
                f"a device's share of the training set takes {size / 1e9:.1f} GB and "
                f"{device} has {free / 1e9:.1f} GB left; set "
                "--config.data.placement=host"
            )
