"""Forward solvers for z = f(z), batched, with per-example stopping."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree


class Iterate(NamedTuple):
    """Where a solver stands, per example."""

    z: PyTree
    steps: Int[Array, " batch"]
    active: Bool[Array, " batch"]


@dataclass(frozen=True, kw_only=True)
class Picard:
    """Fixed-point iteration z ← z + damping · (f(z) − z).

    An example stops, and is frozen from then on, once
    ‖f(z) − z‖ ≤ atol + rtol · ‖f(z)‖ over all its leaves. With both tolerances at
    zero exactly `max_steps` steps are taken and no residual is computed.

    Attributes:
      max_steps: the most applications of f.
      rtol: relative tolerance.
      atol: absolute tolerance.
      damping: step length in (0, 1]; 1 is the plain iteration.
    """

    max_steps: int
    rtol: float = 0.0
    atol: float = 0.0
    damping: float = 1.0

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        if self.rtol < 0 or self.atol < 0:
            raise ValueError(
                f"tolerances must not be negative, got rtol={self.rtol}, "
                f"atol={self.atol}"
            )
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping}")

    def init(self, z0: PyTree) -> Iterate:
        """Returns the iterate that stands at `z0`, every example active."""
        batch = batch_size(z0)
        return Iterate(z0, jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool))

    def step(self, iterate: Iterate, fz: PyTree) -> Iterate:
        """Moves the active examples from z to f(z), damped."""
        z, steps, active = iterate
        moved = fz
        if self.damping != 1:
            moved = jax.tree.map(
                lambda old, new: old + self.damping * (new - old), z, fz
            )
        if self.rtol == self.atol == 0:
            return Iterate(moved, steps + 1, active)
        moved = jax.tree.map(
            lambda old, new: jnp.where(_per_example(active, new), new, old), z, moved
        )
        error, size = residual_norms(z, fz)
        active_steps = steps + active.astype(steps.dtype)
        return Iterate(moved, active_steps, active & ~self.met(error, size))

    def met(
        self, error: Float[Array, " batch"], size: Float[Array, " batch"]
    ) -> Bool[Array, " batch"]:
        """Whether ‖f(z) − z‖ = `error` meets the tolerances at ‖f(z)‖ = `size`.

        Never where either is not finite: infinity is not below infinity.
        """
        return (error <= self.atol + self.rtol * size) & jnp.isfinite(size)

    def solve(self, f: Callable[[PyTree], PyTree], z0: PyTree) -> Iterate:
        """Iterates f from `z0` until every example stopped or `max_steps` is reached.

        Not differentiable in reverse: the adjoints see to that.
        """

        def step(iterate: Iterate) -> Iterate:
            return self.step(iterate, f(iterate.z))

        if self.rtol == self.atol == 0:
            return jax.lax.fori_loop(
                0, self.max_steps, lambda _, iterate: step(iterate), self.init(z0)
            )
        return jax.lax.while_loop(
            # The active examples all stand at the same, largest step count.
            lambda iterate: (
                jnp.any(iterate.active) & (jnp.max(iterate.steps) < self.max_steps)
            ),
            step,
            self.init(z0),
        )


def batch_size(z: PyTree) -> int:
    """Returns the length of the leading axis that all leaves of `z` share."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(z)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "every leaf of z0 needs the same leading batch axis, got shapes "
            f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(z)]}"
        )
    return sizes.pop()[0]


def residual_norms(
    z: PyTree, fz: PyTree
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Returns ‖f(z) − z‖ and ‖f(z)‖ per example, over all leaves.

    Half-precision leaves are accumulated in float32.
    """
    z, fz = _widened(z), _widened(fz)
    return _norm(jax.tree.map(jnp.subtract, fz, z)), _norm(fz)


def _widened(z: PyTree) -> PyTree:
    """Brings all leaves to one dtype, float32 or wider."""
    leaves = jax.tree.leaves(z)
    double = any(jnp.result_type(leaf) == jnp.float64 for leaf in leaves)
    dtype = jnp.float64 if double else jnp.float32
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), z)


def _norm(z: PyTree) -> jax.Array:
    squares = [
        jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(z)
    ]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def _per_example(flag: jax.Array, leaf: jax.Array) -> jax.Array:
    return flag.reshape(flag.shape + (1,) * (leaf.ndim - 1))
