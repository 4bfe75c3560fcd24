"""Training runs of a study: what each is, one process for each, none twice.

A run lies in a folder named by its whole configuration, so that studies that ask for
the same run share it, and a study that is started again goes on where it was. Whoever
wants one run alone finds its command in the log beside the folder.
"""

import hashlib
import importlib
import json
import pathlib
import queue
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import numpy as np

from implicit_slots.runtime.children import Children
from implicit_slots.runtime.config import Config, flat
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import write_atomically
from implicit_slots.runtime.signals import RESUME_ME
from implicit_slots.runtime.workdir import (
    ABSENT,
    CONFIG_FILE,
    SUMMARY_FILE,
    read_summary,
)
from implicit_slots.training.nonfinite import REPLAY_FOLDER

OUTCOME_FILE = "outcome.json"
PROBE_FOLDER = "probes"
# Times the cross-entropy of guessing evenly: above it a run counts as diverged.
LOST = 1.5

# What `launch` has started. A batch system tells only the process that it started
# itself to stop.
_children = Children()
passing_on_signals = _children.told_to_stop

# Starts a command, its output going to a file; returns the exit code.
Launch = Callable[[Sequence[str], pathlib.Path, int], int]


class Arm(NamedTuple):
    """One setting that a study compares with others.

    Attributes:
      name: as figures and tables show it.
      config: file of the configuration, with its variant: "configs/scenes.py:smoke".
      changes: keys of the configuration and their values.
      probes: what is measured of the trained run; see probes.py.
    """

    name: str
    config: str
    changes: Mapping[str, Any]
    probes: tuple[str, ...] = ()


class Done(NamedTuple):
    """A run that has ended.

    Attributes:
      arm: the name of what it is a run of.
      seed: of the run; runs of two arms with one seed are a pair.
      workdir: where it lies.
      diverged: why it counts as diverged; empty if it does not.
      probes: what its arm asks to be measured of it.
    """

    arm: str
    seed: int
    workdir: pathlib.Path
    diverged: str
    probes: tuple[str, ...] = ()


def resolve(arm: Arm, seed: int) -> Config:
    """Returns the whole configuration of a run.

    Raises:
      UserError: if a key does not exist.
    """
    file, _, variant = arm.config.partition(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    config: Config = module.get_config(variant or None)
    config.lock()  # No new keys.
    try:
        config.update_from_flattened_dict({**arm.changes, "seed": seed})
    except (KeyError, AttributeError, TypeError) as error:
        what = str(error).strip("'").partition(". Other fields")[0]
        raise UserError(f"{arm.config} has no such key or type: {what}") from error
    return config


def place_of(config: Config, root: pathlib.Path) -> pathlib.Path:
    """Returns the folder of a run: its name, and what its configuration hashes to.

    Keys that older versions lack do not count where they mean what their absence means:
    finished runs stay found when the program gets new ones.
    """
    values = {
        key: value
        for key, value in flat(json.loads(config.to_json())).items()
        if key not in ABSENT or value != ABSENT[key]
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    return root / f"{config.name}-{digest.hexdigest()[:10]}"


def commands(
    arm: Arm, seed: int, workdir: pathlib.Path
) -> dict[pathlib.Path, list[str]]:
    """Returns what makes a run, in order: by the file that it leaves, a command."""
    changes = {**arm.changes, "seed": seed}
    train = [
        *("python", "-m", "implicit_slots.main", f"--config={arm.config}"),
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]
    probe = ["python", "-m", "experiments.studies.probes", f"--workdir={workdir}"]
    return {workdir / SUMMARY_FILE: train} | {
        workdir / PROBE_FOLDER / f"{name}.json": [*probe, f"--probe={name}"]
        for name in arm.probes
    }


def launch(command: Sequence[str], log: pathlib.Path, place: int) -> int:
    """Runs a command in a process of its own, on cores of its own; see `Launch`.

    Args:
      command: begins with "python".
      log: what its output is added to.
      place: which of the runs at a time this is, from 0; −1: it has all cores.
    """
    command = [sys.executable if part == "python" else part for part in command]
    with log.open("a") as file:
        return _children.run(command, place=place, output=file)


def train_all(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    root: pathlib.Path,
    *,
    jobs: int,
    start: Launch = launch,
) -> list[Done]:
    """Makes every run that is not there yet; prints what ends.

    Args:
      arms: what is compared.
      seeds: of the runs of each.
      root: where all runs lie.
      jobs: how many at a time, each on a core of its own if there are several.
      start: how a command is run.

    Returns:
      The runs of all arms and seeds, in this order.

    Raises:
      UserError: if a run failed for another reason than its numbers, or was stopped.
    """
    root.mkdir(parents=True, exist_ok=True)
    plan = [
        (arm, seed, place_of(resolve(arm, seed), root))
        for arm in arms
        for seed in seeds
    ]
    # Two arms may be one configuration, which is run once; their probes may differ. All
    # arms of a seed come before the next seed: there is something to compare early, and
    # runs side by side do not compile the same program.
    by_place: dict[pathlib.Path, dict[pathlib.Path, list[str]]] = {}
    for arm, seed, workdir in sorted(plan, key=lambda one: seeds.index(one[1])):
        by_place.setdefault(workdir, {}).update(commands(arm, seed, workdir))
    todo = {
        workdir: left
        for workdir, wanted in by_place.items()
        if not outcome(workdir)  # Of what diverged there is nothing to probe.
        and (left := {m: c for m, c in wanted.items() if not m.exists()})
    }
    names = {workdir: f"{arm.name}, seed {seed}" for arm, seed, workdir in plan}
    there = len(by_place) - len(todo)
    print(f"{len(by_place)} runs, {there} there already, {jobs} at a time, in {root}")
    free: queue.Queue[int] = queue.Queue()
    for place in range(jobs) if jobs > 1 else (-1,):
        free.put(place)
    began, stop = time.perf_counter(), []

    def make(workdir: pathlib.Path) -> float:
        if stop:
            return 0.0
        place, then = free.get(), time.perf_counter()
        try:
            for marker, command in todo[workdir].items():
                if stop or outcome(workdir):
                    break
                log = workdir.with_name(f"{workdir.name}.log")
                with log.open("a") as file:
                    file.write(f"$ {shlex.join(command)}\n")
                _finish(workdir, marker, log, start(command, log, place))
        except BaseException:
            stop.append(workdir)
            raise
        finally:
            free.put(place)
        return time.perf_counter() - then

    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(make, workdir): workdir for workdir in todo}
        for count, future in enumerate(as_completed(pending), 1):
            workdir, seconds = pending[future], future.result()
            left = (time.perf_counter() - began) / count * (len(todo) - count)
            end = f"{outcome(workdir) or 'finished'} after {seconds:.0f} s"
            text = f"[{count:3}/{len(todo)}] {names[workdir]:<32} {end}"
            print(f"{text}; about {left / 60:.0f} min left", flush=True)
    return [Done(arm.name, seed, w, outcome(w), arm.probes) for arm, seed, w in plan]


def _finish(
    workdir: pathlib.Path, marker: pathlib.Path, log: pathlib.Path, code: int
) -> None:
    """Writes down a divergence; raises `UserError` on what else went wrong."""
    if code == RESUME_ME:
        raise UserError("told to stop; the same command goes on where it was")
    if code == 0 and marker.exists():
        return
    if marker.name == SUMMARY_FILE and (workdir / REPLAY_FOLDER).exists():
        reason = "diverged: steps that are not finite"
        write_atomically(
            workdir / OUTCOME_FILE, json.dumps({"diverged": reason}) + "\n"
        )
        return
    last = log.read_text().strip().splitlines()[-1]
    raise UserError(f"a run ended with exit code {code}: {last}; all of it is in {log}")


def outcome(workdir: pathlib.Path) -> str:
    """Why a run counts as diverged; empty if it does not.

    It does if too many steps in a row were not finite, if its last validation loss is
    not, or if the decoder's cross-entropy is more than `LOST` times that of guessing
    evenly, which an untrained model's is near.
    """
    path = workdir / OUTCOME_FILE
    if path.exists():
        return str(json.loads(path.read_text())["diverged"])
    summary = read_summary(workdir)
    loss = summary.get("validation/loss", 0.0)
    if loss is None or not np.isfinite(loss):
        return "diverged: a loss that is not finite"
    if "validation/cross_entropy" in summary:
        config = json.loads((workdir / CONFIG_FILE).read_text())
        tokens = (config["data"]["resolution"] // 4) ** 2
        guessing = tokens * np.log(config["model"]["vocab_size"])
        if summary["validation/cross_entropy"] > LOST * guessing:
            return "diverged: worse than guessing"
    return ""
