"""One axis of devices: the batch is split over it, the state copied or split too."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from implicit_slots.runtime.errors import UserError

DATA_AXIS = "data"
SHARDINGS = ("replicated", "fsdp")
# A smaller array costs more to gather than its copies cost in memory.
SMALLEST_SPLIT = 2**12

_traced_for = contextvars.ContextVar("traced_for", default="")
_batch_mesh: contextvars.ContextVar[jax.sharding.Mesh | None] = contextvars.ContextVar(
    "batch_mesh", default=None
)


def find_devices() -> None:
    """Makes JAX look for its devices, before anything else asks it to.

    Raises:
      UserError: there are none of the kind that JAX_PLATFORMS names.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        # Where a platform's plugin is not installed JAX asserts, without a word.
        wanted = jax.config.jax_platforms  # pyright: ignore
        reason = str(error).split("\n")[0].removesuffix(".")
        raise UserError(
            f"JAX finds no device{f' of JAX_PLATFORMS={wanted}' if wanted else ''}"
            f"{f' ({reason})' if reason else ''}; unset JAX_PLATFORMS, or install what "
            "its devices need: pip install 'implicit_slots[cuda]' or [tpu]"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or a device has not enough memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def platform() -> str:
    """What kind of devices a program is traced for: "cpu", "gpu" or "tpu"."""
    return _traced_for.get() or jax.default_backend()


@contextlib.contextmanager
def traced_for(kind: str) -> Iterator[None]:
    """Programs that are traced within are for devices of a kind, here or elsewhere."""
    token = _traced_for.set(kind)
    try:
        yield
    finally:
        _traced_for.reset(token)


def batch_mesh() -> jax.sharding.Mesh | None:
    """The devices that the batch of what is traced is split over, where it is known."""
    return _batch_mesh.get()


@contextlib.contextmanager
def batch_over(mesh: jax.sharding.Mesh | None) -> Iterator[None]:
    """What is traced within has its batch split over these devices."""
    token = _batch_mesh.set(mesh)
    try:
        yield
    finally:
        _batch_mesh.reset(token)


def build_mesh(
    batch_size: int, *, parts: int = 1, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """Returns the mesh of all devices, or of those given.

    Args:
      batch_size: examples of a step over all devices.
      parts: in how many parts each device takes its share of them.
      devices: of all processes.

    Raises:
      UserError: if devices and parts do not divide the batch.
    """
    devices = jax.devices() if devices is None else devices
    # A process's devices in one stretch, so that it reads one stretch of the batch.
    devices = sorted(devices, key=lambda d: (d.process_index, d.id))
    pieces = len(devices) * parts
    if batch_size < 1 or batch_size % pieces:
        in_parts = f" in {parts} parts each (config.accumulate)" if parts > 1 else ""
        raise UserError(
            f"a batch of {batch_size} cannot be split evenly over {len(devices)} "
            f"devices{in_parts}; set --config.batch_size to a positive multiple of "
            f"{pieces}"
        )
    return jax.sharding.Mesh(np.array(devices), (DATA_AXIS,))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of what every device has a copy of."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Puts a copy of every leaf on every device."""
    return jax.device_put(tree, replicated(mesh))


def state_sharding(tree: PyTree, mesh: jax.sharding.Mesh, name: str) -> PyTree:
    """Returns how each leaf of a training state lies on the devices.

    Args:
      tree: arrays or their shapes.
      mesh: the devices.
      name: "replicated" puts all of it on every device. "fsdp" (fully sharded data
        parallel; Rajbhandari et al. 2020, ZeRO) splits every large array along its
        longest axis that the devices divide: parameters, the optimiser's moments
        and the moving average alike. A pass gathers the parameters alone.
    """

    def place(leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        if name == "fsdp" and mesh.size > 1 and leaf.size >= SMALLEST_SPLIT:
            divided = [n for n, size in enumerate(leaf.shape) if size % mesh.size == 0]
            if divided:
                axis = max(divided, key=lambda n: leaf.shape[n])
                spec = PartitionSpec(*[None] * axis, DATA_AXIS)
                return NamedSharding(mesh, spec)
        return replicated(mesh)

    return jax.tree.map(place, tree)


def placed(tree: PyTree, mesh: jax.sharding.Mesh | None, name: str) -> PyTree:
    """Within a compiled function: puts a training state, or its like, in its place.

    Args:
      tree: arrays.
      mesh: the devices; None leaves it to JAX.
      name: see `state_sharding`.
    """
    if mesh is None or mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, state_sharding(tree, mesh, name))


def gathered(params: PyTree, mesh: jax.sharding.Mesh | None, name: str) -> PyTree:
    """Within a compiled function: the whole parameters on every device, for one pass.

    Left to itself XLA would rather split the products along the parameters, and
    send the activations of all examples: hundreds of times the bytes.

    Args:
      params: of the model.
      mesh: the devices; None leaves it to JAX.
      name: how they lie, see `state_sharding`.
    """
    if mesh is None or mesh.size == 1 or name == "replicated":
        return params
    return jax.lax.with_sharding_constraint(params, replicated(mesh))


def shard_batch(batch: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Splits every leaf along its first axis; each process brings its own share."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)),
        batch,
    )
