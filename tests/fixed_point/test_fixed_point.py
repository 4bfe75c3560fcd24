"""The solver core against dense linear algebra in float64, and its laws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    DIFFERENCES,
    FLOAT64,
    central_difference,
    relative_error,
)

from implicit_slots.fixed_point import Neumann, Picard, Unrolled, fixed_point

pytestmark = pytest.mark.usefixtures("strict_promotion")

BATCH, DIM = 3, 5
CONVERGED = Picard(max_steps=400)


def affine(params, x, z):
    return z @ params["a"] + x @ params["b"]


def tanh(params, x, z):
    return jnp.tanh(affine(params, x, z))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def problem(kind, seed=0, radius=0.6):
    """A map with spectral radius `radius` (affine), inputs and a cotangent."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(DIM, DIM))
    if kind == "symmetric":
        # One eigenvalue stands out, so that powers soon follow the radius alone.
        q = np.linalg.qr(a)[0]
        a = q @ np.diag([1.0, 0.5, -0.4, 0.2, 0.1]) @ q.T
    if kind == "non-normal":
        a = np.triu(a, 1) * 2 + np.diag(rng.uniform(0.2, 1, DIM))
    a = a * radius / np.abs(np.linalg.eigvals(a)).max()
    params = {"a": a, "b": rng.normal(size=(2, DIM))}
    x = rng.normal(size=(BATCH, 2))
    g = rng.normal(size=(BATCH, DIM))
    return params, x, g


def solution(f, params, x):
    """The fixed point, in NumPy by brute force."""
    z = np.zeros((len(x), DIM))
    for _ in range(2000):
        z = z @ params["a"] + x @ params["b"]
        z = np.tanh(z) if f is tanh else z
    return z


def exact_gradient(f, params, x, g):
    """dℓ/dparams and dℓ/dx for ℓ = Σ g·z*, one dense solve per example."""
    z = solution(f, params, x)
    grads = {"a": np.zeros((DIM, DIM)), "b": np.zeros((2, DIM))}, np.zeros_like(x)
    for i in range(len(x)):
        slope = 1 - z[i] ** 2 if f is tanh else np.ones(DIM)
        jacobian = slope[:, None] * params["a"].T
        u = slope * np.linalg.solve(np.eye(DIM) - jacobian.T, g[i])
        grads[0]["a"] += np.outer(z[i], u)
        grads[0]["b"] += np.outer(x[i], u)
        grads[1][i] = params["b"] @ u
    return grads


def gradients(f, params, x, g, adjoint, solver=CONVERGED, z0=None):
    """Gradients for params, x and z0 of ℓ = Σ g·value."""
    z0 = np.zeros((len(x), DIM)) if z0 is None else z0

    def loss(params, x, z0):
        value = fixed_point(f, params, x, z0, solver=solver, adjoint=adjoint).value
        return jnp.sum(value * g)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, x, z0)


def assert_equal(got, want, tolerance=FLOAT64):
    """Leaf by leaf, by relative error."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, oracle in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(ours, oracle) < tolerance


@pytest.mark.parametrize("kind", ["general", "symmetric", "non-normal"])
@pytest.mark.parametrize("f", [affine, tanh])
@pytest.mark.parametrize("adjoint", [Neumann(terms=400), Unrolled()])
def test_gradient_equals_the_dense_solve(kind, f, adjoint):
    params, x, g = problem(kind)
    got = gradients(f, params, x, g, adjoint)
    want = exact_gradient(f, params, x, g)
    assert_equal(got[:2], want)


def test_gradient_equals_central_differences():
    params, x, g = problem("general")
    direction = np.random.default_rng(1).normal(size=(DIM, DIM))

    def loss(a):
        return np.sum(g * solution(tanh, {**params, "a": a}, x))

    want = central_difference(loss, params["a"], direction)
    got = gradients(tanh, params, x, g, Neumann(terms=400))[0]["a"]
    assert abs(np.sum(got * direction) - want) < DIFFERENCES * abs(want)


@pytest.mark.parametrize("terms", [1, 2, 3, 8])
def test_neumann_sums_as_many_powers_of_the_jacobian(terms):
    params, x, g = problem("non-normal")
    series = sum(g @ np.linalg.matrix_power(params["a"].T, i) for i in range(terms))
    got = gradients(affine, params, x, g, Neumann(terms=terms))
    assert relative_error(got[1], series @ params["b"].T) < FLOAT64


def test_neumann_error_decays_with_the_spectral_radius():
    radius = 0.8
    params, x, g = problem("symmetric", radius=radius)
    _, want = exact_gradient(affine, params, x, g)
    errors = [
        relative_error(gradients(affine, params, x, g, Neumann(terms=k))[1], want)
        for k in (20, 21)
    ]
    assert errors[1] / errors[0] == pytest.approx(radius, rel=0.02)


def test_one_term_is_one_application_to_the_detached_iterate():
    params, x, g = problem("general")
    z0 = np.ones((BATCH, DIM))

    def paper(params, x):
        z = z0
        for _ in range(4):
            z = tanh(params, x, z)
        return jnp.sum(g * tanh(params, x, jax.lax.stop_gradient(z)))

    want = jax.grad(paper, argnums=(0, 1))(params, x)
    got = gradients(tanh, params, x, g, Neumann(), Picard(max_steps=4), z0)
    assert_equal(got[:2], want, tolerance=1e-15)


@pytest.mark.parametrize("remat", [False, True])
def test_unrolled_differentiates_the_iterations(remat):
    params, x, g = problem("general")
    z0 = np.ones((BATCH, DIM))

    def loop(params, x, z):
        for _ in range(3):
            z = z + 0.7 * (tanh(params, x, z) - z)
        return jnp.sum(g * z)

    want = jax.grad(loop, argnums=(0, 1, 2))(params, x, z0)
    solver = Picard(max_steps=3, damping=0.7)
    got = gradients(tanh, params, x, g, Unrolled(remat=remat), solver, z0)
    assert_equal(got, want)


def test_initial_value_gets_no_gradient_from_implicit_adjoints():
    params, x, g = problem("general")
    solver = Picard(max_steps=2)
    assert not np.any(gradients(tanh, params, x, g, Neumann(terms=3), solver)[2])
    assert np.any(gradients(tanh, params, x, g, Unrolled(), solver)[2])


@pytest.mark.parametrize("adjoint", [Neumann(), Unrolled()])
def test_one_more_step_at_the_fixed_point_moves_nothing(adjoint):
    params, x, _ = problem("general")
    z = fixed_point(
        tanh, params, x, np.zeros((BATCH, DIM)), solver=CONVERGED, adjoint=adjoint
    ).value
    assert relative_error(tanh(params, x, z), z) < FLOAT64


@pytest.mark.parametrize("adjoint", [Neumann(), Unrolled()])
def test_each_example_gets_what_it_gets_alone(adjoint):
    params, x, g = problem("general")
    # The scale is the example's own: the last one diverges.
    x = {"x": x, "scale": np.array([[0.5], [0.9], [1e3]])}
    solver = Picard(max_steps=60, rtol=1e-6)

    def f(params, x, z):
        return x["scale"] * affine(params, x["x"], z)

    def solve(x, g):
        def loss(params, x):
            z0 = np.zeros((len(g), DIM))
            found = fixed_point(f, params, x, z0, solver=solver, adjoint=adjoint)
            return jnp.sum(found.value[:2] * g[:2]), found

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    (_, together_x), together = solve(x, g)
    for i in range(2):
        (_, alone_x), alone = solve(
            jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], x), g[i : i + 1]
        )
        assert relative_error(together.value[i], alone.value[0]) < FLOAT64
        assert relative_error(together_x["x"][i], alone_x["x"][0]) < FLOAT64
        assert together.stats.steps[i] == alone.stats.steps[0] < 60
        assert together.stats.converged[i]
    assert together.stats.steps[0] != together.stats.steps[1]
    assert not together.stats.converged[2]


def test_statistics_describe_the_last_application():
    params, x, _ = problem("general")
    z0 = np.ones((BATCH, DIM))
    solver = Picard(max_steps=3, rtol=1e-12)
    stats = fixed_point(tanh, params, x, z0, solver=solver, adjoint=Neumann()).stats
    z = z0
    for _ in range(3):
        z = np.tanh(z @ params["a"] + x @ params["b"])
    fz = np.tanh(z @ params["a"] + x @ params["b"])
    want = np.linalg.norm(fz - z, axis=1) / np.linalg.norm(fz, axis=1)
    assert relative_error(stats.residual, want) < FLOAT64
    assert np.all(stats.steps == 3) and not np.any(stats.converged)


def test_auxiliary_output_is_that_of_the_last_application():
    params, x, g = problem("general")
    z0 = np.zeros((BATCH, DIM))

    def f(params, x, z):
        return tanh(params, x, z), {"input": z, "sum": z @ params["a"][0]}

    def loss(params, adjoint):
        found = fixed_point(
            f, params, x, z0, solver=CONVERGED, adjoint=adjoint, has_aux=True
        )
        return jnp.sum(found.value * g) + jnp.sum(found.aux["sum"]), found

    gradient = jax.grad(loss, has_aux=True)
    exact, found = gradient(params, Unrolled())
    series, _ = gradient(params, Neumann(terms=300))
    assert relative_error(found.aux["input"], found.value) < FLOAT64
    assert_equal(series, exact)


def test_nested_trees_and_mixed_dtypes():
    params, x, _ = problem("general")

    def f(params, x, z):
        half = z["half"].astype(jnp.float32)
        full = tanh(params, x, z["full"] + half.astype(z["full"].dtype))
        return {"full": full, "half": (0.5 * half).astype(jnp.bfloat16)}

    z0 = {"full": np.zeros((BATCH, DIM)), "half": jnp.ones((BATCH, DIM), jnp.bfloat16)}
    found = fixed_point(f, params, x, z0, solver=CONVERGED, adjoint=Neumann())
    assert found.value["half"].dtype == jnp.bfloat16
    assert found.stats.residual.dtype == jnp.float64
    want = solution(tanh, params, x)
    assert relative_error(found.value["full"], want) < FLOAT64


@pytest.mark.parametrize("terms", [1, 4])
def test_memory_is_flat_in_the_number_of_iterations(terms):
    def temporary_bytes(adjoint, max_steps):
        def loss(params, x):
            found = fixed_point(
                tanh,
                params,
                x,
                jnp.zeros((256, DIM)),
                solver=Picard(max_steps=max_steps),
                adjoint=adjoint,
            )
            return jnp.sum(found.value)

        params, x, _ = problem("general")
        x = np.ones((256, 2))
        compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    implicit = [temporary_bytes(Neumann(terms=terms), steps) for steps in (2, 8, 63)]
    assert max(implicit) <= 1.01 * min(implicit)
    unrolled = [temporary_bytes(Unrolled(), steps) for steps in (2, 63)]
    assert unrolled[1] > 5 * unrolled[0]


def test_second_use_traces_nothing():
    traces = []

    def f(params, x, z):
        traces.append(1)
        return tanh(params, x, z)

    @jax.jit
    def loss(params, x):
        found = fixed_point(
            f, params, x, jnp.zeros((BATCH, DIM)), solver=CONVERGED, adjoint=Neumann()
        )
        return jnp.sum(found.value)

    params, x, _ = problem("general")
    jax.grad(loss)(params, x)
    before = len(traces)
    jax.grad(loss)(params, 2 * x)
    assert len(traces) == before > 0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Picard(max_steps=0), "max_steps must be at least 1, got 0"),
        (lambda: Picard(max_steps=1, rtol=-1.0), "must not be negative"),
        (lambda: Picard(max_steps=1, damping=0.0), r"damping must be in \(0, 1\]"),
        (lambda: Neumann(terms=0), "terms must be at least 1, got 0"),
    ],
)
def test_misuse_of_a_constructor(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("f", "z0", "sentence"),
    [
        (lambda p, x, z: z[:, :2], np.zeros((BATCH, DIM)), "f must return z as it got"),
        (
            lambda p, x, z: z.astype(jnp.float32),
            np.zeros((BATCH, DIM)),
            "f must return z as it got",
        ),
        (lambda p, x, z: (z, z), np.zeros((BATCH, DIM)), "f must return z as it got"),
        (lambda p, x, z: z, np.zeros(()), "leading batch axis"),
        (lambda p, x, z: z, [np.zeros((2, 1)), np.zeros((3, 1))], "leading batch axis"),
    ],
)
def test_misuse_is_a_sentence_at_trace_time(f, z0, sentence):
    with pytest.raises(ValueError, match=sentence):
        fixed_point(f, {}, None, z0, solver=CONVERGED, adjoint=Neumann())
