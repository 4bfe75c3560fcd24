"""Kernels on several devices: each works on its examples."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning


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
