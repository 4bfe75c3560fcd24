"""Keeps lines of XLA's that are known to be wrong off the terminal."""

import os
import pathlib
import shutil
import subprocess
import sys
from importlib import metadata

# Printed twice for each program that is found in the compilation cache, on machines
# with AVX-512: two hints to the compiler are taken for features that the machine lacks
# (jax#38445). The program is right, and JAX 0.12 prints nothing.
LINES = (
    r"cpu_aot_loader\.cc:[0-9]+\] Loading XLA:CPU AOT result\. "
    r"Target machine feature \+prefer-no-(gather|scatter) is not"
)
RIGHT_SINCE = (0, 12)

_filter: subprocess.Popen | None = None


def leave_out() -> None:
    """Leaves the lines out of what C++ code writes to standard error from now on.

    Everything else appears as before, a crash's last words too: the filter is a process
    of its own (`grep`) and outlives this one. What Python writes does not pass it.
    Nothing happens where the lines are not printed.
    """
    global _filter
    grep = shutil.which("grep")
    if grep is None or _filter is not None or not _are_printed():
        return
    terminal = os.dup(2)
    reader, writer = os.pipe()
    _filter = subprocess.Popen(
        [grep, "--text", "--line-buffered", "-vE", LINES],
        stdin=reader,
        stdout=terminal,
        env={**os.environ, "LC_ALL": "C"},  # Bytes that are no text pass as they are.
        # Ctrl-C is for this process, whose last words are still to come.
        start_new_session=True,
    )
    sys.stderr = os.fdopen(terminal, "w", buffering=1, errors="backslashreplace")
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)


def _are_printed() -> bool:
    version = metadata.version("jaxlib").split(".")
    if tuple(int(part) for part in version[:2]) >= RIGHT_SINCE:
        return False
    processor = pathlib.Path("/proc/cpuinfo")
    return processor.exists() and "avx512f" in processor.read_text()
