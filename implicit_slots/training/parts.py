"""What a configuration stands for: devices, model, optimiser, steps, data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jaxtyping import PyTree

from implicit_slots.data import registry
from implicit_slots.data.batches import TrainBatches
from implicit_slots.models.build import (
    build,
    model_class,
    split_model,
)
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import build_mesh, state_sharding
from implicit_slots.training.checks import check_read
from implicit_slots.training.frozen import check_alike, is_cached, open_cached
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import TrainState, first_state, initial_state
from implicit_slots.training.step import Steps, build_steps


class Parts(NamedTuple):
    """What a configuration stands for; nothing is compiled and nothing written.

    Attributes:
      config: the whole configuration.
      mesh: the devices.
      graphdef: the model's structure.
      shapes: of its parameters.
      optimizer: see optimizer.py.
      steps: the compiled functions that train.
      train: training data; None unless it trains.
      held_out: the splits that are scored.
    """

    config: Config
    mesh: jax.sharding.Mesh
    graphdef: nnx.GraphDef
    shapes: PyTree
    optimizer: optax.GradientTransformationExtraArgs
    steps: Steps
    train: registry.Source | None
    held_out: dict[str, registry.Source]

    def state_shapes(self) -> TrainState:
        """Shapes of the training state, as it lies on the devices."""
        config = self.config
        state = jax.eval_shape(
            lambda params: initial_state(params, self.optimizer, config.optimizer),
            self.shapes,
        )
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=place
            ),
            state,
            state_sharding(state, self.mesh, config.sharding),
        )

    def first_state(self) -> TrainState:
        """The state before the first update, as it lies on the devices."""
        state = first_state(self.config, self.optimizer)
        placement = state_sharding(state, self.mesh, self.config.sharding)
        return jax.device_put(state, placement)


def build_parts(
    config: Config, mode: str, *, devices: Sequence[Any] | None = None
) -> Parts:
    """Builds the model's shapes, the optimiser and the steps, and opens the data.

    Args:
      config: the whole configuration.
      mode: "plan" and "replay" open no data.
      devices: all that there are if not given.
    """
    mesh = build_mesh(config.batch_size, parts=config.accumulate, devices=devices)
    # Shapes alone, which takes no time: a model that cannot be built is refused before
    # data is opened.
    graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
    optimizer = build_optimizer(
        config.optimizer,
        shapes,
        num_steps=config.num_steps,
        split=config.sharding == "fsdp",
    )
    steps = build_steps(graphdef, optimizer, config, mesh)
    data = open_data(config, mode)
    return Parts(config, mesh, graphdef, shapes, optimizer, steps, *data)


def open_data(
    config: Config, mode: str
) -> tuple[registry.Source | None, dict[str, registry.Source]]:
    """Opens the training data, to train, and the held-out splits that are scored."""
    if mode in ("plan", "replay"):
        return None, {}
    if mode == "evaluate":
        split = config.evaluation.split
        if is_cached(config):
            return None, {split: open_cached(config, split)}
        return None, {split: registry.build(config.data, split)}
    if is_cached(config):
        features = open_cached(config, "train"), open_cached(config, "validation")
        check_alike(*features)
        TrainBatches(features[0], config.batch_size, config.seed)
        return features[0], {"validation": features[1]}
    reads = model_class(config.model.name).reads
    held_out = {"validation": registry.build(config.data, "validation")}
    train = registry.build(config.data, "train", reads)
    check_read(train, reads, "training", config.model.num_slots)
    check_read(held_out["validation"], reads, "validation", config.model.num_slots)
    # Large enough?
    TrainBatches(train, config.batch_size, config.seed)
    return train, held_out
