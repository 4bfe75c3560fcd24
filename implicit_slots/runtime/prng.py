"""Where all randomness of a run comes from: keys of (seed, purpose, index)."""

from enum import IntEnum
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from implicit_slots.runtime.config import Config


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
    CODEBOOK = 6


def purpose_key(
    seed: jax.typing.ArrayLike, purpose: Purpose, index: jax.typing.ArrayLike
) -> Key[Array, ""]:
    """Returns the key of one step or batch: a function of (seed, purpose, index)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), index)
