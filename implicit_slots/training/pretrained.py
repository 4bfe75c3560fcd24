"""Trained models: `load`, and a model as one folder that goes where a run does not.

`config.json`, `model.safetensors`, `README.md`: the layout that model hubs use; no hub
is needed. Models in this form come with the package, in `implicit_slots/trained`.
"""

import contextlib
import importlib.resources
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from implicit_slots.models.build import build, split_model
from implicit_slots.runtime.compiling import runs_once
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import write_atomically, write_json
from implicit_slots.runtime.weights import read_weights, write_weights
from implicit_slots.runtime.workdir import (
    CONFIG_FILE,
    SUMMARY_FILE,
    read_config,
    read_summary,
)
from implicit_slots.training.checkpoint import (
    CHECKPOINT_FOLDER,
    Checkpoints,
    Damaged,
    restore,
)
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import TrainState, initial_state

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
# What a card says of a summary, in this order.
CARD_NUMBERS = (
    "validation/fg_ari",
    "validation/ari",
    "validation/miou",
    "validation/loss",
    "validation/slot_mse",
)


def packaged() -> Mapping[str, pathlib.Path]:
    """The models that come with the package, by name."""
    folder = pathlib.Path(str(importlib.resources.files("implicit_slots"))) / "trained"
    return {path.parent.name: path.parent for path in folder.glob(f"*/{WEIGHTS_FILE}")}


def load(
    workdir: str | os.PathLike[str],
    step: int | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Config, Any]:
    """Returns the configuration and the trained model of a run.

    Args:
      workdir: of a run that has a checkpoint, a folder that `save_pretrained` wrote, or
        the name of a model that comes with the package; nothing in it is changed.
      step: of the checkpoint; the latest that is whole if not given.
      changes: values of the configuration's keys ("model.num_slots") that take the
        place of the run's; those that change parameters' shapes are refused.

    Raises:
      UserError: if there is no such run or checkpoint, or it cannot be read.
    """
    workdir = pathlib.Path(workdir)
    known = packaged()
    if not workdir.exists() and str(workdir) in known:
        workdir = known[str(workdir)]
    path = workdir / CONFIG_FILE
    is_folder = (workdir / WEIGHTS_FILE).is_file()
    if not path.exists() or not (is_folder or (workdir / CHECKPOINT_FOLDER).is_dir()):
        raise UserError(
            f"{workdir} holds no run; train one there first, or take one that comes "
            f"with the package: {', '.join(known) or 'there is none'}"
        )
    config = read_config(path)
    config.update_from_flattened_dict(dict(changes or {}))
    try:
        if is_folder:
            return config, read_pretrained(workdir, config)
        graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a configuration of this version ({error}); train again, or "
            "read it with the version that wrote it"
        ) from error
    optimizer = build_optimizer(config.optimizer, shapes, num_steps=config.num_steps)

    def zeros() -> TrainState:
        # Drawing parameters that are replaced at once would take seconds.
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return initial_state(params, optimizer, config.optimizer)

    like = jax.jit(zeros, compiler_options=runs_once())()
    folder = workdir / CHECKPOINT_FOLDER
    with contextlib.closing(Checkpoints(folder, keep=None)) as checkpoints:
        if step is None:
            found = restore(checkpoints, like, set_aside=False)
        else:
            try:
                found = checkpoints.read(step, like)
            except Damaged as damage:
                raise UserError(f"{folder / str(step)}: {damage}") from damage
    if found is None:
        raise UserError(f"{workdir} holds no checkpoint; train there first")
    return config, nnx.merge(graphdef, found[0].evaluated)


def save_pretrained(
    model: nnx.Module,
    config: Config,
    folder: pathlib.Path | str,
    *,
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model to a folder.

    Args:
      model: as `load` or `build` returns it.
      config: the whole configuration that it was built from.
      folder: of this model alone; created if it is not there, and written over.
      summary: what the run's summary.json holds, for the model card.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    params = split_model(model)[1]
    weights = {name: np.asarray(leaf) for name, leaf in named(params)}
    write_json(folder / CONFIG_FILE, json.loads(config.to_json()))
    write_weights(folder / WEIGHTS_FILE, weights)
    summary = dict(summary or {})
    if summary:
        write_json(folder / SUMMARY_FILE, summary)
    count = sum(value.size for value in weights.values())
    write_atomically(folder / CARD_FILE, card(config, count, summary, folder.name))


def read_pretrained(folder: pathlib.Path, config: Config) -> nnx.Module:
    """Returns the model of a folder that `save_pretrained` wrote.

    Args:
      folder: the folder.
      config: what its `config.json` says, or with other numbers that leave the
        parameters as they are.

    Raises:
      UserError: if the weights are not those of such a model.
    """
    graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
    weights = read_weights(folder / WEIGHTS_FILE)
    wanted = dict(named(shapes))
    for name, leaf in wanted.items():
        found = weights.get(name)
        if found is None or found.shape != leaf.shape:
            raise UserError(
                f"{folder / WEIGHTS_FILE} has "
                + ("no" if found is None else f"another shape of {found.shape} as")
                + f" {name}, which the model of {folder / CONFIG_FILE} needs; the two "
                "files are not of one model"
            )
    values = [jnp.asarray(weights[name], leaf.dtype) for name, leaf in wanted.items()]
    params = jax.tree.unflatten(jax.tree.structure(shapes), values)
    return nnx.merge(graphdef, params)


def named(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """Yields each leaf of a nested dictionary by its path, joined by dots."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield ".".join(str(key.key) for key in path), leaf


def card(config: Config, count: int, summary: Mapping[str, Any], name: str) -> str:
    """Returns the model card: what it is, on what it was trained, how to load it."""
    data = config.data
    lines = [
        "---",
        "library_name: implicit_slots",
        "tags: [object-centric-learning, slot-attention, implicit-differentiation]",
        "---",
        f"# {config.name}",
        "",
        f"{config.model.name}, {count:,} parameters: {config.model.num_slots} slots of "
        f"{config.model.slot_size} numbers, images of {data.resolution}x"
        f"{data.resolution} pixels.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {data.name} |",
        f"| backward pass | {config.model.adjoint.name} |",
        f"| iterations | {config.model.solver.max_steps} |",
        f"| seed | {config.seed} |",
        f"| steps | {summary.get('step', config.num_steps):,} of {config.batch_size} "
        "images |",
    ]
    lines += [
        f"| {key} | {summary[key]:.4g} |" for key in CARD_NUMBERS if key in summary
    ]
    lines += [
        "",
        "```python",
        "from implicit_slots import load",
        "",
        f'config, model = load("{name}")  # this folder',
        "```",
        "",
        "`config.json` has every setting.",
    ]
    return "\n".join(lines) + "\n"


def export(workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the trained model of a run to a folder, with what its summary says."""
    config, model = load(workdir)
    save_pretrained(model, config, folder, summary=read_summary(workdir))
