"""A batched fixed-point layer with a choice of solver and of backward pass.

Knows nothing of slots: it stands on JAX alone.
"""

import inspect
import sys
import types

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
from implicit_slots.fixed_point.implicit_jvp import ImplicitJVP
from implicit_slots.fixed_point.iteration import Solver
from implicit_slots.fixed_point.krylov import GMRES, BiCGSTAB
from implicit_slots.fixed_point.linear import Dense
from implicit_slots.fixed_point.regularisation import (
    coupling_norm,
    jacobian_norm,
)
from implicit_slots.fixed_point.solvers import Anderson, Broyden, Picard
from implicit_slots.fixed_point.starts import best_start, start_error

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
    "ImplicitJVP",
    "Neumann",
    "Phantom",
    "Picard",
    "Solution",
    "Solver",
    "Stats",
    "Truncated",
    "Unrolled",
    "backward_probe",
    "best_start",
    "check_pair",
    "coupling_norm",
    "fixed_point",
    "jacobian_norm",
    "start_error",
]


class _Callable(types.ModuleType):
    """A module that is called like `fixed_point`.

    The package has a function and a subpackage of this name. Importing the subpackage
    sets the package's attribute, so in `from implicit_slots import fixed_point` the
    module has to do for both.
    """

    __call__ = staticmethod(fixed_point)
    __signature__ = inspect.signature(fixed_point)


sys.modules[__name__].__class__ = _Callable
