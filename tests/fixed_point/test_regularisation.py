"""Jacobian penalties against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_points import BATCH, DIM, affine, problem, solution, tanh
from reference import DIFFERENCES, FLOAT64, central_difference, relative_error

from implicit_slots.fixed_point import coupling_norm, jacobian_norm

pytestmark = pytest.mark.usefixtures("strict_promotion")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def test_jacobian_norm_is_an_unbiased_estimate_of_the_frobenius_norm():
    params, x, _ = problem("non-normal")
    z = solution(tanh, params, x)
    got = jax.jit(
        lambda z: jacobian_norm(tanh, params, x, z, jax.random.key(0), samples=40_000)
    )(z)
    for i in range(BATCH):
        jacobian = (1 - z[i] ** 2)[:, None] * params["a"].T
        # The variance of εᵀAε, A = JJᵀ, is 2‖A‖²_F.
        spread = np.sqrt(2 / 40_000) * np.linalg.norm(jacobian @ jacobian.T)
        assert abs(got[i] - np.linalg.norm(jacobian) ** 2) < 4 * spread


def test_one_sample_of_an_isometry_is_exact_but_for_chi_squared():
    # ‖εᵀQ‖ = ‖ε‖: the estimate is the squared length of the direction that was drawn.
    q = np.linalg.qr(problem().params["a"])[0]
    key = jax.random.key(3)
    z = jnp.zeros((BATCH, DIM))
    got = jacobian_norm(lambda p, x, z: z @ p, q, None, z, key)
    drawn = jax.random.normal(jax.random.split(key, 1)[0], (BATCH, DIM), jnp.float64)
    assert relative_error(got, (drawn**2).sum(axis=1)) < FLOAT64


def test_penalty_has_the_gradient_of_its_definition():
    params, x, _ = problem()
    z = solution(tanh, params, x)
    key = jax.random.key(1)
    direction = np.random.default_rng(0).normal(size=(DIM, DIM))

    def penalty(a):
        return jnp.sum(jacobian_norm(tanh, {**params, "a": a}, x, z, key, samples=3))

    want = central_difference(jax.jit(penalty), params["a"], direction)
    got = np.sum(jax.jit(jax.grad(penalty))(params["a"]) * direction)
    assert abs(got - want) < DIFFERENCES * abs(want)


def in_blocks(f):
    """The same map of three blocks of two, of which each depends on all."""

    def blocked(params, x, z):
        return f(params, x, z.reshape(BATCH, DIM)).reshape(z.shape)

    return blocked


def test_coupling_norm_is_an_unbiased_estimate_of_what_is_off_the_diagonal_blocks():
    params, x, _ = problem("non-normal")
    z = solution(tanh, params, x)
    samples = 40_000
    got = jax.jit(
        lambda z: coupling_norm(
            in_blocks(tanh), params, x, z, jax.random.key(0), samples=samples
        )
    )(z.reshape(BATCH, 3, 2))
    for i in range(BATCH):
        jacobian = (1 - z[i] ** 2)[:, None] * params["a"].T
        jacobian = jacobian.reshape(3, 2, 3, 2) * (1 - np.eye(3)[:, None, :, None])
        rows = jacobian.reshape(3, 2, DIM)
        # Of a sample of block k: mean 3‖R‖²_F, and variance 9 · 2‖RRᵀ‖²_F around it.
        means = 3 * np.sum(rows**2, axis=(1, 2))
        around = 18 * np.sum((rows @ rows.swapaxes(1, 2)) ** 2, axis=(1, 2))
        spread = np.sqrt((around.mean() + means.var()) / samples)
        assert abs(got[i] - np.sum(jacobian**2)) < 4 * spread


def test_blocks_that_go_their_own_way_are_not_coupled():
    params, x, _ = problem()
    key, z = jax.random.key(0), jnp.ones((BATCH, 3, 2))

    def alone(params, x, z):
        return jnp.tanh(z @ params["a"][:2, :2] + (x @ params["b"][:, :2])[:, None])

    assert np.all(coupling_norm(alone, params, x, z, key, samples=9) == 0)
    assert np.all(jacobian_norm(alone, params, x, z, key, samples=9) > 0)
    # One block has nothing to be coupled with.
    whole, together = in_blocks(tanh), z.reshape(BATCH, 1, DIM)
    assert np.all(coupling_norm(whole, params, x, together, key) == 0)
    assert np.all(coupling_norm(whole, params, x, z, key, samples=9) > 0)


def test_coupling_norm_has_the_gradient_of_its_definition():
    params, x, _ = problem()
    z = jnp.asarray(solution(tanh, params, x)).reshape(BATCH, 3, 2)
    key = jax.random.key(1)
    direction = np.random.default_rng(0).normal(size=(DIM, DIM))

    def penalty(a):
        estimate = coupling_norm(
            in_blocks(tanh), {**params, "a": a}, x, z, key, samples=3
        )
        return jnp.sum(estimate)

    want = central_difference(jax.jit(penalty), params["a"], direction)
    got = np.sum(jax.jit(jax.grad(penalty))(params["a"]) * direction)
    assert abs(got - want) < DIFFERENCES * abs(want)


def test_a_smaller_jacobian_is_what_the_penalty_trains():
    params, x, _ = problem("complex", radius=0.95)
    radii = []
    penalty = jax.jit(
        jax.grad(
            lambda a, key: jnp.mean(
                jacobian_norm(
                    affine, {**params, "a": a}, x, jnp.zeros((BATCH, DIM)), key
                )
            )
        )
    )
    a = params["a"]
    for step in range(30):
        radii.append(np.abs(np.linalg.eigvals(a)).max())
        a = a - 0.02 * penalty(a, jax.random.key(step))
    assert radii[-1] < 0.5 * radii[0]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: jacobian_norm(
                affine, *problem()[:2], None, jax.random.key(0), samples=0
            ),
            "samples must be at least 1, got 0",
        ),
        (
            lambda: coupling_norm(
                affine,
                *problem()[:2],
                jnp.zeros((BATCH, 3, 2)),
                jax.random.key(0),
                samples=0,
            ),
            "samples must be at least 1, got 0",
        ),
    ],
)
def test_misuse_is_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
