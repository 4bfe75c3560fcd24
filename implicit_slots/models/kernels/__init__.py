"""Kernels in Pallas, for what XLA's compilers would store and need not.

Whoever can use one asks `use`; all have a plain path beside them that is equal. Their
modules are imported where they are called: Pallas takes a third of a second to start.
"""

from implicit_slots.runtime.devices import batch_mesh, platform

# "auto": kernels where they run; "xla": none; "pallas": everywhere, interpreted where
# they do not run, which is slow and for tests.
KERNELS = ("auto", "xla", "pallas")


def use(kernels: str) -> bool:
    """Whether to call the kernels, by one of `KERNELS`."""
    if kernels == "auto":
        return not interpreted() and _there()
    return kernels == "pallas"


def _there() -> bool:
    from implicit_slots.models.kernels.tiles import triton

    return triton is not None


def use_on_tpus(kernels: str, batch: int) -> bool:
    """Whether to call the TPU's: the batch's devices must be known, and divide it.

    Args:
      kernels: one of `KERNELS`.
      batch: examples.
    """
    mesh = batch_mesh()
    return kernels != "xla" and mesh is not None and batch % mesh.size == 0


def interpreted() -> bool:
    """Whether kernels must be interpreted: they are written for NVIDIA's GPUs."""
    return platform() != "gpu"
