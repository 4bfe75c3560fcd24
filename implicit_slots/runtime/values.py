"""What a configuration's keys may hold: kinds of values, and what is said of others."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from implicit_slots.runtime.errors import InvalidValue
from implicit_slots.runtime.files import expand

# What JAX's 32-bit integers hold.
MOST = 2**31 - 1
# Its 32-bit numbers end there.
LARGEST = 3e38


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int = MOST

    def fault(self, value: Any) -> str:
        """Returns what a value must be and is not, or nothing."""
        if not isinstance(value, int) or isinstance(value, bool):
            return "must be a whole number"
        if value < self.low:
            return (
                f"must be at least {self.low}" if self.low else "must not be negative"
            )
        return f"must be at most {self.high:,}" if value > self.high else ""


@dataclasses.dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, of which those in `closed` are included.

    Without an upper end it is from 0; infinity is one if that end is closed.
    """

    low: float = 0.0
    high: float = math.inf
    closed: str = "["  # or "]", "[]", ""

    def fault(self, value: Any) -> str:
        """Returns what a value must be and is not, or nothing."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return "must be a number"
        if isinstance(value, int) and abs(value) > MOST:
            return "must have a decimal point if it is so large"
        if LARGEST < abs(value) < math.inf:
            return f"must be at most {LARGEST:g}"
        if math.isnan(value):
            return "must be a number"
        above = value > self.high or (value == self.high and "]" not in self.closed)
        below = value < self.low or (value == self.low and "[" not in self.closed)
        if not (above or below):
            return ""
        if self.high < math.inf:
            left = "[" if "[" in self.closed else "("
            right = "]" if "]" in self.closed else ")"
            return f"must be in {left}{self.low:g}, {self.high:g}{right}"
        if above:
            return "must be finite"
        return "must not be negative" if "[" in self.closed else "must be positive"


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or False."""

    def fault(self, value: Any) -> str:
        """Returns what a value must be and is not, or nothing."""
        return "" if isinstance(value, bool) else "must be True or False"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of some names."""

    names: tuple[str, ...]

    def fault(self, value: Any) -> str:
        """Returns what a value must be and is not, or nothing."""
        known = isinstance(value, str) and value in self.names
        return "" if known else f"must be one of {', '.join(self.names)}"


@dataclasses.dataclass(frozen=True)
class Several:
    """None, one or several of some names, with commas between."""

    names: tuple[str, ...]

    def fault(self, value: Any) -> str:
        """Returns what a value must be and is not, or nothing."""
        if isinstance(value, str) and set(value.split(",")) <= {"", *self.names}:
            return ""
        return f"must be some of {', '.join(self.names)}, with commas between, or empty"


@dataclasses.dataclass(frozen=True)
class Text:
    """Text, which whoever reads it looks at; `Name` and `Place` say more."""

    def fault(self, value: Any) -> str:
        """Returns what a value must be and is not, or nothing."""
        return "" if isinstance(value, str) else "must be text"


@dataclasses.dataclass(frozen=True)
class Name:
    """Text that is a folder's name."""

    def fault(self, value: Any) -> str:
        """Returns what a value must be and is not, or nothing."""
        if not isinstance(value, str):
            return "must be text"
        named = value.strip() not in ("", ".", "..", "None") and value.isprintable()
        return (
            "" if named and not set(value) & set("/\\") else "must be a folder's name"
        )


@dataclasses.dataclass(frozen=True)
class Place:
    """A path of a file or folder, or nothing."""

    def fault(self, value: Any) -> str:
        """Returns what a value must be and is not, or nothing."""
        if not isinstance(value, str) or not (value.isprintable() or not value):
            return "must be a path, or empty for none"
        if value.lower() in ("none", "null"):  # As the command line gives None.
            return "must be a path, or empty for none: leave out what follows the ="
        try:
            expand(value)
        except InvalidValue as error:
            return f"cannot be found: {error}".replace(f"cannot be found: {value} ", "")
        return ""


@dataclasses.dataclass(frozen=True)
class Wholes:
    """One or more whole numbers from `low`."""

    low: int
    high: int = MOST

    def fault(self, value: Any) -> str:
        """Returns what a value must be and is not, or nothing."""
        one = Whole(self.low, self.high)
        if isinstance(value, list | tuple) and value and not any(map(one.fault, value)):
            return ""
        return f"must be whole numbers from {self.low}, at least one, as in (2, 1)"


Kind = Whole | Number | Flag | OneOf | Several | Text | Name | Place | Wholes


def check_values(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Refuses values that their keys cannot hold; other keys may hold anything.

    Args:
      values: by key with dots, below `config`.
      kinds: of the same keys.

    Raises:
      InvalidValue: naming the first such key.
    """
    for key, value in values.items():
        if (above := key.rpartition(".")[0]) in kinds:  # A section in a value's place.
            key, value = above, {key.removeprefix(f"{above}."): value}
        if key in kinds and (fault := kinds[key].fault(value)):
            raise InvalidValue(f"config.{key} {fault}, got {value!r}")
