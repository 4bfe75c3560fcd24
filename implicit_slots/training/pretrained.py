"""Trained models: `load`, and a model as one folder that goes where a run does not.

`config.json`, `model.safetensors`, `README.md`: the layout that model hubs use; no hub
is needed. Models in this form come with the package, in `implicit_slots/trained`.
"""

import contextlib
import functools
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

from implicit_slots.models.build import build, count_parameters, split_model
from implicit_slots.runtime.compiling import runs_once, standard_arithmetic
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import InvalidValue, UserError
from implicit_slots.runtime.files import expand, write_atomically, write_json
from implicit_slots.runtime.weights import read_weights, write_weights
from implicit_slots.runtime.workdir import (
    CONFIG_FILE,
    EVALUATION_FILE,
    EVALUATION_FOLDER,
    PATHS,
    WEIGHTS_FILE,
    find_trained,
    packaged,
    read_config,
    read_summary,
)
from implicit_slots.training.checkpoint import (
    CHECKPOINT_FOLDER,
    Checkpoints,
    Damaged,
    restore,
)
from implicit_slots.training.frozen import (
    PART,
    TRANSFORMER_FILE,
    is_cached,
    uncached,
)
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import TrainState, initial_state
from implicit_slots.training.values import check_keys

CARD_FILE = "README.md"
# What a card says of a run's validation and of its evaluations, in this order.
CARD_NUMBERS = (
    *("validation/fg_ari", "validation/ari", "validation/miou", "validation/loss"),
    *("attention/fg_ari", "attention/ari", "attention/miou"),
    *("decoder/fg_ari", "decoder/ari", "decoder/miou"),
    *("slots/mse", "ap_inf", "ap_0_5"),
)


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
        place of the run's; those that change the parameters' shapes are refused.

    Raises:
      UserError: if there is no such run or checkpoint, or it cannot be read.
    """
    workdir = find_trained(workdir)
    path = workdir / CONFIG_FILE
    is_folder = (workdir / WEIGHTS_FILE).is_file()
    if not path.exists() or not (is_folder or (workdir / CHECKPOINT_FOLDER).is_dir()):
        raise UserError(
            f"{workdir} holds no run; train one there first, or take a model that "
            f"comes with the package: {', '.join(packaged()) or 'there is none'}"
        )
    config, trained = read_config(path), read_config(path)
    for key, value in (changes or {}).items():
        *sections, name = key.split(".")
        section = functools.reduce(lambda s, part: s.get(part, {}), sections, config)
        if name not in section:
            raise InvalidValue(f"the configuration of this model has no key {key}")
        section[name] = value
    if changes:
        check_keys(config)
    with standard_arithmetic():
        graphdef, shapes = _structure(trained, path)
        if changes:
            graphdef, needed = split_model(nnx.eval_shape(lambda: build(config)))
            if jax.tree.map(np.shape, needed) != jax.tree.map(np.shape, shapes):
                raise InvalidValue(
                    f"{workdir} has arrays of other shapes than "
                    + " and ".join(f"{key}={value}" for key, value in changes.items())
                    + " needs (learned initial slots, for one, are as many as were "
                    "trained); leave that out, or train with it"
                )
        params = (
            fill(read_weights(workdir / WEIGHTS_FILE), workdir, shapes)
            if is_folder
            else _restore(trained, workdir, shapes, step)
        )
        if is_cached(trained):
            # It was trained without its transformer, and is to read images.
            config = uncached(config)
            graphdef, shapes = _structure(config, path)
            params = params | {PART: kept_transformer(workdir, shapes[PART])}
        return config, nnx.merge(graphdef, params)


def _structure(config: Config, path: pathlib.Path) -> tuple[nnx.GraphDef, dict]:
    """The model of a configuration, and its parameters' shapes."""
    try:
        return split_model(nnx.eval_shape(lambda: build(config)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a configuration of this version ({error}); train again, or "
            "read it with the version that wrote it"
        ) from error


def _restore(
    config: Config, workdir: pathlib.Path, shapes: PyTree, step: int | None
) -> PyTree:
    """The parameters of a run's checkpoint."""
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
    return found[0].evaluated


def kept_transformer(workdir: pathlib.Path, shapes: PyTree) -> PyTree:
    """Reads the transformer that made a run's cached features.

    Args:
      workdir: of the run.
      shapes: of its parameters, a nested dictionary.

    Raises:
      UserError: it is not there.
    """
    file = workdir / TRANSFORMER_FILE
    if not file.exists():
        raise UserError(
            f"{workdir} was trained on cached features and has no {file.name}, which "
            "made them; copy it there, from the folder of the cache"
        )
    return fill(read_weights(file), file, shapes)


def fill(weights: Mapping[str, Any], source: pathlib.Path, shapes: PyTree) -> PyTree:
    """Returns parameters with the values of arrays of the same names.

    Args:
      weights: by the names that `named` gives.
      source: where they are from, for the sentence.
      shapes: of the parameters, a nested dictionary.

    Raises:
      UserError: one is not there, or has another shape.
    """
    wanted = dict(named(shapes))
    for name, leaf in wanted.items():
        if (found := weights.get(name)) is None or found.shape != leaf.shape:
            has = "no" if found is None else f"an array of shape {found.shape} as"
            raise UserError(
                f"{source} has {has} {name}, which the configuration's model has with "
                f"shape {leaf.shape}; take the configuration that it was trained with"
            )
    values = [jnp.asarray(weights[name], leaf.dtype) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), values)


def save_pretrained(
    model: nnx.Module,
    config: Config,
    folder: str | os.PathLike[str],
    *,
    numbers: Mapping[str, float] | None = None,
) -> None:
    """Writes a model to a folder: `config.json`, `model.safetensors`, `README.md`.

    Arrays have the names of the model's attributes, joined by dots. Paths of this
    machine (`data.path`, `data.cache`) are left out of the configuration.

    Args:
      model: as `load` or `build` returns it.
      config: the whole configuration that it was built from.
      folder: of this model alone; created if it is not there, and written over.
      numbers: of the model, by name, for its card.

    Raises:
      UserError: a run lies there, or it cannot be written.
    """
    folder = expand(folder)
    if (folder / CHECKPOINT_FOLDER).exists():
        raise UserError(f"{folder} holds a run; choose another folder for its model")
    params = split_model(model)[1]
    portable = config.copy_and_resolve_references()
    for key in PATHS:
        section, name = key.split(".")
        if section in portable and portable[section].get(name):
            portable[section][name] = ""
    text = card(portable, count_parameters(params), numbers or {}, folder.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(
            folder / WEIGHTS_FILE,
            {name: np.asarray(leaf) for name, leaf in named(params)},
        )
        write_json(folder / CONFIG_FILE, json.loads(portable.to_json()))
        write_atomically(folder / CARD_FILE, text)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from error


def export(workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the trained model of a run to a folder, with its numbers on its card.

    Args:
      workdir: as `load` takes it.
      folder: see `save_pretrained`.

    Raises:
      UserError: there is no such model, or the folder cannot be written.
    """
    config, model = load(workdir)
    save_pretrained(model, config, folder, numbers=_numbers(find_trained(workdir)))


def _numbers(workdir: pathlib.Path) -> dict[str, float]:
    """Of a run's validation and evaluations, those that a card says."""
    summary = read_summary(workdir)
    found = {key: summary[key] for key in CARD_NUMBERS if key in summary}
    pattern = f"{EVALUATION_FOLDER}/*/{EVALUATION_FILE}"
    for file in sorted(workdir.glob(pattern)):
        metrics = json.loads(file.read_text())["metrics"]
        for key in CARD_NUMBERS:
            if (value := metrics.get(key, {}).get("mean")) is not None:
                found[f"{file.parent.name}/{key}"] = value
    return found


def named(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """Yields each leaf of a nested dictionary by its path, joined by dots."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield ".".join(str(key.key) for key in path), leaf


def card(config: Config, count: int, numbers: Mapping[str, float], name: str) -> str:
    """Returns the model card: what it is, on what it was trained, how to load it.

    Args:
      config: of the model.
      count: of its parameters.
      numbers: of the model, by name.
      name: of its folder.
    """
    model, side = config.model, config.data.resolution
    rows = {
        "data": config.data.name,
        "backward pass": model.adjoint.name,
        "iterations": model.solver.max_steps,
        "steps": f"{config.num_steps:,} of {config.batch_size} images",
        "seed": config.seed,
        **{key: f"{value:.4g}" for key, value in numbers.items()},
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: implicit_slots
tags: [object-centric-learning, slot-attention, implicit-differentiation]
---
# {config.name}

{model.name}, {count:,} parameters: {model.num_slots} slots of {model.slot_size}
numbers, images of {side}x{side} pixels. `config.json` has every setting.

| | |
|---|---|
{table}

```python
from implicit_slots import load

config, model = load("{name}")  # this folder
```

```bash
python -m implicit_slots.main --mode=predict --workdir={name} --images=DIR --out=OUT
```
"""
