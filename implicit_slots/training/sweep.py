"""`--seeds` and `--sweep`: several runs, then a page and a table of all.

It imports no JAX: each run has a process, and its devices, of its own.
"""

import itertools
import pathlib
import queue
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from implicit_slots.report.comparison import write_comparison, write_table
from implicit_slots.report.evaluation import records
from implicit_slots.runtime.children import Children, check_jobs
from implicit_slots.runtime.config import Config, flat
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.flags import no_key
from implicit_slots.runtime.signals import RESUME_ME
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
    values: dict[str, list[str]],
    workdir: pathlib.Path,
    arguments: Sequence[str],
    jobs: int = 1,
) -> int:
    """Trains and evaluates each run that is not done; writes a page and a table.

    Args:
      values: see `values_of`.
      workdir: the folder that the runs' workdirs lie in.
      arguments: what `main` is given for each run, beside its workdir and changes.
      jobs: how many at a time; several have a core or GPU each, and their output goes
        to a log beside the workdir.

    Returns:
      0; 1 if a run failed, the others being done; what a run that was told to stop
      ends with, the same command then going on.

    Raises:
      UserError: the folder holds a run, or cannot be written; or so many at a time
        cannot be.
    """
    if (workdir / CONFIG_FILE).exists():
        raise UserError(f"{workdir} holds a run; choose another --workdir for several")
    check_jobs(jobs)
    runs, children = runs_of(values), Children()
    stopped: list[str] = []
    free: queue.Queue[int] = queue.Queue()
    for place in range(jobs) if jobs > 1 else (-1,):
        free.put(place)

    def make(name: str) -> int:
        place = free.get()
        try:
            if stopped:
                return RESUME_ME
            about = f"run {[*runs].index(name) + 1} of {len(runs)}: {name}"
            print(about, flush=True)
            began = time.perf_counter()
            code = _train_and_evaluate(
                children, workdir / name, [*arguments, *_flags(runs[name])], place
            )
            if code == RESUME_ME:
                stopped.append(name)
            elif jobs > 1:
                end = "failed" if code else "done"
                seconds = time.perf_counter() - began
                print(f"{about} {end} after {seconds:.0f} s", flush=True)
            return code
        finally:
            free.put(place)

    try:
        with children.told_to_stop(), ThreadPoolExecutor(jobs) as pool:
            codes = dict(zip(runs, pool.map(make, runs), strict=True))
    except KeyboardInterrupt:  # Between two processes.
        codes = dict.fromkeys(runs, RESUME_ME)
    if RESUME_ME in codes.values():
        where = " and ".join(stopped) or "the end of a run"
        print(f"stopped at {where}; the same command goes on", file=sys.stderr)
        return RESUME_ME
    workdirs = [workdir / name for name in runs]
    with writing(workdir):
        print(f"table: {write_table(workdirs, list(values), workdir / TABLE_FILE)}")
        print(f"report: {write_comparison(workdirs, workdir / PAGE_FILE)}")
    failed = [name for name, code in codes.items() if code]
    for name in failed:
        where = f"in {_log_of(workdir / name)}" if jobs > 1 else "above"
        print(f"error: {name} failed; what it said is {where}", file=sys.stderr)
    return 1 if failed else 0


def _flags(changes: Mapping[str, str]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in changes.items()]


def _log_of(workdir: pathlib.Path) -> pathlib.Path:
    return workdir.with_name(f"{workdir.name}.log")


def _train_and_evaluate(
    children: Children, workdir: pathlib.Path, arguments: Sequence[str], place: int
) -> int:
    """Makes what is missing of a run; returns the exit code of what ended it."""
    command = [*arguments, f"--workdir={workdir}"]
    # A run that is done says so within seconds, and refuses other settings.
    code = launch(children, command, workdir, place)
    if code == 0 and not _is_evaluated(workdir):
        code = launch(children, [*command, "--mode=evaluate"], workdir, place)
    return code


def _is_evaluated(workdir: pathlib.Path) -> bool:
    """Whether there is an evaluation of what was trained last."""
    step = read_summary(workdir).get("step")
    return any(record["step"] == step for record in records(workdir))


def launch(
    children: Children, arguments: Sequence[str], workdir: pathlib.Path, place: int
) -> int:
    """Runs `main` in a process of its own; returns as `Children.run` does.

    Args:
      children: to be told to stop when this process is.
      arguments: of `main`.
      workdir: of the run.
      place: among those at a time, whose output goes to a log; −1: it is alone.
    """
    command = [sys.executable, *MODULE, *arguments]
    if place < 0:
        return children.run(command)
    with writing(workdir.parent):
        workdir.parent.mkdir(parents=True, exist_ok=True)
        log = _log_of(workdir).open("a")
    with log:
        return children.run(command, place=place, output=log)
