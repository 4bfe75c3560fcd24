"""What a run stood on: the versions of its packages, and its device."""

import platform
from importlib import metadata


def versions() -> dict[str, str]:
    """Returns what the run stood on."""
    import jax

    packages = ("implicit_slots", "jax", "flax", "optax", "orbax-checkpoint")
    found = {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
    return found | {package: version_of(package) for package in packages}


def version_of(package: str) -> str:
    """Returns the version of an installed package; imports nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def sentence() -> str:
    """Says what `--version` does."""
    return (
        f"implicit_slots {version_of('implicit_slots')}, JAX {version_of('jax')}, "
        f"Python {platform.python_version()}"
    )
