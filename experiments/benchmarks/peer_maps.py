"""The maps of `solver_peers`, in JAX and in PyTorch, and their exact gradients."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.examples import digits_deq
from implicit_slots import Picard, SlotAttention
from implicit_slots.models.layers import NORM_EPSILON
from implicit_slots.runtime.errors import UserError

# Spectral radius and kind of each affine map.
AFFINE = {
    "affine, real 0.9": ("real", 0.9),
    "affine, complex 0.9": ("complex", 0.9),
    "affine, non-normal 0.8": ("non-normal", 0.8),
    "affine, real 0.99": ("real", 0.99),
}
MAPS = (*AFFINE, "digits DEQ", "slot attention")
WIDTH = 64
# Of the slot attention that is trained here.
SLOTS, POINTS, TRAINING = 5, 100, 300
EPSILON = 1e-8  # its default
DRIFT = 3.0  # weight of the residual in its loss
SETTLE = 500  # steps in which an example has to converge, to be taken
FITTING = 200  # steps of the digits' classifier
NEWTON = 2  # steps to a fixed point in float64; each takes its Jacobian


class Map(NamedTuple):
    """z = f(params, x, z) for a batch, and the cotangent g of its solution.

    Attributes:
      f: in JAX.
      torch: f in PyTorch, of tensors in `tree(params)`'s nested dictionaries.
      params: shared by the batch.
      x: one entry per example, as z0 and g.
      z0: where solvers start.
      g: what the loss is: ⟨g, z⟩ summed over the batch.
    """

    f: Callable
    torch: Callable
    params: Any
    x: Any
    z0: Any
    g: Any

    def first(self, count: int) -> "Map":
        """The same for the first examples alone."""
        x, z0, g = (leaf[:count] for leaf in (self.x, self.z0, self.g))
        return self._replace(x=x, z0=z0, g=g)

    def single(self, params: Any, x: Any, z: Any) -> Any:
        """F of one example, without a batch axis."""
        return self.f(params, x[None], z[None])[0]

    def residual(self, z: Any) -> np.ndarray:
        """‖f(z) − z‖ / ‖f(z)‖ of each example, in float64."""
        with jax.enable_x64(True):
            params, x, z = _doubles((self.params, self.x, z))
            fz = jax.jit(self.f)(params, x, z)
            return np.asarray(_norms(fz - z) / _norms(fz))


def build(name: str, batch: int) -> Map:
    """Returns a map of `MAPS` for as many examples."""
    if name in AFFINE:
        return _affine(*AFFINE[name], batch)
    if name == "digits DEQ":
        return _digits(batch)
    return _slots(batch)


def tree(params: Any) -> Any:
    """Parameters or their gradient as nested dictionaries of NumPy arrays."""
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    return jax.tree.map(np.asarray, params)


class Exact(NamedTuple):
    """A fixed point and the gradient there, in float64.

    Attributes:
      z: the fixed point.
      params: gradient of Σ ⟨g, z⟩ with respect to the parameters, as one vector.
      radius: spectral radius of ∂f/∂z, the median of the examples.
    """

    z: np.ndarray
    params: np.ndarray
    radius: float


def exact(problem: Map, near: Any) -> Exact:
    """Newton's method from `near`, then the dense linear system of each example."""
    with jax.enable_x64(True):
        params, x, z, g = _doubles((problem.params, problem.x, near, problem.g))

        @jax.jit
        def jacobian(params, x, z):
            def flat(x, z):
                moved = problem.single(params, x, z.reshape(near.shape[1:]))
                return moved.reshape(-1)

            return jax.vmap(jax.jacrev(flat, 1))(x, z.reshape(len(z), -1))

        for _ in range(NEWTON):
            J = jacobian(params, x, z)
            system = jnp.eye(J.shape[-1]) - J
            rest = (jax.jit(problem.f)(params, x, z) - z).reshape(len(z), -1, 1)
            z = z + jnp.linalg.solve(system, rest).reshape(z.shape)
        J = jacobian(params, x, z)
        system = jnp.eye(J.shape[-1]) - J.swapaxes(1, 2)
        u = jnp.linalg.solve(system, g.reshape(len(g), -1, 1)).reshape(g.shape)
        _, pull = jax.vjp(lambda params: problem.f(params, x, z), params)
        radius = np.abs(np.linalg.eigvals(np.asarray(J))).max(axis=1)
        return Exact(np.asarray(z), vector(pull(u)[0]), float(np.median(radius)))


def vector(gradient: Any) -> np.ndarray:
    """Every entry of a gradient, in the order of `tree`."""
    leaves = jax.tree.leaves(tree(gradient))
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in leaves])


def _doubles(values: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), values)


def _norms(z: Any) -> Any:
    return jnp.linalg.norm(z.reshape(len(z), -1), axis=1)


def _affine(kind: str, radius: float, batch: int) -> Map:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    diagonal = rng.uniform(-radius, radius, WIDTH)
    diagonal[0] = radius
    matrix = np.diag(diagonal)
    if kind == "complex":
        matrix = np.zeros((WIDTH, WIDTH))
        for i, angle in enumerate(rng.uniform(0, np.pi, WIDTH // 2)):
            turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = radius * np.array(turn)
    elif kind == "non-normal":
        matrix += np.triu(rng.normal(size=matrix.shape), 1) / WIDTH**0.5
    params = {"w": jnp.asarray(basis @ matrix @ basis.T, "float32")}
    x, g = (jnp.asarray(rng.normal(size=(batch, WIDTH)), "float32") for _ in range(2))

    def f(params, x, z):
        return z @ params["w"] + x

    return Map(f, f, params, x, jnp.zeros_like(x), g)


@functools.cache
def _fitted() -> digits_deq.Fitted:
    return digits_deq.fit(digits_deq.EXACT, 0.0, FITTING)


def _digits(batch: int) -> Map:
    fitted = _fitted()
    params, x, y = fitted.params, jnp.asarray(fitted.x[:batch]), fitted.y[:batch]

    def loss(z):
        logits = z @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    z = digits_deq.forward(params, x, digits_deq.EXACT)[1].value

    def torch(params, x, z):
        return (z @ params["w"] + x @ params["u"] + params["b"]).tanh()

    layer = params["layer"]
    return Map(digits_deq.layer, torch, layer, x, jnp.zeros_like(z), jax.grad(loss)(z))


class _Clusters(nnx.Module):
    """Points told again by the slots that attend to them."""

    def __init__(self, rngs: nnx.Rngs):
        self.encode = nnx.Linear(2, WIDTH, rngs=rngs)
        self.slots = SlotAttention(
            WIDTH, num_slots=SLOTS, solver=Picard(max_steps=7), rngs=rngs
        )
        self.decode = nnx.Linear(WIDTH, 2, rngs=rngs)

    def loss(self, points, slots, attention):
        told = jnp.einsum("bkn,bkd->bnd", attention, self.decode(slots))
        return jnp.mean((told - points) ** 2)

    def problem(self, points, key):
        inputs = nnx.relu(self.encode(points))
        return self.slots.problem(inputs, self.slots.start(inputs, key))

    def __call__(self, points, key):
        output = self.slots(nnx.relu(self.encode(points)), key=key)
        f, params, x, _ = self.problem(points, key)
        # So few steps leave slots that drift on; after a long training they settle.
        rest = (f(params, x, output.slots) - output.slots) / _norms(output.slots)[
            :, None, None
        ]
        drift = DRIFT * jnp.sum(rest**2) / len(points)
        return self.loss(points, output.slots, output.attention) + drift


def _clusters(key: Any, batch: int) -> Any:
    """Points of as many clusters as there are slots, [batch, points, 2]."""
    keys = jax.random.split(key)
    centres = 2 * jax.random.normal(keys[0], (batch, SLOTS, 1, 2))
    spread = 0.1 * jax.random.normal(keys[1], (batch, SLOTS, POINTS // SLOTS, 2))
    return (centres + spread).reshape(batch, POINTS, 2)


@functools.cache
def _trained() -> _Clusters:
    """Slot attention that was trained to find clusters, in seconds."""
    graphdef, params = nnx.split(_Clusters(nnx.Rngs(0)))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            return nnx.merge(graphdef, params)(_clusters(key, 16), key)

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(0), TRAINING):
        params, state = step(params, state, key)
    return nnx.merge(graphdef, params)


def _slots(batch: int) -> Map:
    model, key = _trained(), jax.random.key(1)
    points = _clusters(key, 2 * batch)
    f, params, x, z0 = model.problem(points, key)
    settle = Picard(max_steps=SETTLE, rtol=1e-5)
    found = jax.jit(lambda x, z: settle.solve(lambda z: f(params, x, z), z))(x, z0)
    # No solver is asked for what has no attracting fixed point.
    rows = np.flatnonzero(found.converged)[:batch]
    if len(rows) < batch:
        raise UserError(f"only {len(rows)} of {len(points)} examples settle")
    points, x, z0, z = points[rows], x[rows], z0[rows], found.z[rows]

    def loss(z):
        slots, attention = replace(f, attention=True)(params, x, z)
        return model.loss(points, slots, attention)

    return Map(f, _torch_slots, params, x, z0, jax.grad(loss)(z))


def _torch_slots(params, x, z):
    """`SlotAttentionStep` with one head, in PyTorch, by the same products."""
    import torch  # pyright: ignore[reportMissingImports]

    def norm(layer, z):
        normed = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=NORM_EPSILON)
        return normed * layer["scale"] + layer["bias"]

    queries = norm(params["norm_slots"], z) @ params["project_q"]["kernel"]
    seen = queries @ params["project_k"]["kernel"].T * z.shape[-1] ** -0.5
    weights = (x @ seen.swapaxes(1, 2)).softmax(dim=-1) + EPSILON
    weights = weights / weights.sum(dim=1, keepdim=True)
    updates = weights.swapaxes(1, 2) @ x @ params["project_v"]["kernel"]
    gates = params["gru"]["input"], params["gru"]["recurrent"]
    kernels, biases = ([gate[n] for gate in gates] for n in ("kernel", "bias"))
    flat = (y.reshape(-1, z.shape[-1]) for y in (updates, z))
    z = torch.gru_cell(*flat, *(k.T for k in kernels), *biases).reshape(z.shape)
    enter, leave = params["mlp"]["enter"], params["mlp"]["leave"]
    hidden = norm(params["norm_mlp"], z) @ enter["kernel"] + enter["bias"]
    return z + hidden.relu() @ leave["kernel"] + leave["bias"]
