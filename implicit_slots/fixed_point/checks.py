"""What solvers and adjoints are made with: plain Python numbers in their ranges."""

import math
import numbers
from typing import Any


def whole(name: str, value: Any, least: int = 1) -> int:
    """Returns a whole number as a plain int.

    Raises:
      ValueError: naming it, if it is none, or too small. True and 5.0 are none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_count(owner: Any, name: str, least: int = 1) -> None:
    """Makes a frozen dataclass's field a plain int.

    Raises:
      ValueError: see `whole`.
    """
    object.__setattr__(owner, name, whole(name, getattr(owner, name), least))


def check_numbers(owner: Any, *names: str) -> None:
    """Makes a frozen dataclass's fields plain floats: NumPy's have dtypes.

    Raises:
      ValueError: naming it, if one is no finite real number.
    """
    for name in names:
        value = getattr(owner, name)
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (real and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        object.__setattr__(owner, name, float(value))


def check_tolerances(owner: Any) -> None:
    """Holds the fields `rtol` and `atol` to what tolerances can be.

    Raises:
      ValueError: naming them.
    """
    check_numbers(owner, "rtol", "atol")
    if min(owner.rtol, owner.atol) < 0:
        raise ValueError(
            f"tolerances must not be negative, got rtol={owner.rtol}, atol={owner.atol}"
        )


def check_damping(owner: Any) -> None:
    """Holds the field `damping` to (0, 1].

    Raises:
      ValueError: naming it.
    """
    check_numbers(owner, "damping")
    if not 0 < owner.damping <= 1:
        raise ValueError(f"damping must be in (0, 1], got {owner.damping}")


def check_positive(owner: Any, name: str) -> None:
    """Holds a field to positive numbers.

    Raises:
      ValueError: naming it.
    """
    check_numbers(owner, name)
    if not getattr(owner, name) > 0:
        raise ValueError(f"{name} must be positive, got {getattr(owner, name)}")
