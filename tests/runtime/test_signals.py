"""Which signals tell a run to stop."""

import os
import shlex
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


@pytest.mark.parametrize("closed", [(), (1,), (2,), (0, 1, 2)])
def test_output_is_taken_whatever_a_process_was_started_with(closed, tmp_path):
    """A service may have none, and a terminal only some letters."""
    program = (
        "import os, sys\n"
        "from implicit_slots.runtime.signals import open_streams\n"
        "open_streams()\n"
        "print('±'); print('ρ', file=sys.stderr); sys.stdout.flush()\n"
        "os.fstat(0), os.fstat(1), os.fstat(2)\n"
        "open(sys.argv[1], 'w').write('done')"
    )
    shell = " ".join(f"{number}>&-" for number in closed)
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(
        f"{shlex.join(command)} {shell}",
        shell=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout == (b"" if 1 in closed else b"\\xb1\n")
    assert (tmp_path / "file").read_text() == "done"


def test_what_is_written_to_a_terminal_that_is_gone_goes_nowhere(capfd):
    spare = os.dup(1)
    silence([spare])
    os.write(spare, b"unseen")
    os.close(spare)
    os.write(1, b"seen")
    assert capfd.readouterr().out == "seen"
