"""The optimiser: Adam in groups, schedules, clipping, average of weights."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import platform
from implicit_slots.runtime.values import check_values
from implicit_slots.training.values import KINDS

# The groups of parameters, and the names under which their rates are logged.
MAIN, DVAE, SLOTS, FIXED = "main", "dvae", "slots", "fixed"
LOGGED = {
    MAIN: "learning_rate",
    DVAE: "dvae_learning_rate",
    SLOTS: "slots_learning_rate",
}
# What makes slots of an image, by the top-level keys of the models' parameters.
OF_SLOTS = ("encoder", "encoder_norm", "encoder_mlp", "image_encoder", "slot_attention")
# What no update changes, by the same.
FROZEN = ("vit",)
# (updates made, updates to make) -> a rate, or a factor on it.
Schedule = Callable[[jax.typing.ArrayLike, jax.typing.ArrayLike], Any]
# Optax wants some tolerance; any smaller loss counts as better in official SLATE.
_ANY_IMPROVEMENT = 1e-30


def build_optimizer(
    config: Config, params: dict, *, num_steps: int, split: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimiser of a configuration's `optimizer` section.

    The dVAE's parameters (those below the key "dvae") have a rate of their own and no
    warm-up; encoder and slot attention have one where it is given. The gradient of all
    parameters together is clipped first. "plateau" is a constant rate here; see
    `build_plateau`.

    Args:
      config: the section; see configs/base.py.
      params: nested dictionary of parameters, whose top-level keys pick the group.
      num_steps: where a cosine schedule ends, unless an update is told otherwise:
        `update(…, num_steps=…)` may be a traced number, so that one compiled step
        serves runs of any length.
      split: whether every device has a share of each array; see `max_norm`.

    Raises:
      InvalidValue: if a name or a number is not one of the possible ones.
    """
    check_values({f"optimizer.{key}": config[key] for key in config}, KINDS)
    groups: dict[Hashable, optax.GradientTransformation] = {
        group: _adam(rate, num_steps) for group, rate in schedules(config, params)
    }
    labels = {key: _group(config, params, key) for key in params}
    if FIXED in labels.values():
        groups[FIXED] = optax.set_to_zero()
    return optax.chain(_clipping(config, split), optax.partition(groups, labels))


def _group(config: Config, params: dict, key: str) -> str:
    """The group of a top-level key."""
    if key == DVAE:
        return DVAE if _has_dvae(params) else FIXED
    if key in FROZEN:
        return FIXED
    return SLOTS if key in OF_SLOTS and config.get(LOGGED[SLOTS], 0) else MAIN


def _has_dvae(params: dict) -> bool:
    """Whether there is a dVAE, and no codebook in its place."""
    dvae = params.get(DVAE)
    return dvae is not None and not (isinstance(dvae, dict) and "codes" in dvae)


def schedules(config: Config, params: dict) -> list[tuple[str, Schedule]]:
    """Returns the learning rate of each group of parameters.

    Args:
      config: the section `optimizer`.
      params: nested dictionary of parameters, whose top-level keys pick the group.
    """
    decay = _decay(config)

    def warmed(peak: float) -> Schedule:
        def rate(step, num_steps) -> jax.typing.ArrayLike:
            # Official SLATE counts from one: the first update is not lost.
            warm = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
            return peak * (warm * decay(step, num_steps))

        return rate

    def dvae_rate(step, num_steps) -> jax.typing.ArrayLike:
        return config.dvae_learning_rate * decay(step, num_steps)

    found = [(MAIN, warmed(config.learning_rate))]
    if _has_dvae(params):
        found.append((DVAE, dvae_rate))
    if peak := config.get(LOGGED[SLOTS], 0):
        found.append((SLOTS, warmed(peak)))
    return found


def learning_rates(
    config: Config, params: dict, updates: int, num_steps: int, scale: float = 1.0
) -> dict[str, float]:
    """Returns the rates of an update, by the name under which they are logged.

    Args:
      config: the section `optimizer`.
      params: nested dictionary of parameters, whose top-level keys pick the group.
      updates: made before this one.
      num_steps: where a cosine schedule ends.
      scale: the plateau's.
    """
    return {
        LOGGED[group]: scale * float(rate(updates, num_steps))
        for group, rate in schedules(config, params)
    }


def build_plateau(config: Config) -> optax.GradientTransformationExtraArgs | None:
    """Builds what lowers all rates when the validation loss stagnates, if configured.

    As official SLATE: after `plateau_patience` evaluations in a row that were no better
    than the best one so far, all rates are multiplied by `plateau_factor` and the count
    begins anew. Its state's `scale` is the product of the factors so far.

    Args:
      config: the section `optimizer`.
    """
    if config.schedule != "plateau":
        return None
    return optax.contrib.reduce_on_plateau(
        factor=config.plateau_factor,
        patience=config.plateau_patience,
        rtol=0.0,
        atol=_ANY_IMPROVEMENT,
    )


def clip_by_max_norm(limit: float, split: bool = False) -> optax.GradientTransformation:
    """Scales the gradient so that no entry exceeds `limit` in absolute value.

    The scale is limit / (norm + 1e-6) where that is below one, as PyTorch's
    `clip_grad_norm_(…, "inf")`, which official SLATE uses. Optax has no such
    transformation.
    """

    def update(updates, state, params=None):
        scale = jnp.minimum(1.0, limit / (max_norm(updates, split) + 1e-6))
        return jax.tree.map(lambda leaf: leaf * scale, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def max_norm(tree: PyTree, split: bool = False) -> Float[Array, ""]:
    """Returns the largest absolute entry of all leaves: the ∞-norm.

    Args:
      tree: arrays.
      split: whether every device has a share of each.
    """
    leaves = _few(tree, split)
    return jnp.max(jnp.stack([jnp.abs(leaf).max() for leaf in leaves]))


def l2_norm(tree: PyTree, split: bool = False) -> Float[Array, ""]:
    """Returns the root of the sum of all squared entries; see `max_norm`."""
    return optax.tree.norm(_few(tree, split))


def _few(tree: PyTree, split: bool) -> list[jax.Array]:
    """The entries of all leaves, on GPUs in a single array.

    A reduction is a kernel or two there, and there are some hundred leaves; copying
    them is cheaper, but for shares, which the copy would gather.
    """
    leaves = jax.tree.leaves(tree)
    if platform() != "gpu" or split:
        return leaves
    return [jnp.concatenate([leaf.reshape(-1) for leaf in leaves])]


def _adam(rate: Schedule, num_steps: int) -> optax.GradientTransformation:
    scale = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    return optax.chain(scale, _scale_by_rate(rate, num_steps))


def _scale_by_rate(
    rate: Schedule, num_steps: int
) -> optax.GradientTransformationExtraArgs:
    """As `optax.scale_by_learning_rate`, of a schedule whose end comes with an update.

    Its state is Optax's own.
    """

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.int32(0))

    def update(updates, state, params=None, *, num_steps=num_steps, **other):
        del params, other
        factor = -rate(state.count, num_steps)
        updates = jax.tree.map(
            lambda leaf: jnp.asarray(factor, leaf.dtype) * leaf, updates
        )
        count = optax.safe_increment(state.count)
        return updates, optax.ScaleByScheduleState(count=count)

    return optax.GradientTransformationExtraArgs(init, update)


def _clipping(config: Config, split: bool) -> optax.GradientTransformation:
    if config.clip == "none":
        return optax.identity()
    if config.clip == "l2":
        return optax.clip_by_global_norm(config.clip_limit)
    return clip_by_max_norm(config.clip_limit, split)


def _decay(config: Config) -> Schedule:
    """The factor on all rates, by the number of updates made and of those to make."""
    if config.schedule == "cosine":

        def to_zero(step, num_steps) -> jax.typing.ArrayLike:
            progress = jnp.minimum(step / num_steps, 1.0)
            return 0.5 * (1 + jnp.cos(jnp.pi * progress))

        return to_zero
    if config.schedule == "half_life":
        decay = optax.exponential_decay(1.0, config.half_life, 0.5)
    else:
        decay = optax.constant_schedule(1.0)
    return lambda step, num_steps: decay(step)
