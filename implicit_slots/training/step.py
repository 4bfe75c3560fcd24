"""The training step and the evaluation steps: pure functions, no input or output."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu import metrics
from flax import nnx
from jaxtyping import Array, Float, Num

from implicit_slots.config import Config
from implicit_slots.evaluation.segmentation import ForegroundARI
from implicit_slots.models.slate import Reconstruction, squared_error
from implicit_slots.training.optimizer import max_norm, temperature
from implicit_slots.training.state import Purpose, TrainState, purpose_key

Batch = dict[str, Any]


def _averages(*names: str) -> dict[str, type[metrics.Metric]]:
    return {name: metrics.Average.from_output(name) for name in names}


# Means over the steps since the last logged one.
TrainMetrics = metrics.Collection.create(
    **_averages("loss", "mse", "cross_entropy"),
    **_averages("grad_norm_l2", "grad_norm_inf", "forward_residual"),
    temperature=metrics.LastValue.from_output("temperature"),
)
_LOSSES = _averages("loss", "mse", "cross_entropy", "forward_residual")
# Means over held-out examples, each weighed once; masks can only be scored where the
# images come with them.
LossMetrics = metrics.Collection.create(**_LOSSES)
MaskedMetrics = metrics.Collection.create(**_LOSSES, fg_ari=ForegroundARI)
# Squared error per image of what is rendered without noise.
ReconstructionMetrics = metrics.Collection.create(**_averages("dvae_mse", "slot_mse"))


class Steps(NamedTuple):
    """The compiled functions of a run.

    Attributes:
      train: (state, batch) -> (state, `TrainMetrics` of the step).
      validate: (params, step, batch, number of the batch) -> metrics.
      score: (params, batch, number of the batch) -> `ReconstructionMetrics`.
      reconstruct: (params, images, number of the batch) -> `Reconstruction`.
    """

    train: Callable[..., Any]
    validate: Callable[..., Any]
    score: Callable[..., Any]
    reconstruct: Callable[..., Any]


def build_steps(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: Config
) -> Steps:
    """Builds the compiled functions of a run; nothing is compiled before its use.

    Args:
      graphdef: the model's structure.
      optimizer: see optimizer.py.
      config: the whole configuration.
    """
    seed = config.seed

    def train(state: TrainState, batch: Batch):
        key = purpose_key(seed, Purpose.TRAIN, state.step)
        tau = temperature(config.temperature, state.step)

        def loss_of(params):
            model = nnx.merge(graphdef, params)
            output = model(as_float(batch["image"]), temperature=tau, key=key)
            losses = {name: loss.mean() for name, loss in output.losses.items()}
            return sum(losses.values()), (losses, output.stats)

        (loss, (losses, stats)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state.params
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        logged = TrainMetrics.single_from_model_output(
            loss=loss,
            **losses,
            grad_norm_l2=optax.tree.norm(gradient),
            grad_norm_inf=max_norm(gradient),
            forward_residual=stats.residual.mean(),
            temperature=tau,
        )
        return TrainState(state.step + 1, params, opt_state), logged

    def validate(params, step, batch: Batch, number):
        model = nnx.merge(graphdef, params)
        output = model(
            as_float(batch["image"]),
            temperature=temperature(config.temperature, step),
            key=purpose_key(seed, Purpose.VALIDATE, number),
            deterministic=True,
        )
        collection = MaskedMetrics if "segmentation" in batch else LossMetrics
        return collection.single_from_model_output(
            loss=sum(output.losses.values()),
            **output.losses,
            forward_residual=output.stats.residual,
            mask=batch["mask"],
            attention=output.attention,
            segmentation=batch.get("segmentation"),
            max_true=config.data.max_objects,
        )

    def reconstruct(params, image, number) -> Reconstruction:
        key = purpose_key(seed, Purpose.PICTURE, number)
        return nnx.merge(graphdef, params).reconstruct(as_float(image), key=key)

    def score(params, batch: Batch, number) -> metrics.Collection:
        image = as_float(batch["image"])
        rendered = reconstruct(params, image, number)
        return ReconstructionMetrics.single_from_model_output(
            dvae_mse=squared_error(image, rendered.dvae),
            slot_mse=squared_error(image, rendered.slots),
            mask=batch["mask"],
        )

    return Steps(
        # The old state is given up for the new one: half the memory.
        train=jax.jit(train, donate_argnums=0),
        validate=jax.jit(validate),
        score=jax.jit(score),
        reconstruct=jax.jit(reconstruct),
    )


def as_float(
    image: Num[Array, "batch height width 3"],
) -> Float[Array, "batch height width 3"]:
    """Returns images in [0, 1]; bytes are divided by 255, floats taken as they are."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    return image
