"""What a model is called with that changes with the step.

SLATE's temperature, and the noise on learned initial slots where there is some.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from implicit_slots.models.build import model_class
from implicit_slots.runtime.config import Config

NOISE = "initial_noise"


def names(config: Config) -> tuple[str, ...]:
    """Returns what of a run's model changes with the step: sections and arguments.

    Args:
      config: the whole configuration.
    """
    kind = model_class(config.model.name)
    # A codebook draws no tokens.
    own = () if config.model.get("tokenizer") == "patches" else kind.annealed
    noise = config.get(NOISE)
    noisy = noise is not None and max(noise.start, noise.end) > 0
    return (*own, NOISE) if noisy else own


def annealed(config: Config, step: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Returns the arguments of a model's call at a step, by name.

    Args:
      config: the whole configuration, which has a section for each of them.
      step: updates made so far.
    """
    return {name: cosine(config[name], step) for name in names(config)}


def cosine(config: Config, step: jax.typing.ArrayLike) -> Float[Array, ""]:
    """Half a cosine from `start` to `end` over `steps` steps."""
    progress = jnp.minimum(jnp.asarray(step, jnp.float32) / max(config.steps, 1), 1.0)
    share = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return config.end + (config.start - config.end) * share
