"""The frozen transformer's weights, before the first step: read, or standardised.

A run whose features are cached has no transformer; what made them lies in its workdir.
"""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from implicit_slots.data import registry
from implicit_slots.data.prepared.features import Features, hash_file, open_features
from implicit_slots.data.registry import Source
from implicit_slots.data.source import DataError
from implicit_slots.models.build import build, split_model
from implicit_slots.models.images import as_float
from implicit_slots.models.vit import LAYOUTS, grid_side, layout_of
from implicit_slots.models.vit_weights import from_published
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand
from implicit_slots.runtime.weights import read_weights
from implicit_slots.training.checkpoint import CHECKPOINT_FOLDER
from implicit_slots.training.state import TrainState

PART = "vit"
IMAGES = 256  # that a drawn transformer is standardised on
TRANSFORMER_FILE = "transformer.safetensors"  # of a workdir whose features are cached


def is_cached(config: Config) -> bool:
    """Whether a configuration's model reads cached features."""
    return config.model.get("cached_features", False)


def uncached(config: Config) -> Config:
    """The configuration of the same model with its transformer."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.cached_features = False
    return config


def description(config: Config) -> dict[str, Any]:
    """What the features of images depend on, but for a file of weights, as JSON.

    A transformer that stays as it is drawn depends on the seed, and on the training
    images that it is standardised on.
    """
    layout = layout_of(config.model.vit)
    drawn = None
    if not (layout.pretrained or config.features.weights):
        images = registry.request(config.data, "train").identity
        drawn = {"seed": config.seed, "images": images}
    described = {
        "vit": config.model.vit,
        "vit_norm": config.model.vit_norm,
        "patches": grid_side(layout, config.data.resolution) ** 2,
        "width": layout.width,
        "drawn": drawn,
    }
    return json.loads(json.dumps(described))


def weights_hash(config: Config) -> str | None:
    """The hash of the file of weights; None where none is named or there.

    Features can be read on a machine that does not have it.
    """
    file = config.features.weights
    if not file or not expand(file).is_file():
        return None
    try:
        return hash_file(expand(file))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def open_cached(config: Config, split: str) -> Features:
    """The cached features of a split.

    Raises:
      DataError: they are not there, or of something else.
    """
    told = description(config), weights_hash(config)
    return open_features(config.data, split, *told)


def check_alike(train: Features, held_out: Features) -> None:
    """Refuses features that were made with different weights.

    Raises:
      DataError: they were.
    """
    one, other = train.stored, held_out.stored
    if one.manifest.get("weights") != other.manifest.get("weights"):
        raise DataError(
            f"the features in {one.folder} and {other.folder} were made with different "
            "weights; remove one of the folders and prepare it again"
        )


def keep_transformer(train: Features, workdir: pathlib.Path) -> None:
    """Copies what made the features into a workdir, if it is not there.

    Raises:
      DataError: it is not in the cache.
    """
    target = workdir / TRANSFORMER_FILE
    source = train.stored.folder.parent / train.stored.manifest["made_by"]
    if target.exists():
        return
    if not source.exists():
        raise DataError(
            f"there is no {source}, which made the features; run --mode=prepare with "
            "the same --config to have it again"
        )
    unfinished = target.with_name(f".{target.name}")
    shutil.copyfile(source, unfinished)
    unfinished.rename(target)


def read_frozen(
    config: Config, graphdef: nnx.GraphDef, shapes: PyTree, workdir: pathlib.Path
) -> dict[str, Any] | None:
    """Reads the weights that the run begins with, before anything is written.

    Args:
      config: the whole configuration.
      graphdef: the model's structure.
      shapes: of its parameters.
      workdir: where it is; its checkpoints hold the weights from then on.

    Returns:
      The transformer's parameters; None for a model without one, for one that stays as
      it is drawn, and where there are checkpoints already.

    Raises:
      UserError: there is no file, it cannot be read, or is of another transformer.
    """
    if PART not in shapes or (workdir / CHECKPOINT_FOLDER).is_dir():
        return None
    return _read(config, getattr(nnx.merge(graphdef, shapes), PART))


def made(config: Config, train: Source | None) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The transformer with which a run of the configuration begins, and its parameters.

    Args:
      config: the whole configuration.
      train: the training images, for a transformer that stays as it is drawn.

    Raises:
      UserError: as `read_frozen`.
    """
    config = uncached(config)
    graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
    vit = getattr(nnx.merge(graphdef, shapes), PART)
    structure = split_model(vit)[0]
    if (weights := _read(config, vit)) is not None:
        return structure, weights
    assert train is not None
    params = jax.jit(lambda seed: split_model(build(config, seed))[1][PART])(
        np.asarray(config.seed)
    )
    return structure, _standardised(structure, params, train, config)


def with_frozen(state: TrainState, weights: dict[str, Any] | None) -> TrainState:
    """Returns the state before the first update with these weights, if there are any.

    Args:
      state: of a model with a transformer.
      weights: as `read_frozen` returns them.
    """
    if weights is None:
        return state

    return _replaced(state, weights)


def with_standardised(
    state: TrainState, graphdef: nnx.GraphDef, train: Source, config: Config
) -> TrainState:
    """Returns the state before the first update with features of one scale.

    Of a transformer that stays as it is drawn: the scale and bias of its last LayerNorm
    become those with which each feature has mean 0 and deviation 1 over the patches of
    some training images. Process 0's are everybody's.

    Args:
      state: of any model; one without such a transformer stays as it is.
      graphdef: the model's structure.
      train: the training images.
      config: the whole configuration.
    """
    if PART not in state.params or LAYOUTS[config.model.vit].pretrained:
        return state
    structure = split_model(getattr(nnx.merge(graphdef, state.params), PART))[0]
    params = state.params[PART]
    return _replaced(state, _standardised(structure, params, train, config))


def _read(config: Config, vit: Any) -> dict[str, Any] | None:
    """The weights of a file; None for a transformer that stays as it is drawn."""
    name, file = config.model.vit, config.features.weights
    if file:
        return from_published(read_weights(expand(file)), vit)
    if LAYOUTS[name].pretrained:
        raise UserError(
            f"the weights of {name} are not downloaded for you: get them from its "
            "authors and set --config.features.weights=FILE"
        )
    return None


def _standardised(
    structure: nnx.GraphDef, params: PyTree, train: Source, config: Config
) -> dict[str, Any]:
    """The parameters of a drawn transformer with another last LayerNorm."""
    count = min(IMAGES, len(train))
    chosen = np.random.default_rng(config.seed).choice(len(train), count, replace=False)
    images = train.batch(np.sort(chosen))["image"]

    def measure(params, image):
        features = nnx.merge(structure, params)(as_float(image))
        return features.mean(axis=(0, 1)), features.std(axis=(0, 1))

    # On a CPU, whose sums are the same every time; see codebook.py.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = jax.tree.map(np.asarray, params)
        found: Any = jax.tree.map(np.asarray, jax.jit(measure)(params, images))
    if jax.process_count() > 1:
        found = multihost_utils.broadcast_one_to_all(found)
    mean, deviation = found
    norm = {"scale": 1 / deviation, "bias": -mean / deviation}
    return dict(params) | {"norm": norm}


def _replaced(state: TrainState, weights: dict[str, Any]) -> TrainState:
    """The state with other weights of the transformer, placed as its own are."""
    placed = jax.tree.map(
        lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding),
        weights,
        state.params[PART],
    )
    return state._replace(params=state.params | {PART: placed})
