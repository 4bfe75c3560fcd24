"""Which signals tell a run to stop."""

import os
import signal
import subprocess
import sys

import pytest

from implicit_slots.runtime.preemption import noticed
from implicit_slots.runtime.signals import silence, stopping

SENT = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


@pytest.mark.parametrize("name", SENT)
def test_what_terminals_and_clusters_send_is_noticed(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with noticed() as notice:
        assert not notice.reached(1)
        signal.raise_signal(number)
        assert notice.reached(1)
    assert signal.getsignal(number) is before


def test_what_the_process_was_started_to_ignore_it_ignores():
    """As `nohup` has it."""
    assert signal.SIGHUP in stopping()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stopping()
        with noticed() as notice:
            signal.raise_signal(signal.SIGHUP)
            assert not notice.reached(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_the_loop_they_end_the_command_with_its_code():
    """Nothing can be lost there: `--help` and its like need no handler of JAX's."""
    program = (
        "import os, runpy, signal, sys\n"
        "sys.argv = ['main', '--help']\n"
        "from absl import app\n"
        "app.run = lambda *_, **__: os.kill(os.getpid(), signal.SIGUSR1)\n"
        "runpy.run_module('implicit_slots.main', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 75


def test_what_is_written_to_a_terminal_that_is_gone_goes_nowhere(capfd):
    spare = os.dup(1)
    silence([spare])
    os.write(spare, b"unseen")
    os.close(spare)
    os.write(1, b"seen")
    assert capfd.readouterr().out == "seen"
