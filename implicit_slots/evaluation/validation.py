"""What a run measures of held-out images while it trains, and draws of them.

Pure functions that are compiled, and below them the passes over a source. Masks and
sets are scored by the functions of `metrics/` that `--mode=evaluate` scores them with.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import jax
import numpy as np
from clu import metrics
from flax import nnx
from jaxtyping import Array, Int, PyTree

from implicit_slots.data.batches import evaluation_batches
from implicit_slots.data.registry import Source, usage_of
from implicit_slots.data.source import Batch
from implicit_slots.evaluation.metrics.average_precision import (
    average_precisions,
    detect,
)
from implicit_slots.evaluation.metrics.collapse import (
    dead_slots,
    doubled_slots,
    largest_slot,
    mask_similarity,
    token_perplexity,
)
from implicit_slots.evaluation.metrics.image_mean import image_means
from implicit_slots.evaluation.metrics.segmentation import score_masks
from implicit_slots.evaluation.setup import Setup
from implicit_slots.fixed_point import diagnostics, fixed_point
from implicit_slots.models.annealing import annealed
from implicit_slots.models.build import model_class
from implicit_slots.models.images import as_float, seen, squared_error
from implicit_slots.models.outputs import Output, Reconstruction, attention_entropy
from implicit_slots.models.set_prediction import CLASSES, REACH, encode_objects
from implicit_slots.runtime.compiling import Bound
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import replicated, shard_batch
from implicit_slots.runtime.prng import Given, Purpose, purpose_key

# Fields of a held-out batch that are measured.
MEASURED = ("image", "features", "segmentation", "objects", "mask")
# Of `score_masks`, what a run logs.
LOGGED = ("ari", "fg_ari", "miou")

Metrics = dict[str, metrics.Metric]


class ValidationSteps(NamedTuple):
    """The compiled functions.

    Attributes:
      validate: (params, step, batch, number of the batch) -> metrics by name.
      reconstruct: (params, images, number of the batch) -> `Reconstruction`.
      score: (batch, `Reconstruction`) -> metrics of what is rendered without noise;
        None for a model that renders nothing.
      diagnose: (params, images) -> what the slots' fixed points are like.
    """

    validate: Bound
    reconstruct: Bound
    score: Callable[..., Metrics] | None
    diagnose: Bound


def build_validation_steps(
    graphdef: nnx.GraphDef, config: Config, mesh: jax.sharding.Mesh | None = None
) -> ValidationSteps:
    """Builds the functions; nothing is compiled before its use.

    Args:
      graphdef: see `Setup`.
      config: see `Setup`.
      mesh: see `Setup`.
    """
    setup = Setup(graphdef, config, mesh)
    whole = None if mesh is None else replicated(mesh)
    renders = hasattr(model_class(config.model.name), "render")
    return ValidationSteps(
        validate=setup.compiled(validate_batch),
        reconstruct=setup.compiled(reconstruct_batch),
        score=jax.jit(score_batch, out_shardings=whole) if renders else None,
        diagnose=setup.compiled(diagnose_batch),
    )


def validate_batch(
    setup: Setup,
    given: Given,
    params: PyTree,
    step: Int[Array, ""],
    batch: Batch,
    number: Int[Array, ""],
) -> Metrics:
    """Measures a batch without dropout: losses, how slots share images, and more.

    That is what the model's output and the batch have: masks can only be scored where
    the images come with true ones.
    """
    output: Output = setup.model(params)(
        batch | {"image": as_float(seen(batch))},
        key=purpose_key(given.seed, Purpose.VALIDATE, number),
        deterministic=True,
        **annealed(setup.config, step),
    )
    mask = batch["mask"]
    losses = {"loss": sum(output.losses.values()), **output.losses}
    attention = output.attention
    even = math.log(max(attention.shape[1], 2))
    means = losses | {
        "forward_residual": output.stats.residual,
        "attention_entropy": attention_entropy(attention) / even,
        "largest_slot": largest_slot(attention),
        "dead_slots": dead_slots(attention),
        "doubled_slots": doubled_slots(attention),
    }
    if output.tokens is not None:
        vocabulary = setup.config.model.vocab_size
        means["token_perplexity"] = token_perplexity(output.tokens, mask, vocabulary)
    values = {"mask_similarity": mask_similarity(attention, mask)}
    if "segmentation" in batch:
        for prefix, masks in (("", attention), ("decoder_", output.masks)):
            if masks is not None:
                scores = score_masks(
                    masks, batch["segmentation"], max_true=setup.config.data.max_objects
                )
                values |= {f"{prefix}{name}": scores[name] for name in LOGGED}
    found: Metrics = {
        # Here an image with a NaN makes the mean NaN.
        **{n: metrics.Average.from_model_output(v, mask) for n, v in means.items()},
        **image_means(values, mask),
    }
    if output.predicted is not None:
        target = encode_objects(batch["objects"], output.predicted.shape[1])
        detections = detect(output.predicted, target, CLASSES, REACH)
        found |= average_precisions(detections, mask)
    return found


def reconstruct_batch(
    setup: Setup, given: Given, params: PyTree, image: jax.Array, number: jax.Array
) -> Reconstruction:
    """Renders images through the model, without noise."""
    key = purpose_key(given.seed, Purpose.PICTURE, number)
    return setup.model(params).reconstruct(as_float(image), key=key)


def score_batch(batch: Batch, rendered: Reconstruction) -> Metrics:
    """Returns the squared errors of what was rendered."""
    image = as_float(batch["image"])
    return {
        f"{name}_mse": metrics.Average.from_model_output(
            squared_error(image, other), batch["mask"]
        )
        for name, other in (("dvae", rendered.dvae), ("slot", rendered.slots))
        if other is not None
    }


def diagnose_batch(
    setup: Setup, given: Given, params: PyTree, image: jax.Array
) -> dict[str, jax.Array]:
    """Says what the slots' fixed points are like."""
    model = setup.model(params)
    key_slots, key_radius, key_norm = jax.random.split(
        purpose_key(given.seed, Purpose.DIAGNOSE, 0), 3
    )
    problem = model.slot_problem(as_float(image), key_slots)
    slots = model.slot_attention
    found = fixed_point(*problem, solver=slots.solver, adjoint=slots.adjoint)
    at = problem.f, problem.params, problem.x, found.value
    settings = setup.config.diagnostics
    radius = diagnostics.spectral_radius(
        *at, key_radius, krylov=settings.krylov, powers=settings.powers
    )
    norm = diagnostics.spectral_norm(*at, key_norm)
    return {
        "spectral_radius": radius.mean(),
        "spectral_radius_max": radius.max(),
        "spectral_norm": norm.mean(),
        "diagnosed_residual": found.stats.residual.mean(),
    }


class HeldOut(NamedTuple):
    """Held-out images, and what they are measured with.

    Attributes:
      steps: the compiled functions.
      config: the whole configuration.
      mesh: the devices.
      source: the images.
    """

    steps: ValidationSteps
    config: Config
    mesh: jax.sharding.Mesh
    source: Source


def validate(
    held_out: HeldOut, params: PyTree, step: Int[Array, ""]
) -> dict[str, float]:
    """Returns the means over all images; `step` anneals what is annealed."""
    return _means(
        [
            held_out.steps.validate(params, step, batch, number)
            for number, batch in enumerate(_batches(held_out))
        ]
    )


def score(held_out: HeldOut, params: PyTree) -> dict[str, float]:
    """Returns the squared errors of the noise-free reconstructions.

    "slot_mse" generates every token from the slots, which takes long: only the first
    `config.num_scored` images count, rounded up to whole batches.
    """
    measure = held_out.steps.score
    if measure is None:
        return {}
    pairs = rendered(held_out, params, held_out.config.num_scored)
    return _means([measure(batch, images) for batch, images in pairs])


def diagnose(held_out: HeldOut, params: PyTree) -> dict[str, float]:
    """Returns what the slots' fixed points of the first images are like."""
    wanted = held_out.config.diagnostics.num_examples
    batch = held_out.source.batch(np.arange(min(wanted, len(held_out.source))))
    values = jax.device_get(held_out.steps.diagnose(params, seen(batch)))
    return {name: float(value) for name, value in values.items()}


def rendered(
    held_out: HeldOut, params: PyTree, count: int
) -> Iterator[tuple[Batch, Reconstruction]]:
    """Batches of the first `count` examples, and what the model makes of their images.

    By the same whole batches for pictures and scores: one program.
    """
    batches = math.ceil(count / at_once(held_out.config))
    for number, batch in enumerate(islice(_batches(held_out), batches)):
        yield batch, held_out.steps.reconstruct(params, seen(batch), number)


def at_once(config: Config) -> int:
    """Examples of a held-out batch: as many as a training step has in memory."""
    return config.batch_size // config.accumulate


def computed(found: Metrics) -> dict[str, float]:
    """Returns the numbers of metrics that are on the host."""
    with np.errstate(invalid="ignore"):  # A mean over nothing is NaN.
        return {name: float(metric.compute()) for name, metric in found.items()}


def _batches(held_out: HeldOut) -> Iterator[Batch]:
    """A whole pass over the source, without what the metrics do not read."""
    batches = evaluation_batches(
        held_out.source,
        at_once(held_out.config),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=usage_of(held_out.config.data)["workers"],
    )
    with contextlib.closing(batches):
        for batch in batches:
            read = {name: batch[name] for name in MEASURED if name in batch}
            yield shard_batch(read, held_out.mesh)


def _means(parts: Sequence[Metrics]) -> dict[str, float]:
    """Merges on the host, so that no step waits for a transfer before it is logged."""

    def merged(a: Metrics, b: Metrics) -> Metrics:
        return {name: metric.merge(b[name]) for name, metric in a.items()}

    return computed(functools.reduce(merged, jax.device_get(parts)))
