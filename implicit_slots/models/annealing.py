"""What a model is called with that changes with the step: SLATE's temperature."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from implicit_slots.models.build import model_class
from implicit_slots.runtime.config import Config


def annealed(config: Config, step: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Returns the arguments of a model's call at a step, by name.

    Args:
      config: the whole configuration, which has a section for each of them.
      step: updates made so far.
    """
    kind = model_class(config.model.name)
    return {name: cosine(config[name], step) for name in kind.annealed}


def cosine(config: Config, step: jax.typing.ArrayLike) -> Float[Array, ""]:
    """Half a cosine from `start` to `end` over `steps` steps."""
    progress = jnp.minimum(jnp.asarray(step, jnp.float32) / max(config.steps, 1), 1.0)
    share = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return config.end + (config.start - config.end) * share
