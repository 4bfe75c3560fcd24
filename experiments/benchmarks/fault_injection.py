"""Does a run that is killed, damaged or short of room end where it would have ended?

    python -m experiments.benchmarks.fault_injection [--kills=30] [--seed=0] [--out=OUT]

Twenty minutes on one core. One tiny run is left alone. Others are stopped at random
moments by SIGTERM or SIGKILL, find their latest checkpoint damaged, have no room on
their disk (a file system in memory, which only root may mount), or meet a second
process in their workdir. The same command must then go on, and what is left must equal
the uninterrupted run's, bit for bit. Writes OUT.md and OUT.json; exits with 1 if
anything is not as it should be.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.benchmarks import harness
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.metric_writers import read_metrics
from implicit_slots.runtime.workdir import read_summary
from implicit_slots.training.checkpoint import BEST_FOLDER as BEST
from implicit_slots.training.checkpoint import CHECKPOINT_FOLDER as CHECKPOINTS
from implicit_slots.training.checkpoint import DAMAGED_FOLDER as DAMAGED

Row = tuple[str, str, str, str]  # fault, exit code, what then, the end
GOOD = "as it should be"
STEPS, KEPT = 160, 3
# None divides another, so that a resumed run begins within a window of the log.
INTERVALS = {"log": 7, "checkpoint": 15, "validate": 40, "draw": 50}
# Not compared: how long a run took and where it lay.
CIRCUMSTANCES = {"steps_per_second", "data_wait", "command", "wall_seconds", "versions"}
CIRCUMSTANCES |= {"goodput", "wall_time"}
STARTING, STEPPING, SAVING, ENDING = "start-up", "stepping", "a checkpoint", "the end"
# What there is no room for, and the kilobytes left when a checkpoint is complete.
ROOMS = {
    "the first picture": (0, 40),
    "the next checkpoint": (30, 300),
    "the next line of metrics": (75, 0),
    "the report": (STEPS, 100),
}


class Start:
    """A start of a run that takes seconds; what it prints goes to files in `logs`."""

    def __init__(self, workdir: Path, logs: Path):
        self.workdir = workdir
        intervals = [f"--config.{name}_every={n}" for name, n in INTERVALS.items()]
        command = [
            *(sys.executable, "-u", "-m", "implicit_slots.main"),
            *("--config=configs/scenes.py:tokens-smoke", f"--config.num_steps={STEPS}"),
            *(f"--config.keep_checkpoints={KEPT}", "--config.data.cache="),
            *(*intervals, f"--workdir={workdir}"),
        ]
        self._files = [logs / f"{workdir.name}.{name}" for name in ("out", "err")]
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err)
        self.code, self.running = 0, lambda: self.process.poll() is None

    def phase(self) -> str:
        """What it is doing right now."""
        said = self._files[0].read_text()
        if f"step {STEPS}/{STEPS}  train" in said or f"at step {STEPS}\n" in said:
            return ENDING
        if "first step done" not in said:
            return STARTING
        # Orbax's name of a checkpoint that is being written.
        return SAVING if [*self.workdir.glob("*/*orbax-checkpoint-tmp*")] else STEPPING

    def wait_for(self, phase: str) -> None:
        """Waits until it is in a phase, or has ended."""
        while self.running() and self.phase() != phase:
            time.sleep(0.001)

    def end(self) -> "Start":
        """Waits for its end: `code` (negative: a signal), and what it printed."""
        self.code = self.process.wait(600)
        self.said, self.errors = (f.read_text(errors="replace") for f in self._files)
        return self

    @property
    def resumed(self) -> int:
        """The step of the checkpoint that it went on from; 0 for none."""
        found = re.search(r"^resumed .* at step (\d+)$", self.said, re.MULTILINE)
        return int(found[1]) if found else 0

    @property
    def refused(self) -> bool:
        """Whether it ended in one sentence and nothing else."""
        return self.code == 1 and bool(re.fullmatch("error: .*\n?", self.errors))

    def __str__(self) -> str:
        # Temporary folders have another name each time.
        short = re.sub(r"(?<![\w…])/(\S+/)+", "…/", self.errors.strip())[-400:]
        return f"exit code {self.code}: {short or 'nothing said'}"


def steps_of(workdir: Path, folder: str = CHECKPOINTS) -> list[int]:
    """The steps of the complete checkpoints, latest last."""
    names = [path.name for path in (workdir / folder).glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def finals(workdir: Path) -> dict[str, Any]:
    """What must not depend on how often a run was stopped."""
    found: dict[str, Any] = {"files": sorted({*os.listdir(workdir)} - {DAMAGED})}
    for name in (CHECKPOINTS, BEST):
        # A run that was told to stop has more checkpoints before the last one.
        latest = workdir / name / str(steps_of(workdir, name)[-1])
        found[name] = latest.name, (latest / "loop" / "metadata").read_text()
        with ocp.PyTreeCheckpointer() as checkpointer:
            arrays = checkpointer.restore(latest / "state")
        for path, leaf in jax.tree.leaves_with_path(arrays):
            value = np.asarray(leaf).dtype, np.shape(leaf), np.asarray(leaf).tobytes()
            found[f"{name}/{jax.tree_util.keystr(path)}"] = value
    for path in [*(workdir / "images").iterdir(), workdir / "config.json"]:
        found[path.name] = path.read_bytes()
    log = [*read_metrics(workdir), read_summary(workdir)]
    found["log"] = [{k: line[k] for k in line.keys() - CIRCUMSTANCES} for line in log]
    return found


class Lab:
    """The run that nothing stops, and what the others are held against."""

    def __init__(self, folder: Path):
        self.folder = folder
        os.environ["JAX_PLATFORMS"] = "cpu"
        # So that no later start compiles anything, however short that takes.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for name in ("first", "reference"):
            began = time.perf_counter()
            if (start := Start(folder / name, folder).end()).code:
                raise UserError(f"the run fails uninterrupted: {start}")
            self.seconds = time.perf_counter() - began
        self.reference = finals(folder / "reference")

    def compare(self, start: Start, step: int | None = None) -> list[str]:
        """Names what is wrong with a start that should have gone on from a step."""
        if start.code:
            return [str(start)]
        try:
            found = finals(start.workdir)
        except Exception as error:  # whatever is missing or cannot be read
            return [f"cannot be read: {error!r}"[:200]]
        names = found.keys() | self.reference.keys()
        wrong = sorted(n for n in names if found.get(n) != self.reference.get(n))
        return wrong + ([] if step in (None, start.resumed) else [f"not from {step}"])


def row(fault: str, ended: Start, then: object, wrong: list[str]) -> Row:
    """What became of a fault."""
    found = fault, str(ended.code), str(then), "; ".join(wrong) or GOOD
    print(found, flush=True)
    return found


def kills(lab: Lab, count: int, seed: int) -> Iterator[Row]:
    """Kills each run twice at random moments, then lets it end."""
    generator = random.Random(seed)
    for number in range(count):
        workdir = lab.folder / f"killed_{number // 2}"
        start = Start(workdir, lab.folder)
        kill = generator.choice((signal.SIGTERM, signal.SIGKILL))
        moment = time.perf_counter() + generator.uniform(0, 0.9 * lab.seconds)
        if generator.random() < 0.4:  # aimed at the write of a checkpoint
            for phase in generator.randrange(1, 5) * (STEPPING, SAVING):
                start.wait_for(phase)
        else:
            while start.running() and time.perf_counter() < moment:
                time.sleep(0.005)
        phase = start.phase() if start.running() else ENDING
        start.process.send_signal(kill)
        allowed = {os.EX_TEMPFAIL if kill == signal.SIGTERM else -kill}
        # There may be nothing to save, or to kill.
        allowed |= {STARTING: {-kill}, ENDING: {-kill, 0}}.get(phase, set())
        wrong = [] if start.end().code in allowed else [str(start)]
        wrong += ["a traceback"] if "Traceback" in start.errors else []
        latest = (steps_of(workdir) or [0])[-1]
        yield row(f"{kill.name} in {phase}", start, f"step {latest} is saved", wrong)
        if number % 2 or number == count - 1:
            start = Start(workdir, lab.folder).end()
            then, wrong = f"resumed at {start.resumed}", lab.compare(start, latest)
            yield row("the same command again", start, then, wrong)


def flip_bit(path: Path) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# What is done to which files of a checkpoint: its arrays, the record beside them.
DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "one bit of each file of arrays flipped": ("d/*", flip_bit),
    "the files of arrays emptied": ("d/*", lambda path: os.truncate(path, 0)),
    "the record removed": ("loop", shutil.rmtree),
    "the arrays of all checkpoints removed": ("d/*", Path.unlink),
}


def damage(lab: Lab) -> Iterator[Row]:
    """Damages the latest checkpoint of a run, and all of them."""
    for number, (fault, (files, injure)) in enumerate(DAMAGES.items()):
        workdir = lab.folder / f"damaged_{number}"
        shutil.copytree(lab.folder / "reference", workdir)
        *_, before, latest = steps = steps_of(workdir)
        for step in steps if "all" in fault else [latest]:
            for path in [*(workdir / CHECKPOINTS / str(step)).rglob(files)]:
                injure(path)
        start = Start(workdir, lab.folder).end()
        if "all" in fault:
            wrong = [] if start.refused else ["not refused"]
        else:
            aside = (workdir / DAMAGED / str(latest)).is_dir()
            wrong = lab.compare(start, before) + ([] if aside else ["not set aside"])
        then = f"set aside, resumed at {start.resumed}" if start.resumed else start
        yield row(fault, start, then, wrong)


def disk(lab: Lab) -> Iterator[Row]:
    """Takes a run's room at several moments."""
    for what, (step, room) in ROOMS.items():
        folder = lab.folder / f"disk_{step}"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
        if subprocess.run(mount, check=False).returncode:
            print("the full disk is left out", flush=True)
            return
        try:
            workdir, ballast = folder / f"full_{step}", folder / "ballast"
            start = Start(workdir, lab.folder)
            while start.running() and not ballast.exists():
                found = steps_of(workdir)
                # The oldest has made room by then.
                if not step or (step in found and len(found) <= KEPT):
                    fill(ballast, room)
                time.sleep(0.001)
            full = start.end()
            ballast.unlink()
            start = Start(workdir, lab.folder).end()
            wrong = lab.compare(start) + ([] if full.refused else ["not refused"])
            then = f"{full}; resumed at {start.resumed}"
            yield row(f"no room for {what}", full, then, wrong)
        finally:
            subprocess.run(["umount", str(folder)], check=True)


def fill(ballast: Path, room: int) -> None:
    """Takes all of a file system but some kilobytes."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while shutil.disk_usage(ballast).free > 1024 * room:
            file.write(bytes(4096))


def two(lab: Lab) -> Iterator[Row]:
    """Starts two processes on one workdir at once."""
    workdir, logs = lab.folder / "two", lab.folder / "other"
    logs.mkdir()
    pair = [Start(workdir, lab.folder), Start(workdir, logs)]
    one, other = sorted((start.end() for start in pair), key=lambda start: start.code)
    wrong = lab.compare(one) + ([] if other.refused else ["not refused"])
    yield row("two processes on one workdir", other, other, wrong)


def main(arguments: list[str] | None = None) -> None:
    """Injects the faults, prints, and writes OUT.md and OUT.json."""
    parser = harness.build_parser(__doc__, "fault_injection")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    flags = parser.parse_args(arguments)
    lab = Lab(Path(tempfile.mkdtemp()))
    rows = [*kills(lab, flags.kills, flags.seed), *damage(lab), *disk(lab), *two(lab)]
    good = sum(found[-1] == GOOD for found in rows)
    cells = [list(found) for found in rows]
    text = harness.markdown(["fault", "exit code", "then", "the end"], cells)
    text += f"\n\n{good} of {len(rows)} end as they should."
    harness.write(flags, [harness.jax_facts()], rows, text)
    if good < len(rows):
        sys.exit(f"what went wrong is in {lab.folder}")
    shutil.rmtree(lab.folder)


if __name__ == "__main__":
    harness.script(main)
