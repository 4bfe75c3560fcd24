"""The signals that tell a run to stop."""

import os
import signal
import sys

# Ctrl-C, a scheduler's and a terminal's end, what Slurm, LSF, SGE and PBS send before a
# time limit, and Windows' Ctrl-Break. A system may lack some.
_NAMES = "SIGTERM SIGINT SIGHUP SIGUSR1 SIGUSR2 SIGXCPU SIGBREAK".split()


def stopping() -> list[signal.Signals]:
    """Returns those that this process takes.

    What it was started to ignore it goes on to ignore: SIGHUP after nohup, Ctrl-C in
    the background of a script.
    """
    found = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [n for n in found if signal.getsignal(n) is not signal.SIG_IGN]


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
