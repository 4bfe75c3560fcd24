"""Files that are written whole or not at all, paths, locks, and JSON without NaN."""

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from implicit_slots.runtime.errors import InvalidValue

# gs://…, s3://…, also as pathlib writes them; C:/… is a folder of Windows.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


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
        with contextlib.suppress(OSError):
            lock_file(file, wait=True)
        yield


def lock_file(file: IO[Any], *, wait: bool) -> None:
    """Keeps other processes from locking an open file, where there are such locks.

    The lock ends with its process. Windows has others, and some network file systems
    have none.

    Raises:
      BlockingIOError: another process has locked it; only if this one is not to wait.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


def expand(path: str | os.PathLike[str]) -> Path:
    """Returns a path that a user gave, with the home folder for ~.

    Raises:
      InvalidValue: it is the address of a bucket, which would become a folder of that
        name, there is no home folder, or its name is not text.
    """
    text = os.fspath(path)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidValue(
            f"the name {os.fsencode(text)!r} is not UTF-8, which Orbax needs: take "
            "another, or another locale than LC_ALL=C"
        )
    if _ADDRESS.match(text):
        raise InvalidValue(
            f"{text} is no folder of this machine: mount the bucket (gcsfuse) and name "
            "the folder it is mounted at, or copy it to and from a local one (gcloud "
            "storage rsync --recursive FROM TO)"
        )
    found = os.path.expanduser(text)
    if found.startswith("~"):
        raise InvalidValue(
            f"there is no home folder for {text}; write the path in full, or ./{text} "
            "for what is called so"
        )
    return Path(found)


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
