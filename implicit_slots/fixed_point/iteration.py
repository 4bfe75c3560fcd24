"""The loop under all forward solvers of z = f(z): batched, each example for itself."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from implicit_slots.fixed_point import vectors
from implicit_slots.fixed_point.checks import (
    check_count,
    check_damping,
    check_tolerances,
)

# A residual has to fall by this share within `patience` steps to count as progress.
_PROGRESS = 1e-3


class Record(NamedTuple):
    """What a solver that measures has seen so far, per example.

    Attributes:
      best: the evaluated z that is nearest to the tolerances.
      least: how near: see `Solver`; infinite before the first evaluation.
      mark: what the next one must beat to count as progress.
      age: evaluations since the last progress.
      converged: the tolerances were met.
      diverged: f returned something that is not finite.
      trace: relative residual of each evaluation, if asked for.
      size: what residuals are relative to, if not to ‖f(z)‖.
    """

    best: PyTree
    least: Float[Array, " batch"]
    mark: Float[Array, " batch"]
    age: Int[Array, " batch"]
    converged: Bool[Array, " batch"]
    diverged: Bool[Array, " batch"]
    trace: Float[Array, "batch max_steps"] | None
    size: Float[Array, " batch"] | None


class State(NamedTuple):
    """Where a solver stands.

    Attributes:
      z: where f is evaluated next.
      steps: evaluations of f made, per example.
      active: which examples go on.
      memory: the method's own.
      record: None where nothing is measured.
    """

    z: PyTree
    steps: Int[Array, " batch"]
    active: Bool[Array, " batch"]
    memory: Any
    record: Record | None


class Solved(NamedTuple):
    """What a solver found, per example.

    Attributes:
      z: the best evaluated iterate; the last iterate where nothing is measured.
      steps: evaluations of f.
      converged: z meets the tolerances.
      stagnated: stopped because the residual no longer fell.
      diverged: f returned something that is not finite; z is from before.
      trace: relative residual of each evaluation, infinite after an example stopped.
    """

    z: PyTree
    steps: Int[Array, " batch"]
    converged: Bool[Array, " batch"]
    stagnated: Bool[Array, " batch"]
    diverged: Bool[Array, " batch"]
    trace: Float[Array, "batch max_steps"] | None


@dataclass(frozen=True, kw_only=True)
class Solver(abc.ABC):
    """What the solvers share: one loop in which every example stops by itself.

    One step is one evaluation of f. An example stops, and is frozen from then on,
    once ‖f(z) − z‖ ≤ atol + rtol · ‖f(z)‖ over all its leaves, once the residual has
    not fallen by a thousandth for `patience` steps, or once f(z) is not finite. The
    best evaluated iterate is what it gets, so more steps never give a worse residual:
    ‖f(z) − z‖ / ‖f(z)‖, and where atol is set ‖f(z) − z‖ / (atol + rtol · ‖f(z)‖).
    `Unrolled` alone differentiates, and returns, the last iterate.

    Attributes:
      max_steps: the most evaluations of f.
      rtol: relative tolerance.
      atol: absolute tolerance.
      damping: step length in (0, 1]; 1 is the whole step.
      patience: evaluations without progress after which an example stops.
      min_steps: evaluations that an example makes before it stops, unless f(z) is not
        finite.
      trace: keep the residual of every evaluation.
    """

    max_steps: int
    rtol: float = 0.0
    atol: float = 0.0
    damping: float = 1.0
    patience: int = 20
    min_steps: int = 1
    trace: bool = False

    def __post_init__(self):
        check_count(self, "max_steps")
        check_count(self, "min_steps")
        check_count(self, "patience")
        check_tolerances(self)
        check_damping(self)
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"min_steps must not be above max_steps ({self.max_steps}), got "
                f"{self.min_steps}"
            )

    @property
    def stops(self) -> bool:
        """Whether an example can stop before `max_steps`."""
        return True

    @abc.abstractmethod
    def start(self, z: PyTree) -> Any:
        """Returns the method's memory before the first step."""

    @abc.abstractmethod
    def propose(self, z: PyTree, fz: PyTree, memory: Any) -> tuple[PyTree, Any]:
        """Returns the next z, undisturbed by any stopping, and the next memory."""

    def init(self, z0: PyTree, size: Float[Array, " batch"] | None = None) -> State:
        """Returns the state that stands at `z0`, every example active; see `solve`."""
        batch = vectors.batch_size(z0)
        steps, active = jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool)
        record = None
        if self.stops or self.trace:
            dtype = vectors.working_dtype(z0)
            endless = jnp.full(batch, jnp.inf, dtype)
            record = Record(
                best=z0,
                least=endless,
                mark=endless,
                age=steps,
                converged=~active,
                diverged=~active,
                trace=jnp.full((batch, self.max_steps), jnp.inf, dtype)
                if self.trace
                else None,
                size=size,
            )
        state = State(z0, steps, active, self.start(z0), record)
        return vectors.placed(state, vectors.place_of(z0))

    def step(self, state: State, fz: PyTree) -> State:
        """Moves the active examples on, given f at the state's z."""
        proposed, memory = self.propose(state.z, fz, state.memory)
        steps = state.steps + state.active.astype(state.steps.dtype)
        if state.record is None:
            return State(proposed, steps, state.active, memory, None)
        record = self._measured(state, fz)
        if not self.stops:
            return State(proposed, steps, state.active, memory, record)
        # The step that an example converges with is still made, for `Unrolled`, whose
        # value would not depend on the parameters if z0 converged at once.
        finite = state.active & ~record.diverged
        z = vectors.select(finite, proposed, state.z)
        going = ~record.converged & (record.age < self.patience)
        going = finite & (going | (steps < self.min_steps))
        return State(z, steps, going, memory, record)

    def _measured(self, state: State, fz: PyTree) -> Record:
        old, active = state.record, state.active
        assert old is not None
        z, fz = jax.lax.stop_gradient((state.z, fz))
        error, size = vectors.residual_norms(z, fz)
        size = size if old.size is None else old.size
        residual = vectors.relative(error, size)
        finite = jnp.isfinite(error) & jnp.isfinite(size)
        # Best is judged as the tolerances judge, or a small ‖f(z) − z‖ would not count
        # beside a large z.
        near = error / (self.atol + self.rtol * size) if self.atol > 0 else residual
        better = active & (near < old.least)  # never where it is NaN
        least = jnp.where(better, near, old.least)
        progress = least < (1 - _PROGRESS) * old.mark
        age = jnp.where(active, jnp.where(progress, 0, old.age + 1), old.age)
        trace = old.trace
        if trace is not None:
            # The active examples all stand at the same, largest step count.
            column = jnp.where(active, residual, jnp.inf)
            trace = vectors.put(trace, jnp.max(state.steps), column)
        return Record(
            best=vectors.select(better, z, old.best),
            least=least,
            mark=jnp.where(progress, least, old.mark),
            age=age.astype(old.age.dtype),
            converged=old.converged | (active & self.met(error, size)),
            diverged=old.diverged | (active & ~finite),
            trace=trace,
            size=old.size,
        )

    def met(
        self, error: Float[Array, " batch"], size: Float[Array, " batch"]
    ) -> Bool[Array, " batch"]:
        """Whether ‖f(z) − z‖ = `error` meets the tolerances at ‖f(z)‖ = `size`.

        Never where either is not finite: infinity is not below infinity.
        """
        return meets(error, size, rtol=self.rtol, atol=self.atol)

    def solve(
        self,
        f: Callable[[PyTree], PyTree],
        z0: PyTree,
        *,
        size: Float[Array, " batch"] | None = None,
    ) -> Solved:
        """Iterates f from `z0` until every example stopped or `max_steps` is reached.

        Not differentiable in reverse: the adjoints see to that.

        Args:
          f: z -> z, batched.
          z0: pytree to start from.
          size: what residuals are relative to, if not to ‖f(z)‖.
        """

        def step(state: State) -> State:
            return self.step(state, f(state.z))

        if self.stops:
            state = jax.lax.while_loop(
                lambda state: (
                    jnp.any(state.active) & (jnp.max(state.steps) < self.max_steps)
                ),
                step,
                self.init(z0, size),
            )
        else:
            state = jax.lax.fori_loop(
                0, self.max_steps, lambda _, state: step(state), self.init(z0, size)
            )
        return self.finish(state)

    def finish(self, state: State) -> Solved:
        """Reads the result off the last state."""
        record = state.record
        if record is None:
            no = jnp.zeros_like(state.active)
            return Solved(state.z, state.steps, no, no, no, None)
        return Solved(
            z=record.best if self.stops else state.z,
            steps=state.steps,
            converged=record.converged,
            stagnated=~record.converged
            & ~record.diverged
            & (record.age >= self.patience)
            & self.stops,
            diverged=record.diverged,
            trace=record.trace,
        )


def meets(
    error: Float[Array, " batch"],
    size: Float[Array, " batch"],
    *,
    rtol: float,
    atol: float,
) -> Bool[Array, " batch"]:
    """Whether `error` ≤ atol + rtol · `size`, which has to be finite."""
    return (error <= atol + rtol * size) & jnp.isfinite(size)
