"""Processes that this one starts: each on its core or GPU, and stopped with it."""

import contextlib
import os
import pathlib
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.signals import RESUME_ME, stopping

GPUS = pathlib.Path("/proc/driver/nvidia/gpus")


class Children:
    """Starts commands, from several threads if need be, and tells them to stop.

    They are of groups of their own: Ctrl-C in a terminal reaches them through this
    process, once.
    """

    def __init__(self) -> None:
        self._running: list[subprocess.Popen] = []
        self._starting = threading.RLock()  # Held meanwhile, so that none is missed.
        self._starts = False
        self._told = threading.Event()

    def run(
        self,
        command: Sequence[str],
        *,
        place: int = -1,
        output: IO[str] | None = None,
    ) -> int:
        """Runs a command and waits for it.

        Args:
          command: the program and its arguments.
          place: which of those at a time this is, from 0: it has one core, or one GPU,
            to itself. −1: it has all of them.
          output: where it writes to; where this process does if not given.

        Returns:
          Its exit code; `RESUME_ME` if it was told to stop, or was not started because
          others were.
        """
        gpus = visible_gpus() if place >= 0 else []
        environment = dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
        with self._starting:
            if self._told.is_set():
                return RESUME_ME
            self._starts = True
            child = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, process_group=0
            )
            self._running.append(child)
            self._starts = False
            if self._told.is_set():  # In this thread, while the child was started.
                child.terminate()
            if place >= 0 and not gpus:
                _keep_to_one_core(child.pid, place)
        code = child.wait()
        self._running.remove(child)
        return RESUME_ME if self._told.is_set() else code

    @contextlib.contextmanager
    def told_to_stop(self) -> Iterator[None]:
        """Passes on what tells this process to stop, meanwhile; the main thread's.

        Where nothing runs, the process ends as one that was interrupted.
        """

        def stop(number: int, _: FrameType | None) -> None:
            self._told.set()
            with self._starting:
                running = tuple(self._running)
            for child in running:
                child.send_signal(number)
            if not running and not self._starts:
                raise KeyboardInterrupt

        before = {number: signal.signal(number, stop) for number in stopping()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._told.clear()


def visible_gpus() -> list[str]:
    """Returns the names of the GPUs that CUDA gives this process; none for CPUs."""
    if os.environ.get("JAX_PLATFORMS", "cuda") not in ("cuda", "gpu", "cuda,cpu"):
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name and name != "-1"]
    found = len(list(GPUS.iterdir())) if GPUS.is_dir() else 0
    return [str(number) for number in range(found)]


def check_jobs(jobs: int) -> None:
    """Refuses more processes at a time than there are GPUs, whose memory each takes.

    Raises:
      UserError: there are too many, or none.
    """
    gpus = len(visible_gpus())
    if jobs < 1 or (gpus and jobs > gpus):
        most = f"1 to {gpus}, one on each GPU" if gpus else "at least 1"
        raise UserError(f"--jobs must be {most}, got {jobs}")


def _keep_to_one_core(process: int, place: int) -> None:
    """Leaves one of this process's cores to another; where the system can, on Linux."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # It may have ended already.
        os.sched_setaffinity(process, {cores[place % len(cores)]})
