"""What an evaluation computes of a batch: pure functions, compiled on first use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from implicit_slots.data.source import Batch
from implicit_slots.evaluation.metrics import fixed_points
from implicit_slots.evaluation.metrics.average_precision import attribute_scores, detect
from implicit_slots.evaluation.metrics.interdependence import coupling
from implicit_slots.evaluation.metrics.locality import locality
from implicit_slots.evaluation.metrics.reconstruction import compare
from implicit_slots.evaluation.metrics.segmentation import score_masks
from implicit_slots.fixed_point import Unrolled, diagnostics, fixed_point
from implicit_slots.models.build import model_class
from implicit_slots.models.images import as_float
from implicit_slots.models.outputs import Encoded, Reading
from implicit_slots.models.set_prediction import (
    CLASSES,
    REACH,
    encode_objects,
    match_sets,
    pairwise_distance,
)
from implicit_slots.models.slot_attention import SlotAttention
from implicit_slots.runtime.compiling import bind
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import replicated
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
      masks: (params, batch, number) -> values per image, by name; of
        `config.evaluation.masks.starts` initial slots those that reconstruct best.
      rendering: (params, image, number) -> (values per image, images by the name of
        what they were rendered from: "dvae", "slots").
      properties: (params, batch, number) -> (values per image, `Detections`).
      render: (params, slots, present) -> images.
      read: (params, tokens, slots, present) -> `Reading`.
      iterate: (params, image, number) -> (values per image, `Trajectory`, `Coupling`)
        of the slots' fixed points.
      restart: (params, one image, number) -> (slots, last residual, agreement of masks)
        from many initial slots.
    """

    encode: Callable[..., Encoded]
    masks: Callable[..., dict[str, jax.Array]]
    rendering: Callable[..., Any]
    properties: Callable[..., Any]
    render: Callable[..., jax.Array]
    read: Callable[..., Reading]
    iterate: Callable[..., Any]
    restart: Callable[..., Any]


def build_evaluation_steps(
    graphdef: nnx.GraphDef, config: Config, mesh: jax.sharding.Mesh | None = None
) -> EvaluationSteps:
    """Builds the functions; nothing is compiled before its use.

    Args:
      graphdef: the model's structure.
      config: the whole configuration.
      mesh: the devices; None leaves it to JAX where results lie.
    """
    whole = None if mesh is None else replicated(mesh)
    decodes = hasattr(model_class(config.model.name), "read")
    starts = starts_of(config)
    settings = config.evaluation.fixed_points
    iterations = settings.iterations

    def model_of(params):
        if whole is not None:
            params = jax.lax.with_sharding_constraint(params, whole)
        return nnx.merge(graphdef, params)

    def key_of(given: Given, number):
        return purpose_key(given.seed, Purpose.EVALUATE, number)

    def encode(given: Given, params, image, number) -> Encoded:
        return model_of(params).encode(as_float(image), key=key_of(given, number))

    def from_start(model, image, key):
        """Masks by kind, the decoder's cross-entropy, and what a start is judged by."""
        encoded = model.encode(image, key=key)
        by_name = {"attention": encoded.attention}
        if not decodes:
            return by_name, None, jnp.zeros(len(image))
        forced = model.read(encoded.tokens, encoded.slots)
        by_name["decoder"] = forced.attention
        if (by_token := forced.cross_entropy) is not None:
            return by_name, by_token, by_token.sum(axis=(1, 2))
        error = (image - model.render(encoded.slots)) ** 2
        return by_name, None, error.mean(axis=(1, 2, 3))

    def masks(given: Given, params, batch: Batch, number):
        model = model_of(params)
        image, key = as_float(batch["image"]), key_of(given, number)
        found = from_start(model, image, key)
        if starts > 1:  # As of k-means, which has fixed points of every quality too.

            def better(best, start):
                other = from_start(model, image, jax.random.fold_in(key, start))
                is_better = (other[-1] < best[-1]) | jnp.isnan(best[-1])

                def chosen(new, old):
                    return jax.vmap(jnp.where)(is_better, new, old)

                return jax.tree.map(chosen, other, best), None

            found, _ = jax.lax.scan(better, found, jnp.arange(1, starts))
        by_name, by_token, _ = found
        values = {}
        if by_token is not None:
            values["cross_entropy"] = by_token.sum(axis=(1, 2))
            values["cross_entropy_per_token"] = by_token.mean(axis=(1, 2))
        if "segmentation" not in batch:
            return values
        most = config.data.max_objects
        for name, attention in by_name.items():
            found = score_masks(
                attention,
                batch["segmentation"],
                max_true=most,
                classes=classes_of(batch),
            ) | locality(
                attention, batch["segmentation"], batch.get("shadow"), max_true=most
            )
            values |= {f"{name}/{key}": value for key, value in found.items()}
        return values

    def rendering(given: Given, params, image, number):
        image = as_float(image)
        rendered = model_of(params).reconstruct(image, key=key_of(given, number))
        values = {}
        by_name = {"dvae": rendered.dvae, "slots": rendered.slots}
        by_name = {name: other for name, other in by_name.items() if other is not None}
        for name, other in by_name.items():
            found = compare(image, other)
            values |= {f"{name}/{key}": value for key, value in found.items()}
        return values, by_name

    def properties(given: Given, params, batch: Batch, number):
        model = model_of(params)
        encoded = model.encode(as_float(batch["image"]), key=key_of(given, number))
        predicted = model.predict(encoded.slots)
        target = encode_objects(batch["objects"], predicted.shape[1])
        matched = match_sets(pairwise_distance(predicted, target))
        scores = attribute_scores(predicted, target, matched, CLASSES, REACH)
        return scores, detect(predicted, target, CLASSES, REACH)

    def render(given: Given, params, slots, present):
        return model_of(params).render(slots, present=present)

    def read(given: Given, params, tokens, slots, present) -> Reading:
        return model_of(params).read(tokens, slots, present=present)

    def iterate(given: Given, params, image, number):
        model = model_of(params)
        problem = model.slot_problem(as_float(image), key_of(given, number))
        applied = applications(model.slot_attention)
        trajectory = fixed_points.iterate(
            problem, steps=max(iterations, applied), trained=applied
        )
        slots = model.slot_attention
        z = fixed_point(*problem, solver=slots.solver, adjoint=slots.adjoint).value
        at = problem.f, problem.params, problem.x, z
        key_radius, key_norm = jax.random.split(key_of(given, number))
        krylov, powers = config.diagnostics.krylov, config.diagnostics.powers
        values = {
            "residual": trajectory.residual[:, applied - 1],
            "residual_last": trajectory.residual[:, -1],
            "mask_flips": trajectory.mask_flips[:, -1],
            "spectral_radius": diagnostics.spectral_radius(
                *at, key_radius, krylov=krylov, powers=powers
            ),
            "spectral_norm": diagnostics.spectral_norm(*at, key_norm),
        }
        return values, trajectory, coupling(*at)

    def restart(given: Given, params, image, number):
        starts = jnp.repeat(image[None], settings.initialisations, axis=0)
        problem = model_of(params).slot_problem(as_float(starts), key_of(given, number))
        slots, residual, attention = fixed_points.settle(
            problem, steps=RESTART * iterations
        )
        return slots, residual, fixed_points.mask_agreement(attention)

    def compiled(function):
        return bind(function, Given.of(config), out_shardings=whole)

    return EvaluationSteps(
        encode=compiled(encode),
        masks=compiled(masks),
        rendering=compiled(rendering),
        properties=compiled(properties),
        render=compiled(render),
        read=compiled(read),
        iterate=compiled(iterate),
        restart=compiled(restart),
    )


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
