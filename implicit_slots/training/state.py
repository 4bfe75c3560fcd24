"""What a run carries from step to step, and where its randomness comes from."""

from enum import IntEnum
from typing import NamedTuple

import jax
import optax
from flax import nnx
from jaxtyping import Array, Int, Key, PyTree


class TrainState(NamedTuple):
    """Everything that training continues from.

    Attributes:
      step: updates made so far.
      params: nested dictionary of arrays.
      opt_state: the optimiser's.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree


class Purpose(IntEnum):
    """What a key is for: keys of different purposes never meet."""

    TRAIN = 0
    VALIDATE = 1
    PICTURE = 2
    DIAGNOSE = 3


def purpose_key(
    seed: int, purpose: Purpose, index: jax.typing.ArrayLike
) -> Key[Array, ""]:
    """Returns the key of one step or batch: a function of (seed, purpose, index)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), index)


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Returns a model's structure and its parameters as a plain nested dictionary.

    A plain dictionary goes through jax.jit's fast path; `nnx.merge` takes it back.
    """
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def initial_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update."""
    return TrainState(jax.numpy.int32(0), params, optimizer.init(params))


def count_parameters(params: PyTree) -> int:
    """Returns the number of scalars in `params`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
