"""What holds for every solver with every backward pass, and independent references."""

import functools
import os
import subprocess
import sys
import textwrap
import warnings
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from fixed_points import (
    BATCH,
    DIM,
    affine,
    assert_equal,
    gradients,
    problem,
    slot_attention,
    solution,
    tanh,
)
from jax.flatten_util import ravel_pytree
from reference import (
    DIFFERENCES,
    FLOAT32,
    FLOAT64,
    central_difference,
    relative_error,
)

from implicit_slots.fixed_point import (
    GMRES,
    Adaptive,
    Anderson,
    BiCGSTAB,
    Broyden,
    Dense,
    Implicit,
    ImplicitJVP,
    Neumann,
    Phantom,
    Picard,
    Truncated,
    Unrolled,
    backward_probe,
    check_pair,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

# Tolerances that are met, so that examples stop at different steps.
SOLVERS = {
    "picard": Picard(max_steps=90, rtol=1e-8),
    "anderson": Anderson(max_steps=60, rtol=1e-8, depth=3),
    "broyden": Broyden(max_steps=60, rtol=1e-8),
}
ADJOINTS = {
    "unrolled": Unrolled(),
    "truncated": Truncated(steps=3),
    "neumann": Neumann(terms=3),
    "phantom": Phantom(steps=3, damping=0.6),
    "adaptive": Adaptive(max_terms=40, rtol=1e-6),
    "gmres": Implicit(solver=GMRES(max_steps=14, rtol=1e-8)),
    "bicgstab": Implicit(solver=BiCGSTAB(max_steps=40, rtol=1e-8)),
    "dense": Implicit(solver=Dense()),
    "jvp": ImplicitJVP(solver=GMRES(max_steps=14, rtol=1e-8)),
    "anderson": Implicit(solver=Anderson(max_steps=40, rtol=1e-8)),
    "broyden": Implicit(solver=Broyden(max_steps=40, rtol=1e-8)),
}
# Every solver and every backward pass at least once, and who may get in whose way.
CROSS = [
    *((solver, "neumann") for solver in SOLVERS),
    *(("picard", adjoint) for adjoint in ADJOINTS if adjoint != "neumann"),
    ("anderson", "unrolled"),
    ("broyden", "gmres"),
]
# Every solver, and one backward pass of each kind: loop, series, solve.
KINDS = [
    ("picard", "unrolled"),
    ("picard", "truncated"),
    ("picard", "adaptive"),
    ("picard", "jvp"),
    ("anderson", "neumann"),
    ("broyden", "gmres"),
]
each_of_kinds = pytest.mark.parametrize(("solver", "adjoint"), KINDS)
each_of_cross = pytest.mark.parametrize(("solver", "adjoint"), CROSS)
each_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS)
# Each way to a cotangent once; the other solvers of the linear system are like these.
each_way = pytest.mark.parametrize(
    "adjoint",
    ["unrolled", "truncated", "neumann", "phantom", "adaptive", "gmres", "dense"],
)
PICARD = Picard(max_steps=400)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@each_of_cross
def test_each_example_gets_what_it_gets_alone(solver, adjoint):
    params, x, g = problem("non-normal", radius=0.8)

    def f(params, x, z):
        return x["scale"] * affine(params, x["x"], z)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def solve(params, x, g):
        found = fixed_point(
            f,
            params,
            x,
            jnp.zeros_like(g),
            solver=SOLVERS[solver],
            adjoint=ADJOINTS[adjoint],
        )
        return jnp.sum(jnp.where(g != 0, found.value, 0) * g), found

    # The scale is the example's own: the last one runs away, and is in no loss.
    x = {"x": x, "scale": np.array([[0.1], [0.9], [1e3]])}
    g = g * np.array([[1], [1], [0]])
    (together_params, together_x), together = solve(params, x, g)
    total = jax.tree.map(jnp.zeros_like, together_params)
    for i in range(2):
        # Its neighbours are copies of itself; for a batch of one see the next test.
        (copies_params, copies_x), copies = solve(
            params,
            jax.tree.map(lambda leaf, i=i: leaf[[i] * 3], x),
            g[[i] * 3],
        )
        assert relative_error(together.value[i], copies.value[0]) < FLOAT64
        assert relative_error(together_x["x"][i], copies_x["x"][0]) < FLOAT64
        assert np.all(together.stats.steps[i] == copies.stats.steps)
        assert together.stats.steps[i] < 90 and together.stats.converged[i]
        total = jax.tree.map(lambda a, b: a + b / 3, total, copies_params)
    assert_equal(together_params, total, FLOAT64)
    assert together.stats.steps[0] != together.stats.steps[1]


@each_of_kinds
def test_batch_of_one(solver, adjoint):
    params, x, g = problem()
    options = {"solver": SOLVERS[solver], "adjoint": ADJOINTS[adjoint]}
    together, found = gradients(tanh, params, x, g, **options)
    alone, one = gradients(tanh, params, x[1:2], g[1:2], **options)
    assert relative_error(one.value[0], found.value[1]) < FLOAT64
    assert relative_error(alone[1][0], together[1][1]) < FLOAT64
    assert one.stats.steps[0] == found.stats.steps[1]


def with_aux(params, x, z):
    """tanh, and something to look at; integers are no part of a loss."""
    counts = jnp.arange(BATCH)
    return tanh(params, x, z), {"in": z, "sum": z @ params["a"][0], "n": counts}


@functools.cache
def gradient_with_aux(solver, adjoint):
    params, x, g = problem(radius=0.3)
    z0 = np.zeros((BATCH, DIM))

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params):
        found = fixed_point(
            with_aux, params, x, z0, solver=solver, adjoint=adjoint, has_aux=True
        )
        return jnp.sum(found.value * g) + jnp.sum(jnp.sin(found.aux["sum"])), found

    return gradient(params)


@each_of_kinds
def test_one_more_step_moves_nothing_and_auxiliary_output_is_the_last(solver, adjoint):
    solver = type(SOLVERS[solver])(max_steps=80, rtol=1e-13)
    params, x, _ = problem(radius=0.3)
    exact, _ = gradient_with_aux(Picard(max_steps=60), Unrolled())
    backward = ADJOINTS[adjoint]
    if adjoint in ("truncated", "phantom"):
        backward = replace(backward, steps=60)
    elif adjoint == "neumann":
        backward = replace(backward, terms=60)
    got, found = gradient_with_aux(solver, backward)
    last = np.tanh(found.value @ params["a"] + x @ params["b"])
    assert relative_error(last, found.value) < FLOAT64
    assert relative_error(found.aux["in"], found.value) < FLOAT64
    # The ratio of the longest series is 0.58.
    assert_equal(got, exact, DIFFERENCES)


@each_of_kinds
def test_nested_trees_and_mixed_dtypes(solver, adjoint):
    params, x, _ = problem()

    def f(params, x, z):
        half = z["rest"]["half"].astype(jnp.float32)
        full = tanh(params, x, z["full"] + half.astype(z["full"].dtype))
        return {"full": full, "rest": {"half": (0.5 * half).astype(jnp.bfloat16)}}

    z0 = {
        "full": np.zeros((BATCH, DIM)),
        "rest": {"half": jnp.ones((BATCH, DIM), jnp.bfloat16)},
    }
    solver = type(SOLVERS[solver])(max_steps=80, rtol=1e-12)
    backward = loosened(ADJOINTS[adjoint], rtol=2e-2)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def solve(params):
        found = fixed_point(f, params, x, z0, solver=solver, adjoint=backward)
        return jnp.sum(found.value["full"]), found

    gradient, found = solve(params)
    assert found.value["rest"]["half"].dtype == jnp.bfloat16
    assert found.stats.residual.dtype == jnp.float64
    want = solution(tanh, params, x)
    assert relative_error(found.value["full"], want) < FLOAT64
    plain = plain_gradients(adjoint, params, x, np.ones((BATCH, DIM)))
    # The half's Jacobian is no part of the full one's gradient, but its rounding is
    # part of a Krylov space, and of Anderson's weights.
    assert_equal(gradient, plain[0], 5e-2 if isinstance(backward, Implicit) else 5e-3)


def plain_gradients(adjoint, params, x, g):
    """For params, x and z0, of tanh in double precision: one compilation for all."""
    options = {"solver": SOLVERS["picard"], "adjoint": ADJOINTS[adjoint]}
    return gradients(tanh, params, x, g, **options)[0]


def loosened(adjoint, rtol):
    """The same with a tolerance that half precision can meet."""
    if isinstance(adjoint, Implicit) and not isinstance(adjoint.solver, Dense):
        return Implicit(solver=replace(adjoint.solver, rtol=rtol))
    return adjoint


@each_way
def test_step_in_bfloat16(adjoint):
    double = problem()
    params, x, g = jax.tree.map(np.float32, double)

    def f(params, x, z):
        return tanh(params, x, z.astype(jnp.float32)).astype(jnp.bfloat16)

    solver = Picard(max_steps=40)
    backward = loosened(ADJOINTS[adjoint], rtol=1e-1)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params):
        z0 = jnp.zeros((BATCH, DIM), jnp.bfloat16)
        found = fixed_point(f, params, x, z0, solver=solver, adjoint=backward)
        return jnp.sum(found.value.astype(jnp.float32) * g), found.stats

    got, stats = gradient(params)
    assert stats.residual.dtype == jnp.float32
    assert np.all(stats.residual < 0.01)
    want, _ = gradients(tanh, *double, solver=SOLVERS["picard"], adjoint=backward)
    assert_equal(got, want[0], 0.05)


@each_way
def test_vmap_and_remat_change_nothing(adjoint):
    params, x, g = problem()
    x = np.stack([x, 0.5 * x])

    @jax.checkpoint
    def loss(params, x):
        found = fixed_point(
            tanh,
            params,
            x,
            np.zeros((BATCH, DIM)),
            solver=SOLVERS["picard"],
            adjoint=ADJOINTS[adjoint],
        )
        return jnp.sum(found.value * g)

    gradient = jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(None, 0))
    want = [plain_gradients(adjoint, params, one, g)[:2] for one in x]
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *want)
    assert_equal(jax.jit(gradient)(params, x), want, FLOAT64)


@pytest.mark.slow
def test_sharded_batch_gives_what_one_device_gives():
    # A process of its own: the number of devices is fixed when JAX starts.
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from fixed_points import affine, assert_equal, problem
        from fixed_point.test_api import ADJOINTS, SOLVERS
        from implicit_slots.fixed_point import fixed_point

        params, x, g = problem()
        x, g = np.tile(x, (2, 1))[:4], np.tile(g, (2, 1))[:4]
        x[1] *= 20
        mesh = Mesh(np.array(jax.devices()), ("data",))
        rows = NamedSharding(mesh, PartitionSpec("data"))

        def check(name):
            def loss(params, x):
                found = fixed_point(
                    affine, params, x, jnp.zeros_like(g),
                    solver=SOLVERS["anderson"], adjoint=ADJOINTS[name],
                )
                return jnp.sum(found.value * g), found.stats.steps

            grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
            one, steps = grad(params, x)
            four, sharded_steps = grad(params, jax.device_put(x, rows))
            assert_equal(jax.device_get(four), jax.device_get(one), 1e-9)
            assert np.array_equal(steps, sharded_steps), name
            assert four[1].sharding.is_equivalent_to(rows, 2), name

        for name in ("truncated", "neumann", "gmres", "jvp", "bicgstab", "anderson"):
            check(name)
        print("same on", jax.device_count())
    """
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"]
        + " --xla_force_host_platform_device_count=4",
        "JAX_ENABLE_X64": "1",
        "PYTHONPATH": tests,
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "same on 4\n", done.stderr


def temporary_bytes(adjoint, solver):
    """XLA's own account of what the gradient needs beside its in- and outputs."""

    def loss(params, x):
        z0 = jnp.zeros((256, DIM))
        found = fixed_point(tanh, params, x, z0, solver=solver, adjoint=adjoint)
        return jnp.sum(found.value)

    params, _, _ = problem()
    compiled = jax.jit(jax.grad(loss)).lower(params, np.ones((256, 2))).compile()
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize(
    ("solver", "adjoint"), [pair for pair in KINDS if pair[1] != "unrolled"]
)
def test_memory_is_flat_in_the_number_of_iterations(solver, adjoint):
    make = {
        "picard": partial(Picard),
        "anderson": partial(Anderson, depth=2),
        "broyden": partial(Broyden, memory=3),
    }[solver]
    few, many = (
        temporary_bytes(ADJOINTS[adjoint], make(max_steps=steps)) for steps in (6, 63)
    )
    assert many <= 1.01 * few


def test_memory_that_grows():
    solver = Picard(max_steps=6)
    once, often = (temporary_bytes(Truncated(steps=k), solver) for k in (2, 63))
    assert often > 5 * once
    few, many = (
        temporary_bytes(Unrolled(), Picard(max_steps=steps)) for steps in (2, 63)
    )
    assert many > 5 * few
    # Series take terms at no cost in memory.
    for make in (lambda k: Neumann(terms=k), lambda k: Phantom(steps=k)):
        assert temporary_bytes(make(63), solver) <= 1.01 * temporary_bytes(
            make(4), solver
        )
    # Rematerialisation keeps z alone of every step.
    remat = temporary_bytes(Unrolled(remat=True), Picard(max_steps=63))
    assert remat < 0.7 * many
    # In segments four times the steps take twice the memory.
    few, many = (
        temporary_bytes(Unrolled(remat="sqrt"), Picard(max_steps=4**k + 1))
        for k in (3, 4)
    )
    assert many < 2.1 * few


@pytest.mark.parametrize("table", [SOLVERS, ADJOINTS], ids=["solvers", "adjoints"])
def test_what_is_made_anew_is_the_same_to_the_compiler(table):
    for made in table.values():
        again = deepcopy(made)
        assert again is not made and again == made and hash(again) == hash(made)
    assert len(set(table.values())) == len(table)


@pytest.mark.parametrize(
    ("solver", "adjoint", "compiled"),
    [
        ("picard", "unrolled", False),
        ("picard", "truncated", True),
        ("picard", "adaptive", False),
        ("anderson", "neumann", True),
        ("anderson", "truncated", False),
        ("broyden", "gmres", False),
        ("broyden", "gmres", True),
    ],
)
def test_second_use_compiles_nothing(solver, adjoint, compiled):
    params, x, g = problem()

    def gradient(params, x):
        def loss(params):
            found = fixed_point(
                tanh,
                params,
                x,
                jnp.zeros((BATCH, DIM)),
                solver=deepcopy(SOLVERS[solver]),
                adjoint=deepcopy(ADJOINTS[adjoint]),
            )
            return jnp.sum(found.value * g)

        return jax.grad(loss)(params)

    gradient = jax.jit(gradient) if compiled else gradient
    gradient(params, x)
    compilations = []

    def listen(event, *_, **__):
        if "backend_compile" in event or "jaxpr_trace" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        gradient(params, 2 * x)
        again = list(compilations)
        jax.jit(lambda a: a + 1)(np.ones(7))  # that the listener hears anything
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations
    if compiled:
        assert not again
    assert not [event for event in again if "backend_compile" in event]


@each_adjoint
def test_second_derivatives_are_right_or_refused(adjoint):
    params, x, g = problem()

    def loss(scale):
        found = fixed_point(
            tanh,
            params,
            scale * x,
            jnp.zeros_like(g),
            solver=SOLVERS["picard"],
            adjoint=ADJOINTS[adjoint],
        )
        return jnp.sum(found.value * g)

    if adjoint == "unrolled":
        want = central_difference(jax.jit(jax.grad(loss)), 1.0, 1.0)
        got = jax.jit(jax.grad(jax.grad(loss)))(1.0)
        assert abs(got - want) < DIFFERENCES * abs(want)
    elif adjoint not in ("truncated", "jvp"):  # See test_implicit_jvp.py.
        for second in (jax.hessian(loss), jax.grad(jax.grad(loss))):
            with pytest.raises(TypeError, match=r"first derivative|reverse|forward"):
                second(1.0)


def test_what_diverges_after_the_solver_has_not_converged():
    # Broyden finds a fixed point that repels the steps of Truncated.
    found = fixed_point(
        lambda p, x, z: z * z,
        {},
        None,
        jnp.full((1, 1), 1.2),
        solver=Broyden(max_steps=30, rtol=1e-4),
        adjoint=Truncated(steps=25),
    )
    assert not found.stats.converged[0]


def test_leaves_that_are_no_numbers_to_differentiate():
    params, x, g = problem()
    x = {"x": x, "shift": np.arange(BATCH), "key": jax.random.key(0), "no": None}

    def f(params, x, z):
        noise = 0.01 * jax.random.normal(x["key"], z.shape, z.dtype)
        rolled = jnp.take(z, x["shift"], axis=0)
        return tanh(params, x["x"], rolled) + noise

    def gradient(adjoint):
        def loss(params, x):
            z0 = jnp.zeros((BATCH, DIM))
            found = fixed_point(f, params, x, z0, solver=PICARD, adjoint=adjoint)
            return jnp.sum(found.value * g)

        return jax.jit(jax.grad(loss))(params, x)

    got, want = (gradient(adjoint) for adjoint in (ADJOINTS["gmres"], Unrolled()))
    assert_equal(got, want, DIFFERENCES)


@pytest.mark.parametrize("name", ["tanh", "slot attention"])
def test_gradient_equals_optimistix(name):
    if name == "tanh":
        params, x, g = problem()
        f, z0 = tanh, jnp.zeros_like(g)
    else:
        f, params, x, z0 = slot_attention()
        g = jnp.asarray(np.random.default_rng(0).normal(size=z0.shape))

    def theirs(params, x):
        def alone(x, z0, g):
            def step(z, args):
                params, x = args
                batched = jax.tree.map(lambda leaf: leaf[None], (x, z))
                return f(params, *batched)[0]

            with jax.numpy_dtype_promotion("standard"):
                found = optimistix.fixed_point(
                    step,
                    optimistix.FixedPointIteration(rtol=1e-12, atol=1e-12),
                    z0,
                    (params, x),
                    max_steps=1000,
                    adjoint=optimistix.ImplicitAdjoint(),
                )
            return jnp.sum(found.value * g)

        return jnp.sum(jax.vmap(alone)(x, z0, g))

    with jax.numpy_rank_promotion("allow"):
        want = jax.jit(jax.grad(theirs, argnums=(0, 1)))(params, x)
    got, _ = gradients(
        f,
        params,
        x,
        g,
        solver=Picard(max_steps=600),
        adjoint=Implicit(solver=GMRES(max_steps=40, rtol=1e-11)),
        z0=z0,
    )
    # As one vector: the softmax over slots leaves some biases without any gradient.
    got, want = (ravel_pytree(tree)[0] for tree in (got[:2], want))
    assert relative_error(got, want) < DIFFERENCES


def test_gradient_equals_jaxopt(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is unmaintained
        jaxopt = pytest.importorskip("jaxopt", reason="jaxopt cannot be imported")
    params, x, g = problem()

    def theirs(params, x):
        solver = jaxopt.FixedPointIteration(
            lambda z, params, x: tanh(params, x, z), maxiter=500, tol=1e-13
        )
        return jnp.sum(solver.run(jnp.zeros_like(g), params, x).params * g)

    gradient = jax.jit(jax.grad(theirs, argnums=(0, 1)))
    # It compiles its parts, which would compile slowly.
    monkeypatch.setattr(jax, "jit", lambda f, **_: f)
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        warnings.simplefilter("ignore")
        want = gradient(params, x)
    monkeypatch.undo()
    adjoint = Implicit(solver=BiCGSTAB(max_steps=40, rtol=1e-11))
    got, _ = gradients(tanh, params, x, g, solver=PICARD, adjoint=adjoint)
    # It solves the linear system by normal equations, to 1e-5 at its default.
    assert_equal(got[:2], want, FLOAT32)


@pytest.mark.parametrize(
    ("solver", "adjoint", "sentence"),
    [
        (PICARD, Neumann, "adjoint must be Unrolled"),
        (PICARD, GMRES(max_steps=3), "adjoint must be Unrolled"),
        (GMRES(max_steps=3), Neumann(), "solver must be Picard"),
        (Broyden(max_steps=3), Unrolled(), "Broyden cannot be unrolled"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(solver, adjoint, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_pair(solver, adjoint)


@pytest.mark.parametrize(
    ("f", "z0", "options", "sentence"),
    [
        (lambda p, x, z: z[:, :2], np.zeros((2, 3)), {}, "f must return z as it got"),
        (
            lambda p, x, z: z.astype(jnp.float32),
            np.zeros((2, 3)),
            {},
            "f must return z as it got",
        ),
        (lambda p, x, z: (z, z), np.zeros((2, 3)), {}, "f must return z as it got"),
        (lambda p, x, z: 0.5, np.zeros((2, 3)), {}, "f must return z as it got"),
        (lambda p, x, z: z, np.zeros(()), {}, "leading batch axis"),
        (
            lambda p, x, z: z,
            [np.zeros((2, 1)), np.zeros((3, 1))],
            {},
            "leading batch axis",
        ),
        (lambda p, x, z: z, np.zeros((2, 3), int), {}, "floating-point array"),
        (lambda p, x, z: z, np.zeros((0, 3)), {}, "its batch axis is empty"),
        (
            lambda p, x, z: z,
            np.zeros((2, 3)),
            {"has_aux": True},
            r"f must return \(z, aux\)",
        ),
        (
            lambda p, x, z: z,
            np.zeros((2, 3)),
            {"solver": Broyden(max_steps=3), "adjoint": Unrolled()},
            "Broyden cannot be unrolled",
        ),
        (
            lambda p, x, z: z,
            np.zeros((3, 3)),
            {"probe": True, "adjoint": Implicit()},
            r"the probe must be backward_probe\(3\)",
        ),
        (
            lambda p, x, z: z,
            np.zeros((2, 3)),
            {"probe": True},
            "Neumann says nothing of its backward pass",
        ),
    ],
)
def test_misuse_is_a_sentence_at_trace_time(f, z0, options, sentence):
    options = {"solver": PICARD, "adjoint": Neumann()} | options
    if "probe" in options:
        options["probe"] = backward_probe(2)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda z0: fixed_point(f, {}, None, z0, **options), z0)
