"""What becomes of slots that are iterated on, and from other initial slots."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from implicit_slots.evaluation.metrics.rand_index import adjusted_rand_index
from implicit_slots.models.slot_attention import Problem

# Relative residual up to which an iteration has arrived.
CONVERGED = 1e-3
# Root mean squared difference of two sets of slots, over that of the slots themselves,
# up to which they are one fixed point. Far more than two that arrived at it differ by
# (`CONVERGED`, over 1 − ρ), far less than two that did not; README.md has the figures.
SAME = 3e-2
# With how many others each initialisation's masks are compared.
COMPARED = 8


class Trajectory(NamedTuple):
    """A plain iteration, by iteration from 1.

    Attributes:
      residual: ‖f(z) − z‖ / ‖f(z)‖, z being what the iteration starts from.
      mask_flips: share of positions whose slot of largest attention is another than
        at the iteration that training stops at.
      mask_changes: share of positions whose slot of largest attention is another than
        at the iteration before, from the second iteration on.
      attention: of each iteration.
      slots: after the last one.
    """

    residual: Float[Array, "batch steps"]
    mask_flips: Float[Array, "batch steps"]
    mask_changes: Float[Array, "batch changes"]
    attention: Float[Array, "steps batch slots inputs"]
    slots: Float[Array, "batch slots dim"]


def iterate(problem: Problem, *, steps: int, trained: int) -> Trajectory:
    """Applies slot attention's step again and again.

    Args:
      problem: where it starts.
      steps: how many applications.
      trained: the application that training stops at, at most `steps`.
    """

    def apply(z, _):
        after, residual, attention = _apply(problem, z)
        return after, (residual, attention)

    slots, (residual, attention) = jax.lax.scan(apply, problem.z0, None, length=steps)
    winners = jnp.argmax(attention, axis=2)
    flips = jnp.mean(winners != winners[trained - 1][None], axis=2)
    changes = jnp.mean(winners[1:] != winners[:-1], axis=2)
    return Trajectory(residual.T, flips.T, changes.T, attention, slots)


def masks_settled(
    mask_changes: Float[Array, "batch changes"],
) -> Float[Array, " batch"]:
    """Returns the first iteration from which on no position changes its slot.

    Args:
      mask_changes: see `Trajectory`.

    Returns:
      From 1 (the masks of the first iteration stay) to the number of iterations (they
      change to the end: what would come later is not known).
    """
    iterations = jnp.arange(2, mask_changes.shape[1] + 2, dtype=jnp.float32)
    return jnp.max(jnp.where(mask_changes > 0, iterations, 1), axis=1, initial=1)


def settle(
    problem: Problem, *, steps: int
) -> tuple[
    Float[Array, "batch slots dim"],
    Float[Array, " batch"],
    Float[Array, "batch slots inputs"],
]:
    """Returns slots, residual and attention of the last of many applications."""

    def apply(_, last):
        return _apply(problem, last[0])

    return jax.lax.fori_loop(1, steps, apply, _apply(problem, problem.z0))


def _apply(problem: Problem, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step's slots, relative residual and attention."""
    f = replace(problem.f, attention=True)
    after, attention = f(problem.params, problem.x, z)
    apart = jnp.sqrt(jnp.sum((after - z) ** 2, axis=(1, 2)))
    size = jnp.sqrt(jnp.sum(after**2, axis=(1, 2)))
    return after, apart / (size + jnp.finfo(z.dtype).tiny), attention


class Basins(NamedTuple):
    """The fixed points that many initial slots of one image lead to.

    Attributes:
      fixed_points: how many, up to the order of slots; NaN if none was reached.
      largest_basin: share of all initial slots that lead to the commonest one.
      unconverged: share of all initial slots that arrive at none.
      labels: which one each leads to, −1 for none.
    """

    fixed_points: float
    largest_basin: float
    unconverged: float
    labels: Int[np.ndarray, " starts"]


def find_basins(
    slots: Float[np.ndarray, "starts slots dim"],
    residual: Float[np.ndarray, " starts"],
) -> Basins:
    """Counts the distinct fixed points among final slots (on the host, float64).

    Two sets of slots are compared in the order that brings them closest (Kuhn 1955);
    what lies within `SAME` of each other, also over others in between, is one.

    Args:
      slots: of one image, from each start, after many iterations.
      residual: of the last iteration; above `CONVERGED` a start has not arrived.
    """
    from scipy.sparse import csgraph  # A run that trains starts without SciPy.

    arrived = np.asarray(residual) <= CONVERGED
    labels = np.full(len(slots), -1)
    if not arrived.any():
        return Basins(float("nan"), 0.0, 1.0, labels)
    sets = np.asarray(slots, np.float64)[arrived]
    near = _distances(sets) <= SAME
    count, labels[arrived] = csgraph.connected_components(near, directed=False)
    sizes = np.bincount(labels[arrived])
    return Basins(
        float(count),
        float(sizes.max() / len(slots)),
        float(1 - arrived.mean()),
        labels,
    )


def _distances(
    sets: Float[np.ndarray, "n slots dim"],
) -> Float[np.ndarray, "n n"]:
    """Relative distance of each pair of sets, in the best order of slots."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    size = np.sqrt(np.mean(np.sum(sets**2, axis=(1, 2))))
    distances = np.zeros((len(sets), len(sets)))
    for i in range(len(sets)):
        for j in range(i):
            squared = cdist(sets[i], sets[j], "sqeuclidean")
            distance = np.sqrt(squared[linear_sum_assignment(squared)].sum())
            distances[i, j] = distances[j, i] = distance / max(size, 1e-30)
    return distances


def mask_agreement(
    attention: Float[Array, "starts slots inputs"],
) -> Float[Array, ""]:
    """Mean ARI between the masks that different initial slots of one image end in.

    Each start is compared with up to eight others. Other fixed points may still mean
    the same masks: then this is 1. NaN of a single start.
    """
    winners = jnp.argmax(attention, axis=1)
    starts, slots = attention.shape[:2]
    scores = [
        adjusted_rand_index(
            winners,
            jnp.roll(winners, offset, axis=0),
            max_true=slots - 1,
            num_predicted=slots,
        )
        for offset in range(1, min(COMPARED, starts - 1) + 1)
    ]
    return jnp.mean(jnp.stack(scores)) if scores else jnp.float32(jnp.nan)
