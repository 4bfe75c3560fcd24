"""What a run stood on: the versions of its packages, and its device."""

import platform
from importlib import metadata

import jax


def versions() -> dict[str, str]:
    """Returns what the run stood on."""
    packages = ("implicit_slots", "jax", "flax", "optax", "orbax-checkpoint")
    found = {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
