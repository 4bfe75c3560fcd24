"""The training step: pure functions of (state, batch), no input or output."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from clu import metrics
from flax import nnx
from jaxtyping import Array, Float, PyTree

from implicit_slots.data.source import Batch
from implicit_slots.models import annealing
from implicit_slots.models.build import model_class
from implicit_slots.models.images import as_float, seen
from implicit_slots.runtime.compiling import Bound, bind
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import batch_over, gathered, placed, replicated
from implicit_slots.runtime.prng import Given, Purpose, purpose_key
from implicit_slots.training import nonfinite, penalties
from implicit_slots.training.optimizer import (
    DVAE,
    build_plateau,
    l2_norm,
    max_norm,
)
from implicit_slots.training.state import TrainState, averaged


class Steps(NamedTuple):
    """The compiled functions that train.

    Attributes:
      train: (state, batch) -> (state, metrics of the step).
      observe: (state.plateau, validation loss) -> state.plateau; None where the rates
        do not depend on it.
      examine: (state, batch) -> gradient, losses and other means of the step.
      checks: what each training step looks at; see `TrainState.faults`.
      frozen: the same functions with the dVAE frozen; None if it never is.
      dvae_steps: steps that train the dVAE; 0: all.
    """

    train: Bound
    observe: Callable[..., Any] | None
    examine: Bound
    checks: tuple[str, ...]
    frozen: "Steps | None" = None
    dvae_steps: int = 0

    def at(self, step: int) -> "Steps":
        """The functions of a step, counted from one."""
        return self if self.frozen is None or step <= self.dvae_steps else self.frozen


class Setup(NamedTuple):
    """What is the same in every step of a run.

    Attributes:
      graphdef: the model's structure.
      optimizer: see optimizer.py.
      config: the whole configuration.
      mesh: the devices; None leaves it to JAX where results lie, which is right for
        one.
      frozen: whether the dVAE is frozen: it gets no update, and the decoder's targets
        are its most probable tokens.
    """

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformationExtraArgs
    config: Config
    mesh: jax.sharding.Mesh | None
    frozen: bool = False


def build_steps(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    config: Config,
    mesh: jax.sharding.Mesh | None = None,
) -> Steps:
    """Builds the compiled functions; nothing is compiled before its use.

    Args:
      graphdef: see `Setup`.
      optimizer: see `Setup`.
      config: see `Setup`.
      mesh: see `Setup`.
    """
    setup = Setup(graphdef, optimizer, config, mesh)
    steps = _steps_of(setup)
    dvae_steps = config.optimizer.get("dvae_steps", 0)
    if not dvae_steps:
        return steps
    frozen = _steps_of(setup._replace(frozen=True))
    return steps._replace(frozen=frozen, dvae_steps=dvae_steps)


def _steps_of(setup: Setup) -> Steps:
    config, mesh = setup.config, setup.mesh
    given = Given.of(config)
    whole = None if mesh is None else replicated(mesh)
    kind = model_class(config.model.name)
    return Steps(
        # The old state is given up for the new one: half the memory.
        train=bind(functools.partial(train, setup), given, donate_argnums=1),
        observe=None
        if build_plateau(config.optimizer) is None
        else jax.jit(functools.partial(observe, config), out_shardings=whole),
        examine=bind(functools.partial(examine, setup), given, out_shardings=whole),
        checks=nonfinite.checks(_looked_at(config), kind.stages),
    )


def train(
    setup: Setup, given: Given, state: TrainState, batch: Batch
) -> tuple[TrainState, metrics.Collection]:
    """Makes one update; a step that is not finite is skipped, see nonfinite.py."""
    config = setup.config
    kind = model_class(config.model.name)
    gradient, losses, logged = examine(setup, given, state, batch)
    names = annealing.names(config)
    last = {name: logged.pop(name) for name in names}
    updates, opt_state = setup.optimizer.update(
        gradient, state.opt_state, state.params, num_steps=given.num_steps
    )
    if build_plateau(config.optimizer) is not None:
        scale = state.plateau.scale
        updates = jax.tree.map(lambda leaf: scale * leaf, updates)
    if setup.frozen:
        # Not even what Adam remembers of earlier gradients.
        still = jax.tree.map(jnp.zeros_like, updates[DVAE])  # pyright: ignore
        updates = dict(updates) | {DVAE: still}  # pyright: ignore
    params = optax.apply_updates(state.params, updates)
    # A stage that this model does not have is a gradient of zero.
    split = config.sharding == "fsdp"
    stages = [gradient.get(stage, jnp.zeros(1)) for stage in kind.stages]
    norms = [max_norm(stage, split) for stage in stages]
    logged |= {
        "grad_norm_l2": l2_norm(gradient, split),
        "grad_norm_inf": jnp.max(jnp.stack(norms)),
    }
    decay = config.optimizer.ema_decay
    after = state._replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=optax.incremental_update(averaged(params), state.ema, 1 - decay)
        if decay
        else state.ema,
    )
    looked_at = [losses[name] for name in _looked_at(config)] + norms[::-1]
    finite = jnp.isfinite(jnp.stack(looked_at))
    after, good = nonfinite.unless_skipped(config.nonfinite, finite, state, after)
    logged = {**losses, **logged}
    collection = _train_metrics(tuple(logged), names)
    # With an axis, because a mask needs one.
    means = {name: value[None] for name, value in logged.items()}
    return placed(after, setup.mesh, config.sharding), (
        collection.single_from_model_output(**means, **last, mask=good[None])
    )


def observe(config: Config, plateau: PyTree, loss: Float[Array, ""]) -> PyTree:
    """Tells what lowers the rates of a validation loss; returns its new state."""
    rule = build_plateau(config.optimizer)
    assert rule is not None
    return rule.update({}, plateau, value=loss)[1]


def examine(
    setup: Setup, given: Given, state: TrainState, batch: Batch
) -> tuple[PyTree, dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the gradient, the losses and penalties, and what else is logged."""
    config = setup.config
    keys = (
        purpose_key(given.seed, Purpose.TRAIN, state.step),
        purpose_key(given.seed, Purpose.PENALTY, state.step)
        if penalties.COUPLING in penalties.weights(config)
        else None,
    )
    changing = annealing.annealed(config, state.step)
    values: dict[str, Any] = changing | ({"frozen": True} if setup.frozen else {})
    gradient, losses, logged = in_parts(
        lambda part, keys: gradient_of(setup, state.params, part, keys, values),
        batch,
        keys,
        config.accumulate,
    )
    logged |= changing
    return placed(gradient, setup.mesh, config.sharding), losses, logged


def gradient_of(
    setup: Setup, params: PyTree, batch: Batch, keys: tuple, values: dict[str, Any]
) -> tuple[PyTree, dict[str, jax.Array], dict[str, jax.Array]]:
    """Differentiates the model on one part of a batch.

    Args:
      setup: of the run.
      params: of the model.
      batch: the part.
      keys: of the model's noise and of the coupling penalty.
      values: what the model is called with that changes with the step.

    Returns:
      The gradient of losses plus weighed penalties; the losses, their sum "loss" and
      the penalties; what else is logged. All are means over examples.
    """
    key, coupling_key = keys
    weights = penalties.weights(setup.config)
    model = nnx.merge(setup.graphdef, params)

    def loss_of(params, probe):
        # Gathered here, so that the gradient is whole too until it is placed.
        whole = gathered(params, setup.mesh, setup.config.sharding)
        output = nnx.merge(setup.graphdef, whole)(
            batch | {"image": as_float(seen(batch))},
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
        return minimised, ({"loss": loss, **losses, **added}, output.stats)

    # The probe's gradient is what the backward solve did, if there is one.
    probe = model.backward_probe(len(seen(batch)))
    with batch_over(setup.mesh):
        (gradient, backward), (losses, stats) = jax.grad(
            loss_of, argnums=(0, 1), has_aux=True
        )(params, probe)
    stops = model.slot_attention.solver.stops
    return gradient, losses, forward_stats(stats, stops) | backward_stats(backward)


def forward_stats(stats: Any, stops: bool) -> dict[str, jax.Array]:
    """Returns what is logged of the forward solver; `stops`: it may stop early."""
    logged = {"forward_residual": stats.residual.mean()}
    if stops:
        logged |= {
            f"forward_{name}": getattr(stats, name).astype(jnp.float32).mean()
            for name in ("steps", "converged", "stagnated", "diverged")
        }
    return logged


def backward_stats(backward: Any) -> dict[str, jax.Array]:
    """Returns what is logged of the backward solve, where there is one."""
    if backward is None:
        return {}
    return {f"backward_{name}": x.mean() for name, x in backward._asdict().items()}


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


def _looked_at(config: Config) -> tuple[str, ...]:
    """Losses and penalties that must be finite.

    The losses first: where one is not finite, it says more than a penalty.
    """
    losses = model_class(config.model.name).losses
    return (*losses, *map(penalties.logged, penalties.weights(config)))


@functools.cache
def _train_metrics(
    names: tuple[str, ...], last: tuple[str, ...]
) -> type[metrics.Collection]:
    """Means over the steps since the last logged one that were not skipped."""
    means = {name: metrics.Average.from_output(name) for name in names}
    return metrics.Collection.create(**means, **{name: _last(name) for name in last})


def _last(name: str) -> type[metrics.Metric]:
    """What a value was in the last step, whether or not that was skipped."""

    @flax.struct.dataclass
    class Last(metrics.LastValue):
        # Any: JAX rebuilds a pytree of whatever it is mapped to, not only of arrays.
        total: Any
        count: Any

        @classmethod
        def from_model_output(  # pyright: ignore[reportIncompatibleMethodOverride]
            cls, **values: jax.Array
        ) -> "Last":
            return cls(values[name], jnp.int32(1))

    return Last
