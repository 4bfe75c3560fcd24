"""Faults that are no kills: damaged checkpoints, a full disk, two processes."""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.benchmarks import fault_report
from experiments.benchmarks.victims import (
    KEPT,
    RESUME_ME,
    STEPS,
    Bench,
    Victim,
    read_arrays,
    steps_of,
)
from implicit_slots.training.checkpoint import CHECKPOINT_FOLDER, DAMAGED_FOLDER

DAMAGES = (
    "one bit of each file of arrays flipped",
    "one bit of one number flipped, and stored anew",
    "one bit of the largest file flipped",
    "the files of arrays cut to half",
    "the arrays' index emptied",
    "the files of arrays removed",
    "the record removed",
    "the record cut to half",
    "all checkpoints emptied",
)
# For what there is no room, and the kilobytes that are left when a checkpoint is
# complete, or before the start. Lines of metrics first fill up the page they begin in.
ROOMS = (
    ("for the configuration", None, 8),
    ("for the first picture", None, 40),
    ("for the next checkpoint", 15, 0),
    ("for half of the next checkpoint", 30, 300),
    ("for the next picture", 45, 16),
    ("for the next line of metrics", 75, 0),
    ("for the report", STEPS, 100),
)
DISK = 32  # megabytes, more than a run needs


def inject_damage(bench: Bench, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Damages the latest checkpoint in every way; a row for each."""
    rows = []
    for number, name in enumerate(DAMAGES):
        workdir = bench.cut(f"damaged_{number}")
        steps = steps_of(workdir / CHECKPOINT_FOLDER)
        for step in steps if name.startswith("all") else steps[-1:]:
            damage(name, workdir / CHECKPOINT_FOLDER / str(step), flags.seed)
        ended = Victim(workdir).wait()
        aside = (workdir / DAMAGED_FOLDER / str(steps[-1])).is_dir()
        told = f"{DAMAGED_FOLDER}/{steps[-1]}" in ended.said
        wrong = [] if aside == told else ["what was set aside is not what was said"]
        if name.startswith("all"):
            wrong += [] if ended.refused else [str(ended)]
        elif ended.code:
            wrong.append(str(ended))
        else:
            if ended.resumed != steps[-2 if aside else -1]:
                wrong.append(f"resumed at {ended.resumed}")
            wrong += bench.compare(workdir) + ended.traceback
        rows.append(
            {
                "fault": name,
                "code": ended.code,
                "outcome": f"{'' if aside else 'not '}set aside, resumed at "
                f"{ended.resumed}"
                if ended.resumed
                else ended.sentence,
                "wrong": wrong,
            }
        )
        finish(bench, rows, workdir)
    return rows


def damage(name: str, checkpoint: Path, seed: int) -> None:
    """Does to a checkpoint what the name says."""
    files = sorted(
        (path for path in checkpoint.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    arrays = [path for path in files if path.parent.name == "d"]
    record = checkpoint / "loop" / "metadata"
    generator = random.Random(seed)
    match name:
        case "one bit of each file of arrays flipped":
            for path in arrays:
                flip_bit(path, generator)
        case "one bit of one number flipped, and stored anew":
            flip_number(checkpoint / "state", generator)
        case "one bit of the largest file flipped":
            flip_bit(files[-1], generator)
        case "the files of arrays cut to half":
            for path in arrays:
                os.truncate(path, path.stat().st_size // 2)
        case "the arrays' index emptied":
            os.truncate(checkpoint / "state" / "manifest.ocdbt", 0)
        case "the files of arrays removed":
            for path in arrays:
                path.unlink()
        case "the record removed":
            shutil.rmtree(record.parent)
        case "the record cut to half":
            os.truncate(record, record.stat().st_size // 2)
        case "all checkpoints emptied":
            for path in files:
                os.truncate(path, 0)
        case _:
            raise ValueError(f"no such damage: {name}")


def flip_bit(path: Path, generator: random.Random) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def flip_number(folder: Path, generator: random.Random) -> None:
    """Flips one bit of one parameter where no checksum of Orbax's own tells."""
    tree = read_arrays(folder)
    leaves, structure = jax.tree.flatten(tree["params"])
    chosen = generator.randrange(len(leaves))
    array = np.array(leaves[chosen])
    bits = array.reshape(-1).view(np.uint32)
    bits[generator.randrange(bits.size)] ^= np.uint32(1 << generator.randrange(32))
    leaves[chosen] = array
    tree["params"] = jax.tree.unflatten(structure, leaves)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree, force=True)


def fill_disk(bench: Bench, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Takes a run's room at several moments; a row for each."""
    rows = []
    for number, (what, step, room) in enumerate(ROOMS):
        with disk(bench.folder / f"disk_{number}") as folder:
            if folder is None:
                return rows
            workdir = folder / f"full_{number}"
            ballast = folder / "ballast"
            if step is None:
                fill(ballast, room)
            victim = Victim(workdir, "0", bench.folder)
            while step and victim.running() and not ballast.exists():
                found = steps_of(workdir / CHECKPOINT_FOLDER)
                # The oldest has made room by then.
                if step in found and len(found) <= KEPT:
                    fill(ballast, room)
                time.sleep(0.001)
            full = victim.wait()
            ballast.unlink()
            ended = Victim(workdir, "1", bench.folder).wait()
            wrong = [] if full.refused else [f"when it was full: {full}"]
            if ended.code:
                wrong.append(f"when there was room again: {ended}")
            else:
                wrong += bench.compare(workdir)
            rows.append(
                {
                    "fault": f"no room {what} ({room} KB left)",
                    "code": full.code,
                    "outcome": full.sentence + f" Resumed at {ended.resumed}.",
                    "wrong": wrong,
                }
            )
            finish(bench, rows, workdir)
    with disk(bench.folder / "disk") as folder:
        if folder is not None:
            workdir = folder / "read_only"
            shutil.copytree(bench.cut("to_be_read_only"), workdir)
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            ended = Victim(workdir, logs=bench.folder).wait()
            rows.append(
                {
                    "fault": "read-only workdir",
                    "code": ended.code,
                    "outcome": ended.sentence,
                    "wrong": [] if ended.refused else [str(ended)],
                }
            )
            finish(bench, rows, workdir)
    return rows


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path | None]:
    """Mounts a file system in memory; None where that is not possible."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        print(f"the full disk is left out: {reason.strip()}", flush=True)
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(ballast: Path, room: int) -> None:
    """Takes all of a file system but some kilobytes."""
    with ballast.open("wb") as file:
        while True:
            system = os.statvfs(ballast)
            size = system.f_bavail * system.f_frsize - 1024 * room
            try:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
                return
            except OSError:  # The run has just written: there is less now.
                if size < 1:
                    return


def meet_others(bench: Bench, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Two processes in one workdir, and Ctrl-C; a row for each."""
    workdir = bench.folder / "two"
    pair = [Victim(workdir, str(number)) for number in range(2)]
    ends = sorted((victim.wait() for victim in pair), key=lambda ended: ended.code)
    wrong = [] if ends[1].refused else [f"the second: {ends[1]}"]
    wrong += [f"the first: {ends[0]}"] if ends[0].code else bench.compare(workdir)
    rows = [
        {
            "fault": "two processes started at once",
            "code": ends[1].code,
            "outcome": ends[1].sentence,
            "wrong": wrong,
        }
    ]
    finish(bench, rows, workdir)
    workdir = bench.folder / "interrupted"
    victim = Victim(workdir, "0")
    victim.wait_for("first step done")
    victim.strike(signal.SIGINT)
    stopped = victim.wait()
    ended = Victim(workdir, "1").wait()
    wrong = [] if stopped.code == RESUME_ME else [f"after Ctrl-C: {stopped}"]
    wrong += [f"the next start: {ended}"] if ended.code else bench.compare(workdir)
    rows.append(
        {
            "fault": "Ctrl-C",
            "code": stopped.code,
            "outcome": f"saved at step {stopped.saved}, resumed at {ended.resumed}",
            "wrong": wrong,
        }
    )
    finish(bench, rows, workdir)
    return rows


def finish(bench: Bench, rows: list[dict[str, Any]], workdir: Path) -> None:
    """Says how the last case went, and keeps what went wrong."""
    if rows[-1]["wrong"]:
        bench.keep(workdir)
    print(fault_report.fault_line(rows[-1]), flush=True)
