"""Backward passes: how a cotangent of z* reaches the parameters and the inputs."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from implicit_slots.fixed_point import vectors
from implicit_slots.fixed_point.checks import (
    check_count,
    check_damping,
    check_positive,
)
from implicit_slots.fixed_point.iteration import Solver
from implicit_slots.fixed_point.krylov import GMRES, BiCGSTAB
from implicit_slots.fixed_point.linear import (
    Affine,
    Dense,
    Vector,
    normalised,
    solve_by,
)

LinearSolver = GMRES | BiCGSTAB | Dense | Solver


class BackwardStats(NamedTuple):
    """What the backward solve did, one entry per example.

    Numbers, not flags, because they travel as the cotangent of a probe.

    Attributes:
      steps: products with J; of `Adaptive`, the terms summed.
      residual: ‖g + Jᵀu − u‖ / ‖g‖ of the u that was taken; where `Adaptive` met its
        tolerance, the estimated relative error of u.
      failed: 1 where the tolerance was missed, or the result was not finite; else 0.
    """

    steps: Float[Array, " batch"]
    residual: Float[Array, " batch"]
    failed: Float[Array, " batch"]


def backward_probe(batch: int) -> BackwardStats:
    """Returns a probe: give it to `fixed_point`, and its gradient is the statistics.

    A backward pass has no output but cotangents, so what it has to say is the
    cotangent of an argument made for that. It does not depend on the size of the loss,
    and is zero if the loss does not depend on the value. Take one probe for each call:
    a probe that is used twice gets the sum.

    Args:
      batch: how many examples there are.
    """
    return BackwardStats(*(jnp.zeros(batch, jnp.float32) for _ in range(3)))


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """Differentiates through every iteration: the usual, not implicit, gradient.

    Memory grows with the number of iterations. With `Picard` or `Anderson`. An example
    whose f(z) is not finite makes the gradient of shared parameters NaN, as ever where
    0 · ∞ is differentiated; the implicit adjoints differentiate at the best iterate
    alone and are spared.

    Attributes:
      remat: recompute in the backward pass instead of storing: True each step's
        intermediate values, so that z alone is stored of each; "sqrt" the steps in
        segments of √steps, so that memory grows like √steps. Both evaluate f at most
        twice as often.
    """

    remat: bool | str = False
    measures: ClassVar[bool] = False

    def __post_init__(self):
        _check_remat(self.remat)


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """Differentiates through `steps` more applications of f to the detached solution.

    z ← z + damping·(f(z) − z). Undamped it equals `Neumann(terms=steps)` where the
    solver has converged, and differs elsewhere, because every application has its own
    Jacobian. The solution is a constant, also to second derivatives. Damped it is the
    unrolled phantom gradient of Geng et al. 2021. Memory grows with `steps`, not with
    the solver's.

    Attributes:
      steps: applications that are differentiated.
      damping: step length in (0, 1].
      remat: see `Unrolled`.
    """

    steps: int = 1
    damping: float = 1.0
    remat: bool | str = False
    measures: ClassVar[bool] = False

    def __post_init__(self):
        check_count(self, "steps")
        check_damping(self)
        _check_remat(self.remat)


@dataclass(frozen=True, kw_only=True)
class Neumann:
    """Truncated Neumann series of the implicit gradient, uᵀ = Σ_{i<terms} gᵀ Jⁱ.

    `terms=1` is Chang et al. 2022's "first-order" gradient: f is applied once to the
    detached fixed point and that application alone is differentiated. More terms
    reuse the one stored linearisation, so they cost time and no memory. The error
    decays like ρ(J)^terms.

    Attributes:
      terms: how many powers of J are summed, J⁰ included.
      max_growth: a term that is longer than so often the term before is shortened to
        that, per example: below one, u stays below ‖g‖ / (1 − max_growth) also where
        the series diverges (Fein-Ashley and Rashidinejad 2026, arXiv 2605.12466, with
        two terms).
    """

    terms: int = 1
    max_growth: float = math.inf
    measures: ClassVar[bool] = False

    def __post_init__(self):
        check_count(self, "terms")
        if not self.max_growth > 0:
            raise ValueError(f"max_growth must be positive, got {self.max_growth}")

    def cotangent(self, phi: Affine, g: Vector) -> tuple[Vector, None]:
        """Returns u, the cotangent to pull back through one application of f."""
        if self.terms == 1 or self.max_growth == math.inf:
            return _repeat(phi.apply, g, self.terms - 1), None

        def shortened(term, last):
            most = self.max_growth * vectors.norm(last)
            share = jnp.minimum(1, vectors.relative(most, vectors.norm(term)))
            return share[:, None] * term

        def add(state):
            u, term = state
            term = shortened(phi.transpose(term), term)
            return u + term, term

        # The second term holds what auxiliary outputs add.
        term = shortened(phi.apply(g) - g, g)
        u, _ = _repeat(add, (g + term, term), self.terms - 2)
        return u, None


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """Damped Neumann series, uᵀ = λ Σ_{i<steps} gᵀ (λJ + (1−λ))ⁱ (Geng et al. 2021).

    Damping λ moves every eigenvalue of J towards one, so the series converges
    wherever the real parts are below one and λ is small enough; it then needs more
    steps. One stored linearisation serves all of them. `damping=1` is `Neumann`.

    Attributes:
      steps: terms of the series.
      damping: λ in (0, 1].
    """

    steps: int
    damping: float = 0.5
    measures: ClassVar[bool] = False

    def __post_init__(self):
        check_count(self, "steps")
        check_damping(self)

    def cotangent(self, phi: Affine, g: Vector) -> tuple[Vector, None]:
        """Returns u, the cotangent to pull back through one application of f."""

        def step(u):
            return u + self.damping * (phi.apply(u) - u)

        return _repeat(step, self.damping * g, self.steps - 1), None


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """As many terms of the Neumann series as each example needs.

    A term is ratio q times the one before, so what is still missing is about
    q / (1 − q) times the last; the sum ends where that is below `rtol` of ‖u‖. As q
    the larger of the last two ratios plus their difference is taken: they grow towards
    ρ(J), and swing where J has complex pairs. It is an estimate, not a bound.

    Where `max_terms` come first the example is counted as failed, and the partial sum
    with the smallest next term is kept: one term where the series grows from its start.

    Attributes:
      max_terms: the most terms, at least 2.
      rtol: wanted relative error of u.
    """

    max_terms: int = 20
    rtol: float = 1e-2
    measures: ClassVar[bool] = True

    def __post_init__(self):
        check_count(self, "max_terms", 2)
        check_positive(self, "rtol")

    def cotangent(self, phi: Affine, g: Vector) -> tuple[Vector, BackwardStats]:
        """Returns u, the cotangent to pull back, and how it was found."""
        phi, g, scale = normalised(phi, g)
        size = vectors.norm(g)
        nothing = jnp.zeros_like(size)
        start = _Series(
            u=g,
            best=g,
            best_terms=nothing + 1,
            least=nothing + jnp.inf,
            term=size,
            ratio=nothing,
            error=nothing + jnp.inf,
            terms=nothing + 1,
            active=jnp.ones(len(g), bool),
        )
        end = jax.lax.while_loop(
            lambda state: (
                jnp.any(state.active) & (jnp.max(state.terms) < self.max_terms)
            ),
            lambda state: self._add_term(state, phi),
            vectors.placed(start, vectors.place_of(g)),
        )
        met = end.error <= self.rtol
        u = scale * vectors.select(met, end.u, end.best)
        terms = jnp.where(met, end.terms, end.best_terms)
        # Of what is kept the next term is known: its residual.
        residual = jnp.where(met, end.error, vectors.relative(end.least, size))
        return u, _stats(terms, residual, ~met)

    def _add_term(self, old: "_Series", phi: Affine) -> "_Series":
        u = phi.apply(old.u)
        term = vectors.norm(u - old.u)
        ratio = vectors.relative(term, old.term)
        worst = jnp.maximum(ratio, old.ratio) + jnp.abs(ratio - old.ratio)
        missing = jnp.where(
            worst < 1, term * worst / jnp.where(worst < 1, 1 - worst, 1), jnp.inf
        )
        # Not for a term that is NaN: then so is the error, and nothing is met.
        error = jnp.where(term == 0, 0, vectors.relative(missing, vectors.norm(u)))
        # The new term is the residual of the sum before it.
        better = term < old.least
        new = _Series(
            u=u,
            best=vectors.select(better, old.u, old.best),
            best_terms=jnp.where(better, old.terms, old.best_terms),
            least=jnp.where(better, term, old.least),
            term=term,
            ratio=ratio,
            error=error,
            terms=old.terms + 1,
            active=old.active & ~(error <= self.rtol) & jnp.isfinite(term),
        )
        return vectors.select(old.active, new, old)


class _Series(NamedTuple):
    u: Vector
    best: Vector
    best_terms: Float[Array, " batch"]
    least: Float[Array, " batch"]
    term: Float[Array, " batch"]
    ratio: Float[Array, " batch"]
    error: Float[Array, " batch"]
    terms: Float[Array, " batch"]
    active: Array


@dataclass(frozen=True, kw_only=True)
class Implicit:
    """Solves the linear system u = g + Jᵀu of the implicit function theorem.

    Each example gets whichever of the solver's result and the one term u = g has the
    smaller measured residual: the one term where the result is not finite. An example
    that misses the solver's tolerances is counted; a residual that rounding alone
    explains counts as met. A solver without tolerances spends its budget, as the
    paper's Broyden with its seven steps.

    Attributes:
      solver: GMRES, BiCGSTAB, Dense (exact), Anderson, Broyden or Picard. By default
        GMRES takes what 20 products with J reach.
    """

    solver: LinearSolver = GMRES(max_steps=20)
    measures: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(self.solver, LinearSolver):
            raise ValueError(
                "Implicit's solver must be GMRES(…), BiCGSTAB(…), Dense(), "
                f"Anderson(…), Broyden(…) or Picard(…), got {self.solver!r}"
            )

    def cotangent(
        self, phi: Affine, g: Vector, u0: Vector | None = None
    ) -> tuple[Vector, BackwardStats]:
        """Returns u, the cotangent to pull back, and how it was found.

        Args:
          phi: the map whose fixed point is wanted.
          g: one term, where the solve begins.
          u0: where it begins instead, in the examples in which that is nearer.
        """
        phi, unit, scale = normalised(phi, g)
        if u0 is not None:
            u0 = u0 / scale
            errors = [vectors.norm(phi.apply(u) - u) for u in (u0, unit)]
            unit = vectors.select(errors[0] < errors[1], u0, unit)
        if isinstance(self.solver, Solver):
            solved = solve_by(self.solver, phi, unit)
        else:
            solved = self.solver.solve(phi, unit)
        stats = _stats(solved.steps, solved.residual, ~solved.converged)
        return scale * solved.u, stats


def _stats(steps, residual, failed) -> BackwardStats:
    return BackwardStats(
        *(value.astype(jnp.float32) for value in (steps, residual, failed))
    )


def _repeat(step, u, times: int):
    return jax.lax.fori_loop(0, times, lambda _, u: step(u), u) if times else u


def _check_remat(remat: bool | str) -> None:
    if remat not in (False, True, "sqrt"):
        raise ValueError(f'remat must be False, True or "sqrt", got {remat!r}')


Linearised = Neumann | Phantom | Adaptive | Implicit
Adjoint = Unrolled | Truncated | Linearised
