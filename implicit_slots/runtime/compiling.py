"""How functions are compiled, and what the training step costs: FLOPs, memory, time."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

# What JAX sets where it leaves out most optimisations. Every backend takes them.
UNOPTIMISED = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# How JAX computes unless its settings say otherwise.
STANDARD = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}
# What JAX calls the time that XLA, or reading the cache, took for a program.
COMPILED = "/jax/core/compile/backend_compile_duration"
# XLA's older code for fusions is compiled twice as fast. Not every version has it.
OLDER_FUSIONS = {"xla_cpu_use_fusion_emitters": False}


@dataclasses.dataclass(frozen=True)
class Bound:
    """A jitted function that gets the same first argument in every call.

    A number that the function closed over would be a constant of its program, and
    another number another program to compile.

    Attributes:
      function: jitted; its first argument is `given`.
      given: numbers, the same in every process.
    """

    function: Any
    given: PyTree
    _lock: Any = dataclasses.field(
        default_factory=threading.Lock, compare=False, repr=False
    )

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function with `given` and the arguments.

        What another thread is compiling is waited for, not compiled twice.
        """
        if not self._lock.acquire(blocking=False):
            began = time.perf_counter()
            self._lock.acquire()
            # For `told_of_compiling`: this thread waits as if it compiled.
            waited = time.perf_counter() - began
            jax.monitoring.record_event_duration_secs(COMPILED, waited)
        try:
            return self.function(self.given, *arguments)
        finally:
            self._lock.release()

    def trace(self, *arguments: Any) -> Any:
        """Traces for arguments, or their shapes; returns a `jax.stages.Traced`."""
        return self.function.trace(self.given, *arguments)

    def compile(self, *arguments: Any) -> Any:
        """Compiles for arguments, or their shapes, and runs nothing.

        A later call with such arguments finds the program compiled.

        Returns:
          JAX's account of the program, `jax.stages.Compiled`.
        """
        with self._lock:
            return self.trace(*arguments).lower().compile()


@contextlib.contextmanager
def optimised(wanted: bool) -> Iterator[None]:
    """Everything compiled meanwhile is compiled with XLA's optimisations, or without.

    Without them compiling takes about half the time, and a step on a CPU longer.
    """
    before = without_optimisations()
    jax.config.update("jax_disable_most_optimizations", before or not wanted)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def standard_arithmetic() -> Iterator[None]:
    """JAX computes in 32 bits meanwhile, in every thread, as it does by default.

    A run's numbers are not to depend on JAX_ENABLE_X64, nor is it to stop at a
    promotion that JAX is set to forbid.
    """
    before = {name: jax.config.values[name] for name in STANDARD}
    try:
        for name, value in STANDARD.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, getattr(value, "value", value))


def without_optimisations() -> bool:
    """Whether JAX is set to leave out most of XLA's optimisations."""
    return jax.config.read("jax_disable_most_optimizations")


def runs_once() -> dict[str, Any]:
    """Options of the compiler for a program that is not worth optimising."""
    return UNOPTIMISED | (OLDER_FUSIONS if knows(**OLDER_FUSIONS) else {})


@functools.cache
def knows(**options: Any) -> bool:
    """Whether this version of XLA has these options: it is asked."""
    try:
        jax.jit(lambda x: x).lower(0.0).compile(options)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def bind(function: Callable[..., Any], given: PyTree, **options: Any) -> Bound:
    """Jits a function for `Bound`, optimised or not as JAX is set now.

    Args:
      function: its first argument is `given`.
      given: numbers, the same in every process.
      **options: of `jax.jit`.
    """
    if without_optimisations():
        options["compiler_options"] = runs_once()
    return Bound(jax.jit(function, **options), given)


class Program(NamedTuple):
    """A compiled training step.

    Attributes:
      seconds: that compiling took.
      flops: of a step on one device, as XLA counts them: a loop's body once, and
        nothing for what a library computes. None where XLA does not say.
      memory: bytes that a step needs on one device, state and batch included; None
        where XLA does not say.
    """

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


def compile_step(train: Bound, state: PyTree, batch: PyTree) -> Program:
    """Compiles a training step for this state and batch, and runs nothing."""
    began = time.perf_counter()
    compiled = train.compile(state, batch)
    seconds = time.perf_counter() - began
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if memory is not None:
        memory = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return Program(seconds, (costs or {}).get("flops"), memory)


@contextlib.contextmanager
def told_of_compiling(tell: Callable[[float], None]) -> Iterator[None]:
    """Tells the seconds of each compilation that this thread waits for meanwhile."""
    thread = threading.get_ident()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED and threading.get_ident() == thread:
            tell(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def enable_cache() -> None:
    """Keeps compiled programs on disk, so that a second start is fast.

    JAX's own setting (JAX_COMPILATION_CACHE_DIR) wins where it is made. Without a home
    folder that can be written nothing is kept.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(home) / "implicit_slots" / "compilation"
    try:
        if folder.is_absolute():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if folder.is_absolute() and os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
