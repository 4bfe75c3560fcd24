"""The frozen transformer's weights, before the first step: read, or standardised."""

import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from implicit_slots.data.registry import Source
from implicit_slots.models.images import as_float
from implicit_slots.models.vit import LAYOUTS
from implicit_slots.models.vit_weights import from_published
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand
from implicit_slots.runtime.weights import read_weights
from implicit_slots.training.checkpoint import CHECKPOINT_FOLDER
from implicit_slots.training.state import TrainState

PART = "vit"
IMAGES = 256  # that a drawn transformer is standardised on


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
    name, file = config.model.vit, config.features.weights
    if file:
        vit = getattr(nnx.merge(graphdef, shapes), PART)
        return from_published(read_weights(expand(file)), vit)
    if LAYOUTS[name].pretrained:
        raise UserError(
            f"the weights of {name} are not downloaded for you: get them from its "
            "authors and set --config.features.weights=FILE"
        )
    return None


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
    count = min(IMAGES, len(train))
    chosen = np.random.default_rng(config.seed).choice(len(train), count, replace=False)
    images = train.batch(np.sort(chosen))["image"]

    def measure(params, image):
        features = getattr(nnx.merge(graphdef, params), PART)(as_float(image))
        return features.mean(axis=(0, 1)), features.std(axis=(0, 1))

    # On a CPU, whose sums are the same every time; see codebook.py.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = jax.tree.map(np.asarray, state.params)
        found: Any = jax.tree.map(np.asarray, jax.jit(measure)(params, images))
    if jax.process_count() > 1:
        found = multihost_utils.broadcast_one_to_all(found)
    mean, deviation = found
    norm = {"scale": 1 / deviation, "bias": -mean / deviation}
    return _replaced(state, dict(state.params[PART]) | {"norm": norm})


def _replaced(state: TrainState, weights: dict[str, Any]) -> TrainState:
    """The state with other weights of the transformer, placed as its own are."""

    def replaced(params):
        placed = jax.tree.map(
            lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding),
            weights,
            params[PART],
        )
        return params | {PART: placed}

    ema = replaced(state.ema) if state.ema else state.ema
    return state._replace(params=replaced(state.params), ema=ema)
