"""What scenes as no training scene is cost a trained model: `--shift`."""

import dataclasses
from typing import Any

from flax import nnx

from implicit_slots.data import registry
from implicit_slots.data.scenes.shifts import NONE, SHIFTS
from implicit_slots.evaluation.findings import (
    Findings,
    Subject,
    joined,
    kept_values,
)
from implicit_slots.evaluation.groups import groups_of
from implicit_slots.evaluation.mask_scores import masks
from implicit_slots.evaluation.shift_table import SHOWN, UNSHIFTED
from implicit_slots.evaluation.steps import build_evaluation_steps
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError


def chosen(asked: str, config: Config, mode: str) -> list[str]:
    """Returns the names of the shifts that `--shift` asks for, none first.

    Raises:
      UserError: if there is none of that name, or the data's scenes have none.
    """
    if mode != "evaluate":
        raise UserError("--shift is for --mode=evaluate")
    if config.data.name != "scenes":
        raise UserError(
            f"--shift renders the embedded scenes anew; {config.data.name!r} cannot be"
        )
    if config.model.get("cached_features", False):
        raise UserError(
            "--shift renders other images, whose features are not prepared; add "
            "--config.model.cached_features=False"
        )
    names = list(SHIFTS) if asked == "all" else asked.split(",")
    for name in names:
        if name not in SHIFTS:
            raise UserError(
                f"--shift must be all or some of {', '.join(SHIFTS)}, got {name!r}"
            )
    return [UNSHIFTED, *dict.fromkeys(names)]


def evaluate_shifts(
    subject: Subject, names: list[str], graphdef: nnx.GraphDef
) -> Findings:
    """Scores masks and renders on each shift of the subject's split.

    Args:
      subject: what is evaluated.
      names: from `chosen`.
      graphdef: of the model.

    Returns:
      The metrics without a shift; under `shifts` those of each, by name.
    """
    every: dict[str, Findings] = {}
    for name in names:
        every[name] = Findings()
        _measure(_shifted(subject, name, graphdef), every[name])
    first = every[UNSHIFTED]
    first.shifts = {
        name: {
            "meaning": (NONE if name == UNSHIFTED else SHIFTS[name]).meaning,
            "metrics": _shown(found),
        }
        for name, found in every.items()
    }
    return first


def _shown(findings: Findings) -> dict[str, dict[str, Any]]:
    found = findings.metrics()
    return {name: found[name] for name in SHOWN if name in found}


def _shifted(subject: Subject, name: str, graphdef: nnx.GraphDef) -> Subject:
    """The subject on a shift; other steps where there are more objects."""
    if name == UNSHIFTED:
        return subject
    config = subject.config.copy_and_resolve_references()
    data = config.data
    steps = subject.steps
    with config.unlocked():
        if more := SHIFTS[name].more:
            data.min_objects = data.max_objects + 1
            data.max_objects += more
            steps = build_evaluation_steps(graphdef, config, subject.mesh)
        else:
            data.shift = name
    source = registry.build(data, config.evaluation.split)
    return dataclasses.replace(subject, config=config, steps=steps, source=source)


def _measure(subject: Subject, findings: Findings) -> None:
    """The group `masks`, and the errors of the renders without distances of sets."""
    masks(subject, findings)
    if "rendering" not in groups_of(subject.config.model.name):
        return
    count = subject.config.evaluation.rendering.num_images
    rows = [
        kept_values(
            subject.steps.rendering(subject.params, batch["image"], number)[0], host
        )
        for number, batch, host in subject.batches(count, "renders")
    ]
    findings.images |= joined(rows, count)
