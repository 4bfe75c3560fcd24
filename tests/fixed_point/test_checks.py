"""What solvers and adjoints are made with: numbers of NumPy, and what is no number."""

from typing import Any

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from implicit_slots.fixed_point import (
    GMRES,
    Adaptive,
    Anderson,
    BiCGSTAB,
    Broyden,
    Dense,
    Neumann,
    Phantom,
    Picard,
    Truncated,
)


@pytest.fixture(autouse=True)
def without_annotations():
    """The tests' own check of annotations would come first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("value", [5.0, True, "5", None, np.float32(5), jnp.int32(5)])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Picard, "max_steps"),
        (lambda max_steps: GMRES(max_steps=max_steps), "max_steps"),
        (lambda max_steps: BiCGSTAB(max_steps=max_steps), "max_steps"),
        (lambda patience: Picard(max_steps=9, patience=patience), "patience"),
        (lambda min_steps: Picard(max_steps=9, min_steps=min_steps), "min_steps"),
        (lambda depth: Anderson(max_steps=9, depth=depth), "depth"),
        (lambda memory: Broyden(max_steps=9, memory=memory), "memory"),
        (Neumann, "terms"),
        (Truncated, "steps"),
        (Phantom, "steps"),
        (Adaptive, "max_terms"),
        (Dense, "block"),
    ],
)
def test_what_is_no_whole_number(make, name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer, got "):
        make(**{name: value})


@pytest.mark.parametrize("value", [np.nan, np.inf, True, "1e-3", None, 1j])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda rtol: Picard(max_steps=9, rtol=rtol), "rtol"),
        (lambda atol: Picard(max_steps=9, atol=atol), "atol"),
        (lambda damping: Picard(max_steps=9, damping=damping), "damping"),
        (lambda ridge: Anderson(max_steps=9, ridge=ridge), "ridge"),
        (lambda rtol: GMRES(max_steps=9, rtol=rtol), "rtol"),
        (lambda damping: Truncated(damping=damping), "damping"),
        (lambda damping: Phantom(steps=2, damping=damping), "damping"),
        (Adaptive, "rtol"),
    ],
)
def test_what_is_no_number(make, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number, got "):
        make(**{name: value})


def test_numbers_of_numpy_are_plain_numbers():
    # float64's own would make single precision double.
    numbers: Any = {"max_steps": np.int64(9), "depth": np.int32(3)}
    solver = Anderson(**numbers, rtol=np.float64(1e-3))
    assert solver == Anderson(max_steps=9, depth=3, rtol=1e-3)
    assert type(solver.max_steps) is int and type(solver.rtol) is float
