"""A configuration or one of its sections: its type, and its values by key."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

if TYPE_CHECKING:
    # ml_collections types every attribute as the union of all that one could be.
    Config = Any
else:
    Config = ConfigDict


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a section's values by keys with dots, as on the command line.

    Args:
      section: sections are mappings.
      prefix: what each key begins with.

    Raises:
      AttributeError: if it is no mapping.
    """
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
