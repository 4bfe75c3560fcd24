"""What is left out of standard error, and what is not."""

import subprocess
import sys

from implicit_slots.runtime import xla_warnings

ALARM = (
    "E1127 13:40:13.8 1554 cpu_aot_loader.cc:195] Loading XLA:CPU AOT result. Target "
    "machine feature +prefer-no-{} is not  supported on the host machine. Machine type"
)
PROGRAM = """
import os, sys
from implicit_slots.runtime import xla_warnings
xla_warnings._are_printed = lambda: {printed}
xla_warnings.leave_out()
print("of Python", file=sys.stderr)
for line in {lines}:
    os.write(2, line.encode("latin-1") + b"\\n")
os.abort()
"""


def said(lines, printed=True):
    program = PROGRAM.format(lines=lines, printed=printed)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False
    )
    return done.stderr.decode("latin-1").splitlines()


def test_the_lines_are_left_out_and_no_other_even_of_a_crash():
    other = ALARM.format("gather").replace("+prefer-no-gather", "+avx512f")
    lines = [
        ALARM.format("gather"),
        "one",
        ALARM.format("scatter"),
        other,
        "last words",
    ]
    lines.append("\0\xff")  # What is no text passes too.
    want = ["of Python", "one", other, "last words", "\0\xff"]
    assert sorted(said(lines)) == sorted(want)


def test_nothing_happens_where_they_are_not_printed():
    lines = [ALARM.format("gather"), "one"]
    assert said(lines, printed=False) == ["of Python", *lines]


def test_the_versions_that_print_them(monkeypatch):
    for version, printed in (("0.10.1", True), ("0.11.0", True), ("0.12.0.1", False)):
        monkeypatch.setattr(xla_warnings.metadata, "version", lambda _, v=version: v)
        monkeypatch.setattr(xla_warnings.pathlib.Path, "exists", lambda _: True)
        monkeypatch.setattr(
            xla_warnings.pathlib.Path, "read_text", lambda _: "fpu avx512f"
        )
        assert xla_warnings._are_printed() == printed
