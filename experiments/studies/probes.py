"""What a study measures of a trained run's checkpoints, beside what training logs.

    python -m experiments.studies.probes --workdir=DIR --probe=deletion

Each probe writes WORKDIR/probes/NAME.json, a list of {step, metric, value}: means over
held-out images, how many of them the run's `config.evaluation` says. `pictures` and
`slots_left` write arrays beside it. The runner of studies starts these; nothing of the
run is changed.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.solver_comparison import build_case, gradient_quality
from experiments.studies.runs import PROBE_FOLDER
from implicit_slots.data import registry
from implicit_slots.data.source import DataError
from implicit_slots.evaluation.groups import GROUPS, masks
from implicit_slots.evaluation.steps import build_evaluation_steps
from implicit_slots.evaluation.subject import Findings, Subject
from implicit_slots.fixed_point import GMRES, Adjoint, Implicit, Neumann, Unrolled
from implicit_slots.models.build import build, model_class, split_model
from implicit_slots.models.images import as_float
from implicit_slots.runtime import compiling
from implicit_slots.runtime.allocator import keep_freed_memory
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import build_mesh
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import write_whole
from implicit_slots.training import checkpoint

Rows = list[dict[str, Any]]

# Whose parameter gradients are compared with the exact one.
GRADIENTS: Mapping[str, Adjoint] = {
    **{f"{terms} terms": Neumann(terms=terms) for terms in (1, 2, 3, 4, 8)},
    "gmres": Implicit(solver=GMRES(max_steps=60, rtol=1e-2)),
    "unrolled": Unrolled(),
}
NUM_JUDGED = 4  # images; the oracle forms each one's Jacobian
# Numbers of iterations at test time, up to the run's
# config.evaluation.fixed_points.iterations; what it was trained with is added.
ITERATIONS = (1, 2, 3, 5, 10, 20, 50, 100)
# How many initial slots an image is tried with.
STARTS = (1, 3, 10)
NUM_PICTURES = 4


def subject(config: Config, model: Any) -> Subject:
    """Returns a model as an evaluation takes it, on the validation split."""
    graphdef, params = split_model(model)
    mesh = build_mesh(config.batch_size)
    return Subject(
        config=config,
        steps=build_evaluation_steps(graphdef, config, mesh),
        params=params,
        mesh=mesh,
        source=registry.build(config.data, "validation"),
        batch_size=config.batch_size,
        quiet=True,
    )


def along_training(
    workdir: pathlib.Path, *, last: bool = False
) -> Iterator[tuple[int, Subject]]:
    """Returns a run at each of its checkpoints, with functions compiled once.

    Args:
      workdir: of the run.
      last: the last checkpoint alone.
    """
    first = None
    for step in checkpoint.saved_steps(workdir)[-1 if last else 0 :]:
        config, model = checkpoint.load(workdir, step)
        first = first or subject(config, model)
        yield step, dataclasses.replace(first, params=split_model(model)[1])


def group(name: str, *, last: bool = False) -> Callable[[pathlib.Path], Rows]:
    """Returns a probe that is one group of an evaluation's numbers.

    Args:
      name: of the group; see implicit_slots/evaluation/README.md.
      last: of the last checkpoint alone.
    """

    def probe(workdir: pathlib.Path) -> Rows:
        rows: Rows = []
        for step, subject in along_training(workdir, last=last):
            findings = Findings()
            GROUPS[name](subject, findings)
            for metric, value in findings.metrics().items():
                rows.append(row(step, metric, value["mean"]))
            for curve, drawn in findings.curves.items():
                pairs = zip(drawn["x"], drawn["series"]["median"], strict=True)
                rows += [row(step, f"{curve}@{x:g}", y) for x, y in pairs]
        return rows

    return probe


def gradients(workdir: pathlib.Path) -> Rows:
    """Cosine to the exact gradient and relative error, at each checkpoint's slots."""
    rows: Rows = []
    for step in checkpoint.saved_steps(workdir):
        config, model = checkpoint.load(workdir, step)
        source = registry.build(config.data, "validation")
        batch = source.batch(np.arange(NUM_JUDGED))
        image = as_float(jnp.asarray(batch["image"]))
        case = build_case(model, image)
        for name, adjoint in GRADIENTS.items():
            found = gradient_quality(case, adjoint, model.slot_attention.solver)
            for quantity in ("cosine", "relative_error", "ratio"):
                value = float(np.median(found[quantity]))
                rows.append(row(step, f"{quantity}: {name}", value))
    return rows


def iterations(workdir: pathlib.Path) -> Rows:
    """What training left, at other numbers of iterations than it was trained with."""
    config, model = checkpoint.load(workdir)
    trained = config.model.solver.max_steps
    most = config.evaluation.fixed_points.iterations
    counts = sorted({count for count in ITERATIONS if count <= most} | {trained})
    return masks_at(workdir, config, model, "model.solver.max_steps", counts)


def starts(workdir: pathlib.Path) -> Rows:
    """Masks of the best of several initial slots, by how many are tried."""
    config, model = checkpoint.load(workdir)
    if config.model.initial_slots == "learned":
        return []  # All starts are one.
    return masks_at(workdir, config, model, "evaluation.masks.starts", STARTS)


def masks_at(
    workdir: pathlib.Path, config: Config, model: Any, key: str, values: Sequence[int]
) -> Rows:
    """The last checkpoint's masks and cross-entropy where a key has other values."""
    (step,) = checkpoint.saved_steps(workdir)[-1:]
    params = split_model(model)[1]
    rows: Rows = []
    for value in values:
        config.update_from_flattened_dict({key: value})
        again = dataclasses.replace(subject(config, build(config)), params=params)
        findings = Findings()
        masks(again, findings)
        for metric, found in findings.metrics().items():
            if metric in ("cross_entropy", "attention/fg_ari", "decoder/fg_ari"):
                rows.append(row(step, f"{metric}@{value}", found["mean"]))
    return rows


def pictures(workdir: pathlib.Path) -> Rows:
    """Images, renders and masks at each checkpoint, as arrays for a figure."""
    arrays: dict[str, np.ndarray] = {}
    for step, subject in along_training(workdir):
        batch = subject.source.batch(np.arange(NUM_PICTURES))
        image = as_float(jnp.asarray(batch["image"]))
        encoded = subject.steps.encode(subject.params, image, 0)
        arrays["image"] = np.asarray(image)
        arrays[f"attention/{step}"] = np.asarray(encoded.attention)
        present = np.ones(encoded.slots.shape[:2], bool)
        if hasattr(model_class(subject.config.model.name), "render"):
            rendered = subject.steps.render(subject.params, encoded.slots, present)
            forced = subject.steps.read(
                subject.params, encoded.tokens, encoded.slots, present
            )
            arrays[f"slots/{step}"] = np.asarray(rendered)
            arrays[f"decoder/{step}"] = np.asarray(forced.attention)
    save(workdir, "pictures", arrays)
    return []


def slots_left(workdir: pathlib.Path) -> Rows:
    """Renders of the last checkpoint with an image's first K, …, 1 slots alone."""
    ((_, subject),) = along_training(workdir, last=True)
    batch = subject.source.batch(np.arange(NUM_PICTURES))
    image = as_float(jnp.asarray(batch["image"]))
    slots = subject.steps.encode(subject.params, image, 0).slots
    count = slots.shape[1]
    arrays = {"image": np.asarray(image)}
    for left in range(count, 0, -1):
        present = jnp.broadcast_to(jnp.arange(count) < left, slots.shape[:2])
        render = subject.steps.render(subject.params, slots, present)
        arrays[f"left/{left}"] = np.asarray(render)
    save(workdir, "slots_left", arrays)
    return []


def save(workdir: pathlib.Path, probe: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a probe's arrays; `drawing.arrays_of` reads them."""
    folder = workdir / PROBE_FOLDER
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / f"{probe}.npz", **arrays)  # pyright: ignore


PROBES: Mapping[str, Callable[[pathlib.Path], Rows]] = {
    "masks": group("masks"),
    "rendering": group("rendering", last=True),
    "deletion": group("deletion"),
    "fixed_points": group("fixed_points", last=True),
    "properties": group("properties", last=True),
    "gradients": gradients,
    "iterations": iterations,
    "starts": starts,
    "pictures": pictures,
    "slots_left": slots_left,
}


def row(step: int, metric: str, value: float | None) -> dict[str, Any]:
    """A measurement; what is not finite is null, as in metrics.jsonl."""
    known = value is not None and np.isfinite(value)
    return {"step": step, "metric": metric, "value": value if known else None}


def main(argv: list[str] | None = None) -> None:
    """Runs one probe."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--probe", choices=PROBES, required=True)
    options = parser.parse_args(argv)
    keep_freed_memory()
    compiling.enable_cache()
    try:
        rows = PROBES[options.probe](options.workdir)
    except (UserError, DataError) as error:
        sys.exit(f"error: {error}")
    folder = options.workdir / PROBE_FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"{options.probe}.json"
    write_whole(path, json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} numbers in {path}; JAX {jax.__version__}")


if __name__ == "__main__":
    main()
