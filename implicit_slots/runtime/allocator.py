"""How the C library hands memory out on a CPU."""

import ctypes
import platform
from importlib import metadata

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Makes this process keep the memory that it frees, where the library is glibc.

    XLA asks for all temporary memory of a program at once and frees it at the end. By
    default glibc gives that back to the kernel, so that every train step begins by
    faulting in each page again. Nothing happens elsewhere, nor where JAX has an
    accelerator's plugin.

    Threads keep arenas of their own: with a single one for all (MALLOC_ARENA_MAX=1),
    which can also hold the largest blocks, XLA's compiler threads wait for one
    another, and what they leave behind slows the steps of a small model down by half.
    """
    if platform.libc_ver()[0] != "glibc" or metadata.entry_points(group="jax_plugins"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
