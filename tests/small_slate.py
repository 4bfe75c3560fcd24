"""A SLATE that compiles in seconds."""

from collections.abc import Callable

import jax
from flax import nnx

from configs import base
from implicit_slots.models.build import split_model
from implicit_slots.models.slate import SLATE
from implicit_slots.runtime.config import Config

RESOLUTION, VOCAB, WIDTH, HEADS = 16, 7, 8, 2


def section(**changes) -> Config:
    config = base.get_config("test", base.scenes()).model
    config.update(
        vocab_size=VOCAB,
        dvae_features=4,
        width=WIDTH,
        num_blocks=2,
        num_heads=HEADS,
        num_slots=3,
        slot_size=6,
        slot_mlp_size=5,
    )
    config.update(changes)
    return config


class Compiled:
    """A model whose methods are compiled: op by op the tests would take minutes."""

    def __init__(self, model: SLATE):
        self.graphdef, self.params = split_model(model)
        self.model = model

    def merge(self, params) -> SLATE:
        """The model with other parameters."""
        return nnx.merge(self.graphdef, params)

    def __call__(self, method: Callable, *arguments):
        """Returns method(model, *arguments), compiled."""

        def function(params, *arguments):
            return method(self.merge(params), *arguments)

        compiled = jax.jit(function)
        return compiled(self.params, *arguments)
