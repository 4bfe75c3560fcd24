"""Files that are written whole or not at all, and locks between processes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = file.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps other processes from laying out or sealing the same folder meanwhile."""
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        # Some file systems have no locks, and Windows has others.
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def expand(path: str) -> Path:
    """A path that a user gave, with ~ for the home folder if there is one."""
    return Path(os.path.expanduser(path))
