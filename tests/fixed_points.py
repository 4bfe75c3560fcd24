"""Maps with known fixed points and Jacobians, in NumPy float64, and their gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from reference import relative_error

from implicit_slots.fixed_point import backward_probe, fixed_point
from implicit_slots.models.slot_attention import SlotAttention, StepFunction

BATCH, DIM = 3, 6
SPECTRA = ("real", "complex", "near-critical", "non-normal")


def affine(params, x, z):
    return z @ params["a"] + x @ params["b"]


def tanh(params, x, z):
    return jnp.tanh(affine(params, x, z))


class Problem(NamedTuple):
    """A map, what it is fed, and a cotangent of its fixed point."""

    params: dict
    x: np.ndarray
    g: np.ndarray


def problem(spectrum="complex", radius=0.6, seed=0):
    """A random matrix with eigenvalues of a kind and spectral radius `radius`."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(DIM, DIM))
    if spectrum in ("real", "near-critical"):
        # One eigenvalue stands out, so that powers soon follow the radius alone.
        q = np.linalg.qr(a)[0]
        a = q @ np.diag([1.0, 0.5, -0.4, 0.2, 0.1, -0.05]) @ q.T
        radius = 0.99 if spectrum == "near-critical" else radius
    elif spectrum == "complex":
        # Rotations of three radii: the dominant eigenvalues are a pair.
        q = np.linalg.qr(a)[0]
        a = np.zeros((DIM, DIM))
        for i, (size, angle) in enumerate([(1.0, 1.1), (0.7, 2.0), (0.4, 0.3)]):
            turn = np.array(
                [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            )
            a[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = size * turn
        a = q @ a @ q.T
    elif spectrum == "non-normal":
        a = np.triu(a, 1) * 2 + np.diag(rng.uniform(0.2, 1, DIM))
    a = a * radius / np.abs(np.linalg.eigvals(a)).max()
    params = {"a": a, "b": rng.normal(size=(2, DIM))}
    return Problem(params, rng.normal(size=(BATCH, 2)), rng.normal(size=(BATCH, DIM)))


def solution(f, params, x):
    """The fixed point: by a linear solve, or by brute force."""
    right = x @ params["b"]
    if f is affine:
        return np.linalg.solve(np.eye(DIM) - params["a"].T, right.T).T
    z = np.zeros_like(right)
    for _ in range(4000):
        z = np.tanh(z @ params["a"] + right)
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


@functools.cache
def _compiled_gradients(f, solver, adjoint):
    """One compilation for all tests of a module that differ in numbers alone."""

    def loss(params, x, z0, probe, g):
        found = fixed_point(
            f, params, x, z0, solver=solver, adjoint=adjoint, probe=probe
        )
        return jnp.sum(found.value * g), found

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


def gradients(f, params, x, g, *, solver, adjoint, z0=None, probe=None):
    """Gradients for params, x and z0 of ℓ = Σ g·value, and the solution."""
    z0 = np.zeros_like(g) if z0 is None else z0
    gradient, found = _compiled_gradients(f, solver, adjoint)(params, x, z0, probe, g)
    return gradient[:3], found


def probed(f, params, x, g, *, solver, adjoint):
    """The backward statistics of the same."""
    arguments = params, x, np.zeros_like(g), backward_probe(len(g)), g
    return _compiled_gradients(f, solver, adjoint)(*arguments)[0][3]


def assert_equal(got, want, tolerance):
    """Leaf by leaf, by relative error."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, oracle in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(ours, oracle) < tolerance


def slot_attention(batch=2, inputs=7, slots=3, size=4, strength=0.6, seed=7):
    """A real slot attention step in float64 as f, with parameters, inputs and slots.

    `strength` scales what the residual MLP adds: an untrained step need not contract.
    With this seed the slots of both examples differ at the fixed point (with many, all
    slots become one) and the plain iteration contracts like 0.9.
    """
    model = SlotAttention(size, slot_size=size, mlp_size=2 * size, rngs=nnx.Rngs(seed))
    step = model.step
    step.mlp.leave.kernel[...] *= strength
    graphdef, params = nnx.split(step)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float64), nnx.to_pure_dict(params)
    )
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batch, inputs, size)))
    z0 = jnp.asarray(rng.normal(size=(batch, slots, size)))
    return WithoutAttention(StepFunction(graphdef)), params, x, z0


class WithoutAttention(NamedTuple):
    """The step without its auxiliary output."""

    step: StepFunction

    def __call__(self, params, x, slots):
        """(params, x, z) -> z."""
        return self.step(params, x, slots)[0]
