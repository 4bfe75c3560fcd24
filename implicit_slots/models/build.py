"""From a configuration's `model` section to a model: the one name → class table."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from clu import parameter_overview
from flax import nnx
from jaxtyping import PyTree

from implicit_slots.fixed_point import (
    GMRES,
    Adaptive,
    Adjoint,
    Anderson,
    BiCGSTAB,
    Broyden,
    Dense,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Solver,
    Truncated,
    Unrolled,
)
from implicit_slots.models.autoencoder import Autoencoder
from implicit_slots.models.feature_slots import FeatureSlots
from implicit_slots.models.layers import set_precision
from implicit_slots.models.set_prediction import SetPredictor
from implicit_slots.models.slate import SLATE
from implicit_slots.models.slot_attention import SlotAttention
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import InvalidValue

MODELS: Mapping[str, type[SLATE | Autoencoder | SetPredictor | FeatureSlots]] = {
    "slate": SLATE,
    "autoencoder": Autoencoder,
    "set_prediction": SetPredictor,
    "feature_slots": FeatureSlots,
}

SOLVERS = {"picard": Picard, "anderson": Anderson, "broyden": Broyden}
LINEAR_SOLVERS = SOLVERS | {"gmres": GMRES, "bicgstab": BiCGSTAB, "dense": Dense}
ADJOINTS = {
    "unrolled": Unrolled,
    "truncated": Truncated,
    "neumann": Neumann,
    "phantom": Phantom,
    "adaptive": Adaptive,
    "implicit": Implicit,
}

# What a section calls the arguments of `SlotAttention`, beside those of the model.
_CALLED = {"mlp_size": "slot_mlp_size", "num_heads": "slot_heads"}


def defaults(name: str) -> dict[str, Any]:
    """Returns a model's and its slot attention's arguments and their defaults.

    By the keys of a `model` section, without resolution and random numbers. `solver`
    and `adjoint` are objects.

    Args:
      name: of `MODELS`.
    """
    found = {}
    for key, value in _arguments(model_class(name)).items():
        if key == "slots":  # the class, or a partial application of it
            changed = getattr(value, "keywords", {})
            of_slots = _arguments(SlotAttention) | changed
            found |= {_CALLED.get(key, key): value for key, value in of_slots.items()}
        else:
            found[key] = value
    return found


def _arguments(kind: type) -> dict[str, Any]:
    parameters = inspect.signature(kind.__init__).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    found.pop("key_size", None)  # A model knows it.
    return found


def build_model(
    config: Config, *, resolution: int, seed: Any, precision: str = "float32"
) -> Any:
    """Builds the model of a configuration's `model` section.

    Args:
      config: the section; its `solver` and `adjoint` become objects, `name` picks the
        class, and everything else goes as it stands to the constructor or, if it is
        one of its arguments, to that of `SlotAttention`.
      resolution: image side in pixels.
      seed: of the initial parameters: an integer, which may be traced.
      precision: see `layers.set_precision`; the slot attention step is left out.

    Returns:
      An object of one of the classes of `MODELS`.

    Raises:
      ValueError: if a name or a value is not one of the possible ones.
    """
    arguments: dict[str, Any] = config.to_dict()
    kind = model_class(arguments.pop("name"))
    arguments["solver"] = build_solver(arguments["solver"])
    arguments["adjoint"] = build_adjoint(arguments["adjoint"])
    of_slots = {name: _CALLED.get(name, name) for name in _arguments(SlotAttention)}
    slots = {n: arguments.pop(key) for n, key in of_slots.items() if key in arguments}
    model = kind(
        resolution,
        **arguments,
        slots=functools.partial(_arguments(kind)["slots"], **slots),
        rngs=nnx.Rngs(params=jax.random.key(seed)),
    )
    set_precision(model, precision)
    # Tolerances ask for digits that bfloat16 has not, and this is 2 % of the work.
    set_precision(model.slot_attention.step, "float32")
    return model


def build(config: Config, seed: jax.typing.ArrayLike | None = None) -> Any:
    """Builds the model of a whole configuration.

    Args:
      config: the whole configuration.
      seed: of the parameters, where it is not to be a constant of a program; the
        configuration's if not given.

    Raises:
      ValueError: if a name or a value is not one of the possible ones.
    """
    return build_model(
        config.model,
        resolution=config.data.resolution,
        seed=config.seed if seed is None else seed,
        precision=config.precision,
    )


def model_class(name: str) -> Any:
    """Returns the class of a model.

    Raises:
      ValueError: if there is no such model.
    """
    return _pick(MODELS, "model.name", name)


def build_solver(section: dict[str, Any]) -> Solver:
    """Builds a forward solver from {name, …}, reading the keys that it knows."""
    return _build(SOLVERS, "model.solver", section)


def build_adjoint(section: dict[str, Any]) -> Adjoint:
    """Builds a backward pass from {name, …}, reading the keys that it knows.

    The section's own `solver`, of the linear system, is built for `implicit` alone.
    """
    if section["name"] == "implicit":
        solver = _build(LINEAR_SOLVERS, "model.adjoint.solver", section["solver"])
        section = section | {"solver": solver}
    return _build(ADJOINTS, "model.adjoint", section)


def _build(table: Mapping[str, Any], where: str, section: dict[str, Any]) -> Any:
    kind = _pick(table, f"{where}.name", section["name"])
    keys = [field.name for field in dataclasses.fields(kind)]
    try:
        return kind(**{key: section[key] for key in keys if key in section})
    except ValueError as error:
        raise InvalidValue(f"config.{where}: {error}") from error


def _pick(table: Mapping[str, Any], what: str, name: str) -> Any:
    if name not in table:
        raise InvalidValue(
            f"{what} must be one of {', '.join(sorted(table))}, got {name!r}"
        )
    return table[name]


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Returns a model's structure and its parameters as a plain nested dictionary.

    A plain dictionary goes through jax.jit's fast path; `nnx.merge` takes it back.
    """
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def count_parameters(params: PyTree) -> int:
    """Returns the number of scalars in `params`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def overview(params: dict) -> str:
    """Returns a line on the parameters of each part."""
    parts = ", ".join(f"{k} {count_parameters(v):,}" for k, v in params.items())
    return f"{count_parameters(params):,} parameters: {parts}"


def table_of_parameters(params: dict) -> str:
    """Returns a line on every array: name, shape, type, size and sharding."""
    return parameter_overview.get_parameter_overview(params, include_stats="sharding")
