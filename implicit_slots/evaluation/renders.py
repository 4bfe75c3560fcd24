"""The group of numbers about renders, and about scenes of other images' slots."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from implicit_slots.evaluation.findings import (
    Findings,
    Subject,
    joined,
    kept_rows,
    kept_values,
)
from implicit_slots.evaluation.metrics import deletion, frechet, inception, lpips
from implicit_slots.evaluation.metrics.kernel_distance import kernel_distance
from implicit_slots.models.images import as_float
from implicit_slots.runtime.devices import replicated
from implicit_slots.runtime.files import expand
from implicit_slots.runtime.prng import Purpose, purpose_key

Distance = Callable[[np.ndarray, np.ndarray], float]
# What is measured of which features.
DISTANCES: Mapping[str, Mapping[str, Distance]] = {
    "random": {"frechet_random": frechet.frechet_distance},
    "inception": {"fid": frechet.frechet_distance, "kid": kernel_distance},
}
NO_WEIGHTS = (
    "no weights: --config.evaluation.inception=FILE takes "
    "pt_inception-2015-12-05-6726825d.pth, which is not downloaded for you"
)
NO_LPIPS = (
    "no weights: --config.evaluation.lpips=FILE takes the state of an lpips.LPIPS, "
    "which is not downloaded for you"
)


def rendering(subject: Subject, findings: Findings) -> None:
    """Errors, SSIM and LPIPS of both reconstructions; distances of whole sets.

    The sets are the images, both reconstructions of them, and scenes that are rendered
    from slots of different images shuffled together ("composed").
    """
    features = _features(subject)
    if "inception" not in features:
        findings.absent |= dict.fromkeys(DISTANCES["inception"], NO_WEIGHTS)
    perceived = _perceived(subject)
    if perceived is None:
        findings.absent["lpips"] = NO_LPIPS
    rows: list[dict[str, np.ndarray]] = []
    slots: list[np.ndarray] = []
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    count = subject.config.evaluation.rendering.num_images

    def add(name: str, images: jax.Array, kept: np.ndarray) -> None:
        for feature, function in features.items():
            seen = np.asarray(function(images))[kept]
            found.setdefault((name, feature), []).append(seen)

    for number, batch, host in subject.batches(count, "renders"):
        values, rendered = subject.steps.rendering(
            subject.params, batch["image"], number
        )
        image = as_float(batch["image"])
        if perceived is not None:
            values = {**values, **perceived(image, rendered)}
        rows.append(kept_values(values, host))
        kept = kept_rows(host)
        for name, images in {"image": image, **rendered}.items():
            add(name, images, kept)
        encoded = subject.steps.encode(subject.params, batch["image"], number)
        slots.append(np.asarray(encoded.slots)[kept])
    findings.images |= joined(rows, count)
    every = np.concatenate(slots)[: count or None]
    if len(every) < every.shape[1]:
        needs = f"it needs as many images as slots, {every.shape[1]}"
        for feature in features:
            absent = {f"composed/{name}": needs for name in DISTANCES[feature]}
            findings.absent |= absent
    else:
        for images, kept in _composed(subject, every):
            add("composed", images, kept)
    for name, feature in found:
        if name == "image":
            continue
        true, other = (
            np.concatenate(found[of, feature])[: count or None]
            for of in ("image", name)
        )
        for metric, distance in DISTANCES[feature].items():
            if len(true) < 2:
                findings.absent[f"{name}/{metric}"] = "it needs two images or more"
                continue
            findings.numbers[f"{name}/{metric}"] = distance(true, other), len(true)


def _features(subject: Subject) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """The networks whose features are compared; Inception where its weights are."""
    # Whole in every process, which otherwise could not fetch it.
    whole = replicated(subject.mesh)
    compiled = functools.partial(jax.jit, out_shardings=whole)
    features: dict[str, Any] = {"random": compiled(frechet.random_features)}
    if file := subject.config.evaluation.inception:
        weights = jax.device_put(inception.load(expand(file)), whole)
        network = compiled(inception.features)
        features["inception"] = lambda images: network(weights, images)
    return features


def _perceived(subject: Subject) -> Callable[..., dict[str, jax.Array]] | None:
    """LPIPS of a batch's renders, where its weights are."""
    if not (file := subject.config.evaluation.get("lpips", "")):
        return None
    whole = replicated(subject.mesh)  # As for other networks.
    weights = jax.device_put(lpips.load(expand(file)), whole)
    return functools.partial(jax.jit(lpips.distances, out_shardings=whole), weights)


def _composed(
    subject: Subject, slots: np.ndarray
) -> Iterator[tuple[jax.Array, np.ndarray]]:
    """Batches of scenes of which no two slots are of one image, and which are kept.

    As many scenes as images, each slot in one of them.
    """
    key = purpose_key(subject.config.seed, Purpose.EVALUATE, 0)
    mixed = np.asarray(deletion.shuffle_slots(key, jnp.asarray(slots)))
    size = subject.batch_size
    for first in subject.progress(range(0, len(mixed), size), "compositions"):
        places = np.arange(first, first + size)
        batch = mixed[np.minimum(places, len(mixed) - 1)]
        present = np.ones(batch.shape[:2], bool)
        rendered = subject.steps.render(subject.params, batch, present)
        yield rendered, places < len(mixed)
