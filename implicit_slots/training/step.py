"""The training step and the evaluation steps: pure functions, no input or output."""

import functools
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
from implicit_slots.fixed_point import diagnostics, fixed_point
from implicit_slots.models.slate import Reconstruction, squared_error
from implicit_slots.training.optimizer import max_norm, temperature
from implicit_slots.training.state import Purpose, TrainState, purpose_key

Batch = dict[str, Any]


def _averages(*names: str) -> dict[str, type[metrics.Metric]]:
    return {name: metrics.Average.from_output(name) for name in names}


@functools.cache
def _train_metrics(names: tuple[str, ...]) -> type[metrics.Collection]:
    """Means over the steps since the last logged one."""
    return metrics.Collection.create(
        **_averages(*names), temperature=metrics.LastValue.from_output("temperature")
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
      train: (state, batch) -> (state, metrics of the step).
      validate: (params, step, batch, number of the batch) -> metrics.
      score: (params, batch, number of the batch) -> `ReconstructionMetrics`.
      reconstruct: (params, images, number of the batch) -> `Reconstruction`.
      diagnose: (params, images) -> what the slots' fixed points are like.
    """

    train: Callable[..., Any]
    validate: Callable[..., Any]
    score: Callable[..., Any]
    reconstruct: Callable[..., Any]
    diagnose: Callable[..., Any]


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

        def loss_of(params, probe):
            model = nnx.merge(graphdef, params)
            output = model(
                as_float(batch["image"]), temperature=tau, key=key, probe=probe
            )
            losses = {name: loss.mean() for name, loss in output.losses.items()}
            return sum(losses.values()), (losses, output.stats)

        # The probe's gradient is what the backward solve did, if there is one.
        model = nnx.merge(graphdef, state.params)
        probe = model.backward_probe(len(batch["image"]))
        (loss, (losses, stats)), (gradient, backward) = jax.value_and_grad(
            loss_of, argnums=(0, 1), has_aux=True
        )(state.params, probe)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        logged = {
            "loss": loss,
            **losses,
            "grad_norm_l2": optax.tree.norm(gradient),
            "grad_norm_inf": max_norm(gradient),
            "forward_residual": stats.residual.mean(),
        }
        if model.slot_attention.solver.stops:
            logged |= {
                f"forward_{name}": getattr(stats, name).astype(jnp.float32).mean()
                for name in ("steps", "converged", "stagnated", "diverged")
            }
        if backward is not None:
            # A failed solve's residual may be anything, so it is left out.
            solved = 1 - backward.failed
            residual = jnp.where(solved > 0, backward.residual, 0).sum()
            logged |= {
                "backward_steps": backward.steps.mean(),
                "backward_residual": residual / jnp.maximum(solved.sum(), 1),
                "backward_failed": backward.failed.mean(),
            }
        collection = _train_metrics(tuple(logged))
        return (
            TrainState(state.step + 1, params, opt_state),
            collection.single_from_model_output(**logged, temperature=tau),
        )

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

    def diagnose(params, image) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, params)
        key_slots, key_radius, key_norm = jax.random.split(
            purpose_key(seed, Purpose.DIAGNOSE, 0), 3
        )
        problem = model.slot_problem(as_float(image), key_slots)
        f, step_params, x, _ = problem
        slots = model.slot_attention
        found = fixed_point(*problem, solver=slots.solver, adjoint=slots.adjoint)
        radius = diagnostics.spectral_radius(
            f,
            step_params,
            x,
            found.value,
            key_radius,
            krylov=config.diagnostics.krylov,
            powers=config.diagnostics.powers,
        )
        norm = diagnostics.spectral_norm(f, step_params, x, found.value, key_norm)
        return {
            "spectral_radius": radius.mean(),
            "spectral_radius_max": radius.max(),
            "spectral_norm": norm.mean(),
            "diagnosed_residual": found.stats.residual.mean(),
        }

    return Steps(
        # The old state is given up for the new one: half the memory.
        train=jax.jit(train, donate_argnums=0),
        validate=jax.jit(validate),
        score=jax.jit(score),
        reconstruct=jax.jit(reconstruct),
        diagnose=jax.jit(diagnose),
    )


def as_float(
    image: Num[Array, "batch height width 3"],
) -> Float[Array, "batch height width 3"]:
    """Returns images in [0, 1]; bytes are divided by 255, floats taken as they are."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    return image
