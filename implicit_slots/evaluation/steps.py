"""What an evaluation computes of a batch: pure functions, compiled on first use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from implicit_slots.data.source import Batch
from implicit_slots.evaluation.metrics import collapse, fixed_points
from implicit_slots.evaluation.metrics.average_precision import (
    Detections,
    attribute_scores,
    detect,
)
from implicit_slots.evaluation.metrics.detection import Detected, detect_objects
from implicit_slots.evaluation.metrics.interdependence import Coupling, coupling
from implicit_slots.evaluation.metrics.locality import locality
from implicit_slots.evaluation.metrics.reconstruction import compare
from implicit_slots.evaluation.metrics.segmentation import (
    matched_slots,
    score_masks,
)
from implicit_slots.evaluation.setup import Setup
from implicit_slots.fixed_point import Unrolled, diagnostics, fixed_point
from implicit_slots.models.images import as_float, seen
from implicit_slots.models.outputs import Encoded, Reading
from implicit_slots.models.set_prediction import (
    CLASSES,
    REACH,
    encode_objects,
    match_sets,
    pairwise_distance,
)
from implicit_slots.models.slot_attention import SlotAttention
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.prng import Given, Purpose, purpose_key

# Attributes that name an object's class; the first one that the data has counts.
NAMED = ("category", "label", "shape")
# Other initial slots are iterated on so many times as far.
RESTART = 4


class EvaluationSteps(NamedTuple):
    """The compiled functions of an evaluation.

    A batch's number gives its initial slots, so that all functions see the same slots
    (but `masks` where it chooses among several starts).

    Attributes:
      encode: (params, image, number) -> `Encoded`.
      masks: (params, batch, number) -> (values per image, by name; `Detected` of each
        kind of masks where there are true ones); of `config.evaluation.masks.starts`
        initial slots those that reconstruct best.
      rendering: (params, image, number) -> (values per image, images by the name of
        what they were rendered from: "dvae", "slots").
      properties: (params, batch, number) -> (values per image, `Detections`).
      assign: (params, batch, number) -> (slots, which of its image's each object has or
        −1, which objects are to be seen, the objects), of data that tell of objects.
      render: (params, slots, present) -> images.
      read: (params, tokens, slots, present) -> `Reading`.
      iterate: (params, image, number) -> (values per image, `Trajectory`, `Coupling`)
        of the slots' fixed points.
      restart: (params, one image, number) -> (slots, last residual, agreement of masks)
        from many initial slots.
    """

    encode: Callable[..., Encoded]
    masks: Callable[..., tuple[dict[str, jax.Array], dict[str, Detected]]]
    rendering: Callable[..., Any]
    properties: Callable[..., Any]
    assign: Callable[..., Any]
    render: Callable[..., jax.Array]
    read: Callable[..., Reading]
    iterate: Callable[..., Any]
    restart: Callable[..., Any]


def build_evaluation_steps(
    graphdef: nnx.GraphDef, config: Config, mesh: jax.sharding.Mesh | None = None
) -> EvaluationSteps:
    """Builds the functions; nothing is compiled before its use.

    Args:
      graphdef: see `Setup`.
      config: see `Setup`.
      mesh: see `Setup`.
    """
    setup = Setup(graphdef, config, mesh)
    functions = (encode, masks, rendering, properties, assign, render, read)
    return EvaluationSteps(*map(setup.compiled, (*functions, iterate, restart)))


def encode(
    setup: Setup, given: Given, params: PyTree, image: jax.Array, number: jax.Array
) -> Encoded:
    """Returns slots, their attention, and tokens where there are some."""
    return setup.model(params).encode(as_float(image), key=_key(given, number))


def masks(
    setup: Setup, given: Given, params: PyTree, batch: Batch, number: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, Detected]]:
    """Scores both kinds of masks, and the cross-entropy."""
    model = setup.model(params)
    image, key = as_float(seen(batch)), _key(given, number)

    def find(key):
        return judge(model, image, model.encode(image, key=key))

    by_name, by_token, _ = best_start(find, key, starts_of(setup.config))
    values = {}
    if by_token is not None:
        values["cross_entropy"] = by_token.sum(axis=(1, 2))
        values["cross_entropy_per_token"] = by_token.mean(axis=(1, 2))
    most, true = setup.config.data.max_objects, batch.get("segmentation")
    detected = {}
    for name, attention in by_name.items():
        found = {
            "dead_slots": collapse.dead_slots(attention),
            "doubled_slots": collapse.doubled_slots(attention),
        }
        if true is not None:
            classes, shadow = classes_of(batch), batch.get("shadow")
            found |= score_masks(attention, true, max_true=most, classes=classes)
            found |= locality(attention, true, shadow, max_true=most)
            detected[name] = detect_objects(attention, true, max_true=most)
        values |= {f"{name}/{key}": value for key, value in found.items()}
    return values, detected


def best_start(find: Callable[[jax.Array], Any], key: jax.Array, starts: int) -> Any:
    """Returns what is found from the best of several initial slots, image by image.

    Args:
      find: from a key to a tuple of arrays with a leading batch axis; the last one
        says how bad a start is.
      key: of the first start.
      starts: how many are tried.
    """
    first = find(key)
    if starts == 1:
        return first

    # As of k-means, which has fixed points of every quality too.
    def better(best, start):
        other = find(jax.random.fold_in(key, start))
        is_better = (other[-1] < best[-1]) | jnp.isnan(best[-1])

        def chosen(new, old):
            return jax.vmap(jnp.where)(is_better, new, old)

        return jax.tree.map(chosen, other, best), None

    return jax.lax.scan(better, first, jnp.arange(1, starts))[0]


def judge(model: Any, image: jax.Array, encoded: Encoded) -> Any:
    """Masks by kind, the decoder's cross-entropy, and what a start is judged by."""
    by_name = {"attention": encoded.attention}
    if not hasattr(model, "read"):
        return by_name, None, jnp.zeros(len(image))
    forced = model.read(encoded.tokens, encoded.slots)
    by_name["decoder"] = forced.attention
    if (by_token := forced.cross_entropy) is not None:
        return by_name, by_token, by_token.sum(axis=(1, 2))
    if not hasattr(model, "render"):
        return by_name, None, jnp.zeros(len(image))
    error = (image - model.render(encoded.slots)) ** 2
    return by_name, None, error.mean(axis=(1, 2, 3))


def rendering(
    setup: Setup, given: Given, params: PyTree, image: jax.Array, number: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Compares images with both of their reconstructions."""
    image = as_float(image)
    rendered = setup.model(params).reconstruct(image, key=_key(given, number))
    by_name = {"dvae": rendered.dvae, "slots": rendered.slots}
    by_name = {name: other for name, other in by_name.items() if other is not None}
    values = {}
    for name, other in by_name.items():
        found = compare(image, other)
        values |= {f"{name}/{key}": value for key, value in found.items()}
    return values, by_name


def properties(
    setup: Setup, given: Given, params: PyTree, batch: Batch, number: jax.Array
) -> tuple[dict[str, jax.Array], Detections]:
    """Compares predicted objects with the true ones."""
    model = setup.model(params)
    encoded = model.encode(as_float(seen(batch)), key=_key(given, number))
    predicted = model.predict(encoded.slots)
    target = encode_objects(batch["objects"], predicted.shape[1])
    matched = match_sets(pairwise_distance(predicted, target))
    scores = attribute_scores(predicted, target, matched, CLASSES, REACH)
    return scores, detect(predicted, target, CLASSES, REACH)


def assign(
    setup: Setup, given: Given, params: PyTree, batch: Batch, number: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Gives each object to be seen its slot, by attention's masks where there are some.

    Without true masks an object is to be seen if its centre is within the image.
    """
    image, most = as_float(seen(batch)), setup.config.data.max_objects
    encoded = setup.model(params).encode(image, key=_key(given, number))
    objects = batch["objects"]
    if (true := batch.get("segmentation")) is not None:
        matched = matched_slots(encoded.attention, true, max_true=most)
        return encoded.slots, matched, matched >= 0, objects
    there = objects["present"] & jnp.isfinite(encoded.slots).all(axis=(1, 2))[:, None]
    if (place := objects.get("pixel_position")) is not None:
        height, width = batch["image"].shape[1:3]
        within = (place >= 0) & (place < jnp.array([width, height], place.dtype))
        there &= within.all(axis=2)
    return encoded.slots, jnp.full(there.shape, -1), there, objects


def render(
    setup: Setup, given: Given, params: PyTree, slots: jax.Array, present: jax.Array
) -> jax.Array:
    """Renders the slots that are present."""
    del given
    return setup.model(params).render(slots, present=present)


def read(
    setup: Setup,
    given: Given,
    params: PyTree,
    tokens: jax.Array | None,
    slots: jax.Array,
    present: jax.Array,
) -> Reading:
    """Reads tokens from the slots that are present."""
    del given
    return setup.model(params).read(tokens, slots, present=present)


def iterate(
    setup: Setup, given: Given, params: PyTree, image: jax.Array, number: jax.Array
) -> tuple[dict[str, jax.Array], fixed_points.Trajectory, Coupling]:
    """Follows slots beyond the steps that they were trained with; measures J there."""
    model, config = setup.model(params), setup.config
    key = _key(given, number)
    problem = model.slot_problem(as_float(image), key)
    slots = model.slot_attention
    applied = applications(slots)
    steps = max(config.evaluation.fixed_points.iterations, applied)
    trajectory = fixed_points.iterate(problem, steps=steps, trained=applied)
    z = fixed_point(*problem, solver=slots.solver, adjoint=slots.adjoint).value
    at = problem.f, problem.params, problem.x, z
    key_radius, key_norm = jax.random.split(key)
    krylov, powers = config.diagnostics.krylov, config.diagnostics.powers
    values = {
        "residual": trajectory.residual[:, applied - 1],
        "residual_last": trajectory.residual[:, -1],
        "mask_flips": trajectory.mask_flips[:, -1],
        "flip_rate": trajectory.mask_changes[:, applied - 1 :].mean(axis=1),
        "masks_settled": fixed_points.masks_settled(trajectory.mask_changes),
        "spectral_radius": diagnostics.spectral_radius(
            *at, key_radius, krylov=krylov, powers=powers
        ),
        "spectral_norm": diagnostics.spectral_norm(*at, key_norm),
    }
    return values, trajectory, coupling(*at)


def restart(
    setup: Setup, given: Given, params: PyTree, image: jax.Array, number: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Settles one image's slots from many initial ones."""
    settings = setup.config.evaluation.fixed_points
    starts = as_float(jnp.repeat(image[None], settings.initialisations, axis=0))
    problem = setup.model(params).slot_problem(starts, _key(given, number))
    slots, residual, attention = fixed_points.settle(
        problem, steps=RESTART * settings.iterations
    )
    return slots, residual, fixed_points.mask_agreement(attention)


def _key(given: Given, number: jax.typing.ArrayLike) -> jax.Array:
    return purpose_key(given.seed, Purpose.EVALUATE, number)


def starts_of(config: Config) -> int:
    """How many initial slots are tried for masks; older configurations lack the key."""
    return config.evaluation.masks.get("starts", 1)


def applications(slots: SlotAttention) -> int:
    """How often the step is applied in a pass: implicit adjoints add one."""
    return slots.solver.max_steps + (not isinstance(slots.adjoint, Unrolled))


def classes_of(batch: Batch) -> Any:
    """The class of each object, where the data names one."""
    objects = batch.get("objects", {})
    for name in NAMED:
        if name in objects:
            return objects[name]
    return None
