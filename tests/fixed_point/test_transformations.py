"""Inside JAX's transformations and switches nothing changes: one law for each."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_points import BATCH, DIM, assert_equal, problem, tanh
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

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
    coupling_norm,
    diagnostics,
    fixed_point,
    jacobian_norm,
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
    "sqrt": Unrolled(remat="sqrt"),
    "truncated": Truncated(steps=2, damping=0.8),
    "neumann": Neumann(terms=3),
    "bounded": Neumann(terms=3, max_growth=0.5),
    "phantom": Phantom(steps=3),
    "adaptive": Adaptive(max_terms=20, rtol=1e-2),
    "gmres": Implicit(solver=GMRES(max_steps=4, rtol=1e-4)),
    "bicgstab": Implicit(solver=BiCGSTAB(max_steps=6, rtol=1e-4)),
    "dense": Implicit(solver=Dense(block=4)),
    "jvp": ImplicitJVP(solver=GMRES(max_steps=4, rtol=1e-4)),
    "picard": Implicit(solver=Picard(max_steps=9, rtol=1e-4)),
    "anderson": Implicit(solver=Anderson(max_steps=9, depth=2, rtol=1e-4)),
    "broyden": Implicit(solver=Broyden(max_steps=7, memory=3, rtol=1e-3)),
}
PAIRS = [
    (solver, adjoint)
    for solver in SOLVERS
    for adjoint in ADJOINTS
    if not (solver == "broyden" and adjoint in ("unrolled", "remat", "sqrt"))
]
# Every solver, and one backward pass of each kind: loop, series, solve.
kinds = pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        ("anderson", "gmres"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [
                ("picard", "unrolled"),
                ("plain", "truncated"),
                ("picard", "adaptive"),
                ("broyden", "bicgstab"),
                ("anderson", "jvp"),
            ]
        ),
    ],
)
SAME = 1e-5  # relative, of float32 in another order


def single(batch=BATCH):
    """The problem in single precision, which is what JAX has by default."""
    params, x, g = jax.tree.map(np.float32, problem(radius=0.5))
    return params, np.resize(x, (batch, 2)), np.resize(g, (batch, DIM))


def loss_of(solver, adjoint):
    """(params, x, g, z0) -> (Σ g·value, the solution)."""
    options: Any = {"solver": SOLVERS[solver], "adjoint": ADJOINTS[adjoint]}

    def loss(params, x, g, z0=None, **told):
        z0 = jnp.zeros_like(g) if z0 is None else z0
        found = fixed_point(tanh, params, x, z0, **told, **options)
        return jnp.sum(found.value * g), found

    return loss


def gradient_of(loss):
    """For params and x, the solution's value, and its step counts."""

    def gradient(*arguments):
        found = jax.grad(loss, argnums=(0, 1), has_aux=True)(*arguments)
        return found[0], found[1].value, found[1].stats.steps

    return gradient


@kinds
def test_vmap_over_parameters(solver, adjoint):
    params, x, g = single()
    gradient = gradient_of(loss_of(solver, adjoint))
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, 0.5 * leaf]), params)
    got = jax.jit(jax.vmap(gradient, in_axes=(0, None, None)))(stacked, x, g)
    one = jax.jit(gradient)
    want = [one(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), x, g) for i in (0, 1)]
    assert_equal(got, jax.tree.map(lambda *leaves: np.stack(leaves), *want), SAME)


@kinds
def test_map_scan_and_checkpoint(solver, adjoint):
    """Each call starts where the one before ended; a loop in Python has the result."""
    params, x, g = single()
    loss = loss_of(solver, adjoint)

    def chained(params, xs, over, one):
        def step(z0, x):
            total, found = one(params, x, g, z0)
            return found.value, (total, found.stats.steps)

        z, (totals, steps) = over(step, jnp.zeros_like(g), xs)
        return jnp.sum(totals) + jnp.sum(z), steps

    def python_loop(step, carry, xs):
        outputs = []
        for x in xs:
            carry, output = step(carry, x)
            outputs.append(output)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    def gradient(over, one):
        return jax.jit(
            jax.grad(partial(chained, over=over, one=one), argnums=(0, 1), has_aux=True)
        )(params, np.stack([x, 0.5 * x]))

    want = gradient(python_loop, loss)
    assert_equal(gradient(jax.lax.scan, jax.checkpoint(loss)), want, SAME)

    def mapped(params, xs):
        totals, _ = jax.lax.map(lambda x: loss(params, x, g), xs)
        return jnp.sum(totals)

    xs = np.stack([x, 0.5 * x])
    got = jax.jit(jax.grad(mapped, argnums=1))(params, xs)
    each = jax.jit(jax.grad(loss, argnums=1, has_aux=True))
    assert_equal(got, np.stack([each(params, x, g)[0] for x in xs]), SAME)


@kinds
def test_donated_buffers(solver, adjoint):
    params, x, g = single()
    loss = loss_of(solver, adjoint)

    def value(params, x, g, z0):
        return loss(params, x, g, z0)[1].value

    want = jax.jit(value)(params, x, g, jnp.ones_like(g))
    z0 = jnp.ones_like(g)
    got = jax.jit(value, donate_argnums=3)(params, x, g, z0)
    assert z0.is_deleted()
    assert_equal(got, want, SAME)


@kinds
def test_export(solver, adjoint):
    arguments = single()
    gradient = jax.jit(gradient_of(loss_of(solver, adjoint)))
    exported = jax.export.export(gradient, platforms=("cpu", "tpu", "cuda"))(*arguments)
    assert exported.platforms == ("cpu", "tpu", "cuda")
    assert_equal(exported.call(*arguments), gradient(*arguments), SAME)


@kinds
def test_debug_nans(solver, adjoint):
    """Statistics hold no NaN of their own, the trace of one that stopped included."""
    params, x, g = single()
    x[0] = 0
    measures = ADJOINTS[adjoint].measures
    options: Any = {
        "solver": replace(SOLVERS[solver], trace=True),
        "adjoint": ADJOINTS[adjoint],
    }

    def loss(params, x, probe):
        found = fixed_point(tanh, params, x, np.zeros_like(g), probe=probe, **options)
        return jnp.sum(found.value * g), found

    with jax.debug_nans(True):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        got = gradient(params, x, backward_probe(BATCH) if measures else None)
    for leaf in jax.tree.leaves(got):
        assert not np.any(np.isnan(leaf))


@kinds
def test_enabling_x64_changes_no_single_precision(solver, adjoint):
    arguments = single()
    gradient = gradient_of(loss_of(solver, adjoint))
    want = jax.jit(gradient)(*arguments)
    with jax.enable_x64(True):
        got = jax.jit(gradient)(*arguments)
    assert types(got) == types(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def telling(solver, adjoint, batch):
    """(params, x, g, told) -> gradients, the solution; and `told`: probe and u0."""
    loss = loss_of(solver, adjoint)
    # u0's is what the linear solve found.
    told = backward_probe(batch), np.zeros((batch, DIM), np.float32)

    def gradients(params, x, g, told):
        def told_loss(params, x, told):
            probe, u0 = told
            return loss(params, x, g, probe=probe, u0=u0)

        gradient = jax.grad(told_loss, argnums=(0, 1, 2), has_aux=True)
        return gradient(params, x, told)

    if not ADJOINTS[adjoint].measures:
        told = None, None
    elif not isinstance(ADJOINTS[adjoint], Implicit):
        told = told[0], None
    return gradients, told


def split(gradients, mesh):
    """The same on each device's share of the batch, in shard_map."""
    rows = P("data")
    # Parameters are the same on every device: their gradient is summed over all.
    return jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(P(), rows, rows, rows),
        out_specs=((P(), rows, rows), rows),
    )


def types(tree):
    """Shapes and dtypes."""
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [("anderson", adjoint) for adjoint in ADJOINTS if adjoint not in ("remat", "sqrt")]
    + [("plain", "neumann"), ("picard", "neumann"), ("broyden", "neumann")],
)
def test_shard_map_has_the_types_of_what_varies(solver, adjoint):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    gradients, told = telling(solver, adjoint, BATCH)
    got = jax.eval_shape(split(gradients, mesh), *single(), told)
    assert types(got) == types(jax.eval_shape(gradients, *single(), told))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        ("picard", "unrolled"),
        ("anderson", "gmres"),
        ("broyden", "bicgstab"),
        ("plain", "adaptive"),
        ("plain", "dense"),
        ("plain", "jvp"),
    ],
)
def test_explicit_sharding_has_the_types_of_the_batch(solver, adjoint):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    gradients, told = telling(solver, adjoint, BATCH)
    with jax.set_mesh(mesh):
        params, *rows = single()
        rows = jax.device_put(rows, P("data"))
        (_, of_x, _), found = jax.eval_shape(gradients, params, *rows, told)
    for leaf in (of_x, found.value, *jax.tree.leaves(found.stats)):
        assert leaf.sharding.spec[0] == "data"


@pytest.mark.parametrize(
    "estimate",
    [
        lambda f, p, x, z: diagnostics.spectral_radius(f, p, x, z, jax.random.key(0)),
        lambda f, p, x, z: diagnostics.spectral_norm(f, p, x, z, jax.random.key(0)),
        lambda f, p, x, z: jacobian_norm(f, p, x, z, jax.random.key(0)),
        lambda f, params, x, z: coupling_norm(
            lambda params, x, z: f(params, x, z[:, 0])[:, None],
            params,
            x,
            z[:, None],
            jax.random.key(0),
        ),
        diagnostics.dense_jacobian,
    ],
)
def test_diagnostics_have_the_types_of_what_varies(estimate):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    in_specs = P(), P("data"), P("data")
    one = partial(estimate, tanh)
    got = jax.shard_map(one, mesh=mesh, in_specs=in_specs, out_specs=P("data"))
    assert types(jax.eval_shape(got, *single())) == types(
        jax.eval_shape(one, *single())
    )


@pytest.mark.slow
def test_four_devices_give_what_one_gives():
    # A process of its own: the number of devices is fixed when JAX starts.
    code = """
        import jax, numpy as np
        from jax.sharding import Mesh, NamedSharding
        from fixed_points import assert_equal
        from fixed_point.test_transformations import *

        params, x, g = single(batch=8)
        x = x * np.linspace(0.1, 3, 8, dtype=np.float32)[:, None]  # other step counts

        def check(got, want):
            (*gradients, (stats, u)), found = jax.device_get(got)
            (*others, (same, v)), other = jax.device_get(want)
            gradients.append(u), others.append(v)
            assert_equal(gradients, others, 1e-4)
            assert_equal(found.value, other.value, SAME)
            assert np.array_equal(found.stats.steps, other.stats.steps)
            if stats is not None:
                assert np.array_equal(stats.steps, same.steps)
                assert np.array_equal(stats.failed, same.failed)

        mesh = Mesh(np.array(jax.devices()), ("data",))
        explicit = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
        rows = jax.device_put((x, g), NamedSharding(explicit, P("data")))
        for pair in PAIRS:
            print(*pair, file=sys.stderr)
            gradients, told = telling(*pair, 8)
            want = jax.jit(gradients)(params, x, g, told)
            check(jax.jit(split(gradients, mesh))(params, x, g, told), want)
            with jax.set_mesh(explicit):
                check(jax.jit(gradients)(params, *rows, told), want)

        # The weights' rows are split as well: f sums over the devices that share them.
        def part(params, x, z):
            rows = len(params["a"])
            first = rows * jax.lax.axis_index("model")
            mine = jax.lax.dynamic_slice_in_dim(z, first, rows, axis=1)
            total = jax.lax.psum(mine @ params["a"], "model")
            return jnp.tanh(total + x @ params["b"])

        def gradients(params, x, g, f):
            def loss(params, x):
                z0 = jnp.zeros(g.shape, g.dtype)
                found = fixed_point(f, params, x, z0, **options)
                return jnp.sum(found.value * g)

            return jax.grad(loss, argnums=(0, 1))(params, x)

        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
        specs = {"a": P("model"), "b": P()}, P("data")
        for solver, adjoint in (("anderson", "gmres"), ("picard", "unrolled")):
            options = {"solver": SOLVERS[solver], "adjoint": ADJOINTS[adjoint]}
            both = jax.shard_map(
                partial(gradients, f=part),
                mesh=mesh, in_specs=(*specs, P("data")), out_specs=specs,
            )
            want = jax.jit(partial(gradients, f=tanh))(params, x, g)
            assert_equal(jax.jit(both)(params, x, g), want, 1e-4)
        print("same on", jax.device_count())
    """
    flag = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ
        | {
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}",
            "PYTHONPATH": os.path.dirname(os.path.dirname(__file__)),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "same on 4\n", done.stderr


def test_what_varies_besides_z_and_a_probe_of_all_devices():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    params, x, g = single()
    options: Any = {"solver": SOLVERS["anderson"], "adjoint": ADJOINTS["gmres"]}

    def gradient(params, x, probed):
        # z0 is the same on every device, and so is the probe; x is closed over.
        z0, probe = jnp.zeros(g.shape, g.dtype), backward_probe(BATCH)

        def loss(x):
            found = fixed_point(
                lambda params, _, z: tanh(params, x, z),
                params,
                None,
                z0,
                probe=probe if probed else None,
                **options,
            )
            return jnp.sum(found.value)

        return jax.grad(loss)(x)

    def on_devices(probed):
        return jax.shard_map(
            partial(gradient, probed=probed),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P("data"),
        )

    want = jax.eval_shape(partial(gradient, probed=False), params, x)
    got = jax.eval_shape(on_devices(probed=False), params, x)
    assert types(got) == types(want)
    with pytest.raises(ValueError, match="the probe and u0 must be split"):
        jax.eval_shape(on_devices(probed=True), params, x)
