"""What a study measures of a trained run's checkpoints, beside what training logs.

    python -m experiments.studies.probes --workdir=DIR --probe=deletion

Each probe writes WORKDIR/probes/NAME.json, a list of {step, metric, value}: means over
held-out images, how many of them the run's `config.evaluation` says. `pictures` and
`slots_left` write arrays beside it. The runner of studies starts these; nothing of the
run is changed.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.solver_comparison import (
    Case,
    build_case,
    gradient_quality,
    spectra,
)
from experiments.studies import ground
from experiments.studies.drawing import MASKS
from experiments.studies.runs import PROBE_FOLDER
from implicit_slots.data import registry
from implicit_slots.data.batches import TrainBatches
from implicit_slots.data.source import Batch, DataError, Source
from implicit_slots.evaluation import groups
from implicit_slots.evaluation.findings import Findings, Subject
from implicit_slots.evaluation.metrics.segmentation import score_masks
from implicit_slots.evaluation.steps import build_evaluation_steps, judge
from implicit_slots.fixed_point import GMRES, Adjoint, Implicit, Neumann, Unrolled
from implicit_slots.models.build import build, model_class, split_model
from implicit_slots.models.images import as_float
from implicit_slots.models.slot_attention import LEARNED
from implicit_slots.runtime import compiling
from implicit_slots.runtime.allocator import keep_freed_memory
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import build_mesh
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand, write_atomically
from implicit_slots.runtime.prng import Purpose, purpose_key
from implicit_slots.training import checkpoint, pretrained
from implicit_slots.training.codebook import with_codebook
from implicit_slots.training.parts import build_parts
from implicit_slots.training.state import first_state

Rows = Iterable[tuple[int, str, float | None]]  # step, metric, value
Probe = Callable[[pathlib.Path], Rows]

# Whose parameter gradients are compared with the exact one.
GRADIENTS: Mapping[str, Adjoint] = {
    **{f"{terms} terms": Neumann(terms=terms) for terms in (1, 2, 3, 4, 8)},
    "gmres": Implicit(solver=GMRES(max_steps=60, rtol=1e-2)),
    "unrolled": Unrolled(),
}
NUM_IMAGES = 4  # in pictures; of gradients, whose oracle forms each one's Jacobian
# Numbers of iterations at test time, up to the run's
# config.evaluation.fixed_points.iterations; what it was trained with is added.
ITERATIONS = (1, 2, 3, 5, 10, 20, 50, 100)
# How many initial slots an image is tried with.
STARTS = (1, 3, 10)
# And when each start is iterated on as far.
BREADTHS, DEPTHS = (1, 3, 10), (3, 7, 15, 50)
# Of timing: rounds, and steps of a turn.
ROUNDS, TURN = 10, 10


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
        split="validation",
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
        config, model = pretrained.load(workdir, step)
        first = first or subject(config, model)
        yield step, dataclasses.replace(first, params=split_model(model)[1])


def group(name: str, *, last: bool = False) -> Probe:
    """Returns a probe that is one group of an evaluation's numbers.

    Args:
      name: of the group; see implicit_slots/evaluation/README.md.
      last: of the last checkpoint alone.
    """

    def probe(workdir: pathlib.Path) -> Rows:
        for step, subject in along_training(workdir, last=last):
            findings = Findings()
            groups.GROUPS[name](subject, findings)
            for metric, value in findings.metrics().items():
                yield step, metric, value["mean"]
            for curve, drawn in findings.curves.items():
                for x, y in zip(drawn["x"], drawn["series"]["median"], strict=True):
                    yield step, f"{curve}@{x:g}", y

    return probe


def gradients(workdir: pathlib.Path) -> Rows:
    """Cosine to the exact gradient and relative error, at each checkpoint's slots."""
    for step in checkpoint.saved_steps(workdir):
        config, model = pretrained.load(workdir, step)
        case = case_of(config, model)
        for name, adjoint in GRADIENTS.items():
            found = gradient_quality(case, adjoint, model.slot_attention.solver)
            for quantity in ("cosine", "relative_error", "ratio"):
                yield step, f"{quantity}: {name}", float(np.median(found[quantity]))


def case_of(config: Config, model: Any) -> Case:
    """What the first images ask of a model's slots."""
    batch = registry.build(config.data, "validation").batch(np.arange(NUM_IMAGES))
    return build_case(
        model, as_float(jnp.asarray(batch["image"])), batch.get("objects")
    )


def own_gradient(workdir: pathlib.Path) -> Rows:
    """The same of the gradient that a run was trained with, and ρ(J) at its slots."""
    for step in checkpoint.saved_steps(workdir):
        config, model = pretrained.load(workdir, step)
        case, slots = case_of(config, model), model.slot_attention
        found = gradient_quality(case, slots.adjoint, slots.solver)
        for quantity in ("cosine", "relative_error", "ratio"):
            yield step, f"own_{quantity}", float(np.median(found[quantity]))
        for quantity, values in spectra(case, slots.solver).items():
            yield step, f"own_{quantity}", float(np.median(values))


def cost(workdir: pathlib.Path) -> Rows:
    """Time of a run's training step by one with one term, in turns, and its memory."""
    config, _ = pretrained.load(workdir)
    rounds = {"own": step_of(config), "one_term": step_of(with_one_term(config))}
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(ROUNDS + 1):
        for name, (run, _) in rounds.items():
            began = time.perf_counter()
            jax.block_until_ready([run() for _ in range(TURN)])
            seconds[name].append((time.perf_counter() - began) / TURN)
    own, other = (np.array(seconds[name][1:]) for name in rounds)  # The first warms up.
    step = checkpoint.saved_steps(workdir)[-1]
    yield step, "time_ratio", float(np.median(own / other))
    yield step, "step_ms", 1e3 * float(np.median(own))
    yield step, "step_mb", rounds["own"][1] / 2**20


def with_one_term(config: Config) -> Config:
    """Returns a run's configuration with one term of the Neumann series instead."""
    changed = config.copy_and_resolve_references()
    changed.model.adjoint.update(name="neumann", terms=1)
    if config.model.initial_slots in LEARNED:  # Else they would get no gradient.
        changed.model.straight_through = True
    return changed


def step_of(config: Config) -> tuple[Callable[[], Any], int]:
    """A training step, and the bytes of its temporary buffers."""
    parts = build_parts(config, "train")
    assert parts.train is not None
    state = first_state(config, parts.optimizer)
    state = [with_codebook(state, parts.train, config.seed)]
    batch = TrainBatches(parts.train, config.batch_size, config.seed)[0]
    compiled: Any = parts.steps.train.compile(state[0], batch)

    def run():
        state[0], logged = parts.steps.train(state[0], batch)
        return logged

    return run, compiled.memory_analysis().temp_size_in_bytes


def breadth(workdir: pathlib.Path) -> Rows:
    """Masks of one of several initial slots, however many iterations are made.

    One is chosen by the residual of its slots, which needs neither labels nor a
    decoder, by what the decoder loses from its slots, or by the truth, which is the
    most that a choice can give.
    """
    config, model = pretrained.load(workdir)
    if config.model.initial_slots in LEARNED:
        return  # All starts are one.
    source = registry.build(config.data, "validation")
    batch = source.batch(
        np.arange(min(config.evaluation.masks.num_images, len(source)))
    )
    step = checkpoint.saved_steps(workdir)[-1]
    params = split_model(model)[1]
    for depth in DEPTHS:
        config.model.solver.max_steps = depth
        scores_of = jax.jit(functools.partial(one_start, build(config), config))
        keys = (
            purpose_key(config.seed, Purpose.EVALUATE, n) for n in range(BREADTHS[-1])
        )
        found = [jax.tree.map(np.asarray, scores_of(params, batch, k)) for k in keys]
        scores = {name: np.stack([one[name] for one in found]) for name in found[0]}
        for count in BREADTHS:
            first = {name: values[:count] for name, values in scores.items()}
            chosen = {
                "residual": first["residual"].argmin(axis=0),
                "loss": first["loss"].argmin(axis=0),
                "truth": first["fg_ari"].argmax(axis=0),
            }
            for rule, start in chosen.items():
                for name in (*MASKS, "residual"):
                    value = np.take_along_axis(first[name], start[None], axis=0).mean()
                    yield step, f"{name} by {rule} of {count}@{depth}", float(value)


def one_start(
    model: Any, config: Config, params: Any, batch: Batch, key: jax.Array
) -> dict[str, jax.Array]:
    """Scores of attention's masks, the residual and the loss, image by image."""
    model = nnx.merge(split_model(model)[0], params)
    image = as_float(batch["image"])
    encoded = model.encode(image, key=key)
    f, step, x, _ = model.slot_problem(image, key)
    after = f(step, x, encoded.slots)
    gap = jnp.linalg.norm(after - encoded.slots, axis=(1, 2))
    by_name, _, loss = judge(model, image, encoded)
    true, most = batch["segmentation"], config.data.max_objects
    found = score_masks(by_name["attention"], true, max_true=most)
    residual = gap / jnp.linalg.norm(after, axis=(1, 2))
    return {n: found[n] for n in MASKS} | {"residual": residual, "loss": loss}


def iterations(workdir: pathlib.Path) -> Rows:
    """What training left, at other numbers of iterations than it was trained with."""
    config, model = pretrained.load(workdir)
    trained = config.model.solver.max_steps
    most = config.evaluation.fixed_points.iterations
    counts = sorted({count for count in ITERATIONS if count <= most} | {trained})
    return masks_at(workdir, config, model, "model.solver.max_steps", counts)


def starts(workdir: pathlib.Path) -> Rows:
    """Masks of the best of several initial slots, by how many are tried."""
    config, model = pretrained.load(workdir)
    # Of learned ones all are one.
    tried = () if config.model.initial_slots in LEARNED else STARTS
    return masks_at(workdir, config, model, "evaluation.masks.starts", tried)


def masks_at(
    workdir: pathlib.Path, config: Config, model: Any, key: str, values: Sequence[int]
) -> Rows:
    """The last checkpoint's masks and cross-entropy where a key has other values."""
    step = checkpoint.saved_steps(workdir)[-1]
    params = split_model(model)[1]
    scores = {f"{kind}/{name}" for kind in ("attention", "decoder") for name in MASKS}
    for value in values:
        config.update_from_flattened_dict({key: value})
        again = dataclasses.replace(subject(config, build(config)), params=params)
        findings = Findings()
        groups.masks(again, findings)
        for metric, found in findings.metrics().items():
            if metric == "cross_entropy" or metric in scores:
                yield step, f"{metric}@{value}", found["mean"]


def pictures(workdir: pathlib.Path) -> Rows:
    """Images, renders and masks at each checkpoint, as arrays for a figure."""
    arrays: dict[str, Any] = {}
    for step, subject in along_training(workdir):
        arrays["image"] = image = images_of(subject.source)
        encoded = subject.steps.encode(subject.params, image, 0)
        arrays[f"attention/{step}"] = encoded.attention
        present = np.ones(encoded.slots.shape[:2], bool)
        if hasattr(model_class(subject.config.model.name), "render"):
            rendered = subject.steps.render(subject.params, encoded.slots, present)
            forced = subject.steps.read(
                subject.params, encoded.tokens, encoded.slots, present
            )
            arrays[f"slots/{step}"] = rendered
            arrays[f"decoder/{step}"] = forced.attention
    return save(workdir, "pictures", arrays)


def slots_left(workdir: pathlib.Path) -> Rows:
    """Renders of the last checkpoint with an image's first K, …, 1 slots alone."""
    ((_, subject),) = along_training(workdir, last=True)
    image = images_of(subject.source)
    slots = subject.steps.encode(subject.params, image, 0).slots
    count = slots.shape[1]
    arrays: dict[str, Any] = {"image": image}
    for left in range(count, 0, -1):
        present = jnp.broadcast_to(jnp.arange(count) < left, slots.shape[:2])
        arrays[f"left/{left}"] = subject.steps.render(subject.params, slots, present)
    return save(workdir, "slots_left", arrays)


def ground_kept(workdir: pathlib.Path) -> Rows:
    """The last checkpoint's deletions, the ground's slot last and first."""
    ((step, subject),) = along_training(workdir, last=True)
    for metric, value in ground.measure(subject):
        yield step, metric, value


def images_of(source: Source) -> jax.Array:
    """The first images of a source, in [0, 1]."""
    batch = source.batch(np.arange(NUM_IMAGES))
    return as_float(jnp.asarray(batch["image"]))


def save(workdir: pathlib.Path, probe: str, arrays: Mapping[str, Any]) -> Rows:
    """Writes a probe's arrays, which `drawing.arrays_of` reads; returns no numbers."""
    folder = workdir / PROBE_FOLDER
    folder.mkdir(exist_ok=True)
    found = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez_compressed(folder / f"{probe}.npz", **found)  # pyright: ignore
    return ()


PROBES: Mapping[str, Probe] = {
    "masks": group("masks"),
    "rendering": group("rendering", last=True),
    "deletion": group("deletion"),
    "fixed_points": group("fixed_points", last=True),
    "properties": group("properties", last=True),
    "gradients": gradients,
    "own_gradient": own_gradient,
    "cost": cost,
    "breadth": breadth,
    "iterations": iterations,
    "starts": starts,
    "pictures": pictures,
    "slots_left": slots_left,
    "ground": ground_kept,
}


def main(argv: list[str] | None = None) -> None:
    """Runs one probe."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--workdir", type=expand, required=True)
    parser.add_argument("--probe", choices=PROBES, required=True)
    options = parser.parse_args(argv)
    keep_freed_memory()
    compiling.enable_cache()
    try:
        # What is not finite is null, as in metrics.jsonl.
        rows = [
            {"step": step, "metric": metric, "value": value}
            if value is not None and np.isfinite(value)
            else {"step": step, "metric": metric, "value": None}
            for step, metric, value in PROBES[options.probe](options.workdir)
        ]
    except (UserError, DataError) as error:
        sys.exit(f"error: {error}")
    folder = options.workdir / PROBE_FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"{options.probe}.json"
    write_atomically(path, json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} numbers in {path}; JAX {jax.__version__}")


if __name__ == "__main__":
    main()
