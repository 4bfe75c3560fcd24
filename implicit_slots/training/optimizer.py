"""The optimiser of SLATE: two Adam groups, warm-up, clipping by the largest entry."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from implicit_slots.config import Config

SCHEDULES = ("constant", "cosine")


def build_optimizer(
    config: Config, params: dict, *, num_steps: int
) -> optax.GradientTransformation:
    """Builds the optimiser of a configuration's `optimizer` section.

    The dVAE's parameters (those below the key "dvae") have a rate of their own and no
    warm-up; the gradient of all parameters together is clipped first.

    Args:
      config: the section; see configs/base.py.
      params: nested dictionary of parameters, whose top-level keys pick the group.
      num_steps: where a cosine schedule ends.

    Raises:
      ValueError: if the schedule has no such name.
    """
    schedule = (config.schedule, num_steps)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "dvae": _adam(_rate(config.dvae_learning_rate, 0, *schedule)),
        "main": _adam(_rate(config.learning_rate, config.warmup_steps, *schedule)),
    }
    labels = {key: "dvae" if key == "dvae" else "main" for key in params}
    return optax.chain(
        clip_by_max_norm(config.clip_max_norm),
        optax.partition(groups, labels),
    )


def clip_by_max_norm(limit: float) -> optax.GradientTransformation:
    """Scales the gradient so that no entry exceeds `limit` in absolute value.

    The scale is limit / (norm + 1e-6) where that is below one, as PyTorch's
    `clip_grad_norm_(…, "inf")`, which official SLATE uses. Optax has no such
    transformation. Infinity switches it off.
    """

    def update(updates, state, params=None):
        scale = jnp.minimum(1.0, limit / (max_norm(updates) + 1e-6))
        return jax.tree.map(lambda leaf: leaf * scale, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def max_norm(tree: PyTree) -> Float[Array, ""]:
    """Returns the largest absolute entry of all leaves: the ∞-norm."""
    return jnp.max(jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(tree)]))


def temperature(config: Config, step: jax.typing.ArrayLike) -> Float[Array, ""]:
    """Gumbel-softmax temperature: a cosine from `start` to `end` over `steps` steps."""
    progress = jnp.minimum(jnp.asarray(step, jnp.float32) / max(config.steps, 1), 1.0)
    share = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return config.end + (config.start - config.end) * share


def _adam(schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adam(schedule, b1=0.9, b2=0.999, eps=1e-8)


def _rate(peak: float, warmup: int, schedule: str, num_steps: int) -> optax.Schedule:
    """Linear warm-up to `peak` over `warmup` steps, then as the schedule says."""
    if schedule not in SCHEDULES:
        raise ValueError(
            f"optimizer.schedule must be one of {', '.join(SCHEDULES)}, got "
            f"{schedule!r}"
        )

    def rate(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        # Official SLATE counts from one: the first update is not lost.
        factor = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        if schedule == "cosine":
            progress = jnp.minimum(step / num_steps, 1.0)
            factor *= 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * factor

    return rate
