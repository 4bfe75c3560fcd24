"""What is the same for every batch that a trained model is measured on."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import PyTree

from implicit_slots.runtime.compiling import Bound, bind
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import gathered, replicated
from implicit_slots.runtime.prng import Given


class Setup(NamedTuple):
    """A model without its parameters, and where it runs.

    Attributes:
      graphdef: the model's structure.
      config: the whole configuration.
      mesh: the devices; None leaves it to JAX where results lie, which is right for
        one.
    """

    graphdef: nnx.GraphDef
    config: Config
    mesh: jax.sharding.Mesh | None

    def model(self, params: PyTree) -> Any:
        """The model with these parameters, whole on every device."""
        whole = gathered(params, self.mesh, self.config.sharding)
        return nnx.merge(self.graphdef, whole)

    def compiled(self, function: Callable[..., Any]) -> Bound:
        """A function of (setup, given, …) as a compiled function of the rest."""
        whole = None if self.mesh is None else replicated(self.mesh)
        own = functools.partial(function, self)
        return bind(own, Given.of(self.config), out_shardings=whole)
