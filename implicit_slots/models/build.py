"""From a configuration's `model` section to a model: the one name → class table."""

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
from implicit_slots.models.layers import set_precision
from implicit_slots.models.set_prediction import SetPredictor
from implicit_slots.models.slate import SLATE
from implicit_slots.runtime.config import Config

MODELS: Mapping[str, type[SLATE | Autoencoder | SetPredictor]] = {
    "slate": SLATE,
    "autoencoder": Autoencoder,
    "set_prediction": SetPredictor,
}

# Which keys of its section each solver and each backward pass reads.
_EVERY_SOLVER = ("max_steps", "rtol", "atol", "damping", "patience")
SOLVERS = {
    "picard": (Picard, _EVERY_SOLVER),
    "anderson": (Anderson, (*_EVERY_SOLVER, "depth", "ridge", "restart")),
    "broyden": (Broyden, (*_EVERY_SOLVER, "memory")),
}
LINEAR_SOLVERS = SOLVERS | {
    "gmres": (GMRES, ("max_steps", "rtol", "atol")),
    "bicgstab": (BiCGSTAB, ("max_steps", "rtol", "atol")),
    "dense": (Dense, ()),
}
ADJOINTS = {
    "unrolled": (Unrolled, ("remat",)),
    "truncated": (Truncated, ("steps", "damping", "remat")),
    "neumann": (Neumann, ("terms",)),
    "phantom": (Phantom, ("steps", "damping")),
    "adaptive": (Adaptive, ("max_terms", "rtol")),
    "implicit": (Implicit, ("solver",)),
}


def build_model(
    config: Config, *, resolution: int, seed: Any, precision: str = "float32"
) -> Any:
    """Builds the model of a configuration's `model` section.

    Args:
      config: the section; its `solver` and `adjoint` become objects, `name` picks the
        class, and everything else goes to the constructor as it stands.
      resolution: image side in pixels.
      seed: of the initial parameters: an integer, which may be traced.
      precision: see `layers.set_precision`.

    Returns:
      An object of one of the classes of `MODELS`.

    Raises:
      ValueError: if a name or a value is not one of the possible ones.
    """
    arguments: dict[str, Any] = config.to_dict()
    kind = model_class(arguments.pop("name"))
    model = kind(
        **arguments
        | {
            "resolution": resolution,
            "solver": build_solver(arguments["solver"]),
            "adjoint": build_adjoint(arguments["adjoint"]),
        },
        rngs=nnx.Rngs(params=jax.random.key(seed)),
    )
    set_precision(model, precision)
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
    kind, keys = _pick(table, f"{where}.name", section["name"])
    try:
        return kind(**{key: section[key] for key in keys})
    except ValueError as error:
        raise ValueError(f"config.{where}: {error}") from error


def _pick(table: Mapping[str, Any], what: str, name: str) -> Any:
    if name not in table:
        raise ValueError(
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
