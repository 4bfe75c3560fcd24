"""Steps whose losses or gradients are not finite: found, skipped, counted, explained.

Such a step leaves everything but the step's number as it was. After a number of them in
a row the state no longer changes at all, so that the run stops at exactly that step
whenever its loop looks.
"""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.training.state import Faults, TrainState

REPLAY_FOLDER = "replay"


class NonFiniteRun(UserError):
    """A run that stopped because too many steps in a row were skipped."""


def checks(losses: Sequence[str], groups: Sequence[str]) -> tuple[str, ...]:
    """Returns what a step looks at, in the order in which it is computed.

    Args:
      losses: names, in the order in which the model computes them.
      groups: of parameters, in the order in which the model uses them; the backward
        pass computes the last one's gradient first.
    """
    return (
        *(f"the loss {name}" for name in losses),
        *(f"the gradient of {name}" for name in reversed(groups)),
    )


def unless_skipped(
    config: Config,
    finite: Bool[Array, " checks"],
    before: TrainState,
    after: TrainState,
) -> tuple[TrainState, Bool[Array, ""]]:
    """Takes the state after a step if the step was good, and counts it if it was not.

    Args:
      config: the section `nonfinite`.
      finite: which of the `checks` found only finite numbers.
      before: the state that the step began with.
      after: the state after its update, with the same faults.

    Returns:
      The state to go on from, and whether the step was good.
    """
    if not config.skip:
        return after, jnp.bool_(True)
    faults = before.faults
    halted = faults.in_a_row >= config.stop_after
    good = finite.all() & ~halted
    bad = ~good & ~halted
    count = bad.astype(jnp.int32)
    step: Int[Array, ""] = before.step + jnp.where(halted, 0, 1)
    faults = Faults(
        skipped=faults.skipped + count,
        in_a_row=jnp.where(good, 0, faults.in_a_row + count),
        last=jnp.where(bad, step, faults.last),
        check=jnp.where(bad, jnp.argmin(finite), faults.check),
    )
    chosen = jax.tree.map(lambda a, b: jnp.where(good, a, b), after, before)
    return chosen._replace(step=step, faults=faults), good


def explain(faults: Faults, names: Sequence[str]) -> str:
    """Says which step was skipped last, and why; `names` are the `checks`."""
    what = names[int(faults.check)]
    return f"step {int(faults.last)} was skipped: {what} was not finite"


def last_words(faults: Faults, names: Sequence[str], workdir: pathlib.Path) -> str:
    """Says why the run stops, how to look into it, and what usually helps."""
    row = int(faults.in_a_row)
    return (
        f"{row} steps in a row were skipped; {explain(faults, names)}. "
        f"The same command with --mode=replay takes that step apart (what it needs is "
        f"in {workdir / REPLAY_FOLDER}); a lower --config.optimizer.learning_rate, "
        "--config.optimizer.clip=max_norm and a longer "
        "--config.optimizer.warmup_steps usually help, with another --workdir"
    )
