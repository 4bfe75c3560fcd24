"""Every backward pass against dense linear algebra in float64, and its laws."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_points import (
    BATCH,
    DIM,
    SPECTRA,
    affine,
    assert_equal,
    exact_gradient,
    gradients,
    probed,
    problem,
    slot_attention,
    solution,
    tanh,
)
from reference import DIFFERENCES, FLOAT32, FLOAT64, central_difference, relative_error

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

PICARD = Picard(max_steps=2500)
FORWARD = {
    "picard": PICARD,
    "anderson": Anderson(max_steps=400, rtol=1e-13, depth=3),
    "broyden": Broyden(max_steps=400, rtol=1e-13, memory=5),
}
SOLVES = {
    "gmres": Implicit(solver=GMRES(max_steps=30, rtol=1e-12)),
    "bicgstab": Implicit(solver=BiCGSTAB(max_steps=60, rtol=1e-10)),
    "dense": Implicit(solver=Dense(block=4)),
    "anderson": Implicit(solver=Anderson(max_steps=400, rtol=1e-12, depth=3)),
    "broyden": Implicit(solver=Broyden(max_steps=400, rtol=1e-12)),
    "picard": Implicit(solver=Picard(max_steps=4000, rtol=1e-12)),
    "adaptive": Adaptive(max_terms=4000, rtol=1e-9),
}
EXACT = SOLVES | {
    "neumann": Neumann(terms=2500),
    "phantom": Phantom(steps=5000, damping=0.7),
    "truncated": Truncated(steps=2500),
    "truncated damped": Truncated(steps=4500, damping=0.7),
    "unrolled": Unrolled(),
}
# What single precision can meet.
SINGLE = {
    name: replace(adjoint, rtol=1e-5)
    if name == "adaptive"
    else adjoint
    if name == "dense"
    else replace(adjoint, solver=replace(adjoint.solver, rtol=1e-5))
    for name, adjoint in SOLVES.items()
}
ONE_TERM = Neumann(terms=1)


def each(table):
    return pytest.mark.parametrize("name", table)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def scaled(params, x, z):
    """The affine map with a scale of its own for each example."""
    return x["scale"] * (z @ params["a"]) + x["x"] @ params["b"]


def both(f, params, x, g, **options):
    """The gradients, and what the backward solve did: one compilation for both."""
    probe = backward_probe(len(g))
    got, _ = gradients(f, params, x, g, probe=probe, **options)
    return got, probed(f, params, x, g, **options)


def powers(a, g, terms):
    """The Neumann series of one example or more in NumPy."""
    return sum(g @ np.linalg.matrix_power(a.T, i) for i in range(terms))


@each(EXACT)
@pytest.mark.parametrize(
    ("f", "spectrum"), [*((affine, s) for s in SPECTRA), (tanh, "non-normal")]
)
def test_exact_adjoints_equal_the_dense_solve(name, f, spectrum):
    data = problem(spectrum)
    adjoint = EXACT[name]
    # As other tests have it, which then need no compilation.
    probe = backward_probe(BATCH) if adjoint.measures else None
    (*got, z0_cotangent), _ = gradients(
        f, *data, solver=PICARD, adjoint=adjoint, probe=probe
    )
    assert_equal(tuple(got), exact_gradient(f, *data), DIFFERENCES)
    if name != "unrolled":
        assert not np.any(z0_cotangent)


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("unrolled", "anderson"),
        ("neumann", "anderson"),
        ("truncated", "broyden"),
        ("gmres", "broyden"),
    ],
)
def test_exact_adjoints_follow_every_solver(name, forward):
    data = problem()
    solver = FORWARD[forward]
    if name == "unrolled":
        solver = replace(solver, max_steps=100)
    got, found = gradients(tanh, *data, solver=solver, adjoint=EXACT[name])
    assert_equal(got[:2], exact_gradient(tanh, *data), DIFFERENCES)
    assert np.all(found.stats.converged)


@each(SOLVES)
def test_gradients_at_a_repelling_fixed_point(name):
    # ρ(J) = 1.5: series diverge, linear solves do not.
    params, x, g = problem("complex", radius=1.5)
    adjoint = SOLVES[name]
    if name == "anderson":
        adjoint = Implicit(
            solver=Anderson(max_steps=60, rtol=1e-12, depth=DIM, restart=False)
        )
    solver = Broyden(max_steps=60, rtol=1e-13, memory=60)
    (*got, _), probe = both(affine, params, x, g, solver=solver, adjoint=adjoint)
    if name in ("picard", "adaptive"):
        # They say so, and fall back to one term.
        one, _ = gradients(affine, params, x, g, solver=solver, adjoint=ONE_TERM)
        assert_equal(tuple(got), one[:2], FLOAT64)
        assert np.all(probe.failed == 1)
    else:
        assert_equal(tuple(got), exact_gradient(affine, params, x, g), DIFFERENCES)


def test_oracle_equals_central_differences():
    params, x, g = problem()
    direction = np.random.default_rng(1).normal(size=(DIM, DIM))

    def loss(a):
        return np.sum(g * solution(tanh, {**params, "a": a}, x))

    want = central_difference(loss, params["a"], direction)
    got = exact_gradient(tanh, params, x, g)[0]["a"]
    assert abs(np.sum(got * direction) - want) < DIFFERENCES * abs(want)


@pytest.fixture(scope="module")
def slots():
    """A slot attention step, its exact gradient along a direction by differences."""
    with jax.enable_x64(True):
        f, params, x, z0 = slot_attention()
        solve = Picard(max_steps=500)
        rng = np.random.default_rng(3)
        g = jnp.asarray(rng.normal(size=z0.shape))
        direction = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), (params, x)
        )

        @jax.jit
        def loss(step):
            moved, x_moved = jax.tree.map(
                lambda a, b: a + step * b, (params, x), direction
            )
            return jnp.sum(g * solve.solve(lambda z: f(moved, x_moved, z), z0).z)

        slope = central_difference(lambda step: float(loss(step)), 0.0, 1.0)
        return f, params, x, z0, g, direction, slope


@each(["unrolled", "truncated", "neumann", "adaptive", "gmres", "dense"])
def test_exact_adjoints_on_slot_attention_equal_central_differences(name, slots):
    f, params, x, z0, g, direction, slope = slots
    adjoint = EXACT[name]
    for field in ("terms", "steps"):
        if hasattr(adjoint, field):
            adjoint = replace(adjoint, **{field: 500})
    (*got, z0_cotangent), found = gradients(
        f, params, x, g, solver=Picard(max_steps=500), adjoint=adjoint, z0=z0
    )
    assert np.all(found.stats.residual < 1e-12)
    parts = jax.tree.map(lambda a, b: jnp.sum(a * b), tuple(got), direction)
    along = float(sum(jax.tree.leaves(parts)))
    assert abs(along - slope) < DIFFERENCES * abs(slope)
    assert name == "unrolled" or not np.any(z0_cotangent)


@pytest.mark.parametrize("terms", [1, 2, 3, 8])
def test_neumann_sums_as_many_powers_of_the_jacobian(terms):
    params, x, g = problem("non-normal")
    series = powers(params["a"], g, terms)
    got, _ = gradients(
        affine, params, x, g, solver=PICARD, adjoint=Neumann(terms=terms)
    )
    assert relative_error(got[1], series @ params["b"].T) < FLOAT64


@pytest.mark.parametrize("terms", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_no_term_outgrows_the_one_before_by_more_than_the_bound(terms):
    params, x, g = problem("non-normal", radius=1.5)
    x = {"x": x, "scale": np.array([[1.0], [0.01], [3.0]])}
    adjoint = Neumann(terms=terms, max_growth=0.8)
    # One step from anywhere: the map runs away.
    got, _ = gradients(
        scaled, params, x, g, solver=Picard(max_steps=1), adjoint=adjoint
    )
    u = g.copy()
    for i in range(BATCH):
        term = g[i]
        for _ in range(terms - 1):
            image = x["scale"][i] * term @ params["a"].T
            growth = np.linalg.norm(image) / np.linalg.norm(term)
            assert (growth < 0.1) if i == 1 else (growth > 1.2)
            term = image * min(1, 0.8 / growth)
            u[i] += term
    assert relative_error(got[1]["x"], u @ params["b"].T) < FLOAT64
    assert np.all(np.linalg.norm(u, axis=1) <= np.linalg.norm(g, axis=1) / (1 - 0.8))


def test_bound_that_is_never_reached_changes_nothing():
    params, x, g = problem("non-normal")
    bounded, plain = (
        gradient_with_sum(params, x, g, adjoint)
        for adjoint in (Neumann(terms=4, max_growth=1e3), Neumann(terms=4))
    )
    assert_equal(bounded, plain, FLOAT64)


def gradient_with_sum(params, x, g, adjoint):
    """The gradient of a loss that auxiliary outputs enter too."""

    def f(params, x, z):
        return tanh(params, x, z), jnp.sin(z)

    @jax.jit
    @jax.grad
    def gradient(params):
        found = fixed_point(
            f,
            params,
            x,
            jnp.zeros_like(g),
            solver=Picard(max_steps=9),
            adjoint=adjoint,
            has_aux=True,
        )
        return jnp.sum(found.value * g) + jnp.sum(found.aux)

    return gradient(params)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_phantom_sums_the_damped_series(steps):
    params, x, g = problem("non-normal")
    damped = 0.3 * params["a"].T + 0.7 * np.eye(DIM)
    series = 0.3 * sum(g @ np.linalg.matrix_power(damped, i) for i in range(steps))
    adjoint = Phantom(steps=steps, damping=0.3)
    got, _ = gradients(affine, params, x, g, solver=PICARD, adjoint=adjoint)
    assert relative_error(got[1], series @ params["b"].T) < FLOAT64


def test_undamped_phantom_is_neumann():
    data = problem()
    phantom, neumann = (
        gradients(tanh, *data, solver=Picard(max_steps=3), adjoint=adjoint)[0]
        for adjoint in (Phantom(steps=4, damping=1.0), Neumann(terms=4))
    )
    assert_equal(phantom, neumann, FLOAT64)


@pytest.mark.parametrize("adjoint", [Truncated, Phantom])
def test_damped_series_and_damped_steps_agree_at_the_solution(adjoint):
    # Geng et al. 2021: the Neumann and the unrolled phantom gradient.
    data = problem()
    got, want = (
        gradients(affine, *data, solver=PICARD, adjoint=kind(steps=5, damping=0.4))[0]
        for kind in (adjoint, Truncated)
    )
    assert_equal(got[:2], want[:2], FLOAT64)


def test_neumann_error_decays_with_the_spectral_radius():
    radius = 0.8
    data = problem("real", radius=radius)
    _, want = exact_gradient(affine, *data)
    errors = [
        relative_error(
            gradients(affine, *data, solver=PICARD, adjoint=Neumann(terms=k))[0][1],
            want,
        )
        for k in (20, 21)
    ]
    assert errors[1] / errors[0] == pytest.approx(radius, rel=0.02)


def test_one_term_is_one_application_to_the_detached_iterate():
    params, x, g = problem()
    z0 = np.ones((BATCH, DIM))

    def paper(params, x):
        z = z0
        for _ in range(4):
            z = tanh(params, x, z)
        return jnp.sum(g * tanh(params, x, jax.lax.stop_gradient(z)))

    want = jax.jit(jax.grad(paper, argnums=(0, 1)))(params, x)
    for adjoint in (ONE_TERM, Truncated(steps=1)):
        got, _ = gradients(
            tanh, params, x, g, solver=Picard(max_steps=4), adjoint=adjoint, z0=z0
        )
        assert_equal(got[:2], want, tolerance=1e-15)


def test_truncated_is_neumann_at_the_solution_alone():
    data = problem()

    def pair(solver):
        return [
            gradients(tanh, *data, solver=solver, adjoint=adjoint)[0][:2]
            for adjoint in (Truncated(steps=5), Neumann(terms=5))
        ]

    converged = pair(PICARD)
    assert_equal(converged[0], converged[1], FLOAT64)
    early = pair(Picard(max_steps=1))
    assert relative_error(early[0][1], early[1][1]) > 1e-3


@pytest.mark.parametrize("remat", [False, True])
def test_unrolled_differentiates_the_iterations(remat):
    params, x, g = problem()
    z0 = np.ones((BATCH, DIM))

    def loop(params, x, z):
        for _ in range(3):
            z = z + 0.7 * (tanh(params, x, z) - z)
        return jnp.sum(g * z)

    want = jax.jit(jax.grad(loop, argnums=(0, 1, 2)))(params, x, z0)
    solver = Picard(max_steps=3, damping=0.7)
    got, _ = gradients(
        tanh, params, x, g, solver=solver, adjoint=Unrolled(remat=remat), z0=z0
    )
    assert_equal(got, want, FLOAT64)
    truncated = Truncated(steps=3, damping=0.7, remat=remat)
    later, found = gradients(
        tanh, params, x, g, solver=Picard(max_steps=2), adjoint=truncated, z0=z0
    )
    for _ in range(2):
        z0 = tanh(params, x, z0)
    want = jax.jit(jax.grad(loop, argnums=(0, 1)))(params, x, z0)
    assert_equal(later[:2], want, FLOAT64)
    assert np.all(found.stats.steps == 2)


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        (Picard(max_steps=12), Unrolled()),  # 3 segments of 3 steps, 2 and the last
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                (Anderson(max_steps=17, depth=2), Unrolled()),
                (Picard(max_steps=1), Truncated(steps=4)),
                (Picard(max_steps=1), Truncated(steps=16, damping=0.8)),
            )
        ),
    ],
)
def test_segments_change_no_gradient(solver, adjoint):
    params, x, g = problem("non-normal")
    z0 = np.ones((BATCH, DIM))
    want, got = (
        gradients(tanh, params, x, g, solver=solver, adjoint=choice, z0=z0)
        for choice in (adjoint, replace(adjoint, remat="sqrt"))
    )
    assert_equal(got, want, FLOAT64)


def test_segments_evaluate_at_most_twice():
    evaluations = []

    def f(params, x, z):
        jax.debug.callback(lambda _: evaluations.append(1), z[0, 0])
        return params * z + x

    def loss(params):
        adjoint, z0 = Unrolled(remat="sqrt"), jnp.ones((1, 1))
        solver = Picard(max_steps=50)
        found = fixed_point(f, params, z0, z0, solver=solver, adjoint=adjoint)
        return jnp.sum(found.value)

    jax.block_until_ready(jax.jit(jax.grad(loss))(0.5))
    jax.effects_barrier()
    assert 50 < len(evaluations) <= 100


def test_unrolled_anderson_equals_central_differences():
    params, x, g = problem("non-normal")
    # Three steps from a point that is no solution: the mixing weights matter.
    solver = Anderson(max_steps=4, depth=2)
    direction = np.random.default_rng(1).normal(size=(DIM, DIM))

    def loss(a):
        changed = {**params, "a": a}
        z0 = np.zeros((BATCH, DIM))
        found = fixed_point(tanh, changed, x, z0, solver=solver, adjoint=Unrolled())
        return jnp.sum(g * found.value)

    want = central_difference(jax.jit(loss), params["a"], direction)
    got = jax.jit(jax.grad(loss))(params["a"])
    assert abs(np.sum(got * direction) - want) < DIFFERENCES * abs(want)


@each(SOLVES)
def test_probe_says_what_the_backward_solve_did(name):
    params, x, g = problem()
    adjoint = SOLVES[name]
    stats = probed(affine, params, x, g, solver=PICARD, adjoint=adjoint)
    assert all(leaf.shape == (BATCH,) for leaf in stats)
    assert not np.any(stats.failed) and np.all(stats.residual < 1e-8)
    # No more products than the method needs: dimension, twice that, an eigenbasis.
    least, most = {
        "gmres": (DIM, DIM),
        "bicgstab": (6, 2 * DIM + 8),
        "dense": (DIM, DIM),
        "anderson": (DIM, 60),
        "broyden": (DIM, 60),
        "picard": (20, 80),
        "adaptive": (20, 80),
    }[name]
    assert np.all((least <= stats.steps) & (stats.steps <= most)), stats.steps


def test_probe_does_not_depend_on_the_loss_scale_nor_change_it():
    params, x, g = problem()
    adjoint = Implicit(solver=GMRES(max_steps=3, rtol=0.0))
    small, large = (
        probed(affine, params, x, scale * g, solver=PICARD, adjoint=adjoint)
        for scale in (1e-3, 1e3)
    )
    assert relative_error(small.residual, large.residual) < 1e-5
    plain, _ = gradients(affine, params, x, g, solver=PICARD, adjoint=adjoint)
    with_probe, _ = gradients(
        affine, params, x, g, solver=PICARD, adjoint=adjoint, probe=backward_probe(3)
    )
    assert_equal(with_probe, plain, FLOAT64)


def test_probe_residual_is_that_of_the_linear_system():
    params, x, g = problem("non-normal")
    adjoint = Implicit(solver=GMRES(max_steps=3, rtol=0.0))
    got, _ = both(affine, params, x, g, solver=PICARD, adjoint=adjoint)
    # The cotangent u, from x's: b has full row rank on a part only, so ask for u.
    params = {**params, "b": np.eye(DIM)}
    right = x @ problem("non-normal").params["b"]
    (_, u, _), stats = both(affine, params, right, g, solver=PICARD, adjoint=adjoint)
    phi = g + u @ params["a"].T
    want = np.linalg.norm(phi - u, axis=1) / np.linalg.norm(g, axis=1)
    assert relative_error(stats.residual, want) < 1e-5
    assert relative_error(got[1], u @ problem("non-normal").params["b"].T) < FLOAT64
    # The residual is least over the Krylov space: a dense least-squares solve.
    for i in range(BATCH):
        system = np.eye(DIM) - params["a"]
        krylov = [params["a"] @ g[i]]
        for _ in range(2):
            krylov.append(params["a"] @ krylov[-1])
        basis = np.linalg.qr(np.array(krylov).T)[0]
        weights = np.linalg.lstsq(system @ basis, krylov[0], rcond=None)[0]
        assert relative_error(u[i], g[i] + basis @ weights) < FLOAT64


@pytest.mark.slow
def test_preconditioned_map_has_the_same_gradient_in_fewer_products():
    # Two strong blocks and weak coupling between them.
    params, x, g = problem("non-normal", radius=0.2)
    rng = np.random.default_rng(4)
    blocks = np.kron(np.eye(2), np.ones((3, 3)))
    params["a"] = 0.05 * params["a"] + blocks * rng.normal(size=(DIM, DIM))
    inverse = np.linalg.inv(np.eye(DIM) - blocks * params["a"])

    def preconditioned(params, x, z):
        return z + (affine(params, x, z) - z) @ inverse

    adjoint = Implicit(solver=GMRES(max_steps=DIM, rtol=1e-6))
    solver = Anderson(max_steps=60, rtol=1e-12, restart=False)
    (*plain, _), stats = both(affine, params, x, g, solver=solver, adjoint=adjoint)
    (*got, _), fewer = both(
        preconditioned, params, x, g, solver=solver, adjoint=adjoint
    )
    for gradient in (plain, got):
        assert_equal(tuple(gradient), exact_gradient(affine, params, x, g), 1e-5)
    assert np.all(stats.steps >= 5) and np.all(fewer.steps <= 3)


FAILING = {
    "gmres": GMRES(max_steps=2, rtol=1e-10),
    "bicgstab": BiCGSTAB(max_steps=2, rtol=1e-10),
    "anderson": Anderson(max_steps=2, depth=1, rtol=1e-10),
    "broyden": Broyden(max_steps=2, rtol=1e-10),
    "picard": Picard(max_steps=2, rtol=1e-10),
}


@each(FAILING)
def test_missed_tolerance_keeps_the_smaller_residual_of_each_example(name):
    params, x, g = problem("non-normal", radius=1.5)
    # x has the cotangent u itself. The second example's map is constant: u = g solves
    # it at once.
    params["b"], scale = np.eye(DIM), np.array([[1.0], [0.0], [1.0]])
    x = {"x": np.ones((BATCH, DIM)), "scale": scale}
    adjoint = Implicit(solver=FAILING[name])
    forward = Broyden(max_steps=60, rtol=1e-13, memory=60)
    (_, got, _), stats = both(scaled, params, x, g, solver=forward, adjoint=adjoint)
    u = np.asarray(got["x"])
    assert stats.failed.tolist() == [1, 0, 1]

    def residual(u):
        right = np.linalg.norm(g, axis=1)
        return np.linalg.norm(g + scale * (u @ params["a"].T) - u, axis=1) / right

    assert relative_error(stats.residual, residual(u)) < 1e-6
    assert np.all(residual(u) <= residual(g) + 1e-12)
    if name == "gmres":  # which no one term beats
        assert np.all(residual(u)[::2] < residual(g)[::2])


def test_missed_tolerance_throws_no_better_gradient_away():
    params, x, g = problem("real", radius=0.95)
    want = exact_gradient(affine, params, x, g)[1]
    missed = Implicit(solver=GMRES(max_steps=4, rtol=1e-3))
    (_, got, _), stats = both(affine, params, x, g, solver=PICARD, adjoint=missed)
    (_, one, _), _ = gradients(affine, params, x, g, solver=PICARD, adjoint=ONE_TERM)
    assert np.all(stats.failed)
    errors = relative_error(got, want), relative_error(one, want)
    assert errors[0] < 0.2 < 0.8 < errors[1], errors


def test_singular_system_falls_back_to_one_term():
    # J has the eigenvalue one: there is no implicit gradient.
    params = {"a": np.diag([1.0, 0.5, 0.2, 0.1, 0.0, -0.3]), "b": np.zeros((2, DIM))}
    _, x, g = problem()
    for name in ("gmres", "bicgstab", "anderson", "broyden"):
        got, stats = both(affine, params, x, g, solver=PICARD, adjoint=SOLVES[name])
        assert np.all(stats.failed == 1), name
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))


@each({k: v for k, v in SOLVES.items() if k not in ("picard", "adaptive")})
def test_single_precision_solves_what_is_nearly_critical(name):
    # ‖u‖ is a hundred times ‖g‖, and a residual of 1e-5 ‖g‖ is nothing but rounding.
    params, x, _ = jax.tree.map(np.float32, problem("near-critical"))
    q = np.linalg.eigh(params["a"])[1][:, -1]
    g = np.tile(q, (BATCH, 1))
    got, stats = both(affine, params, x, g, solver=PICARD, adjoint=SINGLE[name])
    assert got[1].dtype == np.float32 and not np.any(stats.failed)
    assert relative_error(got[1], g @ params["b"].T / (1 - 0.99)) < 1e-3


@each(SOLVES)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_backward_solves_do_not_depend_on_the_scale_of_the_loss(name, scale):
    params, x, g = jax.tree.map(np.float32, problem())
    options = {"solver": PICARD, "adjoint": SINGLE[name]}
    want, _ = both(affine, params, x, g, **options)
    got, stats = both(affine, params, x, np.float32(scale) * g, **options)
    assert relative_error(got[1] / np.float32(scale), want[1]) < 1e-4
    assert not np.any(stats.failed)


@each(["unrolled", "truncated", "neumann", "gmres", "bicgstab", "broyden", "adaptive"])
@pytest.mark.parametrize("exponent", [-66, 66])
def test_gradients_of_any_size_are_the_same(name, exponent):
    """Of z and of the loss, 1e-20 and 1e20: squares of neither are in range."""
    params, x, g = jax.tree.map(np.float32, problem())
    adjoint = SINGLE.get(name, EXACT[name])
    for field in ("terms", "steps"):
        if hasattr(adjoint, field):
            adjoint = replace(adjoint, **{field: 60})
    options = {"solver": Anderson(max_steps=60, rtol=1e-6), "adjoint": adjoint}
    want, _ = gradients(affine, params, x, g, **options)
    scale = np.float32(2.0**exponent)
    # The parameters' gradients are the products of the two.
    got, found = gradients(affine, params, scale * x, g / scale, **options)
    assert np.all(found.stats.converged)
    assert relative_error(got[1] * scale, want[1]) < 1e-4
    assert_equal(got[0], want[0], 1e-4)


def normalised(params, x, z):
    """Each slot's normalised vector times a number, and the input."""
    centred = z - z.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return params * centred * jax.lax.rsqrt(variance) + x


def test_dense_solve_of_a_batch_of_a_models_size():
    """With jaxlib 0.10.2 most are wrong on a CPU: a block of products takes 1 MiB."""
    z0, x, g = np.random.default_rng(0).normal(size=(3, 16, 4, 64)).astype(np.float32)
    with jax.enable_x64(False):
        (_, u, _), _ = gradients(
            normalised,
            np.float32(0.5),
            x,
            g,
            solver=Picard(max_steps=1),
            adjoint=Implicit(solver=Dense()),
            z0=z0,
        )
    # J where it is taken, by hand: (1 − 1/d − h hᵀ/d) / 2σ for each slot.
    z0, x, g = (array.astype(np.float64) for array in (z0, x, g))
    z = normalised(np.float64(0.5), x, z0)
    centred = np.asarray(z - z.mean(axis=-1, keepdims=True))
    sigma = centred.std(axis=-1)[..., None, None]
    h = centred[..., None] / sigma
    size = z.shape[-1]
    jacobian = (np.eye(size) - 1 / size - h * h.swapaxes(-1, -2) / size) / 2 / sigma
    want = np.linalg.solve(np.eye(size) - jacobian, g[..., None])[..., 0]
    assert relative_error(u, want) < FLOAT32


def square_root(params, x, z):
    """√(z²) has no derivative at zero."""
    return params * x + 0.1 * jnp.sqrt(z**2)


@each(SOLVES)
def test_jacobian_that_is_not_finite_falls_back_to_one_term(name):
    # The first example's solution is zero.
    x, g = np.array([[0.0], [3.0]]), np.ones((2, 1))
    params = jnp.ones(())
    with jax.numpy_rank_promotion("allow"):
        adjoint = SOLVES[name]
        solver = Picard(max_steps=60)
        got, stats = both(square_root, params, x, g, solver=solver, adjoint=adjoint)
    assert stats.failed.tolist() == [1, 0]
    # One term for the first, whose x is zero; 3 / (1 − 0.1) for the second.
    assert relative_error(got[0], 3 / 0.9) < DIFFERENCES


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_budget_without_tolerance_is_used_not_dropped(name):
    # The paper's Broyden backward pass: seven steps, whatever the residual.
    params, x, g = problem(radius=0.9)
    solver = {
        "anderson": Anderson(max_steps=7, depth=5),
        "broyden": Broyden(max_steps=7),
    }[name]
    got, stats = both(
        affine, params, x, g, solver=PICARD, adjoint=Implicit(solver=solver)
    )
    assert not np.any(stats.failed) and np.all(stats.steps == 7)
    one, _ = gradients(affine, params, x, g, solver=PICARD, adjoint=ONE_TERM)
    want = exact_gradient(affine, params, x, g)[1]
    assert relative_error(got[1], want) < 0.1 * relative_error(one[1], want)


@pytest.mark.parametrize("spectrum", ["real", "complex", "non-normal"])
@pytest.mark.parametrize("budget", [1e-1, 1e-2, 1e-4])
def test_adaptive_keeps_its_budget(spectrum, budget):
    data = problem(spectrum, radius=0.8)
    # x has the cotangent u itself.
    data.params["b"] = np.eye(DIM)
    x = np.random.default_rng(5).normal(size=(BATCH, DIM))
    adjoint = Adaptive(max_terms=500, rtol=budget)
    (_, got, _), stats = both(
        affine, data.params, x, data.g, solver=PICARD, adjoint=adjoint
    )
    want = np.linalg.solve(np.eye(DIM) - data.params["a"], data.g.T).T
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert np.all(stats.residual <= budget) and not np.any(stats.failed)
    assert np.all(error <= budget)


def test_adaptive_takes_as_many_terms_as_each_example_needs():
    params, x, g = problem("real", radius=1.0)
    x = {"x": x, "scale": np.array([[0.1], [0.5], [0.9]])}
    adjoint = Adaptive(max_terms=200, rtol=1e-3)
    got, stats = both(scaled, params, x, g, solver=PICARD, adjoint=adjoint)
    terms = stats.steps.astype(int)
    assert terms[0] < terms[1] < terms[2] < 200
    for i in range(BATCH):
        series = powers(x["scale"][i] * params["a"], g[i], int(terms[i]))
        assert relative_error(got[1]["x"][i], series @ params["b"].T) < FLOAT64


def test_adaptive_at_its_maximum_keeps_the_partial_sum():
    data = problem("real", radius=0.9)
    adjoint = Adaptive(max_terms=6, rtol=1e-6)
    got, stats = both(affine, *data, solver=PICARD, adjoint=adjoint)
    # Its last sum's next term was never computed, so the one before is known best.
    assert np.all(stats.steps == 5) and np.all(stats.failed)
    assert np.all(stats.residual > 1e-6)
    want = powers(data.params["a"], data.g, 5) @ data.params["b"].T
    assert relative_error(got[1], want) < FLOAT64


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Neumann(terms=0), "terms must be at least 1, got 0"),
        (lambda: Neumann(max_growth=0.0), "max_growth must be positive, got 0"),
        (lambda: Truncated(steps=0), "steps must be at least 1, got 0"),
        (lambda: Truncated(steps=1, damping=2.0), r"damping must be in \(0, 1\]"),
        (
            lambda: replace(Unrolled(), remat="log"),
            'remat must be False, True or "sqrt"',
        ),
        (
            lambda: replace(Truncated(), remat="log"),
            'remat must be False, True or "sqrt"',
        ),
        (lambda: Phantom(steps=0), "steps must be at least 1, got 0"),
        (lambda: Phantom(steps=1, damping=0.0), r"damping must be in \(0, 1\]"),
        (lambda: Adaptive(max_terms=1), "max_terms must be at least 2, got 1"),
        (lambda: Adaptive(max_terms=9, rtol=0.0), "rtol must be positive"),
        (lambda: GMRES(max_steps=0), "max_steps must be at least 1, got 0"),
        (lambda: GMRES(max_steps=1, rtol=-1.0), "must not be negative"),
        (lambda: BiCGSTAB(max_steps=1), "max_steps must be at least 2, got 1"),
        (lambda: Dense(block=0), "block must be at least 1, got 0"),
        (lambda: Truncated(steps=True), "steps must be an integer, got True"),
        (lambda: GMRES(max_steps=5, rtol=np.inf), "rtol must be a finite number"),
        (lambda: Adaptive(rtol=np.nan), "rtol must be a finite number, got nan"),
        (lambda: Phantom(steps=2, damping=np.nan), "damping must be a finite number"),
    ],
)
def test_misuse_of_a_constructor(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
