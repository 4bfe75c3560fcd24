"""What f closes over is an input: gradients, changes between calls, and memory."""

import functools
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixed_points import BATCH, DIM, assert_equal, gradients, problem, tanh
from flax import nnx
from reference import FLOAT64, relative_error

from implicit_slots.fixed_point import (
    GMRES,
    Anderson,
    Implicit,
    Neumann,
    Picard,
    Truncated,
    Unrolled,
    api,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

Z0 = np.zeros((BATCH, DIM))
FEW: Any = {"solver": Picard(max_steps=3), "adjoint": Neumann()}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


GMRES_ADJOINT = Implicit(solver=GMRES(max_steps=DIM))


@pytest.mark.parametrize(
    ("wrap", "adjoint"),
    [
        (jax.jit, Unrolled()),
        (jax.jit, Truncated(steps=2)),
        (jax.jit, GMRES_ADJOINT),
        (lambda f: f, GMRES_ADJOINT),
    ],
    ids=["unrolled", "truncated", "gmres", "eager gmres"],
)
def test_closed_over_values_have_the_gradients_of_arguments(wrap, adjoint):
    params, x, g = problem()
    options: Any = {"solver": Picard(max_steps=60), "adjoint": adjoint}

    def loss(params, x, scale, shift):
        def f(_, __, z):  # by a scale and an integer besides
            return scale * tanh(params, x, jnp.roll(z, shift, axis=1))

        return jnp.sum(fixed_point(f, (), None, Z0, **options).value * g)

    def explicit(params, x, scale, shift):
        def f(params, x, z):
            params, scale, shift = params
            return scale * tanh(params, x, jnp.roll(z, shift, axis=1))

        found = fixed_point(f, (params, scale, shift), x, Z0, **options)
        return jnp.sum(found.value * g)

    arguments = params, x, jnp.float64(0.9), jnp.int32(0)
    got = wrap(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    want = jax.jit(jax.grad(explicit, argnums=(0, 1, 2)))(*arguments)
    assert_equal(got, want, FLOAT64)
    exact, _ = gradients(tanh, params, x, g, **options)
    assert relative_error(got[0]["a"], exact[0]["a"]) > 1e-3  # the scale is at work


def test_closed_over_values_are_mapped_and_scanned():
    params, x, _ = problem()

    def value(scale, x):
        return fixed_point(lambda p, x, z: scale * tanh(p, x, z), params, x, Z0).value

    scales, xs = np.array([0.5, 0.9]), np.stack([x, 2 * x])
    want = [value(*pair) for pair in zip(scales, xs, strict=True)]
    _, scanned = jax.lax.scan(lambda c, pair: (c, value(*pair)), 0, (scales, xs))
    for got in (jax.vmap(value)(scales, xs), scanned):
        assert relative_error(got, np.stack(want)) < FLOAT64


class Model(nnx.Module):
    """A module with a weight and a number that is no array."""

    def __init__(self):
        self.w = nnx.Param(jnp.full((1, DIM), 0.5))
        self.offset = 0.0

    def __call__(self, params, x, z):
        """Contracts by its weight."""
        return self.w[...] * z + self.offset + x


@pytest.mark.parametrize("method", [True, False], ids=["bound method", "object"])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_what_changed_between_two_calls_is_no_cache_hit(method, jit):
    model = Model()

    def solve():
        f = model.__call__ if method else model

        def value(x):
            return fixed_point(f, None, x, Z0, solver=Anderson(max_steps=9)).value

        return (jax.jit(value) if jit else value)(np.ones((BATCH, DIM)))

    assert relative_error(solve(), np.full((BATCH, DIM), 1 / 0.5)) < FLOAT64
    model.w[...] = jnp.full((1, DIM), 0.75)
    assert relative_error(solve(), np.full((BATCH, DIM), 1 / 0.25)) < FLOAT64
    model.offset = 2.0
    assert relative_error(solve(), np.full((BATCH, DIM), 3 / 0.25)) < FLOAT64


def test_rules_of_derivatives_tell_functions_apart():
    def doubled(factor):
        @jax.custom_vjp
        def same(z):
            return z

        same.defvjp(lambda z: (z, None), lambda _, g: (factor * g,))
        return lambda p, x, z: 0.0 * z + same(x)

    def slope(factor):
        f, x = doubled(factor), jnp.ones((BATCH, DIM))
        return jax.grad(lambda x: jnp.sum(fixed_point(f, None, x, Z0, **FEW).value))(x)

    assert slope(1.0)[0, 0] == 1 and slope(2.0)[0, 0] == 2


class Thing:
    """Something that weak references can count."""


def test_functions_of_one_call_leave_nothing_behind(monkeypatch):
    few = functools.lru_cache(maxsize=1)(api._compiled.__wrapped__)
    monkeypatch.setattr(api, "_compiled", few)
    programs = jax.devices()[0].client.live_executables

    def once(number):
        thing: Any = Thing()
        thing.array = np.full((1, DIM), 0.5)

        def f(params, x, z):
            return params * thing.array * z + number

        fixed_point(f, 0.5, None, Z0, **FEW)
        return weakref.ref(thing), weakref.ref(f)

    references = [once(float(number)) for number in range(2)]
    gc.collect()
    compiled = len(programs())
    references += [once(float(number)) for number in range(2, 4)]
    gc.collect()
    assert len(programs()) <= compiled
    assert not any(reference() for pair in references for reference in pair)


def test_few_programs_are_kept():
    assert api._compiled.cache_parameters()["maxsize"] <= 64


def test_the_same_function_is_compiled_once():
    model, x = Model(), np.ones((BATCH, DIM))
    before = api._compiled.cache_info().misses
    for weight in (0.1, 0.2):
        model.w[...] = jnp.full((1, DIM), weight)
        fixed_point(model.__call__, None, x, Z0, **FEW)
    assert api._compiled.cache_info().misses == before + 1
