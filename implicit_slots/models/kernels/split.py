"""Kernels on several devices: each works on its examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped, UInt32

from implicit_slots.runtime.devices import DATA_AXIS, batch_mesh


def over_batch(function: Callable[..., Any], rule: str) -> Callable[..., Any]:
    """Lets XLA run a function of arrays on each device's share of the batch.

    XLA cannot look into a kernel: left alone it would gather all arguments.

    Args:
      function: of arrays; what it does for an example depends on
        no other.
      rule: its arrays' axes, as in "b t d, v d -> b t v"; `b` is the batch.
    """
    split = custom_partitioning(function)

    def partition(mesh, arguments, results):
        def shardings(those):
            return jax.tree.map(lambda one: one.sharding, those)

        return mesh, function, shardings(results), shardings(arguments)

    # In the order in which the rule names them.
    others = dict.fromkeys(axis for axis in rule if axis.isalpha() and axis != "b")
    split.def_partition(
        partition=partition,
        sharding_rule=rule,
        need_replication_factors=tuple(others),
    )
    return split


def numbers(x: Shaped[Array, "batch tokens dim"]) -> UInt32[Array, "batch tokens"]:
    """Numbers of tokens over the whole batch, which a device has its share of.

    Noise is a hash of them: a kernel knows its own share alone.
    """
    return jax.lax.iota(jnp.uint32, x.shape[0] * x.shape[1]).reshape(x.shape[:2])


def on_each_device(function: Callable[..., Any], rule: str) -> Callable[..., Any]:
    """As `over_batch`, on the devices of `batch_mesh`: the TPU's compiler asks nobody.

    Args:
      function: as there.
      rule: as there; `b` is the first axis of an array or none.
    """
    taken, given = (
        tuple(
            PartitionSpec(DATA_AXIS) if "b" in array.split() else PartitionSpec()
            for array in side.split(",")
        )
        for side in rule.split("->")
    )

    def split(*arrays):
        mesh = batch_mesh()
        if mesh is None or mesh.size == 1:
            return function(*arrays)
        return jax.shard_map(
            function, mesh=mesh, in_specs=taken, out_specs=given, check_vma=False
        )(*arrays)

    return split
