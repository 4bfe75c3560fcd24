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
# By loss, objects are matched anew after so many steps.
MATCH_EVERY = 25
# Fit and matching may end in a bad place: linear probes begin from so many.
STARTS = 3

# Weights and biases by layer; codes and numbers; each property's number of outputs.
Layers = list[dict[str, jax.Array]]
Targets = tuple[dict[str, Any], dict[str, Any]]
Sizes = tuple[tuple[str, int], ...]
# Slots, what is true of each, and whether it counts: 1 or 0.
Objects = tuple[Any, Targets, Any]


class Properties(NamedTuple):
    """What is true of objects, a row each.

    Attributes:
      categories: codes from 0, by name.
      positions: numbers, by name.
    """

    categories: Mapping[str, Int[np.ndarray, " objects"]]
    positions: Mapping[str, Float[np.ndarray, "objects numbers"]]


class Places(NamedTuple):
    """Where objects are, a row each.

    Attributes:
      images: of which image each is.
      slots: which of its image's slots is its own; None: to be matched by loss.
    """

    images: Int[np.ndarray, " objects"]
    slots: Int[np.ndarray, " objects"] | None


def probe_properties(
    slots: Float[np.ndarray, "images slots dim"],
    places: Places,
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

    By loss, an image's objects have slots of their own so that the sum of their losses
    is least (Dittadi et al. 2022): anew after every `MATCH_EVERY` steps of the fit (an
    MLP's first matching is a linear probe's last, the best of `STARTS`), and for what
    chooses and for what is scored, whose properties are then read before they are
    predicted.

    Args:
      slots: of each image.
      places: of each object its image, and its slot where that is known.
      properties: of each object.
      held_out: which objects are scored; the probe is fitted on the others.
      chosen_on: of those others, which choose the factor. Objects of one image are all
        in one of the three.
      hidden: units of its one hidden layer; 0 for a linear probe.
      seed: of the first weights.

    Returns:
      By name: of a category `<name>_accuracy`, the share that is right, of a position
      `<name>_r2`, at most 1 (0: no better than the mean of those that are scored),
      mean over its numbers. Objects beyond the number of slots count nowhere.
    """
    fitted, images = ~held_out, places.images
    known, at = places.slots, (np.unique(images[fitted]),)
    if known is not None:
        at = images[fitted], known[fitted]
    inputs = _standardised(slots, slots[at].reshape(-1, slots.shape[-1]))
    codes = {n: np.asarray(v, np.int32) for n, v in properties.categories.items()}
    numbers = {n: _standardised(v, v[fitted]) for n, v in properties.positions.items()}
    sizes = (
        *((name, int(values.max()) + 1) for name, values in codes.items()),
        *((name, values.shape[1]) for name, values in numbers.items()),
    )
    targets = codes, numbers

    def match(params: Layers, which: np.ndarray) -> np.ndarray:
        if known is not None:
            return np.where(which, known, -1)
        costs = _pair_costs(params, inputs, images, targets, sizes)
        return _cheapest(np.asarray(costs), images, which)

    def objects(matched: np.ndarray) -> Objects:
        own = inputs[images, np.maximum(matched, 0)]
        return own, targets, np.asarray(matched >= 0, np.float32)

    def begun(which: np.ndarray, decay: float, hidden: int, seed: int) -> Layers:
        layers = [hidden] if hidden else []
        widths = slots.shape[-1], *layers, sum(count for _, count in sizes)
        params, state = _start(widths, seed)
        # An MLP fits any matching, so that its first one would be its last.
        begin = fit(which, decay, 0) if hidden and known is None else params
        matched, steps = match(begin, which), MATCH_EVERY if known is None else STEPS
        for _ in range(STEPS // steps):
            those = objects(matched)
            params, state = _descend(params, state, those, decay, sizes, steps)
            matched = match(params, which)
        return params

    def cost(params: Layers, which: np.ndarray) -> float:
        return float(_loss(params, objects(match(params, which)), sizes))

    def fit(which: np.ndarray, decay: float, hidden: int) -> Layers:
        if hidden or known is not None:
            return begun(which, decay, hidden, seed)
        tried = [begun(which, decay, hidden, seed + n) for n in range(STARTS)]
        return min(tried, key=lambda params: cost(params, which))

    def loss(decay: float) -> float:
        return cost(fit(fitted & ~chosen_on, decay, hidden), chosen_on)

    params = fit(fitted, min(DECAYS, key=loss), hidden)
    matched = match(params, held_out)
    own, _, _ = objects(matched)
    said, scored = jax.device_get(_say(params, own, sizes)), matched >= 0
    scores = {}
    for name, true in codes.items():
        right = said[name].argmax(axis=1) == true
        scores[f"{name}_accuracy"] = float(right[scored].mean())
    for name, values in numbers.items():
        true = values[scored].astype(np.float64)
        left = np.sum((true - said[name][scored]) ** 2, axis=0)
        whole = np.sum((true - true.mean(axis=0)) ** 2, axis=0)
        defined = whole > 0
        r2 = 1 - left[defined] / whole[defined]
        scores[f"{name}_r2"] = float(r2.mean()) if defined.any() else float("nan")
    return scores


def _standardised(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 over some rows; what is constant there becomes 0."""
    values, like = np.asarray(values, np.float64), np.asarray(like, np.float64)
    spread = like.std(axis=0)
    scale = np.where(spread > 0, spread, np.inf)
    return ((values - like.mean(axis=0)) / scale).astype(np.float32)


def _cheapest(costs: np.ndarray, images: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Gives objects of an image slots of their own; −1 for none (Kuhn 1955).

    Args:
      costs: [objects, slots].
      images: of the objects, which stand in the order of their images.
      which: objects; the others have none.
    """
    # Imported here: a start of training needs no SciPy.
    from scipy.optimize import linear_sum_assignment

    matched, rows = np.full(len(images), -1), np.flatnonzero(which)
    for own in np.split(rows, np.flatnonzero(np.diff(images[rows])) + 1):
        objects, slots = linear_sum_assignment(costs[own])
        matched[own[objects]] = slots
    return matched


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(widths: tuple[int, ...], seed: int) -> tuple[Layers, Any]:
    """The first layers, and the optimizer's state."""
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    params = [
        {"w": jax.random.normal(key, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for key, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]
    return params, _optimizer().init(params)


def _optimizer() -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(RATE, STEPS))


@functools.partial(jax.jit, static_argnames=("sizes", "steps"))
def _descend(
    params: Layers, state: Any, objects: Objects, decay: Any, sizes: Sizes, steps: int
) -> Any:
    """Goes on with the fit: the next layers, and the optimizer's state."""

    def penalised(params):
        squares = sum(jnp.sum(layer["w"] ** 2) for layer in params)
        return _loss(params, objects, sizes) + decay * squares

    def step(carry, _):
        params, state = carry
        updates, state = _optimizer().update(jax.grad(penalised)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), None, length=steps)[0]


@functools.partial(jax.jit, static_argnames="sizes")
def _loss(params: Layers, objects: Objects, sizes: Sizes) -> jax.Array:
    """The objects' mean cost; of some, by their weights."""
    inputs, targets, weights = objects
    costs = _costs(_say(params, inputs, sizes), targets)
    return jnp.sum(costs * weights) / weights.sum()


@functools.partial(jax.jit, static_argnames="sizes")
def _pair_costs(
    params: Layers, slots: jax.Array, images: jax.Array, targets: Targets, sizes: Sizes
) -> jax.Array:
    """What each slot of its image would cost an object, [objects, slots]."""
    said = jax.tree.map(lambda leaf: leaf[images], _say(params, slots, sizes))
    return _costs(said, jax.tree.map(lambda leaf: leaf[:, None], targets))


def _costs(said: dict[str, jax.Array], targets: Targets) -> jax.Array:
    """The sum of cross-entropies and mean squared errors, over the last axis."""
    (codes, numbers), total = targets, jnp.zeros(())
    for name, code in codes.items():
        code = jnp.broadcast_to(code, said[name].shape[:-1])
        total += optax.softmax_cross_entropy_with_integer_labels(said[name], code)
    for name, true in numbers.items():
        total += jnp.mean((said[name] - true) ** 2, axis=-1)
    return total


@functools.partial(jax.jit, static_argnames="sizes")
def _say(params: Layers, inputs: jax.Array, sizes: Sizes) -> dict[str, jax.Array]:
    """What the probe says of each property, by name."""
    *before, last = params
    for layer in before:
        inputs = jax.nn.relu(inputs @ layer["w"] + layer["b"])
    outputs = inputs @ last["w"] + last["b"]
    parts = jnp.split(outputs, np.cumsum([n for _, n in sizes])[:-1], axis=-1)
    return {name: part for (name, _), part in zip(sizes, parts, strict=True)}
