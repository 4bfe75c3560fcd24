"""A batched fixed-point layer with a choice of solver and of backward pass.

Knows nothing of slots: it stands on JAX alone.
"""

from implicit_slots.fixed_point.adjoints import Adjoint, Neumann, Unrolled
from implicit_slots.fixed_point.api import Solution, Stats, fixed_point
from implicit_slots.fixed_point.solvers import Picard

__all__ = [
    "Adjoint",
    "Neumann",
    "Picard",
    "Solution",
    "Stats",
    "Unrolled",
    "fixed_point",
]
