"""Inside JAX's transformations and switches nothing changes: one law for each."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_points import BATCH, problem, tanh

from implicit_slots.fixed_point import (
    GMRES,
    Adaptive,
    Anderson,
    BiCGSTAB,
    Broyden,
    Dense,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Truncated,
    Unrolled,
    backward_probe,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

SOLVERS = {
    "plain": Picard(max_steps=25),
    "picard": Picard(max_steps=25, rtol=1e-4),
    "anderson": Anderson(max_steps=12, rtol=1e-4, depth=2),
    "broyden": Broyden(max_steps=12, rtol=1e-4, memory=3),
}
ADJOINTS = {
    "unrolled": Unrolled(),
    "remat": Unrolled(remat=True),
    "truncated": Truncated(steps=2, damping=0.8),
    "neumann": Neumann(terms=3),
    "phantom": Phantom(steps=3),
    "adaptive": Adaptive(max_terms=20, rtol=1e-2),
    "gmres": Implicit(solver=GMRES(max_steps=4, rtol=1e-4)),
    "bicgstab": Implicit(solver=BiCGSTAB(max_steps=6, rtol=1e-4)),
    "dense": Implicit(solver=Dense(block=4)),
    "picard": Implicit(solver=Picard(max_steps=9, rtol=1e-4)),
    "anderson": Implicit(solver=Anderson(max_steps=9, depth=2, rtol=1e-4)),
    "broyden": Implicit(solver=Broyden(max_steps=7, memory=3)),
}
PAIRS = [
    (solver, adjoint)
    for solver in SOLVERS
    for adjoint in ADJOINTS
    if not (solver == "broyden" and adjoint in ("unrolled", "remat"))
]
# Every solver, and one backward pass of each kind: loop, series, solve.
SOME = [
    ("picard", "unrolled"),
    ("plain", "truncated"),
    ("picard", "adaptive"),
    ("anderson", "gmres"),
    ("broyden", "bicgstab"),
]
some = pytest.mark.parametrize(("solver", "adjoint"), SOME)


def single():
    """The problem in single precision, which is what JAX has by default."""
    return jax.tree.map(np.float32, problem(radius=0.5))


@some
def test_debug_nans(solver, adjoint):
    """Statistics hold no NaN of their own; an example that stops early has a trace."""
    params, x, g = single()
    x[0] = 0
    pair = {
        "solver": replace(SOLVERS[solver], trace=True),
        "adjoint": ADJOINTS[adjoint],
    }

    def loss(params, x, probe):
        if not pair["adjoint"].measures:
            probe = None
        found = fixed_point(tanh, params, x, np.zeros_like(g), probe=probe, **pair)
        return jnp.sum(found.value * g), found

    with jax.debug_nans(True):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        got, found = gradient(params, x, backward_probe(BATCH))
    for leaf in jax.tree.leaves((got, found)):
        assert not np.any(np.isnan(leaf))
