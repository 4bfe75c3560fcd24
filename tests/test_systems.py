"""The package imports where a system lacks what Linux has, as Windows and macOS do."""

import subprocess
import sys

import pytest

# Third-party packages are imported before, as this system has them.
PROGRAM = """
import builtins, importlib, os, pathlib, pkgutil, signal, sys, tempfile
from absl import flags
import implicit_slots
PACKAGE = "implicit_slots"
COMMANDS = (f"{PACKAGE}.main", f"{PACKAGE}.data.__main__")  # define flags, once
modules = pkgutil.walk_packages(implicit_slots.__path__, "implicit_slots.")
names = sys.argv[1:] or [module.name for module in modules]
for name in names:
    if name not in COMMANDS:
        importlib.import_module(name)
for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
    del sys.modules[name]
absent = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
original = builtins.__import__
def without(name, globals=None, *rest):
    importer = str((globals or {}).get("__name__", "")).split(".")[0]
    if importer == PACKAGE and name.split(".")[0] in absent:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)
    return original(name, globals, *rest)
builtins.__import__ = without
own = ("fork", "getuid", "geteuid", "getpgid", "sched_getaffinity", "uname")
for name in [n for n in dir(os) if n.startswith("EX_") or n in own]:
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGKILL"):
    delattr(signal, name)
for name in names:
    if name in COMMANDS:  # They define the same flags.
        for flag in list(flags.FLAGS):
            delattr(flags.FLAGS, flag)
    importlib.import_module(name)
from implicit_slots.main import RESUME_ME
from implicit_slots.runtime.signals import stopping
from implicit_slots.runtime.workdir import locked
assert RESUME_ME == 75
assert stopping() == [signal.SIGTERM, signal.SIGINT]
with tempfile.TemporaryDirectory() as folder, locked(pathlib.Path(folder)):
    pass
"""


@pytest.mark.parametrize(
    "modules",
    [
        ["implicit_slots.main", "implicit_slots.data.__main__"],
        pytest.param([], marks=pytest.mark.slow, id="all"),
    ],
)
def test_it_imports_without_what_linux_alone_has(modules):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *modules],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
