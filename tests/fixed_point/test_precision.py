"""Products in f: which precision they are made in, and what follows from a low one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_points import BATCH, DIM, problem, tanh
from jax.extend.core import jaxprs_in_params
from reference import relative_error

from implicit_slots.fixed_point import (
    GMRES,
    Adaptive,
    Anderson,
    BiCGSTAB,
    Broyden,
    Implicit,
    Neumann,
    Picard,
    Truncated,
    Unrolled,
    backward_probe,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def products(jaxpr):
    """The precisions of all products of a program and of its inner programs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        (Picard(max_steps=3), Unrolled()),
        (Picard(max_steps=3), Truncated(steps=2)),
        (Picard(max_steps=3), Neumann(terms=2)),
        (Anderson(max_steps=5, rtol=1e-3), Implicit(solver=GMRES(max_steps=3))),
        (Broyden(max_steps=5, rtol=1e-3), Implicit(solver=BiCGSTAB(max_steps=3))),
    ],
)
def test_products_are_made_as_asked(solver, adjoint):
    params, x, _ = jax.tree.map(np.float32, problem())

    def found(**options):
        def loss(params, x):
            z0 = np.zeros((BATCH, DIM), np.float32)
            options.update(solver=solver, adjoint=adjoint)
            return jnp.sum(fixed_point(tanh, params, x, z0, **options).value)

        gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x)
        return set(products(gradient.jaxpr))

    assert found() == {HIGHEST}
    # The solvers' own remain.
    assert found(matmul_precision=None) <= {HIGHEST, None} > {HIGHEST}
    with jax.default_matmul_precision("bfloat16"):
        default = (jax.lax.Precision.DEFAULT,) * 2
        assert found(matmul_precision=None) <= {HIGHEST, default} > {HIGHEST}
        assert found() == {HIGHEST}


def test_no_such_precision_is_a_sentence():
    z0 = np.zeros((1, 1), np.float32)
    with pytest.raises(ValueError, match="no such matmul_precision"):
        fixed_point(lambda p, x, z: z, None, None, z0, matmul_precision="float31")


def rounded_product(bits):
    """A matrix product of operands with `bits` of mantissa, forward and backward."""

    def multiply(a, b):
        a, b = (jax.lax.reduce_precision(m, 8, bits) for m in (a, b))
        return jnp.matmul(a, b, precision="highest")

    @jax.custom_vjp
    def product(a, b):
        return multiply(a, b)

    product.defvjp(
        lambda a, b: (multiply(a, b), (a, b)),
        lambda ab, g: (multiply(g, ab[1].T), multiply(ab[0].T, g)),
    )
    return product


def rounded_tanh(bits):
    """The map of such products; all else, and z, in float32."""
    product = rounded_product(bits)
    return lambda params, x, z: jnp.tanh(
        product(z, params["a"]) + product(x, params["b"])
    )


# TF32 of NVIDIA's GPUs and one pass of bfloat16 on TPUs.
TF32 = rounded_tanh(10), 2.0**-10
BFLOAT16 = rounded_tanh(7), 2.0**-7
# In float32.
EXACT: Any = {
    "solver": Anderson(max_steps=99, rtol=1e-6),
    "adjoint": Implicit(solver=GMRES(max_steps=DIM)),
}


@functools.cache
def gradient_of(f, solver, adjoint):
    """(params, x, g, probe) -> (gradients of Σ g·value, the solution)."""

    def loss(params, x, probe, g):
        found = fixed_point(
            f,
            params,
            x,
            jnp.zeros_like(g),
            solver=solver,
            adjoint=adjoint,
            probe=probe,
        )
        return jnp.sum(found.value * g), found

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def near_critical():
    """ρ = 0.95 at the solution at least nearly: x is small."""
    params, x, g = jax.tree.map(np.float32, problem("real", radius=0.95))
    return params, np.float32(0.1) * x, g


@pytest.mark.parametrize(
    ("solver", "rounded"),
    [
        (Picard(max_steps=1000, rtol=1e-6), TF32),
        (Picard(max_steps=1000, rtol=1e-6), BFLOAT16),
        (Anderson(max_steps=1000, rtol=1e-6), TF32),
        (Broyden(max_steps=1000, rtol=1e-6), BFLOAT16),
    ],
)
def test_solvers_stop_at_the_rounding_of_products(solver, rounded):
    f, rounding = rounded
    params, x, g = near_critical()
    _, want = gradient_of(tanh, **EXACT)(params, x, None, g)
    _, found = gradient_of(f, solver, Neumann())(params, x, None, g)
    stats = found.stats
    assert np.all(stats.converged | stats.stagnated)
    assert np.all(stats.steps < 150) and np.all(stats.residual < rounding)
    assert relative_error(found.value, want.value) < 10 * rounding


@pytest.mark.parametrize(
    ("adjoint", "rounded"),
    [
        (Implicit(solver=GMRES(max_steps=DIM, rtol=1e-6)), TF32),
        (Implicit(solver=GMRES(max_steps=DIM, rtol=1e-6)), BFLOAT16),
        (Implicit(solver=BiCGSTAB(max_steps=20, rtol=1e-6)), TF32),
        (Implicit(solver=Broyden(max_steps=300, rtol=1e-6)), BFLOAT16),
        (Adaptive(max_terms=300, rtol=1e-6), TF32),
    ],
)
def test_gradients_are_as_good_as_the_products(adjoint, rounded):
    f, rounding = rounded
    params, x, g = near_critical()
    (_, want, _), _ = gradient_of(tanh, **EXACT)(params, x, None, g)
    solver = Anderson(max_steps=40, rtol=rounding)
    probe = backward_probe(BATCH)
    (_, got, stats), _ = gradient_of(f, solver, adjoint)(params, x, probe, g)
    (_, one, _), _ = gradient_of(f, solver, Neumann())(params, x, None, g)
    # The tolerance is below what the products can tell: missed, and no more. What
    # evaluates the rounded map itself may still come to rest.
    krylov = isinstance(getattr(adjoint, "solver", None), GMRES | BiCGSTAB)
    assert np.any(stats.failed == 1) or not krylov
    assert np.all(stats.residual < 2 * rounding)
    errors = [relative_error(x_gradient, want) for x_gradient in (got, one)]
    assert errors[0] < 20 * rounding < errors[1], errors
