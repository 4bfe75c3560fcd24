"""Backward passes: how a cotangent of z* reaches the parameters and the inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """Differentiates through every iteration: the usual, not implicit, gradient.

    Memory grows with the number of iterations.

    Attributes:
      remat: recompute each step in the backward pass instead of storing its
        intermediate values.
    """

    remat: bool = False


@dataclass(frozen=True, kw_only=True)
class Neumann:
    """Truncated Neumann series of the implicit gradient, uᵀ = Σ_{i<terms} gᵀ Jⁱ.

    `terms=1` is Chang et al. 2022's "first-order" gradient: f is applied once to the
    detached fixed point and that application alone is differentiated. More terms
    reuse the one stored linearisation, so they cost time and no memory. The error
    decays like ρ(J)^terms.

    Attributes:
      terms: how many powers of J are summed, J⁰ included.
    """

    terms: int = 1

    def __post_init__(self):
        if self.terms < 1:
            raise ValueError(f"terms must be at least 1, got {self.terms}")

    def cotangent(
        self,
        transpose: Callable[[PyTree], PyTree],
        g: PyTree,
        first: Callable[[], PyTree],
    ) -> PyTree:
        """Returns u, the cotangent to pull back through one application of f.

        Args:
          transpose: w ↦ Jᵀ w at the fixed point.
          g: the cotangent of f(z*).
          first: gives the cotangent that this application passes on to z*: Jᵀ g, and
            what f's auxiliary output adds to it.
        """
        if self.terms == 1:
            return g

        def add_term(_, carry):
            u, w = carry
            return jax.tree.map(jnp.add, u, w), transpose(w)

        # terms − 2 turns in the loop and the last sum outside it: the loop would
        # otherwise pay for a product with J that nobody reads.
        u, w = jax.lax.fori_loop(0, self.terms - 2, add_term, (g, first()))
        return jax.tree.map(jnp.add, u, w)


Adjoint = Unrolled | Neumann
