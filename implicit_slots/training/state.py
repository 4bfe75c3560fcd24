"""What a run carries from step to step, and where its randomness comes from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

from implicit_slots.models.build import build, split_model
from implicit_slots.runtime.compiling import runs_once
from implicit_slots.runtime.config import Config
from implicit_slots.training.optimizer import FROZEN, build_plateau


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
      ema: moving average of the parameters, less those that no update changes; ()
        without.
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
        if not self.ema:
            return self.params
        frozen = {n: part for n, part in self.params.items() if n not in self.ema}
        return self.ema | frozen if frozen else self.ema


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
        ema=jax.tree.map(jnp.copy, averaged(params)) if config.ema_decay else (),
        plateau=() if plateau is None else plateau.init(params),
        faults=Faults(*(jnp.int32(0) for _ in Faults._fields)),
    )


def averaged(params: PyTree) -> PyTree:
    """The parameters of which a moving average is kept: not those that are frozen."""
    return {name: part for name, part in params.items() if name not in FROZEN}


def first_state(
    config: Config, optimizer: optax.GradientTransformationExtraArgs
) -> TrainState:
    """Draws the parameters and returns the state before the first update.

    In one program: array by array, each shape would be compiled by itself.

    Args:
      config: the whole configuration.
      optimizer: see optimizer.py.
    """

    def draw(seed: jax.Array) -> TrainState:
        params = split_model(build(config, seed))[1]
        return initial_state(params, optimizer, config.optimizer)

    seed = np.asarray(config.seed)
    return jax.jit(draw, compiler_options=runs_once())(seed)
