"""The compiled training step, and what it costs: time to compile, FLOPs, memory."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from clu import parameter_overview
from jaxtyping import PyTree

from implicit_slots.training.state import TrainState, count_parameters


class Program(NamedTuple):
    """A compiled training step.

    Attributes:
      step: (state, batch) -> (state, metrics), as `Steps.train`.
      seconds: that compiling took.
      flops: of a step on one device, as XLA counts them: a loop's body once, and
        nothing for what a library computes. None where XLA does not say.
      memory: bytes that a step needs on one device, state and batch included; None
        where XLA does not say.
    """

    step: Callable[..., Any]
    seconds: float
    flops: float | None
    memory: int | None

    def __str__(self) -> str:
        text = f"compiled in {self.seconds:.1f} s"
        if self.flops is not None:
            text += f", {self.flops / 1e9:.3g} GFLOP a step (loops counted once)"
        if self.memory is not None:
            text += f", {self.memory / 1e9:.3g} GB of memory"
        return f"train step: {text}, on each device"


def compile_step(train: Any, state: TrainState, batch: PyTree) -> Program:
    """Compiles a jitted training step for this state and batch, and runs nothing."""
    began = time.perf_counter()
    compiled = train.lower(state, batch).compile()
    seconds = time.perf_counter() - began
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if memory is not None:
        memory = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return Program(compiled, seconds, (costs or {}).get("flops"), memory)


def overview(params: dict) -> str:
    """Returns a line on the parameters of each part."""
    parts = ", ".join(f"{k} {count_parameters(v):,}" for k, v in params.items())
    return f"{count_parameters(params):,} parameters: {parts}"


def table(params: dict) -> str:
    """Returns a line on every array: name, shape, type, size and sharding."""
    return parameter_overview.get_parameter_overview(params, include_stats="sharding")
