"""Does a run that is killed, damaged or short of room end where it would have ended?

    python -m experiments.benchmarks.fault_injection [--kills=30] [--seed=0] [--out=OUT]

Ten to twenty minutes on one core, and a few hundred megabytes in a temporary folder.
One tiny run is left alone; others are stopped at random instants by SIGTERM or SIGKILL,
find their latest checkpoint damaged, their disk full or read-only, or a second process
in their workdir. The same command must then go on, and every number and picture that is
left must be, bit for bit, the uninterrupted run's. Exits with 1 if any is not.

The full and the read-only disk are file systems in memory that only root may mount;
without that they are left out. `--keep=DIR` takes a copy of what went wrong.
"""

import argparse
import itertools
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmarks import fault_report, harness, other_faults
from experiments.benchmarks.victims import (
    INTERVALS,
    RESUME_ME,
    STARTING,
    STEPS,
    Bench,
    Ended,
    Victim,
    steps_of,
)
from implicit_slots.runtime.errors import UserError
from implicit_slots.training.checkpoint import CHECKPOINT_FOLDER

AIMED = 0.4  # share of the kills that are aimed at a checkpoint's write
SIGNALS = (signal.SIGTERM, signal.SIGKILL)


def main(arguments: list[str] | None = None) -> None:
    """Injects the faults, prints, and writes OUT.md and OUT.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=harness.positive, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default=",".join(PARTS), help="in this order")
    parser.add_argument("--keep", type=Path, help="where to copy what went wrong")
    parser.add_argument(
        "--out", type=Path, default=Path("experiments/results/fault_injection")
    )
    flags = parser.parse_args(arguments)
    parts = harness.choices("--parts", flags.parts, PARTS)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), flags.keep)
        bench.measure()
        rows = {part: PARTS[part](bench, flags) for part in parts}
    minutes = (time.perf_counter() - began) / 60
    if not fault_report.write(flags, bench.versions, rows, minutes):
        sys.exit(1)


@dataclass
class Kill:
    """One signal, and when it is sent.

    Attributes:
      signal: SIGTERM or SIGKILL.
      aimed: at the write of a checkpoint; else at an instant of the whole run.
      when: share of what is left of the run: of its time, or of its checkpoints.
      delay: share of the time of a write, after it began.
    """

    signal: signal.Signals
    aimed: bool
    when: float
    delay: float


def draw_kills(count: int, seed: int) -> list[Kill]:
    """Draws the kills; at least two fifths of them are aimed."""
    generator = random.Random(seed)
    aimed = [i < AIMED * count for i in range(count)]
    generator.shuffle(aimed)
    return [
        Kill(
            signal=generator.choice(SIGNALS),
            aimed=aim,
            when=generator.uniform(0, 0.5 if aim else 1.05),
            delay=generator.random(),
        )
        for aim in aimed
    ]


def inject_kills(bench: Bench, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Kills run after run until all kills are used; a row for each kill."""
    kills = draw_kills(flags.kills, flags.seed)
    rows: list[dict[str, Any]] = []
    for number in itertools.count():
        if not kills:
            break
        workdir = bench.folder / f"killed_{number:02d}"
        mine: list[dict[str, Any]] = []
        wrong: list[str] = []
        while True:
            victim = Victim(workdir, f"{len(mine):02d}")
            row = strike(bench, victim, kills[0]) if kills else None
            ended = victim.wait()
            if mine and "parameters:" in ended.said:
                mine[-1]["resumed"] = ended.resumed
                if ended.resumed != mine[-1]["latest"]:
                    wrong.append(f"resumed at {ended.resumed}")
            wrong += ended.traceback
            if "damaged" in ended.said:
                wrong.append("a checkpoint was damaged")
            if row is not None:
                del kills[0]
                mine.append(row | outcome(workdir, ended))
                wrong += check_end(mine[-1], ended)
                print(fault_report.line(mine[-1]), flush=True)
            elif ended.code:
                wrong.append(f"not killed, but {ended}")
            if row is None and kills:
                # It ended before its instant came.
                kills[0].when *= 0.8
            if ended.code == 0 or wrong:
                break
        wrong += bench.compare(workdir) if not wrong else []
        if wrong:
            bench.keep(workdir)
        for row in mine:
            row["wrong"] = wrong
        print(f"  ended: {', '.join(wrong) or 'equal'}", flush=True)
        rows += mine
    return rows


def strike(bench: Bench, victim: Victim, kill: Kill) -> dict[str, Any] | None:
    """Waits for the kill's instant and kills; None if the run ended before."""
    found = steps_of(victim.workdir / CHECKPOINT_FOLDER)
    step = found[-1] if found else 0
    if kill.aimed:
        writes = sum((STEPS - step) // INTERVALS[n] for n in ("checkpoint", "validate"))
        if not victim.wait_for_write(int(kill.when * writes)):
            return None
        time.sleep(kill.delay * bench.saving)
        planned = None
    else:
        planned = kill.when * bench.expected(step)
        while victim.running() and time.perf_counter() - victim.began < planned:
            time.sleep(0.005)
    at = time.perf_counter() - victim.began
    late = victim.late()
    phase = victim.strike(kill.signal)
    if phase is None:
        return None
    return {
        "signal": kill.signal.name,
        "aimed": kill.aimed,
        "planned": planned,
        "at": at,
        "phase": phase,
        "late": late,
    }


def outcome(workdir: Path, ended: Ended) -> dict[str, Any]:
    """What is left of a start that was killed."""
    found = steps_of(workdir / CHECKPOINT_FOLDER)
    return {
        "code": ended.code,
        "saved": ended.saved,
        "latest": found[-1] if found else 0,
        "resumed": None,
    }


def check_end(row: dict[str, Any], ended: Ended) -> list[str]:
    """Names what is wrong with how a killed start ended."""
    if row["signal"] == "SIGKILL":
        allowed = {-signal.SIGKILL}
    elif row["late"]:
        allowed = {0, RESUME_ME, -signal.SIGTERM}
    elif row["phase"] == STARTING:
        allowed = {RESUME_ME, -signal.SIGTERM}
    else:
        allowed = {RESUME_ME}
    wrong = [] if row["code"] in allowed else [str(ended)]
    # Before the first step and after the last one there is nothing to save.
    idle = row["saved"] is None and (row["late"] or row["phase"] == STARTING)
    if ended.code == RESUME_ME and row["saved"] != row["latest"] and not idle:
        wrong.append(f"says {row['saved']} is saved, but {row['latest']} is there")
    return wrong


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "kills": inject_kills,
    "damage": other_faults.inject_damage,
    "disk": other_faults.fill_disk,
    "others": other_faults.meet_others,
}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
