"""From a configuration's `model` section to a model: the one name → class table."""

from typing import Any

from flax import nnx

from implicit_slots.config import Config
from implicit_slots.fixed_point import Adjoint, Neumann, Picard, Unrolled
from implicit_slots.models.slate import SLATE

MODELS = {"slate": SLATE}
SOLVERS = {"picard": Picard}
# Which keys of the section each backward pass reads.
ADJOINTS = {"neumann": (Neumann, ("terms",)), "unrolled": (Unrolled, ("remat",))}


def build_model(config: Config, *, resolution: int, seed: int) -> SLATE:
    """Builds the model of a configuration's `model` section.

    Args:
      config: the section; its `solver` and `adjoint` become objects, `name` picks the
        class, and everything else goes to the constructor as it stands.
      resolution: image side in pixels.
      seed: of the initial parameters.

    Raises:
      ValueError: if a name or a value is not one of the possible ones.
    """
    arguments: dict[str, Any] = config.to_dict()
    model = _pick(MODELS, "model.name", arguments.pop("name"))
    return model(
        **arguments
        | {
            "resolution": resolution,
            "solver": build_solver(arguments["solver"]),
            "adjoint": build_adjoint(arguments["adjoint"]),
        },
        rngs=nnx.Rngs(params=seed),
    )


def build_solver(section: dict[str, Any]) -> Picard:
    """Builds a forward solver from {name, …its fields}."""
    fields = dict(section)
    return _pick(SOLVERS, "model.solver.name", fields.pop("name"))(**fields)


def build_adjoint(section: dict[str, Any]) -> Adjoint:
    """Builds a backward pass from {name, …}, reading the keys that it knows."""
    adjoint, keys = _pick(ADJOINTS, "model.adjoint.name", section["name"])
    return adjoint(**{key: section[key] for key in keys})


def _pick(table: dict[str, Any], what: str, name: str) -> Any:
    if name not in table:
        raise ValueError(
            f"{what} must be one of {', '.join(sorted(table))}, got {name!r}"
        )
    return table[name]
