"""The choice among starts, and starts that are learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_points import BATCH, DIM, affine, assert_equal, problem, tanh
from reference import FLOAT64, relative_error

from implicit_slots.fixed_point import (
    GMRES,
    Implicit,
    ImplicitJVP,
    Neumann,
    Picard,
    backward_probe,
    best_start,
    fixed_point,
    start_error,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def with_aux(params, x, z):
    """Each entry has two fixed points that attract, and one that repels."""
    return jnp.tanh(params * z) + x, jnp.sum(z)


def test_no_start_has_a_smaller_residual_than_the_one_that_is_kept():
    rng = np.random.default_rng(0)
    x, solver = 0.1 * rng.normal(size=(4, 2)), Picard(max_steps=4)
    starts = rng.normal(size=(5, 4, 2))
    starts[1, 0] = np.nan
    starts[:, 3] = np.nan
    options = {"solver": solver, "has_aux": True}

    @jax.jit
    def solve(z0):
        return fixed_point(with_aux, 2.0, x, z0, adjoint=Neumann(), **options).stats

    residuals = np.array([solve(z0).residual for z0 in starts])
    kept = jax.jit(lambda s: best_start(with_aux, 2.0, x, s, **options))(starts)
    least = np.nanmin(residuals[:, :3], axis=0)
    assert len({*np.nanargmin(residuals[:, :3], axis=0)}) > 1
    found = solve(kept)
    assert np.array_equal(found.residual[:3], least)
    assert found.diverged.tolist() == [False, False, False, True]


def test_kept_start_carries_its_gradient_and_no_other():
    params, x, _ = problem()
    starts = {"z": np.random.default_rng(0).normal(size=(3, BATCH, DIM))}

    def f(params, x, z):
        return {"z": tanh(params, x, z["z"])}

    def first(starts):
        kept = best_start(f, params, x, starts, solver=Picard(max_steps=1))
        return jnp.sum(kept["z"])

    gradient = jax.jit(jax.grad(first))(starts)["z"]
    assert set(np.unique(gradient)) == {0.0, 1.0}
    assert np.all(gradient.sum(axis=0) == 1)


@jax.jit
def warm_started(params, x, g, u0):
    """The gradient of x, u, and what the linear solve did."""

    def loss(x, u0, probe):
        found = fixed_point(
            affine,
            params,
            x,
            jnp.zeros_like(g),
            solver=Picard(max_steps=200),
            adjoint=Implicit(solver=GMRES(max_steps=3, rtol=0.0)),
            probe=probe,
            u0=u0,
        )
        return jnp.sum(found.value * g)

    return jax.grad(loss, argnums=(0, 1, 2))(x, u0, backward_probe(BATCH))


def test_linear_solve_begins_where_it_is_told_if_that_is_nearer():
    params, x, g = problem(radius=0.8)
    exact = np.linalg.solve(np.eye(DIM) - params["a"], g.T).T
    cold, u, first = warm_started(params, x, g, np.zeros_like(g))
    assert np.all(first.residual > 1e-2)
    # Solved, far off, and not finite.
    u0 = np.stack([exact[0], 1e6 * exact[1], np.full(DIM, np.nan)])
    warm, found, stats = warm_started(params, x, g, u0)
    assert stats.residual[0] < FLOAT64
    assert relative_error(found[0], exact[0]) < FLOAT64
    assert relative_error(warm[0], params["b"] @ exact[0]) < FLOAT64
    assert_equal((warm[1:], found[1:]), (cold[1:], u[1:]), FLOAT64)
    # Twice three products, the second from where the first ended.
    _, _, second = warm_started(params, x, g, u)
    assert np.all(second.residual < 0.5 * first.residual)


@pytest.mark.parametrize(
    ("adjoint", "u0", "sentence"),
    [
        (Neumann(), np.zeros((1, 2)), "leave u0=None with Neumann"),
        (ImplicitJVP(), np.zeros((1, 2)), "leave u0=None with ImplicitJVP"),
        (Implicit(), np.zeros((1, 3)), "u0 must be like z0"),
    ],
)
def test_misuse_of_u0_is_a_sentence(adjoint, u0, sentence):
    z0, options = np.zeros((1, 2)), {"solver": Picard(max_steps=1), "adjoint": adjoint}
    with pytest.raises(ValueError, match=sentence):
        fixed_point(lambda p, x, z: z, {}, None, z0, **options, u0=u0)


def test_error_of_a_start_is_relative_and_moves_the_start_alone():
    rng = np.random.default_rng(0)
    start, value = (
        {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=(2,))} for _ in range(2)
    )
    got = start_error(start, value)
    for i in range(2):
        ours, theirs = (
            np.append(tree["a"][i], tree["b"][i]) for tree in (start, value)
        )
        want = np.sum((ours - theirs) ** 2) / np.sum(theirs**2)
        assert relative_error(got[i], want) < FLOAT64

    def loss(start, value):
        return jnp.sum(start_error(start, value))

    of_start, of_value = jax.grad(loss, argnums=(0, 1))(start, value)
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(of_start))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_value))


def test_start_that_is_learned_saves_steps():
    params, x, _ = problem()
    solver = Picard(max_steps=200, rtol=1e-8)

    def solve(weights, x):
        start = x @ weights
        found = fixed_point(affine, params, x, start, solver=solver, adjoint=Implicit())
        return jnp.sum(start_error(start, found.value)), found.stats.steps

    @jax.jit
    def train(weights):
        def step(_, weights):
            return weights - 0.3 * jax.grad(lambda w: solve(w, x)[0])(weights)

        return jax.lax.fori_loop(0, 2000, step, weights)

    weights = jnp.zeros((2, DIM))
    assert np.all(solve(weights, x)[1] > 20)
    # The solution is linear in x, and so is the start.
    assert np.all(solve(train(weights), x)[1] <= 2)
