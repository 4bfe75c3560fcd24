"""The groups of numbers: masks, renders, objects' properties, deletions, fixed points.

Each is a function of a `Subject` that adds to `Findings`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from implicit_slots.data.source import Batch
from implicit_slots.evaluation.catalogue import describe
from implicit_slots.evaluation.findings import (
    Findings,
    Subject,
    curve,
    joined,
    kept_rows,
    kept_values,
)
from implicit_slots.evaluation.mask_scores import NO_MASKS, masks
from implicit_slots.evaluation.metrics import (
    deletion,
    fixed_points,
    interdependence,
)
from implicit_slots.evaluation.metrics.average_precision import (
    THRESHOLDS,
    PrecisionRecall,
    average_precision,
    precision_recall,
)
from implicit_slots.evaluation.metrics.segmentation import matched_slots
from implicit_slots.evaluation.probing import probes
from implicit_slots.evaluation.renders import rendering
from implicit_slots.models.build import model_class
from implicit_slots.models.images import as_float, seen
from implicit_slots.models.slot_attention import LEARNED
from implicit_slots.runtime.prng import Purpose, purpose_key

# Of the cross-validation of predictability.
FOLDS = 5

NO_OBJECTS = "the data does not say what objects there are"
NO_RENDERER = "the data's scenes cannot be rendered again without an object"
OF_STARTS = ("fixed_points", "largest_basin", "unconverged", "mask_agreement")
NO_STARTS = "learned initial slots: every start is the same"


def deletions(subject: Subject, findings: Findings) -> tuple[np.ndarray, Batch] | None:
    """Spill, counterfactual error and predictability.

    Returns:
      The renders of the first order, and the images.
    """
    settings = subject.config.evaluation.deletion
    count = subject.count(settings.num_images)
    indices = np.arange(count)
    batch = subject.source.batch(indices)
    encoded = subject.steps.encode(subject.params, seen(batch), 0)
    slots = encoded.slots
    num_slots = slots.shape[1]
    if num_slots < 2:
        findings.absent["Slot interdependence"] = "the model has a single slot"
        return None
    forced = subject.steps.read(subject.params, encoded.tokens, slots, _all(slots))
    regions = regions_of(subject, batch, forced.attention)
    if "segmentation" not in batch:
        findings.notes.append(
            f"spill is measured outside the deleted slot's own decoder mask: {NO_MASKS}"
        )
    key = purpose_key(subject.config.seed, Purpose.EVALUATE, 0)
    orders = deletion.random_orders(key, settings.orders, count, num_slots)

    def render(slots, present):
        return subject.steps.render(subject.params, slots, present)

    def read(slots, present):
        return subject.steps.read(
            subject.params, encoded.tokens, slots, present
        ).cross_entropy

    image = as_float(jnp.asarray(batch["image"]))
    found, renders = deletion.delete_in_turn(
        render,
        slots,
        regions,
        orders,
        read=read,
        image=image,
        without=without_of(subject, indices) if "segmentation" in batch else None,
        progress=subject.progress,
    )
    _tell_deletions(findings, found, "")
    if np.isnan(found.counterfactual_error).all():
        findings.absent["counterfactual_error"] = NO_RENDERER
    if count >= num_slots:
        shuffled, mixed = deletion.shuffle_slots(key, (slots, regions))
        control, _ = deletion.delete_in_turn(
            render, shuffled, mixed, orders[:1], progress=subject.progress
        )
        _tell_deletions(findings, control, "shuffled/")
    _predict(subject, findings)
    return renders, batch


def _predict(subject: Subject, findings: Findings) -> None:
    """Predictability, of as many images as masks are scored on: it takes many."""
    wanted = subject.config.evaluation.masks.num_images
    rows = [
        np.asarray(subject.steps.encode(subject.params, seen(batch), number).slots)[
            kept_rows(host)
        ]
        for number, batch, host in subject.batches(wanted, "slots")
    ]
    slots = np.concatenate(rows)
    needed = max(slots.shape[1], FOLDS)
    if len(slots) < needed:
        findings.absent["predictability"] = (
            f"it needs {needed} images: --config.evaluation.masks.num_images"
        )
        return
    key = purpose_key(subject.config.seed, Purpose.EVALUATE, 0)
    shuffled = deletion.shuffle_slots(key, jnp.asarray(slots))
    for name, values in (("", slots), ("shuffled/", np.asarray(shuffled))):
        r2 = interdependence.predictability(values, FOLDS)
        findings.numbers[f"{name}predictability"] = r2, len(slots)


def behaviour(subject: Subject, findings: Findings) -> fixed_points.Trajectory:
    """Residuals, mask flips, J, coupling, and distinct fixed points.

    Returns:
      The trajectory of the images.
    """
    settings = subject.config.evaluation.fixed_points
    count = subject.count(settings.num_images)
    image = seen(subject.source.batch(np.arange(count)))
    values, trajectory, coupled = jax.device_get(
        subject.steps.iterate(subject.params, image, 0)
    )
    values["jacobian_coupling"] = coupled.jacobian
    values["inverse_coupling"] = coupled.inverse
    if subject.config.model.initial_slots in LEARNED:
        findings.absent |= dict.fromkeys(OF_STARTS, NO_STARTS)
    else:
        values |= basins(subject, image)
    findings.images |= values
    steps = np.arange(1, trajectory.residual.shape[1] + 1)
    findings.curves["residual"] = curve(
        "Residual by iteration",
        ("iteration", "‖f(z) − z‖ / ‖f(z)‖"),
        steps,
        trajectory.residual.T,
        log=True,
    )
    findings.curves["mask_flips"] = curve(
        "Positions that change their slot",
        ("iteration", "share of positions"),
        steps,
        trajectory.mask_flips.T,
    )
    return trajectory


def basins(subject: Subject, image: np.ndarray) -> dict[str, np.ndarray]:
    """Where many initial slots of each image end."""
    found = []
    for place in subject.progress(range(len(image)), "fixed points"):
        slots, residual, agreement = jax.device_get(
            subject.steps.restart(subject.params, image[place], place)
        )
        ends = fixed_points.find_basins(slots, residual)
        found.append([*ends[:3], float(agreement)])
    return dict(zip(OF_STARTS, np.array(found).T, strict=True))


def properties(
    subject: Subject, findings: Findings
) -> dict[str, PrecisionRecall] | None:
    """Average precision of predicted objects, and what is right of them.

    Returns:
      A curve of precision over recall for each threshold.
    """
    count = subject.config.evaluation.properties.num_images
    rows, detected = [], []
    for number, batch, host in subject.batches(count, "properties"):
        if "objects" not in host:
            findings.absent["Object properties"] = NO_OBJECTS
            return None
        values, found = subject.steps.properties(subject.params, batch, number)
        rows.append(kept_values(values, host))
        kept = kept_rows(host)
        detected.append([np.asarray(part)[kept] for part in found])
    findings.images |= joined(rows, count)
    confidence, hits, objects = (
        np.concatenate(parts)[: count or None] for parts in zip(*detected, strict=True)
    )
    curves = {}
    for place, name in enumerate(THRESHOLDS):
        curves[name] = precision_recall(
            confidence.ravel(), hits[..., place].ravel(), float(objects.sum())
        )
        precision = average_precision(curves[name])
        findings.numbers[f"ap_{name}"] = precision, len(objects)
    return curves


GROUPS: Mapping[str, Callable[[Subject, Findings], Any]] = {
    "masks": masks,
    "rendering": rendering,
    "properties": properties,
    "probes": probes,
    "deletion": deletions,
    "fixed_points": behaviour,
}
# What a model must be able to do for a group.
_NEEDS = {"rendering": "render", "deletion": "render", "properties": "predict"}


def groups_of(model: str) -> list[str]:
    """The groups that a model of this name has numbers of."""
    kind = model_class(model)
    return [g for g in GROUPS if g not in _NEEDS or hasattr(kind, _NEEDS[g])]


def regions_of(
    subject: Subject, batch: Batch, attention: jax.Array
) -> deletion.Regions:
    """What each slot stands for: its object, or else its own mask."""
    height, width = batch["image"].shape[1:3]
    if "segmentation" not in batch:
        return deletion.mask_regions(attention, height, width)
    true = jnp.asarray(batch["segmentation"])
    most = subject.config.data.max_objects
    matched = matched_slots(attention, true, max_true=most)
    shadow = batch.get("shadow")
    return deletion.object_regions(
        true,
        matched,
        num_slots=attention.shape[1],
        shadow=None if shadow is None else jnp.asarray(shadow),
    )


def without_of(subject: Subject, indices: np.ndarray) -> deletion.Without:
    """The true scenes of these images without some of their objects."""
    return lambda removed: subject.source.without(indices, removed)


def _all(slots: jax.Array) -> jax.Array:
    return jnp.ones(slots.shape[:2], bool)


def _tell_deletions(findings: Findings, found: deletion.Deletions, prefix: str) -> None:
    """The first deletion's numbers, and by the number of slots left."""
    rows = found.spill.shape[1]
    left = np.arange(rows, 0, -1)
    for name in (
        "spill",
        "spill_share",
        "spill_cross_entropy",
        "object_cross_entropy",
        "counterfactual_error",
        "scene_spill",
    ):
        values = getattr(found, name)
        if np.isnan(values).all():
            continue
        # Over orders: the same images again.
        by_left = np.stack([_mean(values[:, row]) for row in range(rows)])
        findings.images[f"{prefix}{name}"] = by_left[0]
        findings.images[f"{prefix}one_left/{name}"] = by_left[-1]
        if not prefix:
            findings.curves[name] = curve(
                describe(name).label,
                ("slots left", describe(name).unit or "share"),
                left,
                by_left,
            )
    if not prefix and not np.isnan(found.render_error).all():
        findings.images["render_error"] = found.render_error


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, of what is not NaN."""
    defined = ~np.isnan(values)
    total = np.where(defined, values, 0).sum(axis=0)
    count = defined.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
