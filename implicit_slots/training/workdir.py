"""The files of a run: one process at a time writes them, whole or not at all."""

import contextlib
import errno
import fcntl
import json
import math
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from implicit_slots.data.layout import write_whole
from implicit_slots.training.errors import UserError

LOCK_FILE = ".lock"
SUMMARY_FILE = "summary.json"


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps a second run out of the workdir; the lock ends with its process.

    Raises:
      UserError: if another run holds it.
    """
    with (workdir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another run is writing to {workdir} ({file.read().strip()}); wait "
                "for it, stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def read_summary(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns what an earlier session left in summary.json, or nothing."""
    path = workdir / SUMMARY_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all; what is not finite becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
    write_whole(path, json.dumps(finite, indent=2) + "\n")
