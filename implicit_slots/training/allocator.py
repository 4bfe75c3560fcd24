"""How the C library hands memory out on a CPU."""

import ctypes
import platform
from importlib import metadata

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_freed_memory() -> None:
    """Makes this process keep the memory that it frees, where the library is glibc.

    XLA asks for all temporary memory of a program at once and frees it at the end. By
    default glibc gives that back to the kernel, so that every train step begins by
    faulting in each page again: hundreds of megabytes, a sixth of the step's time. To
    be called before JAX starts its threads, which settle on arenas of their own.
    Nothing happens elsewhere, nor where JAX has an accelerator's plugin.
    """
    if platform.libc_ver()[0] != "glibc" or metadata.entry_points(group="jax_plugins"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Threads' own arenas cannot hold blocks of this size and would map them.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
