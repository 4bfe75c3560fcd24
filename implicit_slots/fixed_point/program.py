"""f as a program: what it closes over becomes an argument like the others."""

import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import PyTree

from implicit_slots.fixed_point import vectors


class Program:
    """What f computes, as a function of ((closed-over values, params), x, z).

    Made anew at each call of `fixed_point`, so that f may close over traced values and
    over values that have changed since. It equals another if f is the same and so is
    what it computes: then the other's compilation serves.
    """

    def __init__(self, f: Callable, jaxpr: ClosedJaxpr, structure: Any):
        self._jaxpr = jaxpr.jaxpr
        self._structure = structure
        # Not the text alone: it has no rules of custom derivatives.
        self._key = _weakly(f), str(jaxpr), structure

    def __call__(self, params: PyTree, x: PyTree, z: PyTree) -> Any:
        """Returns what f returns."""
        closed_over, params = params
        f = jaxpr_as_fun(ClosedJaxpr(self._jaxpr, closed_over))
        return jax.tree.unflatten(self._structure, f(*jax.tree.leaves((params, x, z))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def trace(
    f: Callable, params: PyTree, x: PyTree, z0: PyTree, *, has_aux: bool
) -> tuple[Program, list, PyTree]:
    """Traces f, without `has_aux` with None for an auxiliary output.

    Returns:
      The program, the values that f closes over, and z0, where what f makes of it lies.

    Raises:
      ValueError: if f changes the structure, a shape or a dtype of z.
    """
    place = vectors.place_of(z0)

    # A function of this call: JAX would not trace again what it has seen.
    def fresh(params, x, z):
        nonlocal place
        returned = f(params, x, z) if has_aux else (f(params, x, z), None)
        _check_returned(returned, z)
        value, aux = returned
        place = vectors.place_of((z, value))
        return vectors.placed(value, place), aux

    while True:
        z0 = vectors.placed(z0, place)
        jaxpr, shapes = jax.make_jaxpr(fresh, return_shape=True)(params, x, z0)
        if place == vectors.place_of(z0):
            return Program(f, jaxpr, jax.tree.structure(shapes)), jaxpr.consts, z0


def _check_returned(returned: Any, z: PyTree) -> None:
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise ValueError(f"with has_aux f must return (z, aux), it returned {returned}")
    got, want = vectors.shapes(returned[0]), vectors.shapes(z)
    if got != want:
        raise ValueError(
            f"f must return z as it got it: z0 is {want}, but f returned {got}"
        )


def _weakly(f: Callable) -> Hashable:
    """f, or what equals another's if that is f and lives: no one is kept alive."""
    try:
        if isinstance(f, types.MethodType):
            key: Hashable = weakref.WeakMethod(f)
        elif type(f).__eq__ is object.__eq__:
            key = weakref.ref(f)
        else:  # compared by value, as frozen dataclasses are
            key = f
        hash(key)
    except TypeError:  # cannot be hashed or referred to: equal to none
        return object()
    return key
