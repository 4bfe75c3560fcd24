"""The group of numbers about what slots tell of their objects' properties."""

from typing import Any

import jax
import numpy as np

from implicit_slots.evaluation.findings import Findings, Subject, kept_rows
from implicit_slots.evaluation.metrics.probes import (
    HIDDEN,
    Properties,
    probe_properties,
)

# Of so many images one is scored, and no object of it is fitted; another one chooses.
ONE_IN = 5
# Attributes that start again after a full turn: no regression finds them.
ANGLES = ("rotation", "orientation")
NOT_TOLD = "the data does not say what objects there are, or where"


def probes(subject: Subject, findings: Findings) -> None:
    """Accuracy and R² of properties, read from frozen slots by probes.

    "shuffled": the same with the properties of other objects, which says what a probe
    finds where there is nothing to be found.
    """
    count = subject.config.evaluation.probes.num_images
    rows: list[Any] = []
    for number, batch, host in subject.batches(count, "probes"):
        if not {"objects", "segmentation"} <= host.keys():
            findings.absent["probes"] = NOT_TOLD
            return
        found = subject.steps.assign(subject.params, batch, number)
        kept = kept_rows(host)
        rows.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[kept], found))
    slots, matched, objects = jax.tree.map(
        lambda *parts: np.concatenate(parts)[: count or None], *rows
    )
    images, _ = np.nonzero(matched)
    part = images % ONE_IN
    held_out, chosen_on = part == ONE_IN - 1, part == ONE_IN - 2
    if len(np.unique(part)) < ONE_IN:
        findings.absent["probes"] = "too few images to fit a probe and to score it"
        return
    fields = {name: values[matched] for name, values in objects.items()}
    properties = Properties(*_sorted_out(fields))
    shuffled = jax.tree.map(lambda v: _shuffled(v, held_out), properties)
    for prefix, told in (("", properties), ("shuffled/", shuffled)):
        for name, hidden in HIDDEN.items():
            scores = probe_properties(
                slots[matched], told, held_out, chosen_on, hidden=hidden
            )
            scored = len(np.unique(images[held_out]))
            findings.numbers |= {
                f"{prefix}{name}/{key}": (value, scored)
                for key, value in scores.items()
            }


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
