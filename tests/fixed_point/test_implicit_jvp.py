"""Tangents and second derivatives of a fixed point against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_points import (
    BATCH,
    DIM,
    affine,
    assert_equal,
    exact_gradient,
    gradients,
    problem,
    slot_attention,
    solution,
    tanh,
)
from reference import DIFFERENCES, FLOAT64, central_difference, relative_error

from implicit_slots.fixed_point import (
    GMRES,
    Anderson,
    BiCGSTAB,
    Broyden,
    Dense,
    Implicit,
    ImplicitJVP,
    Neumann,
    Picard,
    backward_probe,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

PICARD = Picard(max_steps=400)
LINEAR = {
    "gmres": GMRES(max_steps=DIM, rtol=1e-12),
    "bicgstab": BiCGSTAB(max_steps=60, rtol=1e-10),
    "dense": Dense(),
    "anderson": Anderson(max_steps=400, rtol=1e-12, depth=3),
    "broyden": Broyden(max_steps=400, rtol=1e-12),
    "picard": Picard(max_steps=400),
}


def quick(one, cases):
    """All the cases, marked as slow but for one: they are alike."""
    slow = pytest.mark.slow
    return [case if case == one else pytest.param(case, marks=slow) for case in cases]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def solve(f, params, x, solver=LINEAR["dense"]):
    """The fixed point, by the adjoint that this file is about."""
    adjoint = ImplicitJVP(solver=solver)
    z0 = jnp.zeros((len(x), DIM))
    return fixed_point(f, params, x, z0, solver=PICARD, adjoint=adjoint).value


def motion(f, params, x, along):
    """The solution's first and second derivative along a line, by dense solves.

    With y = az + bx and z = s(y): ż = s'ẏ and z̈ = s'ÿ + s''ẏ².
    """
    a, b = params["a"], params["b"]
    (moved, x_moved), first, second = along, np.zeros((BATCH, DIM)), None
    z = solution(f, params, x)
    second = np.zeros_like(first)
    for i in range(BATCH):
        slope = 1 - z[i] ** 2 if f is tanh else np.ones(DIM)
        bend = -2 * z[i] * slope if f is tanh else np.zeros(DIM)
        system = np.eye(DIM) - slope[:, None] * a.T
        explicit = z[i] @ moved["a"] + x_moved[i] @ b + x[i] @ moved["b"]
        first[i] = np.linalg.solve(system, slope * explicit)
        y = first[i] @ a + explicit
        twice = 2 * (first[i] @ moved["a"] + x_moved[i] @ moved["b"])
        second[i] = np.linalg.solve(system, slope * twice + bend * y**2)
    return first, second


@functools.cache
def along_a_line(f, solver):
    """Forward mode twice over params and x together."""

    def first(params, x, along):
        return jax.jvp(lambda p, x: solve(f, p, x, solver), (params, x), along)[1]

    def both(params, x, along):
        return jax.jvp(lambda p, x: first(p, x, along), (params, x), along)

    return jax.jit(both)


def a_line(x, seed=3):
    rng = np.random.default_rng(seed)
    moved = {"a": rng.normal(size=(DIM, DIM)), "b": rng.normal(size=(2, DIM))}
    return moved, rng.normal(size=x.shape)


@pytest.mark.parametrize("f", quick(tanh, [affine, tanh]))
@pytest.mark.parametrize("name", quick("gmres", LINEAR))
def test_tangent_and_second_tangent_equal_dense_solves(f, name):
    params, x, _ = problem("non-normal")
    along = a_line(x)
    got = along_a_line(f, LINEAR[name])(params, x, along)
    for ours, want in zip(got, motion(f, params, x, along), strict=True):
        assert relative_error(ours, want) < DIFFERENCES


def test_jacobian_by_either_mode_is_that_of_the_affine_map():
    params, x, _ = problem()
    # z = x b (1 − a)⁻¹, each example for itself.
    want = np.zeros((BATCH, DIM, BATCH, 2))
    for i in range(BATCH):
        want[i, :, i] = (params["b"] @ np.linalg.inv(np.eye(DIM) - params["a"])).T
    for mode in (jax.jacfwd, jax.jacrev):
        got = jax.jit(mode(lambda x: solve(affine, params, x)))(x)
        assert relative_error(got, want) < FLOAT64


def test_hessian_equals_central_differences_of_the_exact_gradient():
    params, x, g = problem()

    def loss(b, x):
        return jnp.sum(solve(tanh, {**params, "b": b}, x) * g)

    hessian = jax.jit(jax.hessian(loss, argnums=(0, 1)))(params["b"], x)
    moved, x_moved = a_line(x)
    got = [
        np.tensordot(by_b, moved["b"], 2) + np.tensordot(by_x, x_moved, 2)
        for by_b, by_x in hessian
    ]

    def gradient(step):
        changed = {**params, "b": params["b"] + step * moved["b"]}
        of_params, of_x = exact_gradient(tanh, changed, x + step * x_moved, g)
        return np.concatenate([of_params["b"].ravel(), of_x.ravel()])

    want = central_difference(gradient, 0.0, 1.0)
    got = np.concatenate([part.ravel() for part in got])
    assert relative_error(got, want) < DIFFERENCES
    # And it is symmetric.
    assert relative_error(hessian[0][1], np.moveaxis(hessian[1][0], (0, 1), (2, 3))) < (
        FLOAT64
    )


@pytest.mark.slow
def test_gradient_of_a_gradients_norm_on_slot_attention():
    f, params, x, z0 = slot_attention()
    g = jnp.asarray(np.random.default_rng(1).normal(size=z0.shape))
    direction = jnp.asarray(np.random.default_rng(2).normal(size=x.shape))

    def slope(x):
        def loss(x):
            found = fixed_point(
                f,
                params,
                x,
                z0,
                solver=Picard(max_steps=500),
                adjoint=ImplicitJVP(solver=GMRES(max_steps=12, rtol=1e-12)),
            )
            return jnp.sum(found.value * g)

        return jnp.sum(jnp.square(jax.grad(loss)(x)))

    first_and_second = jax.jit(jax.value_and_grad(slope))
    want = central_difference(lambda x: float(first_and_second(x)[0]), x, direction)
    got = float(jnp.sum(first_and_second(x)[1] * direction))
    assert abs(got - want) < DIFFERENCES * abs(want)


FAILING = {"failing": GMRES(max_steps=2, rtol=1e-10)}


@pytest.mark.parametrize("name", quick("failing", LINEAR | FAILING))
def test_first_gradient_is_that_of_implicit_number_for_number(name):
    data = problem("non-normal")
    solver = (LINEAR | FAILING)[name]
    (*got, z0_cotangent), found = gradients(
        tanh, *data, solver=PICARD, adjoint=ImplicitJVP(solver=solver)
    )
    (*want, _), expected = gradients(
        tanh, *data, solver=PICARD, adjoint=Implicit(solver=solver)
    )
    assert_equal(tuple(got), tuple(want), 1e-14)
    assert not np.any(z0_cotangent)
    assert_equal(found, expected, 1e-14)


def test_tangents_of_what_is_no_number_and_of_auxiliary_outputs():
    params, x, _ = problem()
    x = {"x": x, "shift": np.arange(BATCH), "key": jax.random.key(0), "no": None}

    def f(params, x, z):
        noise = 0.01 * jax.random.normal(x["key"], z.shape, z.dtype)
        rolled = tanh(params, x["x"], jnp.take(z, x["shift"], axis=0)) + noise
        return rolled, {"sum": jnp.sum(z * x["x"][:, :1]), "n": x["shift"] + 1}

    def both(scale):
        moved = {**x, "x": scale * x["x"]}
        found = fixed_point(
            f,
            params,
            moved,
            jnp.zeros((BATCH, DIM)),
            solver=PICARD,
            adjoint=ImplicitJVP(solver=Dense()),
            has_aux=True,
        )
        return found.aux["sum"] + jnp.sum(found.value), found.aux["n"]

    (value, n), (tangent, _) = jax.jit(lambda t: jax.jvp(both, (t,), (t,)))(1.0)
    want = central_difference(lambda t: float(both(t)[0]), 1.0, 1.0)
    assert abs(tangent - want) < DIFFERENCES * abs(want)
    assert n.tolist() == [1, 2, 3]
    assert np.isfinite(value)


def test_adjoint_without_second_derivatives_says_which_has_them():
    with pytest.raises(TypeError, match=r"Take adjoint=ImplicitJVP\(\)"):
        jax.eval_shape(jax.hessian(lambda z0: once(z0, Neumann())), np.ones((1, 2)))
    with pytest.raises(ValueError, match="ImplicitJVP says nothing of its backward"):
        once(np.ones((1, 2)), ImplicitJVP(), probe=backward_probe(1))


def once(x, adjoint, probe=None):
    found = fixed_point(
        lambda p, x, z: 0.5 * z + x,
        {},
        x,
        jnp.zeros_like(x),
        solver=PICARD,
        adjoint=adjoint,
        probe=probe,
    )
    return jnp.sum(found.value**2)
