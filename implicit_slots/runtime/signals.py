"""The signals that tell a run to stop, and an output that is gone."""

import io
import os
import signal
import sys

# Ctrl-C, a scheduler's and a terminal's end, what Slurm, LSF, SGE and PBS send before a
# time limit, and Windows' Ctrl-Break. A system may lack some.
_NAMES = "SIGTERM SIGINT SIGHUP SIGUSR1 SIGUSR2 SIGXCPU SIGBREAK".split()

# What a process ends with that was told to stop and goes on when it is started again:
# "temporary failure, try again", of sysexits.h.
RESUME_ME = 75


def stopping() -> list[signal.Signals]:
    """Returns those that this process takes.

    What it was started to ignore it goes on to ignore: SIGHUP after nohup, Ctrl-C in
    the background of a script.
    """
    found = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [n for n in found if signal.getsignal(n) is not signal.SIG_IGN]


def open_streams() -> None:
    """Makes standard output and errors take whatever is printed.

    What a service was started without leads nowhere: Python has None in its place, and
    the next file that is opened would take its number. Letters that a terminal does not
    have are escaped.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor < 2:
        descriptor = os.dup(descriptor)
    if descriptor > 2:
        os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", buffering=1))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def terminals() -> list[int]:
    """Returns the file descriptors of standard output and error that are a terminal."""
    return [
        stream.fileno()
        for stream in (sys.stdout, sys.stderr)
        if stream is not None and stream.isatty()
    ]


def silence(descriptors: list[int]) -> None:
    """Sends what is still to be written nowhere: whoever read it is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
