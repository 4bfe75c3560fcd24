"""Contestants of a benchmark: each in a process of its own, taking turns.

So allocators, thread pools and BLAS libraries do not disturb one another. While one
runs its steps the others wait for a message, and between turns there is a pause in
which a thread pool that waits by spinning falls asleep. Two contestants are compared by
the ratio of their medians within one round, so that what slows the machine down for a
while slows both.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax

from experiments.benchmarks import harness
from implicit_slots.runtime.allocator import keep_freed_memory
from implicit_slots.runtime.errors import UserError

PAUSE = 0.3  # seconds between turns


class Bench(NamedTuple):
    """What a contestant's builder returns, compiled and warm.

    Attributes:
      step: starts one step and returns what to wait for.
      wait: blocks until that has been computed.
      facts: whatever else is worth writing down, as JSON takes it.
      peak: returns the most bytes of device memory that were in use, if known.
      chained: time several steps together, without waiting between them: what a
        device computes in order. On a CPU each step is timed by itself.
    """

    step: Callable[[], Any]
    wait: Callable[[Any], Any]
    facts: dict[str, Any]
    peak: Callable[[], int | None]
    chained: bool


def jax_bench(step: Callable[[], Any], **facts: Any) -> Bench:
    """Returns the `Bench` of a step in JAX, after two steps to warm up."""
    for _ in range(2):
        jax.block_until_ready(step())
    facts = harness.jax_facts() | facts
    chained = facts["platform"] != "cpu"
    return Bench(step, jax.block_until_ready, facts, jax_peak, chained)


def jax_peak() -> int | None:
    """The most bytes in use on JAX's device so far; None on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


# Of this process, which is a worker's own unless nothing is isolated.
_benches: dict[str, Bench] = {}


class Contestant:
    """One way of computing the same thing, in a process of its own.

    Args:
      name: as the table shows it.
      builder: returns the `Bench`; a function of a module, which the process imports.
      arguments: of the builder.
      steps: in one turn.
      keep_memory: set up the C library's allocator as implicit_slots.main does.
      isolate: use a process, and not a thread of this one.
    """

    def __init__(
        self,
        name: str,
        builder: Callable[..., Bench],
        *arguments: Any,
        steps: int,
        keep_memory: bool = True,
        isolate: bool = True,
    ):
        self.name = name
        self.steps = steps
        self._executor = executor(keep_memory=keep_memory, isolate=isolate)
        print(f"  {name}: getting ready", file=sys.stderr, flush=True)
        self.facts = self._ask(_prepare, name, builder, *arguments)

    def turn(self) -> list[float]:
        """Runs the steps; seconds of each, or of the average one where chained."""
        return self._ask(_turn, self.name, self.steps)

    def close(self) -> int | None:
        """Ends the process; returns the peak of the device's memory, if known."""
        peak = self._ask(_finish, self.name)
        self._executor.shutdown()
        return peak

    def _ask(self, function: Callable, *arguments: Any) -> Any:
        try:
            return self._executor.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            what = f"the process of {self.name!r} died; is there enough memory?"
            raise UserError(what) from error


def executor(*, keep_memory: bool = True, isolate: bool = True) -> Executor:
    """One fresh process, set up like a run's; a thread of this one if not isolated."""
    if not isolate:
        return ThreadPoolExecutor(1)
    context = get_context("spawn")
    return ProcessPoolExecutor(1, context, _set_up, (keep_memory,))


def _set_up(keep_memory: bool) -> None:
    # Several processes share an accelerator: none may take most of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if keep_memory:
        keep_freed_memory()


def _prepare(name: str, builder: Callable[..., Bench], *arguments: Any) -> dict:
    _benches[name] = builder(*arguments)
    return _benches[name].facts


def _turn(name: str, steps: int) -> list[float]:
    bench = _benches[name]
    parts = 1 if bench.chained else steps
    seconds = []
    for _ in range(parts):
        begin = time.perf_counter()
        for _ in range(steps // parts - 1):
            bench.step()
        bench.wait(bench.step())
        seconds.append((time.perf_counter() - begin) * parts / steps)
    return seconds


def _finish(name: str) -> int | None:
    return _benches.pop(name).peak()


def alternate(
    contestants: Sequence[Contestant], rounds: int, *, pause: float = PAUSE
) -> dict[str, list[list[float]]]:
    """Lets the contestants take turns; returns seconds by contestant, round, step."""
    turns: dict[str, list[list[float]]] = {c.name: [] for c in contestants}
    for number in range(rounds):
        # There and back again: a drift favours nobody.
        for contestant in contestants[:: -1 if number % 2 else 1]:
            time.sleep(pause)
            turns[contestant.name].append(contestant.turn())
        medians = [f"{n} {statistics.median(t[-1]):.4g} s" for n, t in turns.items()]
        print(f"  round {number + 1}:", *medians, file=sys.stderr, flush=True)
    return turns


def compete(contestants: Sequence[Contestant], rounds: int) -> dict[str, Any]:
    """Lets contestants take turns and ends them.

    Returns:
      By contestant: times, facts, the peak of its memory.

    Raises:
      UserError: if they run on different kinds of devices, naming them.
    """
    platforms = {c.facts["platform"]: c.name for c in contestants}
    if len(platforms) > 1:
        where = ", ".join(f"{name} on {place}" for place, name in platforms.items())
        raise UserError(f"the contestants run on different devices: {where}")
    turns = alternate(contestants, rounds)
    return {
        contestant.name: {
            "seconds": harness.spread(turns[contestant.name]),
            "facts": contestant.facts,
            "peak_bytes": contestant.close(),
        }
        for contestant in contestants
    }


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """The ratio of two contestants' times; see `harness.ratio`."""
    return harness.ratio(one["seconds"]["turns"], other["seconds"]["turns"])


def report(
    flags: Any,
    contest: Callable[[harness.Configuration], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Measures every configuration of the flags; writes table and numbers.

    Args:
      flags: of the script.
      contest: lets the contestants of a configuration take turns; see `compete`.
      table: of the results, in Markdown.
    """
    results, facts = {}, []
    for configuration in harness.pick(flags):
        announce(configuration)
        found = contest(configuration)
        facts += [contestant["facts"] for contestant in found.values()]
        results[configuration.name] = {
            "sizes": str(configuration),
            "contestants": found,
        }
    harness.write(flags, facts, results, table(results))


def announce(configuration: harness.Configuration) -> None:
    """Says which configuration is measured now."""
    print(f"({configuration.name}) {configuration}", file=sys.stderr, flush=True)
