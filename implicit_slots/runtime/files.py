"""Files that are written whole or not at all, locks, and JSON without NaN."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(file: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = file.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps other processes out of the same work on a folder; they wait."""
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        # Some file systems have no locks, and Windows has others.
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def expand(path: str) -> Path:
    """A path that a user gave, with ~ for the home folder if there is one."""
    return Path(os.path.expanduser(path))


def write_json(file: Path, values: Any) -> None:
    """Writes JSON whole or not at all; what is not finite becomes null."""
    write_atomically(file, json.dumps(finite(values), indent=2) + "\n")


def finite(tree: Any) -> Any:
    """Returns a tree of dictionaries and lists with None for what is not finite."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree
