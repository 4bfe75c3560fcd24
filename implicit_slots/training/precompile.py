"""Programs that are compiled while a run gets ready, for when they are called.

JAX finds a program compiled if the shapes, types and shardings are those of the call;
where they are not, the call compiles, and only time was lost.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from implicit_slots.data.source import Source
from implicit_slots.evaluation.validation import MEASURED, HeldOut, at_once
from implicit_slots.models.images import seen
from implicit_slots.runtime.compiling import Program, compile_step
from implicit_slots.runtime.devices import DATA_AXIS
from implicit_slots.training.state import TrainState
from implicit_slots.training.step import Steps


def compile_ahead(
    steps: Steps,
    validation: HeldOut,
    state: TrainState,
    train: Source,
    *,
    batch_size: int,
) -> Future[Program]:
    """Begins to compile the train step, and after it what draws and validates.

    One after the other, in the order of their first calls: XLA compiles each with all
    cores, and whatever is compiled beside the train step delays the first step.

    Args:
      steps: the compiled functions that train.
      validation: held-out data, and the functions that measure them.
      state: shapes of the training state, as it lies on the devices.
      train: the training data.
      batch_size: examples of a step.

    Returns:
      The train step's program, or how compiling it failed.
    """
    mesh = validation.mesh
    held_out = batch_shapes(validation.source, at_once(validation.config), mesh)
    held_out = {name: held_out[name] for name in MEASURED if name in held_out}

    batch = batch_shapes(train, batch_size, mesh)
    del batch["mask"]
    # The interpreter waits for this thread when it ends, as XLA wants it to.
    pool = ThreadPoolExecutor(1, "compile")
    program = pool.submit(compile_step, steps.train, state, batch)
    measure = validation.steps
    pool.submit(measure.reconstruct.compile, state.evaluated, seen(held_out), 0)
    pool.submit(measure.validate.compile, state.evaluated, state.step, held_out, 0)
    if steps.frozen is not None:
        pool.submit(compile_step, steps.frozen.train, state, batch)
    return program


def batch_shapes(source: Source, size: int, mesh: jax.sharding.Mesh) -> PyTree:
    """Shapes of a batch of a source on the devices, with `mask` of a held-out one."""
    rows = NamedSharding(mesh, PartitionSpec(DATA_AXIS))

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct((size, *leaf.shape), dtype, sharding=rows)

    example = {**source.example(), "mask": np.empty((), bool)}
    return jax.tree.map(shape, example)
