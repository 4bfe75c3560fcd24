"""What a configuration may add to the loss of any model; none of it by default."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from implicit_slots.models.outputs import Output
from implicit_slots.runtime.config import Config

SECTION = "penalty"


def attention_entropy(
    attention: Float[Array, "batch slots rows columns"],
) -> Float[Array, " batch"]:
    """Returns the entropy over the slots, mean over positions, in nats.

    From 0, each position one slot's, to log(slots). Unlike `jax.scipy.special.entr` its
    gradient is finite where a share is 0, as sharp masks have them: there entr's is
    infinite, and the softmax multiplies it by 0.
    """
    smallest = jnp.finfo(attention.dtype).tiny
    nats = -attention * jnp.log(jnp.maximum(attention, smallest))
    return nats.sum(axis=1).mean(axis=(1, 2))


def _coupling(output: Output) -> Float[Array, " batch"]:
    assert output.coupling is not None
    return output.coupling


# By the key of the section: what is measured of each example.
PENALTIES: Mapping[str, Callable[[Output], Float[Array, " batch"]]] = {
    "attention_entropy": lambda output: attention_entropy(output.attention),
    "slot_coupling": _coupling,
}
# The one that needs a product with J, which a model makes where it is asked to.
COUPLING = "slot_coupling"
KEYS = tuple(f"{SECTION}.{name}" for name in PENALTIES)


def weights(config: Config) -> dict[str, Any]:
    """Returns the weights that are not 0, by the key of the section.

    Without the section, as older versions wrote configurations, there are none.
    """
    section = config.get(SECTION, {})
    return {name: section[name] for name in PENALTIES if section.get(name)}


def measure(names: Mapping[str, Any], output: Output) -> dict[str, jax.Array]:
    """Returns penalties' means over the batch, not weighed, as they are logged."""
    return {logged(name): PENALTIES[name](output).mean() for name in names}


def logged(name: str) -> str:
    """The name under which a penalty is logged."""
    return f"{SECTION}_{name}"
