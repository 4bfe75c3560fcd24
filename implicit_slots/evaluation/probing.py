"""The group of numbers about what slots tell of their objects' properties."""

from typing import Any

import jax
import numpy as np

from implicit_slots.evaluation.findings import Findings, Subject, kept_rows
from implicit_slots.evaluation.metrics.probes import (
    HIDDEN,
    Places,
    Properties,
    probe_properties,
)

# How objects are matched with slots: by attention's masks where the data have masks and
# by the probe's loss elsewhere, or by one of them.
MATCHES = (AUTO, MASKS, LOSS) = ("auto", "masks", "loss")
# Of so many images one is scored, and no object of it is fitted; another one chooses.
ONE_IN = 5
# Attributes that start again after a full turn: no regression finds them.
ANGLES = ("rotation", "orientation")
NOT_TOLD = "the data does not say what objects there are"
NO_PLACES = (
    "the data does not say where objects are, which match=masks needs; match=loss does "
    "without: --config.evaluation.probes.match"
)
BY_LOSS = (
    "probes: each object has the slot that tells most of it, also in the images that "
    "are scored; by_loss/shuffled says what this choice alone is worth"
)


def probes(subject: Subject, findings: Findings) -> None:
    """Accuracy and R² of properties, read from frozen slots by probes.

    "shuffled": the same with the properties of other objects, which says what a probe
    finds where there is nothing to be found. "by_loss": where objects were matched with
    slots by the probe's loss, see `probe_properties`.
    """
    settings = subject.config.evaluation.probes
    count, by = settings.num_images, settings.get("match", AUTO)
    rows: list[Any] = []
    by_loss = False
    for number, batch, host in subject.batches(count, "probes"):
        by_loss = by == LOSS or (by == AUTO and "segmentation" not in host)
        if "objects" not in host:
            findings.absent["probes"] = NOT_TOLD
            return
        if not by_loss and "segmentation" not in host:
            findings.absent["probes"] = NO_PLACES
            return
        found = subject.steps.assign(subject.params, batch, number)
        kept = kept_rows(host)
        rows.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[kept], found))
    slots, matched, seen, objects = jax.tree.map(
        lambda *parts: np.concatenate(parts)[: count or None], *rows
    )
    images, _ = np.nonzero(seen)
    part = images % ONE_IN
    held_out, chosen_on = part == ONE_IN - 1, part == ONE_IN - 2
    if len(np.unique(part)) < ONE_IN:
        findings.absent["probes"] = "too few images to fit a probe and to score it"
        return
    places = Places(images, None if by_loss else matched[seen])
    fields = {name: values[seen] for name, values in objects.items()}
    properties = Properties(*_sorted_out(fields))
    shuffled = jax.tree.map(lambda v: _shuffled(v, held_out), properties)
    kind = "by_loss/" if by_loss else ""
    for prefix, told in ((kind, properties), (f"{kind}shuffled/", shuffled)):
        for name, hidden in HIDDEN.items():
            scores = probe_properties(
                slots, places, told, held_out, chosen_on, hidden=hidden
            )
            scored = len(np.unique(images[held_out]))
            findings.numbers |= {
                f"{prefix}{name}/{key}": (value, scored)
                for key, value in scores.items()
            }
    findings.notes += [BY_LOSS] if by_loss else []


def _sorted_out(
    fields: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The attributes that are codes, and those that are one number or several."""
    categories, positions = {}, {}
    for name, values in fields.items():
        if name == "present" or name in ANGLES:
            continue
        if np.issubdtype(values.dtype, np.integer) and values.ndim == 1:
            categories[name] = values
        elif np.issubdtype(values.dtype, np.floating) and values.ndim <= 2:
            positions[name] = values.reshape(len(values), -1)
    return categories, positions


def _shuffled(values: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Each object's values are another's, on its side of the split."""
    rng, values = np.random.default_rng(0), values.copy()
    for side in (held_out, ~held_out):
        values[side] = values[side][rng.permutation(int(side.sum()))]
    return values
