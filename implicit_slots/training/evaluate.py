"""A trained model on a split: every number, every picture, the report."""

import datetime
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from implicit_slots.evaluation import pictures, shifts
from implicit_slots.evaluation import run as evaluation
from implicit_slots.evaluation.findings import Subject
from implicit_slots.evaluation.steps import build_evaluation_steps
from implicit_slots.evaluation.validation import at_once
from implicit_slots.report.page import write_report
from implicit_slots.runtime import processes
from implicit_slots.runtime.devices import replicated
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.versions import versions
from implicit_slots.runtime.workdir import (
    CONFIG_FILE,
    EVALUATION_FOLDER,
    read_config,
    writing,
)
from implicit_slots.training.checkpoint import (
    BEST_FOLDER,
    CHECKPOINT_FOLDER,
    open_checkpoints,
    restore,
)
from implicit_slots.training.frozen import PART, is_cached
from implicit_slots.training.parts import Parts, build_parts
from implicit_slots.training.pretrained import kept_transformer
from implicit_slots.training.state import TrainState


def run(
    parts: Parts,
    workdir: pathlib.Path,
    checkpoint: str,
    command: str,
    shifted: Sequence[str],
) -> dict[str, Any]:
    """Evaluates a trained model on a split, writes all of it down, and draws.

    Where shifts are named, on those.

    Returns:
      What metrics.json holds.

    Raises:
      UserError: if the workdir has nothing to evaluate, or cannot be written.
    """
    config, mesh = parts.config, parts.mesh
    if not (workdir / CHECKPOINT_FOLDER).is_dir():
        raise nothing_to_evaluate(workdir)
    state, params = restored(parts, workdir, checkpoint)
    processes.say(f"resumed {workdir} at step {int(state.step)}")
    ((split, source),) = parts.held_out.items()
    label = evaluation.label(config, workdir, checkpoint)
    began = time.perf_counter()
    subject = Subject(
        config=config,
        steps=build_evaluation_steps(parts.graphdef, config, mesh),
        params=jax.device_put(params, replicated(mesh)),
        mesh=mesh,
        source=source,
        batch_size=at_once(config),
    )
    processes.say(f"evaluating {workdir} at step {int(state.step)} on {label}")
    if shifted:
        label = f"{label}-shifts"
        findings = shifts.evaluate_shifts(subject, [*shifted], parts.graphdef)
    else:
        findings = evaluation.evaluate(subject)
    folder = workdir / EVALUATION_FOLDER / label
    drawn = [] if shifted else pictures.draw(subject, findings, folder)
    about = {
        "label": label,
        "title": f"{split.capitalize()} split of {config.data.name}",
        "step": int(state.step),
        "checkpoint": checkpoint,
        "split": split,
        "images": len(source),
        "seconds": round(time.perf_counter() - began, 1),
        "date": datetime.date.today().isoformat(),
        "command": command,
        "versions": versions(),
        "data": config.data.to_dict(),
        "settings": config.evaluation.to_dict(),
    }
    record = evaluation.record(findings, about | {"pictures": drawn})
    with writing(workdir):
        evaluation.write(folder, findings, record)
        report = write_report(workdir)
    print(evaluation.table(record))
    print(f"report: {report}")
    return record


def restored(
    parts: Parts, workdir: pathlib.Path, checkpoint: str
) -> tuple[TrainState, PyTree]:
    """Reads a checkpoint; returns its state, and the parameters to evaluate.

    A run of cached features has its transformer beside the checkpoints; it is put back
    where the configuration has one.

    Raises:
      UserError: there is none.
    """
    trained = read_config(workdir / CONFIG_FILE)
    puts_back = is_cached(trained) and not is_cached(parts.config)
    of_checkpoint = build_parts(trained, "plan") if puts_back else parts
    name = BEST_FOLDER if checkpoint == "best" else CHECKPOINT_FOLDER
    with open_checkpoints(workdir, name, None) as checkpoints:
        found = restore(checkpoints, of_checkpoint.first_state(), set_aside=False)
    if found is None:
        raise nothing_to_evaluate(workdir)
    state, _ = found
    if not puts_back:
        return state, state.evaluated
    transformer = kept_transformer(workdir, parts.shapes[PART])
    return state, state.evaluated | {PART: transformer}


def nothing_to_evaluate(workdir: pathlib.Path) -> UserError:
    """What is said of a workdir without a checkpoint."""
    return UserError(f"{workdir} has no checkpoint to evaluate; train there first")
