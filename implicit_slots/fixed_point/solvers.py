"""Forward solvers for z = f(z): how the next z is proposed. See iteration.py."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from implicit_slots.fixed_point import vectors
from implicit_slots.fixed_point.checks import check_count, check_positive
from implicit_slots.fixed_point.iteration import Solver


@dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    """Fixed-point iteration z ← z + damping · (f(z) − z).

    With both tolerances at zero it makes exactly `max_steps` steps, measures nothing
    and returns the last iterate, as the paper's slot attention does. With a tolerance
    it stops and returns the best of the iterates that f was evaluated at.
    """

    @property
    def stops(self) -> bool:
        """Only with a tolerance."""
        return self.rtol > 0 or self.atol > 0

    def start(self, z: PyTree) -> None:
        """No memory."""

    def propose(self, z: PyTree, fz: PyTree, memory: None) -> tuple[PyTree, None]:
        """Returns f(z), damped."""
        if self.damping == 1:
            return fz, None
        return jax.tree.map(lambda old, new: old + self.damping * (new - old), z, fz), (
            None
        )


class AndersonMemory(NamedTuple):
    """The last iterate and residual, and the differences before them."""

    z: Float[Array, "batch dim"]
    residual: Float[Array, "batch dim"]
    z_steps: Float[Array, "batch depth dim"]
    residual_steps: Float[Array, "batch depth dim"]
    taken: Int[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration, type II (Anderson 1965; Walker and Ni 2011).

    With g = f(z) − z and the last `depth` differences Δz, Δg as columns,
    w = argmin ‖g − Δg·w‖² + ridge·‖w‖² and
    z ← z + damping·g − (Δz + damping·Δg)·w. Columns of Δg are first scaled to unit
    length: residuals fall by orders of magnitude, and one ridge must suit the oldest
    and the newest. Repeated or vanishing columns are harmless for the same ridge. On
    an affine f it spans what GMRES spans.

    Nothing makes the plain method converge where f is not affine. With `restart` an
    example forgets its differences whenever its residual has grown, and goes on from
    there with a plain step: of 32 images' slots in a trained model 8 were stuck after
    100 evaluations without, 1 with. Switched off it can reach fixed points that repel
    the plain iteration, which it must leave to find.

    Attributes:
      depth: how many differences are kept; not above `max_steps`.
      ridge: of the least-squares problem, relative to its unit columns.
      restart: forget the differences where the residual has grown.
    """

    depth: int = 5
    ridge: float = 1e-6
    restart: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_count(self, "depth")
        check_positive(self, "ridge")
        if self.depth > self.max_steps:
            raise ValueError(
                f"depth must be from 1 to max_steps ({self.max_steps}), got "
                f"{self.depth}"
            )

    def start(self, z: PyTree) -> AndersonMemory:
        """Returns an empty history."""
        flat, _ = vectors.ravel(z)
        history = jnp.zeros((len(flat), self.depth, flat.shape[1]), flat.dtype)
        nothing = jnp.zeros_like(flat)
        return AndersonMemory(nothing, nothing, history, history, jnp.int32(0))

    def propose(
        self, z: PyTree, fz: PyTree, memory: AndersonMemory
    ) -> tuple[PyTree, AndersonMemory]:
        """Returns the mixture of the history that makes the residual least."""
        flat, unravel = vectors.ravel(z)
        residual = vectors.ravel(fz)[0] - flat
        first = memory.taken == 0
        slot = (memory.taken - 1) % self.depth

        change = residual - memory.residual
        # The weights make up for it.
        scale = jnp.where(first, 0, vectors.binary_scale(change))
        z_steps = vectors.put(memory.z_steps, slot, scale * (flat - memory.z))
        residual_steps = vectors.put(memory.residual_steps, slot, scale * change)
        if self.restart:
            grew = vectors.norm(residual) > vectors.norm(memory.residual)
            nothing = jnp.zeros_like(z_steps)
            z_steps = vectors.select(grew, nothing, z_steps)
            residual_steps = vectors.select(grew, nothing, residual_steps)
        weights = self._weights(residual_steps, residual)
        moved = (
            flat
            + self.damping * residual
            - vectors.combine(weights, z_steps + self.damping * residual_steps)
        )
        following = AndersonMemory(
            flat, residual, z_steps, residual_steps, memory.taken + 1
        )
        return _finite_or(unravel(moved), fz), following

    def _weights(self, columns: jax.Array, residual: jax.Array) -> jax.Array:
        gram = jnp.einsum(
            "bmn,bkn->bmk", columns, columns, precision=jax.lax.Precision.HIGHEST
        )
        squares = jnp.diagonal(gram, axis1=1, axis2=2)
        # A column of zeros gets the weight zero.
        scale = jnp.where(
            squares > 0, 1 / jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0
        )
        unit = gram * scale[:, :, None] * scale[:, None, :]
        unit += self.ridge * jnp.eye(self.depth, dtype=unit.dtype)[None]
        right = scale * vectors.coefficients(columns, residual)
        return scale * jnp.linalg.solve(unit, right[..., None])[..., 0]


class BroydenMemory(NamedTuple):
    """The last iterate and residual; the inverse is −1 + Σ left ⊗ right."""

    z: Float[Array, "batch dim"]
    residual: Float[Array, "batch dim"]
    left: Float[Array, "batch memory dim"]
    right: Float[Array, "batch memory dim"]
    taken: Int[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's good method on g(z) = f(z) − z, limited memory (Broyden 1965).

    The inverse Jacobian of g is −1 plus one rank-one update per step; so the first
    step is z ← f(z), and every step costs one evaluation of f, without a line search.
    Bai et al. 2019 solve deep-equilibrium models with it. An update whose denominator
    vanishes is left out.

    Attributes:
      memory: how many updates are kept at most; then it begins anew.
    """

    memory: int = 10

    def __post_init__(self):
        super().__post_init__()
        check_count(self, "memory")

    def start(self, z: PyTree) -> BroydenMemory:
        """Returns the inverse −1."""
        flat, _ = vectors.ravel(z)
        # The last step's update is never read.
        count = min(self.memory, max(self.max_steps - 1, 1))
        updates = jnp.zeros((len(flat), count, flat.shape[1]), flat.dtype)
        nothing = jnp.zeros_like(flat)
        return BroydenMemory(nothing, nothing, updates, updates, jnp.int32(0))

    def propose(
        self, z: PyTree, fz: PyTree, memory: BroydenMemory
    ) -> tuple[PyTree, BroydenMemory]:
        """Returns the quasi-Newton step."""
        flat, unravel = vectors.ravel(z)
        residual = vectors.ravel(fz)[0] - flat
        slot = (memory.taken - 1) % memory.left.shape[1]
        # A full memory begins anew. Dropping the oldest update instead leaves later
        # ones that were built on it: on affine maps it then stalled near 1e-5 where
        # this goes on to rounding.
        left = jnp.where(slot == 0, 0, memory.left)
        right = jnp.where(slot == 0, 0, memory.right)

        def times(vector):  # inverse · vector
            return vectors.combine(vectors.coefficients(right, vector), left) - vector

        step, change = flat - memory.z, residual - memory.residual
        # stepᵀ · inverse, of any length: the update is column ⊗ row / slope.
        row = vectors.combine(vectors.coefficients(left, step), right) - step
        row *= vectors.binary_scale(row)
        slope = vectors.dot(row, change)
        scale = vectors.norm(row) * vectors.norm(change)
        usable = jnp.abs(slope) > jnp.finfo(slope.dtype).eps * scale
        usable &= memory.taken > 0
        column = (step - times(change)) / jnp.where(usable, slope, 1)[:, None]

        def update(rows, new):
            new = jnp.where(usable[:, None], new, jnp.zeros_like(new))
            return vectors.put(rows, slot, new)

        left, right = update(left, column), update(right, row)
        moved = flat - self.damping * times(residual)
        following = BroydenMemory(flat, residual, left, right, memory.taken + 1)
        return _finite_or(unravel(moved), fz), following


def _finite_or(z: PyTree, fallback: PyTree) -> PyTree:
    """Takes the plain step where extrapolation overflowed."""
    return vectors.select(jnp.isfinite(vectors.norm(z)), z, fallback)
