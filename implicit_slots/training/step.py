"""The training step and the evaluation steps: pure functions, no input or output."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from clu import metrics
from flax import nnx
from jaxtyping import PyTree

from implicit_slots.evaluation.metrics.average_precision import AP_METRICS, detect
from implicit_slots.evaluation.metrics.collapse import (
    AttentionEntropy,
    LargestSlot,
    MaskSimilarity,
)
from implicit_slots.evaluation.metrics.segmentation import ForegroundARI
from implicit_slots.fixed_point import diagnostics, fixed_point
from implicit_slots.models.build import model_class
from implicit_slots.models.images import as_float, squared_error
from implicit_slots.models.outputs import Output, Reconstruction
from implicit_slots.models.set_prediction import CLASSES, REACH, encode_objects
from implicit_slots.runtime.compiling import Bound, bind
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import replicated, state_sharding
from implicit_slots.runtime.prng import Given, Purpose, purpose_key
from implicit_slots.training import nonfinite, penalties
from implicit_slots.training.optimizer import build_plateau, cosine, max_norm
from implicit_slots.training.state import TrainState

Batch = dict[str, Any]


def _averages(*names: str) -> dict[str, type[metrics.Metric]]:
    return {name: metrics.Average.from_output(name) for name in names}


def _annealed(name: str) -> type[metrics.Metric]:
    """What a value was in the last step, whether or not that was skipped."""

    @flax.struct.dataclass
    class Annealed(metrics.LastValue):
        # Any: JAX rebuilds a pytree of whatever it is mapped to, not only of arrays.
        total: Any
        count: Any

        @classmethod
        def from_model_output(  # pyright: ignore[reportIncompatibleMethodOverride]
            cls, **values: jax.Array
        ) -> "Annealed":
            return cls(values[name], jnp.int32(1))

    return Annealed


@functools.cache
def _train_metrics(
    names: tuple[str, ...], annealed: tuple[str, ...]
) -> type[metrics.Collection]:
    """Means over the steps since the last logged one that were not skipped."""
    last = {name: _annealed(name) for name in annealed}
    return metrics.Collection.create(**_averages(*names), **last)


@flax.struct.dataclass
class _DecoderForegroundARI(ForegroundARI):
    """The same of the decoder's masks."""

    @classmethod
    def from_model_output(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, masks: jax.Array, attention: jax.Array, **other: Any
    ) -> ForegroundARI:
        del attention
        return super().from_model_output(attention=masks, **other)


def held_out_metrics(output: Output, batch: Batch) -> type[metrics.Collection]:
    """Returns what is measured of held-out examples, each weighed once.

    That is what the model's output and the batch have: masks can only be scored where
    the images come with true ones.
    """
    kinds: dict[str, type[metrics.Metric]] = {
        **_averages("loss", *output.losses, "forward_residual"),
        "attention_entropy": AttentionEntropy,
        "largest_slot": LargestSlot,
        "mask_similarity": MaskSimilarity,
    }
    if "segmentation" in batch:
        kinds["fg_ari"] = ForegroundARI
        if output.masks is not None:
            kinds["decoder_fg_ari"] = _DecoderForegroundARI
    if output.predicted is not None:
        kinds |= AP_METRICS
    return metrics.Collection.create(**kinds)


class Steps(NamedTuple):
    """The compiled functions of a run.

    Attributes:
      train: (state, batch) -> (state, metrics of the step).
      observe: (state.plateau, validation loss) -> state.plateau; None where the rates
        do not depend on it.
      examine: (state, batch) -> gradient, losses and other means of the step.
      validate: (params, step, batch, number of the batch) -> metrics.
      score: (batch, `Reconstruction`) -> metrics of what is rendered without noise;
        None for a model that renders nothing.
      reconstruct: (params, images, number of the batch) -> `Reconstruction`.
      diagnose: (params, images) -> what the slots' fixed points are like.
      checks: what each training step looks at; see `TrainState.faults`.
    """

    train: Bound
    observe: Callable[..., Any] | None
    examine: Bound
    validate: Bound
    score: Callable[..., Any] | None
    reconstruct: Bound
    diagnose: Bound
    checks: tuple[str, ...]


def build_steps(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    config: Config,
    mesh: jax.sharding.Mesh | None = None,
) -> Steps:
    """Builds the compiled functions of a run; nothing is compiled before its use.

    Args:
      graphdef: the model's structure.
      optimizer: see optimizer.py.
      config: the whole configuration.
      mesh: the devices; None leaves it to JAX where results lie, which is right for
        one.
    """
    whole = None if mesh is None else replicated(mesh)

    def place(tree: PyTree) -> PyTree:
        if mesh is None or mesh.size == 1:
            return tree
        shardings = state_sharding(tree, mesh, config.sharding)
        return jax.lax.with_sharding_constraint(tree, shardings)

    def gather(params: PyTree) -> PyTree:
        """The whole parameters on every device, for one pass.

        Left to itself XLA would rather split the products along the parameters, and
        send the activations of all examples: hundreds of times the bytes.
        """
        if mesh is None or mesh.size == 1 or config.sharding == "replicated":
            return params
        return jax.lax.with_sharding_constraint(params, whole)

    plateau = build_plateau(config.optimizer)
    kind = model_class(config.model.name)
    decay = config.optimizer.ema_decay
    weights = penalties.weights(config)
    # The losses first: where one is not finite, it says more than a penalty.
    summed = (*kind.losses, *map(penalties.logged, weights))

    def annealed(step) -> dict[str, jax.Array]:
        """What the model is called with that changes with the step."""
        return {name: cosine(config[name], step) for name in kind.annealed}

    def gradient_of(params, batch: Batch, keys, values):
        """Of one part of a batch: the gradient, the losses, what else is logged.

        The gradient is that of the losses and the penalties; "loss" is the sum of the
        losses alone.
        """
        key, coupling_key = keys
        model = nnx.merge(graphdef, params)

        def loss_of(params, probe):
            # Gathered here, so that the gradient is whole too until it is placed.
            output = nnx.merge(graphdef, gather(params))(
                batch | {"image": as_float(batch["image"])},
                key=key,
                probe=probe,
                coupling_key=coupling_key,
                **values,
            )
            losses = {name: loss.mean() for name, loss in output.losses.items()}
            added = penalties.measure(weights, output)
            loss = sum(losses.values())
            minimised = loss
            for weight, penalty in zip(weights.values(), added.values(), strict=True):
                minimised += weight * penalty
            return minimised, (loss, losses, added, output.stats)

        # The probe's gradient is what the backward solve did, if there is one.
        probe = model.backward_probe(len(batch["image"]))
        (gradient, backward), (loss, losses, added, stats) = jax.grad(
            loss_of, argnums=(0, 1), has_aux=True
        )(params, probe)
        logged = {"forward_residual": stats.residual.mean()}
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
        return gradient, {"loss": loss, **losses, **added}, logged

    def examine(given: Given, state: TrainState, batch: Batch):
        keys = (
            purpose_key(given.seed, Purpose.TRAIN, state.step),
            purpose_key(given.seed, Purpose.PENALTY, state.step)
            if penalties.COUPLING in weights
            else None,
        )
        values = annealed(state.step)
        gradient, losses, logged = in_parts(
            lambda part, keys: gradient_of(state.params, part, keys, values),
            batch,
            keys,
            config.accumulate,
        )
        return place(gradient), losses, logged | values

    def train(given: Given, state: TrainState, batch: Batch):
        gradient, losses, logged = examine(given, state, batch)
        last = {name: logged.pop(name) for name in kind.annealed}
        updates, opt_state = optimizer.update(
            gradient, state.opt_state, state.params, num_steps=given.num_steps
        )
        if plateau is not None:
            scale = state.plateau.scale
            updates = jax.tree.map(lambda leaf: scale * leaf, updates)
        params = optax.apply_updates(state.params, updates)
        norms = [max_norm(gradient[stage]) for stage in kind.stages]
        logged |= {
            "grad_norm_l2": optax.tree.norm(gradient),
            "grad_norm_inf": jnp.max(jnp.stack(norms)),
        }
        after = state._replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=optax.incremental_update(params, state.ema, 1 - decay)
            if decay
            else state.ema,
        )
        looked_at = [*(losses[name] for name in summed), *reversed(norms)]
        finite = jnp.isfinite(jnp.stack(looked_at))
        after, good = nonfinite.unless_skipped(config.nonfinite, finite, state, after)
        logged = {**losses, **logged}
        collection = _train_metrics(tuple(logged), kind.annealed)
        # With an axis, because a mask needs one.
        means = {name: value[None] for name, value in logged.items()}
        return place(after), collection.single_from_model_output(
            **means, **last, mask=good[None]
        )

    def observe(state, loss) -> PyTree:
        assert plateau is not None
        return plateau.update({}, state, value=loss)[1]

    def validate(given: Given, params, step, batch: Batch, number):
        model = nnx.merge(graphdef, gather(params))
        output: Output = model(
            batch | {"image": as_float(batch["image"])},
            key=purpose_key(given.seed, Purpose.VALIDATE, number),
            deterministic=True,
            **annealed(step),
        )
        detections = None
        if output.predicted is not None:
            count = output.predicted.shape[1]
            target = encode_objects(batch["objects"], count)
            detections = detect(output.predicted, target, CLASSES, REACH)
        return held_out_metrics(output, batch).single_from_model_output(
            loss=sum(output.losses.values()),
            **output.losses,
            forward_residual=output.stats.residual,
            mask=batch["mask"],
            attention=output.attention,
            masks=output.masks,
            detections=detections,
            segmentation=batch.get("segmentation"),
            max_true=config.data.max_objects,
        )

    def reconstruct(given: Given, params, image, number) -> Reconstruction:
        key = purpose_key(given.seed, Purpose.PICTURE, number)
        model = nnx.merge(graphdef, gather(params))
        return model.reconstruct(as_float(image), key=key)

    def score(batch: Batch, rendered: Reconstruction) -> metrics.Collection:
        image = as_float(batch["image"])
        errors = {
            f"{name}_mse": squared_error(image, other)
            for name, other in (("dvae", rendered.dvae), ("slot", rendered.slots))
            if other is not None
        }
        collection = metrics.Collection.create(**_averages(*errors))
        return collection.single_from_model_output(**errors, mask=batch["mask"])

    def diagnose(given: Given, params, image) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, gather(params))
        key_slots, key_radius, key_norm = jax.random.split(
            purpose_key(given.seed, Purpose.DIAGNOSE, 0), 3
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

    def bound(function: Callable[..., Any], **options: Any) -> Bound:
        return bind(function, Given.of(config), **options)

    return Steps(
        # The old state is given up for the new one: half the memory.
        train=bound(train, donate_argnums=1),
        observe=None if plateau is None else jax.jit(observe, out_shardings=whole),
        examine=bound(examine, out_shardings=whole),
        validate=bound(validate, out_shardings=whole),
        score=jax.jit(score, out_shardings=whole) if hasattr(kind, "render") else None,
        reconstruct=bound(reconstruct, out_shardings=whole),
        diagnose=bound(diagnose, out_shardings=whole),
        checks=nonfinite.checks(summed, kind.stages),
    )


def in_parts(
    function: Callable[[Batch, Any], PyTree], batch: Batch, keys: PyTree, parts: int
) -> PyTree:
    """Returns the mean over the parts of a batch of a function of (part, keys).

    One part after the other, so that only one part's activations are in memory. Part
    i holds the examples i, i + parts, i + 2·parts, …: every device has an equal share
    of each. With one part the keys are the function's own; else each is folded with i.

    Args:
      function: whose result is a pytree of means over examples.
      batch: pytree of arrays with a leading batch axis that `parts` divides.
      keys: of the step: one, or a pytree of some.
      parts: how many.
    """
    if parts == 1:
        return function(batch, keys)

    def part(index):
        def take(leaf):
            split = leaf.reshape(-1, parts, *leaf.shape[1:])
            return jax.lax.dynamic_index_in_dim(split, index, 1, keepdims=False)

        def fold(key):
            return jax.random.fold_in(key, index)

        return function(jax.tree.map(take, batch), jax.tree.map(fold, keys))

    def add(total, index):
        return jax.tree.map(jnp.add, total, part(index)), None

    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(part, 0)
    )
    total, _ = jax.lax.scan(add, zeros, jnp.arange(parts))
    return jax.tree.map(lambda leaf: leaf / parts, total)
