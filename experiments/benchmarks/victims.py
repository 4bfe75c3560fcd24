"""Runs that are started to be killed: in processes of their own, watched, compared."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from implicit_slots.runtime.workdir import METRICS_FILE, SUMMARY_FILE
from implicit_slots.training.checkpoint import (
    BEST_FOLDER,
    CHECKPOINT_FOLDER,
    DAMAGED_FOLDER,
)

STEPS = 160
KEPT = 3  # checkpoints
# None divides another, so that a resumed run begins within a window of the log.
INTERVALS = {"log": 7, "checkpoint": 15, "validate": 40, "draw": 50}
# The exit code of a run that was told to stop: the same command goes on.
RESUME_ME = os.EX_TEMPFAIL
UNFINISHED = "orbax-checkpoint-tmp"
# They tell how long the run took, and where it lay.
TIMES = ("steps_per_second", "data_wait")
CIRCUMSTANCES = ("command", "wall_seconds", "versions")

STARTING, STEPPING, SAVING, ENDING = (
    "start-up",
    "stepping",
    "inside a checkpoint",
    "finishing",
)


def command(workdir: Path) -> list[str]:
    """The command of a run that takes seconds, and of its next start."""
    intervals = [f"--config.{name}_every={n}" for name, n in INTERVALS.items()]
    return [
        *(sys.executable, "-m", "implicit_slots.main"),
        *("--config=configs/scenes.py:smoke", f"--config.num_steps={STEPS}"),
        *(f"--config.keep_checkpoints={KEPT}", "--config.data.cache=", *intervals),
        f"--workdir={workdir}",
    ]


@dataclass(frozen=True)
class Ended:
    """How a start ended.

    Attributes:
      code: of the process; negative: the signal that killed it.
      said: what it printed.
      errors: what it printed to standard error.
    """

    code: int
    said: str
    errors: str

    @property
    def resumed(self) -> int:
        """The step of the checkpoint that it went on from; 0 for none."""
        found = re.search(r"^resumed .* at step (\d+)$", self.said, re.MULTILINE)
        return int(found[1]) if found else 0

    @property
    def saved(self) -> int | None:
        """The step that it says it saved when it was told to stop."""
        found = re.search(r"^told to stop: saved at step (\d+);", self.errors, re.M)
        return int(found[1]) if found else None

    @property
    def refused(self) -> bool:
        """Whether it ended as it should on what the user can put right."""
        return self.code == 1 and is_sentence(self.errors)

    @property
    def traceback(self) -> list[str]:
        """Names it if there is a traceback in standard error."""
        return ["a traceback"] if "Traceback" in self.errors else []

    @property
    def sentence(self) -> str:
        """What it says is wrong, or else its last line, with short names of files."""
        lines = self.errors.strip().splitlines() or ["nothing said"]
        last = next((line for line in lines if line.startswith("error: ")), lines[-1])
        # Temporary folders have another name each time.
        return re.sub(r"(?<![\w…])/(\S+/)+", "…/", last)

    def __str__(self) -> str:
        count = len(self.errors.strip().splitlines())
        return f"exit code {self.code}, {count} lines: {self.sentence[:300]}"


def is_sentence(errors: str) -> bool:
    """Whether standard error holds one line that says what is wrong, and no more."""
    return len(errors.strip().splitlines()) == 1 and errors.startswith("error: ")


class Victim:
    """One start of a run.

    Args:
      workdir: of the run.
      label: of the files that hold what it prints, `workdir`.`label`.out and .err.
      logs: the folder of those; beside the workdir unless told otherwise.
    """

    def __init__(self, workdir: Path, label: str = "0", logs: Path | None = None):
        self.workdir = workdir
        beside = (logs or workdir.parent) / workdir.name
        self._logs = [Path(f"{beside}.{label}.{name}") for name in ("out", "err")]
        self.began = time.perf_counter()
        with self._logs[0].open("w") as out, self._logs[1].open("w") as err:
            self._process = subprocess.Popen(
                command(workdir),
                stdout=out,
                stderr=err,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def reached(self, text: str) -> bool:
        """Whether it has printed this."""
        return text in self._logs[0].read_text()

    def late(self) -> bool:
        """Whether its last step is done, after which it does not stop early."""
        done = f"step {STEPS}/{STEPS}  train", f"at step {STEPS}\n"
        return any(self.reached(text) for text in done)

    def phase(self) -> str:
        """What it is doing right now."""
        if not self.reached("first step done"):
            return ENDING if self.late() else STARTING
        if unfinished(self.workdir):
            return SAVING
        return ENDING if self.late() else STEPPING

    def wait_for(self, text: str) -> float | None:
        """Seconds from the start until it has printed this; None if it ended before."""
        while not self.reached(text):
            if not self.running():
                return None
            time.sleep(0.01)
        return time.perf_counter() - self.began

    def wait_for_write(self, skip: int) -> bool:
        """Waits until it begins a checkpoint after `skip` others; False if it ends."""
        seen = set()
        started = False
        while self.running():
            # What an earlier start left unfinished is removed before the first step.
            started = started or self.reached("first step done")
            if started:
                seen |= unfinished(self.workdir)
                if len(seen) > skip:
                    return True
            time.sleep(0.001 if started else 0.02)
        return False

    def strike(self, number: int) -> str | None:
        """Sends a signal; returns the phase that it fell into, None if too late."""
        phase = self.phase()
        if not self.running():
            return None
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()
            # What is unfinished now will stay so.
            started = phase != STARTING
            phase = SAVING if started and unfinished(self.workdir) else phase
        return phase

    def wait(self, seconds: float = 600.0) -> Ended:
        """Waits for its end."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        said, errors = (log.read_text(errors="replace") for log in self._logs)
        return Ended(code, said, errors)


def unfinished(workdir: Path) -> set[str]:
    """The checkpoints that are being written, or were when the run was killed."""
    return {
        f"{name}/{entry}"
        for name in (CHECKPOINT_FOLDER, BEST_FOLDER)
        if (workdir / name).is_dir()
        for entry in os.listdir(workdir / name)
        if UNFINISHED in entry
    }


def steps_of(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, latest last."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def differences(workdir: Path, reference: Mapping[str, Any]) -> list[str]:
    """Names what of a finished run is not the reference's, bit for bit."""
    try:
        found = finals(workdir)
    except Exception as error:  # whatever is missing or cannot be read
        return [f"cannot be read ({type(error).__name__}: {str(error)[:200]})"]
    return sorted(
        name
        for name in found.keys() | reference.keys()
        if found.get(name) != reference.get(name)
    )


def finals(workdir: Path) -> dict[str, Any]:
    """What must not depend on how often a run was stopped."""
    found: dict[str, Any] = {}
    for name in (CHECKPOINT_FOLDER, BEST_FOLDER):
        # A run that was told to stop has more checkpoints before the last one.
        step = steps_of(workdir / name)[-1]
        latest = workdir / name / str(step)
        found[f"last step in {name}/"] = step
        found[f"arrays in {name}/"] = arrays(latest / "state")
        record = json.loads((latest / "loop" / "metadata").read_text())
        found[f"record in {name}/"] = record
    lines = (workdir / METRICS_FILE).read_text().splitlines()
    found[METRICS_FILE] = [without(json.loads(line), TIMES) for line in lines]
    for path in sorted((workdir / "images").iterdir()):
        found[f"images/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    summary = json.loads((workdir / SUMMARY_FILE).read_text())
    found[SUMMARY_FILE] = without(summary, CIRCUMSTANCES)
    for name in ("config.json", "parameters.txt"):
        found[name] = (workdir / name).read_text()
    listed = {path.name for path in workdir.iterdir()} - {DAMAGED_FOLDER}
    found["files"] = sorted(listed)
    return found


def without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The values but for those of these names."""
    return {key: value for key, value in values.items() if key not in names}


def arrays(folder: Path) -> dict[str, str]:
    """A digest of each array of a checkpoint."""
    digests = {}
    for path, leaf in jax.tree.leaves_with_path(read_arrays(folder)):
        array = np.asarray(leaf)
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
        digests[jax.tree_util.keystr(path)] = digest.hexdigest()
    return digests


def read_arrays(folder: Path) -> Any:
    """The arrays of a checkpoint as Orbax stored them, whatever model they are of."""
    with warnings.catch_warnings():
        # That shardings are read from a file.
        warnings.simplefilter("ignore", UserWarning)
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(folder)


class Bench:
    """The run that nothing stops, and what the others are held against.

    Args:
      folder: for everything that is written.
      keep: where workdirs of runs that went wrong are copied to.

    Attributes:
      reference: workdir of the uninterrupted run.
      first: seconds from its start to its first step.
      stepping: seconds from there to its last one.
      ending: seconds from there to its end.
      saving: seconds that the write of a checkpoint takes.
      versions: of what it stood on.
    """

    def __init__(self, folder: Path, keep: Path | None):
        self.folder = folder
        self.reference = folder / "reference"
        self._keep = keep
        os.environ["JAX_PLATFORMS"] = "cpu"
        # So that no later start compiles anything, however short that takes.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def measure(self) -> None:
        """Runs once to fill the compilation cache, and once for the reference."""
        for workdir in (self.folder / "first", self.reference):
            victim = Victim(workdir)
            self.first = victim.wait_for("first step done") or 0.0
            self.saving = 0.0
            if victim.wait_for_write(2):
                began = time.perf_counter()
                while unfinished(workdir) and victim.running():
                    time.sleep(0.001)
                self.saving = time.perf_counter() - began
            last = victim.wait_for(f"step {STEPS}/{STEPS}  valid") or 0.0
            ended = victim.wait()
            if ended.code:
                raise SystemExit(f"the run fails uninterrupted: {ended}")
            self.stepping = last - self.first
            self.ending = time.perf_counter() - victim.began - last
        self._finals = finals(self.reference)
        summary = json.loads((self.reference / SUMMARY_FILE).read_text())
        self.versions = summary["versions"]
        wrong = self.compare(self.folder / "first")
        if wrong:
            raise SystemExit(f"two uninterrupted runs differ: {', '.join(wrong)}")
        print(
            f"uninterrupted: {self.first:.1f} s to the first step, {self.stepping:.1f} "
            f"s to the last, {self.ending:.1f} s to the end; a checkpoint takes "
            f"{1e3 * self.saving:.0f} ms",
            flush=True,
        )

    def expected(self, step: int) -> float:
        """Seconds that a start takes which resumes at this step."""
        return self.first + self.stepping * (1 - step / STEPS) + self.ending

    def compare(self, workdir: Path) -> list[str]:
        """Names what differs from the reference; keeps the workdir if anything does."""
        wrong = differences(workdir, self._finals)
        if wrong:
            self.keep(workdir)
        return wrong

    def keep(self, workdir: Path) -> None:
        """Takes a copy of a workdir and of what was printed, where that is wanted."""
        if self._keep is None:
            return
        target = self._keep / workdir.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(workdir, target)
        # What was printed need not lie beside the workdir.
        for folder in {workdir.parent, self.folder}:
            for log in folder.glob(f"{workdir.name}.*.*"):
                shutil.copy(log, self._keep)

    def cut(self, name: str) -> Path:
        """A copy of the reference as it was after its last but one checkpoint."""
        workdir = self.folder / name
        shutil.copytree(self.reference, workdir)
        last = steps_of(workdir / CHECKPOINT_FOLDER)[-1]
        for folder in (CHECKPOINT_FOLDER, BEST_FOLDER):
            shutil.rmtree(workdir / folder / str(last), ignore_errors=True)
        for file in (SUMMARY_FILE, "report.html", f"images/step_{last:08d}.png"):
            (workdir / file).unlink()
        return workdir
