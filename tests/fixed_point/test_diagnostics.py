"""Spectra against dense linear algebra, gradient errors against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_points import BATCH, DIM, SPECTRA, affine, problem, slot_attention, tanh
from reference import FLOAT64, relative_error

from implicit_slots.fixed_point import (
    Adaptive,
    Dense,
    Implicit,
    Neumann,
    Picard,
    Truncated,
    Unrolled,
    fixed_point,
)
from implicit_slots.fixed_point.diagnostics import (
    dense_jacobian,
    gradient_error,
    spectral_norm,
    spectral_radius,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

PERCENT = 0.01
KEY = 0


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def linear(params, x, z):
    """One matrix per example."""
    return jnp.einsum("bij,bj->bi", params, z)


def matrix(kind, dim, rng):
    """Kinds of spectra that Krylov methods find easy, hard, and very hard."""
    a = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    if kind == "symmetric":
        return (a + a.T) / 2
    if kind == "complex pair":
        # Power iteration never settles here: two conjugate eigenvalues of modulus 1.
        q = np.linalg.qr(a)[0]
        a = 0.3 * a
        turn = [[np.cos(2.0), -np.sin(2.0)], [np.sin(2.0), np.cos(2.0)]]
        return a + q[:, :2] @ np.array(turn) @ q[:, :2].T
    if kind == "opposite pair":
        q = np.linalg.qr(a)[0]
        values = np.linspace(-0.5, 0.5, dim)
        values[:2] = 0.9, -0.9
        return q @ np.diag(values) @ q.T
    if kind == "non-normal":
        return np.triu(2 * a, 1) + np.diag(np.linspace(-0.9, 0.9, dim))
    if kind == "zero":
        return np.zeros((dim, dim))
    return a  # "circular": eigenvalues fill a disc


KINDS = ("symmetric", "complex pair", "opposite pair", "non-normal", "circular", "zero")


@pytest.mark.parametrize(
    ("dim", "dtype"), [(6, np.float32), (40, np.float64), (120, np.float32)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_spectra_equal_dense_ones(kind, dim, dtype):
    if kind == "non-normal" and dim > 6:
        # So far from normal that only the whole space shows the eigenvalues, and that
        # single precision moves them by more than the percent.
        krylov, dtype = dim, np.float64
    else:
        krylov = 40
    rng = np.random.default_rng(dim)
    matrices = np.stack([matrix(kind, dim, rng) for _ in range(2)])
    key, z = jax.random.key(KEY), jnp.zeros((2, dim), dtype)

    @jax.jit
    def estimate(params):
        return (
            spectral_radius(linear, params, None, z, key, krylov=krylov, powers=40),
            spectral_norm(linear, params, None, z, key),
        )

    radius, norm = estimate(jnp.asarray(matrices, dtype))
    assert radius.dtype == norm.dtype == dtype
    want = np.abs(np.linalg.eigvals(matrices)).max(axis=1)
    np.testing.assert_allclose(radius, want, rtol=PERCENT)
    want = np.linalg.svd(matrices)[1][:, 0]
    np.testing.assert_allclose(norm, want, rtol=PERCENT)


@functools.cache
def radius_and_trace():
    z0 = np.zeros((BATCH, DIM))
    return jax.jit(
        lambda params, x: (
            spectral_radius(affine, params, x, z0, jax.random.key(KEY)),
            Picard(max_steps=60, trace=True)
            .solve(functools.partial(affine, params, x), z0)
            .trace,
        )
    )


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_radius_is_the_rate_of_convergence(spectrum):
    params, x, _ = problem(spectrum)
    radius, trace = radius_and_trace()(params, x)
    want = np.abs(np.linalg.eigvals(params["a"])).max()
    np.testing.assert_allclose(radius, want, rtol=1e-6)
    rate = (trace[:, 59] / trace[:, 39]) ** (1 / 20)
    np.testing.assert_allclose(rate, want, rtol=0.05)


def test_spectra_on_slot_attention():
    f, params, x, z0 = slot_attention()
    z = jax.jit(
        lambda z0: Picard(max_steps=300).solve(functools.partial(f, params, x), z0).z
    )(z0)
    dense = np.asarray(jax.jit(lambda z: dense_jacobian(f, params, x, z, block=5))(z))
    # The dense Jacobian itself, column by column, by central differences.
    flat = np.asarray(z).reshape(len(z), -1)

    @jax.jit
    def step(vector):
        return f(params, x, vector.reshape(z.shape)).reshape(flat.shape)

    for j in range(flat.shape[1]):
        shift = 1e-6 * (np.arange(flat.shape[1]) == j)
        column = (step(flat + shift) - step(flat - shift)) / 2e-6
        assert np.abs(dense[:, :, j] - column).max() < 1e-7
    key = jax.random.key(KEY)
    radius = jax.jit(lambda z: spectral_radius(f, params, x, z, key))(z)
    want = np.abs(np.linalg.eigvals(dense)).max(axis=1)
    np.testing.assert_allclose(radius, want, rtol=PERCENT)
    norm = jax.jit(lambda z: spectral_norm(f, params, x, z, key))(z)
    np.testing.assert_allclose(norm, np.linalg.svd(dense)[1][:, 0], rtol=PERCENT)


def test_power_iteration_would_lie():
    # The same matrix and the same number of products: the ratio of norms swings.
    a = matrix("complex pair", 40, np.random.default_rng(1))
    a = a @ np.diag(np.where(np.arange(40) % 2, 1.5, 0.7))
    want = np.abs(np.linalg.eigvals(a)).max()
    v, ratios = np.random.default_rng(0).normal(size=40), []
    for _ in range(80):
        ratios.append(np.linalg.norm(a @ v) / np.linalg.norm(v))
        v = a @ v / np.linalg.norm(a @ v)
    assert np.abs(np.array(ratios[-5:]) / want - 1).max() > 5 * PERCENT
    key, z = jax.random.key(KEY), jnp.zeros((1, 40))
    got = jax.jit(lambda a: spectral_radius(linear, a, None, z, key, krylov=40))(
        a[None]
    )
    np.testing.assert_allclose(got, want, rtol=PERCENT)


def test_trees_and_half_precision():
    params, x, _ = problem()

    def f(params, x, z):
        half = z["half"].astype(jnp.float32)
        full = affine(params, x, z["full"])
        return {"full": full, "half": (0.9 * half).astype(jnp.bfloat16)}

    z = {"full": jnp.zeros((BATCH, DIM)), "half": jnp.zeros((BATCH, 2), jnp.bfloat16)}
    radius, dense = jax.jit(
        lambda z, key: (
            spectral_radius(f, params, x, z, key),
            dense_jacobian(f, params, x, z),
        )
    )(z, jax.random.key(KEY))
    np.testing.assert_allclose(radius, 0.9, rtol=PERCENT)
    assert dense.shape == (BATCH, DIM + 2, DIM + 2)


def error_of(adjoint, solver=Picard(max_steps=200), **options):
    params, x, g = problem("non-normal")
    z0 = jnp.zeros((BATCH, DIM))

    @jax.jit
    def error(params, x, g):
        return gradient_error(
            tanh, params, x, z0, g, solver=solver, adjoint=adjoint, **options
        )

    return error(params, x, g)


def with_offset(params, x, z):
    """An offset's cotangent is u: the affine map's input through the identity."""
    return tanh(params, x[0], z) + x[1]


@functools.cache
def gradient_of_one(adjoint):
    """(params, offset, x, g) -> gradients for params and offset, of one example."""

    def loss(params, offset, x, g):
        found = fixed_point(
            with_offset,
            params,
            (x, offset),
            jnp.zeros((1, DIM)),
            solver=Picard(max_steps=200),
            adjoint=adjoint,
        )
        return jnp.sum(found.value * g)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize(
    "adjoint",
    [Neumann(terms=2), Truncated(steps=2), Unrolled(), Adaptive(max_terms=9)],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_gradient_error_is_what_its_definition_says(adjoint):
    params, x, g = problem("non-normal")
    error = error_of(adjoint)

    def gradient(adjoint, i):
        one = slice(i, i + 1)
        grad = gradient_of_one(adjoint)(params, np.zeros((1, DIM)), x[one], g[one])
        leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(grad[0])]
        return np.concatenate(leaves), np.ravel(grad[1])

    for i in range(BATCH):
        pairs = zip(
            gradient(adjoint, i), gradient(Implicit(solver=Dense()), i), strict=True
        )
        wanted = [
            (
                a @ b / np.linalg.norm(a) / np.linalg.norm(b),
                np.linalg.norm(a) / np.linalg.norm(b),
                np.linalg.norm(a - b) / np.linalg.norm(b),
            )
            for a, b in pairs
        ]
        got = [
            (error.params_cosine[i], error.params_ratio[i], error.params_error[i]),
            (
                error.cotangent_cosine[i],
                error.cotangent_ratio[i],
                error.cotangent_error[i],
            ),
        ]
        assert relative_error(got, wanted) < FLOAT64


def test_exact_adjoint_has_no_gradient_error_and_one_term_has():
    exact = error_of(Unrolled())
    for name, value in exact._asdict().items():
        want = 0 if name.endswith("error") else 1
        np.testing.assert_allclose(value, want, atol=1e-6)
    one = error_of(Neumann())
    assert np.all(one.cotangent_cosine < 0.999) and np.all(one.cotangent_cosine > 0)


def test_oracle_solver_shows_the_error_of_stopping_early():
    early = Picard(max_steps=1)
    exact = Implicit(solver=Dense())
    own = error_of(exact, solver=early)
    np.testing.assert_allclose(own.params_cosine, 1, rtol=1e-9)
    full = error_of(exact, solver=early, oracle=Picard(max_steps=300))
    assert np.all(full.params_cosine < 0.999)


def test_gradients_of_any_size_are_compared():
    params, x, g = jax.tree.map(np.float32, problem("non-normal"))
    options = {"solver": Picard(max_steps=40), "adjoint": Neumann(terms=2)}

    @jax.jit
    def error(g):
        return gradient_error(tanh, params, x, jnp.zeros_like(g), g, **options)

    want = error(g)
    assert np.all(want.params_error > 0.01)
    for scale in np.array([1e-25, 1e25], np.float32):
        for got, same in zip(error(scale * g), want, strict=True):
            assert relative_error(got, same) < 1e-4


@pytest.mark.parametrize("options", [{"krylov": 0}, {"powers": -1}])
@pytest.mark.parametrize("estimate", [spectral_radius, spectral_norm])
def test_misuse_is_a_sentence(estimate, options):
    z = jnp.zeros((1, 3))
    with pytest.raises(
        ValueError, match=r"krylov must be at least 1|powers must be at least 0"
    ):
        estimate(lambda p, x, z: z, None, None, z, jax.random.key(0), **options)
