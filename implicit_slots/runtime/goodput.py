"""Where the wall time of a run goes, over all starts of its workdir: its goodput."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from implicit_slots.runtime.files import write_json
from implicit_slots.runtime.workdir import GOODPUT_FILE

# What a moment of a run may be, and what that means.
PARTS = {
    "steps": "training steps, each counted once",
    "start": "imports, data, the model, the last checkpoint, until the first step",
    "compile": "waiting for programs, the train step's and others",
    "data_wait": "devices without a batch to train on",
    "validation": "held-out images: losses, masks, diagnostics, scores at the end",
    "pictures": "reconstructions in images/",
    "checkpoints": "states written",
    "repeated": "steps that an earlier start had made, after its last checkpoint",
    "other": "what is none of these: logs, ends",
}
# Seconds between two writes while steps go on: what a killed run's account may lack.
EVERY = 5.0


class WallTime:
    """A clock that counts every moment as one part of `PARTS`: the parts add up.

    Nothing on a device is waited for: a moment is what the interpreter's thread that
    trains does in it.

    Args:
      began: when the run did, by `clock`; now if not given. It begins with "start".
      clock: seconds.

    Attributes:
      clock: as given.
      began: as given.
      seconds: of each part, up to the last change.
    """

    def __init__(
        self,
        began: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.clock = clock
        self.began = self._counted = clock() if began is None else began
        self._part = "start"
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def turn_to(self, part: str) -> str:
        """Counts what follows as `part`; returns what was counted until now."""
        now, before = self.clock(), self._part
        self.seconds[before] += now - self._counted
        self._counted, self._part = now, part
        return before

    def now(self) -> dict[str, float]:
        """Returns the seconds of each part up to now."""
        self.turn_to(self._part)
        return dict(self.seconds)

    @contextlib.contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Counts what happens in the context as `part`, and what follows as before."""
        before = self.turn_to(part)
        try:
            yield
        finally:
            self.turn_to(before)

    def compiled(self, seconds: float) -> None:
        """Counts the last seconds as "compile"."""
        self.move(seconds, "compile")

    def move(self, seconds: float, part: str) -> None:
        """Counts the last seconds as `part`, not as what they were counted as."""
        self.turn_to(self._part)
        self.seconds[self._part] -= seconds
        self.seconds[part] += seconds


class Starts:
    """The account of a workdir, `goodput.json`: of each start its steps and seconds.

    As a context it is written where that ends with an exception, as at a signal.

    Args:
      workdir: of the run.
      wall: the clock of this start.
      step: the step that it begins after.
      writes: false in all processes but one, which have no account.

    Attributes:
      furthest: the last step that an earlier start made.
    """

    def __init__(
        self, workdir: pathlib.Path, wall: WallTime, step: int, *, writes: bool
    ):
        self._path = workdir / GOODPUT_FILE
        self._wall, self._writes = wall, writes
        self._written = wall.began
        self._earlier = read_starts(workdir) if writes else []
        self._first = self._step = step
        self.furthest = max((start["step"] for start in self._earlier), default=0)

    def note(self, step: int) -> None:
        """Tells which step was made; writes, unless that was a moment ago."""
        self._step = step
        if self._wall.clock() - self._written > EVERY:
            self.write()

    def write(self) -> list[dict[str, Any]]:
        """Writes the account of every start, this one's up to now; returns it.

        That it cannot be written stops no run.
        """
        seconds = {name: round(value, 3) for name, value in self._wall.now().items()}
        now = {"after": self._first, "step": self._step, "seconds": seconds}
        found = [*self._earlier, now]
        if self._writes:
            with contextlib.suppress(OSError):
                write_json(self._path, found)
        self._written = self._wall.clock()
        return found

    def __enter__(self) -> "Starts":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.write()


def read_starts(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the account of each start of a workdir; nothing where there is none."""
    try:
        return json.loads((workdir / GOODPUT_FILE).read_text())
    except (OSError, ValueError):
        return []


def totals(starts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the seconds of each part over all starts."""
    return {
        part: round(sum((start["seconds"].get(part, 0.0) for start in starts), 0.0), 3)
        for part in PARTS
    }


def repeated_steps(starts: Sequence[Mapping[str, Any]]) -> int:
    """Returns how many steps were made again."""
    furthest = count = 0
    for start in starts:
        count += max(min(furthest, start["step"]) - start["after"], 0)
        furthest = max(furthest, start["step"])
    return count


def summarised(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what a summary has: the share `goodput`, the seconds `wall_time`."""
    seconds = totals(starts)
    whole = sum(seconds.values())
    return {
        "goodput": round(seconds["steps"] / whole, 4) if whole else None,
        "wall_time": seconds,
    }


def sentence(starts: Sequence[Mapping[str, Any]]) -> str:
    """Says where the time went, the longest first, as shares of the whole."""
    seconds = totals(starts)
    whole = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    shares = ", ".join(
        f"{part.replace('_', ' ')} {value / max(whole, 1e-9):.1%}"
        for part, value in parts
        if value > 0
    )
    text = f"{whole:.0f} s"
    if len(starts) > 1:
        text += f" in {len(starts)} starts"
        text += f", {repeated_steps(starts):,} steps made again"
    return f"time: {text}: {shares}"
