"""What slots tell of the objects that they stand for: probes fitted to frozen slots."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

# Hidden units of each probe; none: a linear one.
HIDDEN: Mapping[str, int] = {"linear": 0, "mlp": 128}
# Of the fit: steps of Adam on all objects at once, its first rate, and the factors on
# the squared weights in the loss, of which the best is chosen.
STEPS = 500
RATE = 3e-2
DECAYS = (1e-3, 1e-2, 1e-1)

# Weights and biases by layer; codes and numbers; each property's number of outputs.
Layers = list[dict[str, jax.Array]]
Targets = tuple[dict[str, jax.Array], dict[str, jax.Array]]
Sizes = tuple[tuple[str, int], ...]


class Properties(NamedTuple):
    """What is true of objects, a row each.

    Attributes:
      categories: codes from 0, by name.
      positions: numbers, by name.
    """

    categories: Mapping[str, Int[np.ndarray, " objects"]]
    positions: Mapping[str, Float[np.ndarray, "objects numbers"]]


def probe_properties(
    slots: Float[np.ndarray, "objects dim"],
    properties: Properties,
    held_out: Bool[np.ndarray, " objects"],
    chosen_on: Bool[np.ndarray, " objects"],
    *,
    hidden: int,
    seed: int = 0,
) -> dict[str, float]:
    """Fits a probe on some objects and scores it on the others.

    One network reads the standardised slot and says every property: logits of
    categories, standardised numbers. Its loss is the sum of cross-entropies and mean
    squared errors, plus one of `DECAYS` times the squared weights: the one that is best
    on some of the objects when it is fitted to the others.

    Args:
      slots: of each object.
      properties: of each.
      held_out: which are scored; the probe is fitted on the others.
      chosen_on: of those others, which choose the factor.
      hidden: units of its one hidden layer; 0 for a linear probe.
      seed: of the first weights.

    Returns:
      By name: of a category `<name>_accuracy`, the share that is right, of a position
      `<name>_r2`, at most 1 (0: no better than the mean of those that are scored),
      mean over its numbers.
    """
    fitted = ~held_out
    inputs = _standardised(slots, fitted)
    codes = {n: np.asarray(v, np.int32) for n, v in properties.categories.items()}
    numbers = {n: _standardised(v, fitted) for n, v in properties.positions.items()}
    sizes = (
        *((name, int(values.max()) + 1) for name, values in codes.items()),
        *((name, values.shape[1]) for name, values in numbers.items()),
    )

    def some(which: np.ndarray) -> tuple[np.ndarray, Targets]:
        targets = jax.tree.map(lambda v: jnp.asarray(v[which]), (codes, numbers))
        return inputs[which], targets

    first = _fit(*some(fitted & ~chosen_on), sizes, hidden, seed)
    left, targets = some(chosen_on)
    losses = jax.vmap(lambda params: _loss(params, jnp.asarray(left), targets, sizes))
    best = int(losses(first).argmin())
    every = _fit(*some(fitted), sizes, hidden, seed)
    params = jax.tree.map(lambda leaf: leaf[best], every)
    said = jax.device_get(_say(params, jnp.asarray(inputs[held_out]), sizes))
    scores = {}
    for name, true in codes.items():
        right = said[name].argmax(axis=1) == true[held_out]
        scores[f"{name}_accuracy"] = float(right.mean())
    for name, values in numbers.items():
        true = values[held_out].astype(np.float64)
        left = np.sum((true - said[name]) ** 2, axis=0)
        whole = np.sum((true - true.mean(axis=0)) ** 2, axis=0)
        defined = whole > 0
        r2 = 1 - left[defined] / whole[defined]
        scores[f"{name}_r2"] = float(r2.mean()) if defined.any() else float("nan")
    return scores


def _standardised(values: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 over what is fitted; what is constant there becomes 0."""
    values = np.asarray(values, np.float64)
    spread = values[fitted].std(axis=0)
    scale = np.where(spread > 0, spread, np.inf)
    return ((values - values[fitted].mean(axis=0)) / scale).astype(np.float32)


def _fit(
    inputs: np.ndarray, targets: Targets, sizes: Sizes, hidden: int, seed: int
) -> Layers:
    """Returns the layers after `STEPS`, for each of `DECAYS` along the first axis."""
    widths = [inputs.shape[1], *([hidden] if hidden else []), sum(n for _, n in sizes)]
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    params = [
        {"w": jax.random.normal(key, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for key, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]
    decays = jnp.array(DECAYS, jnp.float32)
    return _descend(params, jnp.asarray(inputs), targets, decays, sizes)


@functools.partial(jax.jit, static_argnames="sizes")
def _descend(
    params: Layers, inputs: jax.Array, targets: Targets, decays: jax.Array, sizes: Sizes
) -> Any:
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def penalised(params, decay):
        squares = sum(jnp.sum(layer["w"] ** 2) for layer in params)
        return _loss(params, inputs, targets, sizes) + decay * squares

    def fit(decay):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(penalised)(params, decay)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer.init(params)
        return jax.lax.scan(step, carry, None, length=STEPS)[0][0]

    return jax.vmap(fit)(decays)


def _loss(
    params: Layers, inputs: jax.Array, targets: Targets, sizes: Sizes
) -> jax.Array:
    """The sum of the properties' mean cross-entropies and mean squared errors."""
    (codes, numbers), said = targets, _say(params, inputs, sizes)
    total = jnp.zeros(())
    for name, code in codes.items():
        nats = optax.softmax_cross_entropy_with_integer_labels(said[name], code)
        total += nats.mean()
    for name, true in numbers.items():
        total += jnp.mean((said[name] - true) ** 2)
    return total


def _say(params: Layers, inputs: jax.Array, sizes: Sizes) -> dict[str, jax.Array]:
    """What the probe says of each property, by name."""
    *before, last = params
    for layer in before:
        inputs = jax.nn.relu(inputs @ layer["w"] + layer["b"][None])
    outputs = inputs @ last["w"] + last["b"][None]
    parts = jnp.split(outputs, np.cumsum([n for _, n in sizes])[:-1], axis=1)
    return {name: part for (name, _), part in zip(sizes, parts, strict=True)}
