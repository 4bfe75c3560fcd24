"""A batched fixed-point layer with a choice of solver and of backward pass.

Knows nothing of slots: it stands on JAX alone.
"""

from implicit_slots.fixed_point.adjoints import (
    Adaptive,
    Adjoint,
    BackwardStats,
    Implicit,
    Neumann,
    Phantom,
    Truncated,
    Unrolled,
    backward_probe,
)
from implicit_slots.fixed_point.api import Solution, Stats, check_pair, fixed_point
from implicit_slots.fixed_point.iteration import Solver
from implicit_slots.fixed_point.krylov import GMRES, BiCGSTAB
from implicit_slots.fixed_point.linear import Dense
from implicit_slots.fixed_point.regularisation import (
    correction_loss,
    corrections,
    coupling_norm,
    jacobian_norm,
)
from implicit_slots.fixed_point.solvers import Anderson, Broyden, Picard

__all__ = [
    "GMRES",
    "Adaptive",
    "Adjoint",
    "Anderson",
    "BackwardStats",
    "BiCGSTAB",
    "Broyden",
    "Dense",
    "Implicit",
    "Neumann",
    "Phantom",
    "Picard",
    "Solution",
    "Solver",
    "Stats",
    "Truncated",
    "Unrolled",
    "backward_probe",
    "check_pair",
    "correction_loss",
    "corrections",
    "coupling_norm",
    "fixed_point",
    "jacobian_norm",
]
