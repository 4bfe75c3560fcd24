"""What a configuration may add to the loss of any model; none of it by default."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from implicit_slots.models.outputs import Output, attention_entropy
from implicit_slots.runtime.config import Config

SECTION = "penalty"


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
