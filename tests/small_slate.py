"""A SLATE that compiles in seconds."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
from flax import nnx

from configs import base
from implicit_slots.config import Config
from implicit_slots.models.slate import SLATE
from implicit_slots.training.state import split_model

# What runs once or twice is not worth optimising. XLA's older code for fusions is
# compiled several times faster than MLIR's, and needs the same temporary memory to 64
# bytes.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# The same for programs of their own, in XLA_FLAGS.
QUICKLY_FLAGS = " ".join(f"--{name}={value}" for name, value in QUICKLY.items())


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
    """Everything that is compiled meanwhile is compiled as `QUICKLY` says."""
    careful = jax.jit
    jax.jit = functools.partial(careful, compiler_options=QUICKLY)  # pyright: ignore
    try:
        yield
    finally:
        jax.jit = careful


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

        compiled = jax.jit(function, compiler_options=QUICKLY)
        return compiled(self.params, *arguments)
