"""One axis of devices: the batch is split over it, everything else is replicated."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from implicit_slots.training.errors import UserError

DATA_AXIS = "data"


def build_mesh(batch_size: int) -> jax.sharding.Mesh:
    """Returns the mesh of all devices.

    Raises:
      UserError: if the devices do not divide the batch.
    """
    # A process's devices in one stretch, so that it reads one stretch of the batch.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    if batch_size < 1 or batch_size % len(devices):
        raise UserError(
            f"a batch of {batch_size} cannot be split evenly over {len(devices)} "
            "devices; set --config.batch_size to a positive multiple of "
            f"{len(devices)}"
        )
    return jax.sharding.Mesh(np.array(devices), (DATA_AXIS,))


def replicate(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Puts a copy of every leaf on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Splits every leaf along its first axis; each process brings its own share."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)),
        batch,
    )
