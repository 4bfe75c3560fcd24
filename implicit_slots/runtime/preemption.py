"""Being told to stop: the run saves and ends, and the same command goes on."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from implicit_slots.runtime import signals


class Preempted(Exception):
    """The run was told to stop; what it had done is saved.

    Attributes:
      step: the step of the checkpoint that the next start goes on from.
    """

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class Notice:
    """Whether this run was told to stop."""

    def __init__(self):
        self._given = threading.Event()
        self._asked = False
        self._terminals = signals.terminals()

    def give(self, number: int, _: FrameType | None) -> None:
        """Takes the signal; a second Ctrl-C stops at once."""
        if number == signal.SIGINT:
            if self._given.is_set():
                raise KeyboardInterrupt
            print("stopping: saving first, Ctrl-C again stops at once", file=sys.stderr)
        if number == getattr(signal, "SIGHUP", None):
            signals.silence(self._terminals)  # They are gone: writing would fail.
        self._given.set()

    def reached(self, step: int) -> bool:
        """Whether to save and stop at this step, the same answer in every process.

        To be asked once for each step, in order.
        """
        if jax.process_count() == 1:
            return self._given.is_set()
        # JAX stops at the step after the largest that it was asked for: at 1 if the
        # signal came before the loop, whatever step this one begins with.
        early = not self._asked and reached_preemption_sync_point(1)
        self._asked = True
        return early or reached_preemption_sync_point(step)


def pass_on(*_: object) -> None:
    """Turns a signal into the one that JAX's preemption service watches for."""
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def noticed() -> Iterator[Notice]:
    """Within the context what tells a run to stop is noticed and does not kill.

    That is SIGTERM, Ctrl-C, a terminal that closes, and what clusters send before a
    time limit; see signals.py.

    With several processes JAX's own preemption service watches for SIGTERM, on any of
    them, and finds a step that none has begun; the others become a SIGTERM, but Ctrl-C
    then stops at once. Outside the main thread, where Python takes no signals, nothing
    is noticed.
    """
    notice = Notice()
    taken, take = signals.stopping(), notice.give
    if jax.process_count() > 1:
        taken = [n for n in taken if n not in (signal.SIGTERM, signal.SIGINT)]
        take = pass_on
    if threading.current_thread() is not threading.main_thread():
        taken = []
    before = {number: signal.signal(number, take) for number in taken}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
