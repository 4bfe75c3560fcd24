"""The type of a configuration or of one of its sections."""

from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

if TYPE_CHECKING:
    # ml_collections types every attribute as the union of all that one could be.
    Config = Any
else:
    Config = ConfigDict
