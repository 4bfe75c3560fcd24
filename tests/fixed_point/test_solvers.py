"""Forward solvers against linear algebra, NumPy twins and their own laws."""

import functools
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
    problem,
    slot_attention,
    solution,
    tanh,
)
from reference import FLOAT32, FLOAT64, relative_error

from implicit_slots.fixed_point import Anderson, Broyden, Neumann, Picard, fixed_point

pytestmark = pytest.mark.usefixtures("strict_promotion")

# Small enough for each of them to need several restarts, or wrapped histories.
SOLVERS = {
    "picard": Picard(max_steps=3000, rtol=1e-13),
    "damped": Picard(max_steps=6000, rtol=1e-13, damping=0.7),
    "anderson": Anderson(max_steps=400, rtol=1e-13, depth=3),
    "broyden": Broyden(max_steps=400, rtol=1e-13, memory=5),
}
by_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@functools.cache
def compiled(solver, f):
    """One compilation for all tests that differ in numbers alone."""
    return jax.jit(
        lambda params, x, z0: fixed_point(
            f, params, x, z0, solver=solver, adjoint=Neumann()
        )
    )


def solve(solver, f, params, x, z0=None):
    """The compiled fixed point, from zero."""
    z0 = np.zeros((len(x), DIM)) if z0 is None else z0
    return compiled(solver, f)(params, x, z0)


def shorter(solver, max_steps):
    """The same method with another budget and no tolerance to speak of."""
    fields = {"max_steps": max_steps, "rtol": 1e-300, "trace": True}
    if isinstance(solver, Anderson):
        fields["depth"] = min(3, max_steps)
    return type(solver)(**fields)


@by_solver
@pytest.mark.parametrize(
    ("f", "spectrum"), [*((affine, s) for s in SPECTRA), (tanh, "non-normal")]
)
def test_solution_equals_the_linear_solve(solver, f, spectrum):
    params, x, _ = problem(spectrum)
    found = solve(solver, f, params, x)
    assert np.all(found.stats.converged) and not np.any(found.stats.stagnated)
    assert np.all(found.stats.residual < 2e-13)
    assert relative_error(found.value, solution(f, params, x)) < FLOAT64


@pytest.fixture(scope="module")
def slots():
    with jax.enable_x64(True):
        f, *data = slot_attention()
        return f, jax.jit(lambda *arguments: f(*arguments)), data


@by_solver
def test_slot_attention_converges(solver, slots):
    f, step, (params, x, z0) = slots
    found = solve(solver, f, params, x, z0)
    assert np.all(found.stats.converged)
    assert relative_error(step(params, x, found.value), found.value) < FLOAT64


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_accelerated_solvers_need_fewer_evaluations(name):
    params, x, _ = problem("near-critical")
    picard = solve(SOLVERS["picard"], affine, params, x).stats.steps
    assert np.all(5 * solve(SOLVERS[name], affine, params, x).stats.steps < picard)


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_accelerated_solvers_find_a_repelling_fixed_point(name):
    # ρ(J) = 1.5: the plain iteration runs away.
    params, x, _ = problem("complex", radius=1.5)
    solver = {
        "anderson": Anderson(
            max_steps=60, rtol=1e-12, depth=DIM, ridge=1e-12, restart=False
        ),
        "broyden": Broyden(max_steps=60, rtol=1e-12, memory=60),
    }[name]
    found = solve(solver, affine, params, x)
    assert np.all(found.stats.converged)
    right = x @ params["b"]
    want = np.linalg.solve(np.eye(DIM) - params["a"].T, right.T).T
    assert relative_error(found.value, want) < FLOAT64


@by_solver
@pytest.mark.parametrize("radius", [0.9, 1.3])
def test_more_steps_never_give_a_worse_residual(solver, radius):
    params, x, _ = problem("non-normal", radius=radius)
    residuals = []
    for steps in (1, 3, 8):
        found = solve(shorter(solver, steps), affine, params, x)
        stats = found.stats
        # What is returned is the best of what was evaluated.
        assert relative_error(stats.residual, np.min(stats.trace, 1)) < FLOAT64
        residuals.append(stats.residual)
    assert np.all(np.diff(residuals, axis=0) <= 1e-12)


def test_plain_picard_is_the_iteration_itself():
    params, x, _ = problem()
    z = np.ones((BATCH, DIM))
    found = solve(Picard(max_steps=4), tanh, params, x, z)
    for _ in range(4):
        z = np.tanh(z @ params["a"] + x @ params["b"])
    fz = np.tanh(z @ params["a"] + x @ params["b"])
    residual = np.linalg.norm(fz - z, axis=1) / np.linalg.norm(fz, axis=1)
    assert relative_error(found.value, fz) < FLOAT64
    assert relative_error(found.stats.residual, residual) < FLOAT64
    assert np.all(found.stats.steps == 4) and not np.any(found.stats.converged)


def numpy_anderson(f, z, steps, depth, restart):
    """Walker and Ni's type II by a least-squares solve; the iterates of one example."""
    iterates, residuals, begin = [], [], 0
    for step in range(steps):
        iterates.append(z)
        residuals.append(f(z) - z)
        g = residuals[-1]
        if restart and step and np.linalg.norm(g) > np.linalg.norm(residuals[-2]):
            begin = step
        kept = slice(max(begin, step - depth), None)
        dz = np.diff(iterates[kept], axis=0).T
        dg = np.diff(residuals[kept], axis=0).T
        z = z + g
        if dg.size:
            z = z - (dz + dg) @ np.linalg.lstsq(dg, g, rcond=None)[0]
    return iterates


def numpy_broyden(f, z, steps):
    """The good method with the whole inverse; the iterates of one example."""
    iterates, inverse = [], -np.eye(len(z))
    g = f(z) - z
    for _ in range(steps):
        iterates.append(z)
        step = -inverse @ g
        z, old = z + step, g
        g = f(z) - z
        change = inverse @ (g - old)
        inverse += np.outer(step - change, step @ inverse) / (step @ change)
    return iterates


@pytest.mark.parametrize("name", ["anderson", "anderson restarted", "broyden"])
def test_iterates_equal_numpy(name):
    params, x, _ = problem("non-normal", radius=1.2)
    steps = 9
    anderson = Anderson(max_steps=steps, depth=2, ridge=1e-15, trace=True)
    solver = {
        "anderson": replace(anderson, restart=False),
        "anderson restarted": anderson,
        "broyden": Broyden(max_steps=steps, trace=True),
    }[name]
    trace = solve(solver, tanh, params, x).stats.trace
    for i in range(BATCH):

        def f(z, i=i):
            return np.tanh(z @ params["a"] + x[i] @ params["b"])

        if isinstance(solver, Anderson):
            iterates = numpy_anderson(
                f, np.zeros(DIM), steps, depth=2, restart=solver.restart
            )
        else:
            iterates = numpy_broyden(f, np.zeros(DIM), steps)
        want = [np.linalg.norm(f(z) - z) / np.linalg.norm(f(z)) for z in iterates]
        assert relative_error(trace[i], want) < 1e-6  # the ridge, amplified
    if name == "anderson restarted":
        assert np.any(np.diff(trace) > 0)  # or it never restarted


def test_anderson_spans_what_gmres_spans():
    # Walker and Ni 2011, theorem 2.2: undamped, with the whole history, Anderson's next
    # iterate is f at the minimiser of the residual over the Krylov space.
    params, x, _ = problem("complex", radius=0.9)
    for steps in (2, 3, 4):
        # Converges nowhere; the last evaluation is at the iterate that is meant.
        solver = Anderson(max_steps=steps + 1, depth=steps, ridge=1e-14, restart=False)
        z = jax.jit(iterate, static_argnums=(0, 1))(solver, steps, params, x)
        for i in range(BATCH):
            a, b = params["a"].T, x[i] @ params["b"]
            krylov = [b]
            for _ in range(steps - 2):
                krylov.append(a @ krylov[-1])
            basis = np.linalg.qr(np.array(krylov).T)[0]
            weights = np.linalg.lstsq(basis - a @ basis, b, rcond=None)[0]
            minimiser = basis @ weights
            assert relative_error(z[i], a @ minimiser + b) < 1e-7


def iterate(solver, steps, params, x):
    state = solver.init(jnp.zeros((BATCH, DIM)))
    for _ in range(steps):
        state = solver.step(state, affine(params, x, state.z))
    return state.z


def test_anderson_takes_a_singular_history():
    # A map to a line: after two steps every difference points the same way.
    def f(params, x, z):
        return jnp.tanh(z @ params["a"]) * x + 1

    rng = np.random.default_rng(0)
    params = {"a": np.outer(rng.normal(size=DIM), np.ones(DIM)) / DIM}
    x = np.tile(rng.normal(size=(BATCH, 1)), DIM)
    z0 = rng.normal(size=(BATCH, DIM))
    found = solve(Anderson(max_steps=60, depth=8, rtol=1e-12), f, params, x, z0)
    assert np.all(found.stats.converged) and np.all(np.isfinite(found.value))
    # An exact fixed point from the start: all differences vanish.
    still = solve(Anderson(max_steps=9, depth=8), affine, *zero_problem())
    assert np.all(still.stats.converged) and np.all(still.stats.steps == 1)
    assert not np.any(still.value)


def zero_problem():
    params, x, _ = problem()
    return params, np.zeros_like(x)


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_iterations_do_not_depend_on_the_scale_of_z(name):
    params, x, _ = problem("non-normal")
    solver = shorter(SOLVERS[name], 9)
    small, large = (
        solve(solver, affine, params, scale * x).stats.trace for scale in (1e-4, 1e4)
    )
    assert relative_error(small, large) < FLOAT64


@by_solver
def test_warm_start_at_the_solution_takes_one_evaluation(solver):
    params, x, _ = problem()
    cold = solve(SOLVERS["broyden"], tanh, params, x)
    warm = solve(type(solver)(max_steps=50, rtol=1e-10), tanh, params, x, cold.value)
    assert np.all(warm.stats.steps == 1) and np.all(warm.stats.converged)


@by_solver
def test_what_is_not_finite_stays_with_its_example(solver):
    # f of the second example is NaN as soon as z has left the start by a little.
    params, x, _ = problem()
    x = {"x": x, "limit": np.array([[1e9], [1e-3], [1e9]])}

    def f(params, x, z):
        fz = affine(params, x["x"], z)
        return jnp.where(jnp.abs(z).max(1, keepdims=True) < x["limit"], fz, jnp.nan)

    z0 = np.zeros((BATCH, DIM))
    found = solve(solver, f, params, x, z0)
    assert found.stats.diverged.tolist() == [False, True, False]
    assert found.stats.converged.tolist() == [True, False, True]
    assert found.stats.steps[1] == 2
    # The best one evaluated is z0, so the value is f(z0): finite.
    assert relative_error(found.value[1], x["x"][1] @ params["b"]) < FLOAT64
    want = solution(affine, params, x["x"])
    assert relative_error(np.asarray(found.value)[::2], want[::2]) < FLOAT64


@by_solver
def test_not_finite_from_the_start_is_reported(solver):
    params, x, _ = problem()
    x = x.copy()
    x[0] = np.nan
    found = solve(solver, affine, params, x)
    assert found.stats.diverged.tolist() == [True, False, False]
    assert not found.stats.converged[0] and np.all(found.stats.converged[1:])
    assert np.all(np.isfinite(found.value[1:]))


def test_stagnation_is_recognised():
    def swap(params, x, z):  # a cycle of two
        return x - z

    solver = Picard(max_steps=500, rtol=1e-6, patience=15)
    x = np.ones((2, DIM))
    z0 = np.stack([np.zeros(DIM), np.full(DIM, 0.5)])
    found = solve(solver, swap, {}, x, z0)
    # The second example starts at the fixed point.
    assert found.stats.stagnated.tolist() == [True, False]
    assert found.stats.converged.tolist() == [False, True]
    assert found.stats.steps.tolist() == [16, 1]


def test_absolute_tolerance_is_met_by_what_is_returned():
    # The relative residual never changes here, the absolute one falls.
    def shrink(params, x, z):
        return 0.9 * z

    z0 = np.full((1, 1), 1e6)
    for solver in (
        Picard(max_steps=1000, atol=1e-3),
        Anderson(max_steps=50, atol=1e-3),
    ):
        found = solve(solver, shrink, {}, np.zeros((1, 1)), z0)
        assert found.stats.converged[0] and not found.stats.stagnated[0]
        assert 0.1 * abs(found.value[0, 0]) <= 1e-3


def test_never_fewer_evaluations_than_asked_for():
    params, x, _ = problem()
    x = x * np.array([[0.0], [1e-6], [1.0]])  # the first starts at its solution
    for solver in (
        Picard(max_steps=90, rtol=1e-3, min_steps=25),
        Anderson(max_steps=90, rtol=1e-3, min_steps=25, patience=5),
        Broyden(max_steps=90, rtol=1e-3, min_steps=25, patience=5),
    ):
        found = solve(solver, affine, params, x)
        assert found.stats.steps.tolist() == [25, 25, 25]
        assert np.all(found.stats.converged) and np.all(found.stats.residual < 1e-5)


@pytest.mark.parametrize("exponent", [-66, 66])
@pytest.mark.parametrize("name", ["picard", "anderson", "broyden"])
def test_iterations_of_any_size_are_the_same(name, exponent):
    """1e-20 and 1e20, whose squares single precision has not: the same bits, scaled."""
    params, x, _ = jax.tree.map(np.float32, problem("non-normal", radius=0.5))
    solver = replace(SOLVERS[name], max_steps=60, rtol=1e-6, trace=True)
    z0 = np.zeros((BATCH, DIM), np.float32)
    scale = np.float32(2.0**exponent)
    want = solve(solver, affine, params, x, z0)
    found = solve(solver, affine, params, scale * x, z0)
    assert np.all(want.stats.converged) and relative_error(found.value, 0 * z0) > 0
    assert np.array_equal(found.value, scale * want.value)
    jax.tree.map(np.testing.assert_array_equal, found.stats, want.stats)


def test_slow_progress_is_no_stagnation():
    params, x, _ = problem("real", radius=0.9999)
    found = solve(Picard(max_steps=1000, rtol=1e-13), affine, params, x)
    assert not np.any(found.stats.stagnated) and np.all(found.stats.steps == 1000)


@by_solver
def test_trace_holds_the_residual_of_every_evaluation(solver):
    params, x, _ = problem(radius=0.9)
    x = x * np.array([[0.0], [1.0], [1.0]])  # the first example starts at its solution
    found = solve(shorter(solver, 5), affine, params, x)
    trace = np.asarray(found.stats.trace)
    assert trace.shape == (BATCH, 5)
    assert trace[0, 0] == 0 and np.all(trace[0, 1:] == np.inf)
    assert np.all(np.isfinite(trace[1:])) and np.all(trace[1:, 0] == 1)
    assert found.stats.steps.tolist() == [1, 5, 5]


def test_trace_of_the_plain_iteration_changes_nothing():
    params, x, _ = problem()
    plain = solve(Picard(max_steps=6), tanh, params, x)
    traced = solve(Picard(max_steps=6, trace=True), tanh, params, x)
    assert relative_error(traced.value, plain.value) < FLOAT64
    z = np.zeros((BATCH, DIM))
    for step in range(6):
        fz = np.tanh(z @ params["a"] + x @ params["b"])
        want = np.linalg.norm(fz - z, axis=1) / np.linalg.norm(fz, axis=1)
        assert relative_error(traced.stats.trace[:, step], want) < FLOAT64
        z = fz
    assert plain.stats.trace is None
    assert not np.any(traced.stats.stagnated)

    def swap(params, x, z):  # no progress, and nobody asked for any
        return x - z

    traced = solve(Picard(max_steps=50, trace=True), swap, {}, np.ones((1, DIM)))
    assert traced.stats.steps[0] == 50 and not traced.stats.stagnated[0]


@by_solver
def test_float32_and_bfloat16(solver):
    params, x, _ = problem()
    single = jax.tree.map(lambda leaf: np.float32(leaf), (params, x))
    solver = type(solver)(max_steps=60, rtol=1e-6)
    found = solve(solver, tanh, *single, z0=np.zeros((BATCH, DIM), np.float32))
    assert np.all(found.stats.converged)
    assert relative_error(found.value, solution(tanh, params, x)) < FLOAT32

    def half(params, x, z):
        return tanh(params, x, z.astype(jnp.float32)).astype(jnp.bfloat16)

    z0 = jnp.zeros((BATCH, DIM), jnp.bfloat16)
    solver = type(solver)(max_steps=60, rtol=1e-2)
    found = solve(solver, half, *single, z0=z0)
    assert found.value.dtype == jnp.bfloat16
    assert found.stats.residual.dtype == jnp.float32
    assert np.all(found.stats.converged)
    assert relative_error(found.value, solution(tanh, params, x)) < 0.02


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Picard(max_steps=0), "max_steps must be at least 1, got 0"),
        (lambda: Picard(max_steps=1, rtol=-1.0), "must not be negative"),
        (
            lambda: Picard(max_steps=1, rtol=float("nan")),
            "rtol must be a finite number",
        ),
        (lambda: Anderson(max_steps=9, atol=-1.0), "must not be negative"),
        (lambda: Picard(max_steps=1, damping=0.0), r"damping must be in \(0, 1\]"),
        (lambda: Picard(max_steps=1, patience=0), "patience must be at least 1"),
        (lambda: Anderson(max_steps=3, depth=4), r"from 1 to max_steps \(3\), got 4"),
        (lambda: Anderson(max_steps=3, depth=0), "depth must be at least 1, got 0"),
        (lambda: Anderson(max_steps=9, ridge=0.0), "ridge must be positive"),
        (lambda: Broyden(max_steps=3, memory=0), "memory must be at least 1, got 0"),
        (lambda: Picard(max_steps=True), "max_steps must be an integer, got True"),
        (lambda: Picard(max_steps=5, atol=np.inf), "atol must be a finite number"),
        (lambda: Picard(max_steps=5, damping=np.nan), "damping must be a finite"),
        (lambda: Picard(max_steps=5, min_steps=6), r"not be above max_steps \(5\)"),
    ],
)
def test_misuse_of_a_constructor(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
