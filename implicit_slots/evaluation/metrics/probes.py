"""What slots tell of the objects that they stand for: probes fitted to frozen slots."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

# Hidden units of each probe; none: a linear one.
HIDDEN: Mapping[str, int] = {"linear": 0, "mlp": 128}
# Of the fit: steps of Adam on all objects at once, its first rate, and what is added to
# the loss of the squared weights.
STEPS = 1_000
RATE = 3e-2
DECAY = 1e-3


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
    held_out: np.ndarray,
    *,
    hidden: int,
    seed: int = 0,
) -> dict[str, float]:
    """Fits a probe on some objects and scores it on the others.

    One network reads the standardised slot and says every property: logits of
    categories, standardised numbers. Its loss is the sum of cross-entropies and mean
    squared errors, plus `DECAY` times the squared weights.

    Args:
      slots: of each object.
      properties: of each.
      held_out: bool [objects]: which are scored; the probe is fitted on the others.
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
    sizes = {name: int(values.max()) + 1 for name, values in codes.items()}
    sizes |= {name: values.shape[1] for name, values in numbers.items()}
    targets = jax.tree.map(lambda v: jnp.asarray(v[fitted]), (codes, numbers))
    params = _fit(inputs[fitted], targets, tuple(sizes.items()), hidden, seed)
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
    inputs: np.ndarray,
    targets: tuple[dict[str, jax.Array], dict[str, jax.Array]],
    sizes: tuple[tuple[str, int], ...],
    hidden: int,
    seed: int,
) -> list[dict[str, jax.Array]]:
    """Returns the weights and biases of the layers after `STEPS`."""
    widths = [inputs.shape[1], *([hidden] if hidden else []), sum(dict(sizes).values())]
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    params = [
        {"w": jax.random.normal(key, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for key, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    @jax.jit
    def fit(params, inputs, targets):
        def loss(params):
            codes, numbers = targets
            said = _say(params, inputs, dict(sizes))
            total = DECAY * sum(jnp.sum(layer["w"] ** 2) for layer in params)
            for name, code in codes.items():
                nats = optax.softmax_cross_entropy_with_integer_labels(said[name], code)
                total += nats.mean()
            for name, true in numbers.items():
                total += jnp.mean((said[name] - true) ** 2)
            return total

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer.init(params)
        return jax.lax.scan(step, carry, None, length=STEPS)[0][0]

    return fit(params, jnp.asarray(inputs), targets)


def _say(
    params: list[dict[str, jax.Array]], inputs: jax.Array, sizes: Mapping[str, int]
) -> dict[str, jax.Array]:
    """What the probe says of each property, by name."""
    *before, last = params
    for layer in before:
        inputs = jax.nn.relu(inputs @ layer["w"] + layer["b"][None])
    outputs = inputs @ last["w"] + last["b"][None]
    ends = np.cumsum([*sizes.values()])[:-1]
    return dict(zip(sizes, jnp.split(outputs, ends, axis=1), strict=True))
