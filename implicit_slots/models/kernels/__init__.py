"""Kernels in Pallas, for what XLA's compilers would store and need not.

Whoever can use one asks `use`; all have a plain path beside them that is equal.
"""

from implicit_slots.models.kernels.tiles import triton
from implicit_slots.runtime.devices import platform

# "auto": kernels where they run; "xla": none; "pallas": everywhere, interpreted where
# they do not run, which is slow and for tests.
KERNELS = ("auto", "xla", "pallas")


def use(kernels: str) -> bool:
    """Whether to call the kernels, by one of `KERNELS`."""
    run = triton is not None and not interpreted()
    return kernels == "pallas" or (kernels == "auto" and run)


def interpreted() -> bool:
    """Whether kernels must be interpreted: they are written for NVIDIA's GPUs."""
    return platform() != "gpu"
