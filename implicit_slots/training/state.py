"""What a run carries from step to step, and where its randomness comes from."""

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int, Key, PyTree

from implicit_slots.config import Config
from implicit_slots.training.optimizer import build_plateau


class Faults(NamedTuple):
    """Steps that were skipped because something was not finite; see nonfinite.py.

    Attributes:
      skipped: how many since the beginning.
      in_a_row: how many of them immediately before the next step.
      last: the step of the last one, counted from one; 0 if there was none.
      check: which of the checks failed first in it.
    """

    skipped: Int[Array, ""]
    in_a_row: Int[Array, ""]
    last: Int[Array, ""]
    check: Int[Array, ""]


class TrainState(NamedTuple):
    """Everything that training continues from.

    Attributes:
      step: updates made so far.
      params: nested dictionary of arrays.
      opt_state: the optimiser's.
      ema: moving average of the parameters; () without.
      plateau: what lowers the rates when the validation loss stagnates; () without.
      faults: the steps that were skipped.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree
    plateau: PyTree
    faults: Faults

    @property
    def evaluated(self) -> PyTree:
        """The parameters to validate, draw and use: the average where there is one."""
        return self.ema or self.params


class Given(NamedTuple):
    """What a run's compiled functions are told in every call, beside its state.

    They are arguments and no constants, so that a run of another seed or length finds
    its programs in the compilation cache.

    Attributes:
      seed: of the run.
      num_steps: where training ends.
    """

    seed: Int[np.ndarray | Array, ""]
    num_steps: Int[np.ndarray | Array, ""]

    @classmethod
    def of(cls, config: Config) -> "Given":
        """Those of a whole configuration."""
        return cls(np.asarray(config.seed), np.asarray(config.num_steps, np.int32))


class Purpose(IntEnum):
    """What a key is for: keys of different purposes never meet."""

    TRAIN = 0
    VALIDATE = 1
    PICTURE = 2
    DIAGNOSE = 3
    EVALUATE = 4
    PENALTY = 5


def purpose_key(
    seed: jax.typing.ArrayLike, purpose: Purpose, index: jax.typing.ArrayLike
) -> Key[Array, ""]:
    """Returns the key of one step or batch: a function of (seed, purpose, index)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), index)


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Returns a model's structure and its parameters as a plain nested dictionary.

    A plain dictionary goes through jax.jit's fast path; `nnx.merge` takes it back.
    """
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def initial_state(
    params: dict, optimizer: optax.GradientTransformation, config: Config
) -> TrainState:
    """Returns the state before the first update.

    Args:
      params: nested dictionary of arrays.
      optimizer: see optimizer.py.
      config: the section `optimizer`, which says what else is kept.
    """
    plateau = build_plateau(config)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        # A copy: the step gives the whole state up, and no array twice.
        ema=jax.tree.map(jnp.copy, params) if config.ema_decay else (),
        plateau=() if plateau is None else plateau.init(params),
        faults=Faults(*(jnp.int32(0) for _ in Faults._fields)),
    )


def count_parameters(params: PyTree) -> int:
    """Returns the number of scalars in `params`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
