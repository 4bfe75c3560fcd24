"""`--seeds` and `--sweep`: one run after the other, then a page and a table of all.

It imports no JAX: each run has a process, and its devices, of its own.
"""

import itertools
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from implicit_slots.report.comparison import write_comparison, write_table
from implicit_slots.report.evaluation import records
from implicit_slots.runtime.config import Config, flat
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.flags import no_key
from implicit_slots.runtime.signals import RESUME_ME, stopping
from implicit_slots.runtime.workdir import (
    CONFIG_FILE,
    read_summary,
    writing,
)

PAGE_FILE = "report.html"
TABLE_FILE = "runs.csv"
SEED = "seed"
MODULE = ("-m", "implicit_slots.main")


def values_of(
    seeds: str | None, sweeps: Sequence[str], config: Config
) -> dict[str, list[str]]:
    """Returns the values of each key that runs differ in; the seed is the last.

    Args:
      seeds: with commas between.
      sweeps: each [config.]KEY=VALUE,VALUE,…
      config: what they change.

    Raises:
      UserError: one is no such text, or there is no such key.
    """
    known = flat(config.to_dict())
    found: dict[str, list[str]] = {}
    for text in [*sweeps, *([f"{SEED}={seeds}"] if seeds is not None else [])]:
        key, equals, values = text.partition("=")
        key = key.lstrip("-").removeprefix("config.")
        listed = [value.strip() for value in values.split(",")]
        if not equals or "" in listed:
            raise UserError(
                f"{text!r} names no values; write --sweep=config.KEY=1,2,4 and "
                "--seeds=0,1,2"
            )
        if key not in known:
            raise UserError(no_key(key, known))
        if key in found or len(set(listed)) < len(listed):
            raise UserError(f"{text!r} has something twice; leave one out")
        if key == SEED and not all(value.isdecimal() for value in listed):
            raise UserError(f"seeds are whole numbers from 0, got {values!r}")
        found[key] = listed
    return found


def runs_of(values: dict[str, list[str]]) -> dict[str, dict[str, str]]:
    """Returns the changes of each run by the name of its folder, "lr=0.1,seed=0"."""
    last = {key: key.rpartition(".")[2] for key in values}
    short = {
        key: name if list(last.values()).count(name) == 1 else key
        for key, name in last.items()
    }
    rows = itertools.product(*values.values())
    every = [dict(zip(values, row, strict=True)) for row in rows]
    return {
        ",".join(f"{short[k]}={v.replace('/', '_')}" for k, v in run.items()): run
        for run in every
    }


def run(
    values: dict[str, list[str]], workdir: pathlib.Path, arguments: Sequence[str]
) -> int:
    """Trains and evaluates each run that is not done; writes a page and a table.

    Args:
      values: see `values_of`.
      workdir: the folder that the runs' workdirs lie in.
      arguments: what `main` is given for each run, beside its workdir and changes.

    Returns:
      0; 1 if a run failed, the others being done; what a run that was told to stop
      ends with, the same command then going on.

    Raises:
      UserError: the folder holds a run, or cannot be written.
    """
    if (workdir / CONFIG_FILE).exists():
        raise UserError(f"{workdir} holds a run; choose another --workdir for several")
    runs, failed = runs_of(values), []
    for place, (name, changes) in enumerate(runs.items(), start=1):
        command = [
            *arguments,
            f"--workdir={workdir / name}",
            *(f"--config.{key}={value}" for key, value in changes.items()),
        ]
        print(f"run {place} of {len(runs)}: {name}", flush=True)
        # A run that is done says so within seconds, and refuses other settings.
        code = launch(command)
        if code == 0 and not _is_evaluated(workdir / name):
            code = launch([*command, "--mode=evaluate"])
        if code == RESUME_ME:
            print(f"stopped at {name}; the same command goes on", file=sys.stderr)
            return code
        if code:
            failed.append(name)
    workdirs = [workdir / name for name in runs]
    with writing(workdir):
        print(f"table: {write_table(workdirs, list(values), workdir / TABLE_FILE)}")
        print(f"report: {write_comparison(workdirs, workdir / PAGE_FILE)}")
    for name in failed:
        print(f"error: {name} failed; what it said is above", file=sys.stderr)
    return 1 if failed else 0


def _is_evaluated(workdir: pathlib.Path) -> bool:
    """Whether there is an evaluation of what was trained last."""
    step = read_summary(workdir).get("step")
    return any(record["step"] == step for record in records(workdir))


def launch(arguments: Sequence[str]) -> int:
    """Runs `main` in a process of its own, which is told to stop when this one is.

    Returns:
      Its exit code; `RESUME_ME` if it was told to stop.
    """
    command = [sys.executable, *MODULE, *arguments]
    told: list[int] = []
    # Of a group of its own: Ctrl-C in a terminal reaches it through this one, once.
    with subprocess.Popen(command, process_group=0) as child:

        def stop(number: int, _: FrameType | None) -> None:
            told.append(number)
            child.send_signal(number)

        before = {number: signal.signal(number, stop) for number in stopping()}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return RESUME_ME if told else code
