"""The trackers of a run, beside metrics.jsonl: each gets every value once."""

import importlib.util
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import write_json
from implicit_slots.runtime.processes import say
from implicit_slots.runtime.tracker_libraries import TRACKERS, Tracker
from implicit_slots.runtime.workdir import ABSENT

STATE_FILE = "tracking.json"


def check(names: str) -> None:
    """Refuses trackers whose library is not installed.

    Args:
      names: as `config.track` has them, with commas between.

    Raises:
      UserError: naming the extra that brings it.
    """
    for name in _split(names):
        if importlib.util.find_spec(TRACKERS[name].library) is None:
            raise UserError(
                f"config.track={names} needs {TRACKERS[name].library}, which is not "
                f"installed: pip install 'implicit_slots[{name}]', or leave it out"
            )


class Trackers:
    """Those of a run. Each gets every value once, whatever stopped the run in between.

    What each has lies in `tracking.json`: the library's name of the run, and by metric
    the last step. A run that goes on from an earlier checkpoint comes to steps that it
    had sent before: they are not sent again. Lines of metrics.jsonl that a tracker does
    not have, as it is new or failed, are sent at the start.

    A tracker that fails later is left out: no run ends for it.

    Args:
      workdir: the run's directory.
      config: of the run.
      step: the step that the run starts from.
      history: the lines of metrics.jsonl up to there.

    Raises:
      UserError: one cannot be started.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: Config,
        *,
        step: int,
        history: Iterable[Mapping[str, Any]],
    ):
        self._workdir, self._config, self._last = workdir, config, step
        path = workdir / STATE_FILE
        # By tracker: "run", and what is certain to be there, "sent"; while it is open,
        # what to set aside should it not be closed, "open".
        self._state = json.loads(path.read_text()) if path.exists() else {}
        self._open: dict[str, Tracker] = {}
        # What a tracker had before, and what it was given in all.
        self._before: dict[str, dict[str, int]] = {}
        self._given: dict[str, dict[str, int]] = {}
        lines = [(line["step"], _named(line)) for line in history]
        for name in _split(config.get("track", ABSENT["track"])):
            before = self._state.get(name, {}).get("sent", {})
            lacks = any(_after(before, *line) for line in lines)
            if step < config.num_steps or lacks:
                self._start(name)
        for at, values in lines:
            self._send(at, values, "write")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Sends the values of one step; what is not finite is left out."""
        self._last = step
        self._send(step, _named({**values, "split": split}), "write")

    def draw(self, step: int, name: str, picture: np.ndarray) -> None:
        """Sends a picture, uint8 [height, width, 3]."""
        self._send(step, {name: picture}, "draw")

    def close(self) -> None:
        """Ends the session; the same run goes on in the next one."""
        for name, tracker in [*self._open.items()]:
            try:
                tracker.close(ended=self._last >= self._config.num_steps)
            except Exception as error:
                self._leave_out(name, error)
            else:
                self._state[name] |= {"sent": self._given[name], "open": ""}
                self._save()

    def _start(self, name: str) -> None:
        state = self._state.setdefault(name, {"run": None, "sent": {}, "open": ""})
        dead = self._workdir / state["open"]
        if state["open"] and dead.exists():
            # Nobody knows what it has. All that metrics.jsonl has is sent again.
            dead.rename(dead.with_name(f"killed-{dead.name}"))
        try:
            tracker = TRACKERS[name](self._workdir, self._config, state["run"])
        except Exception as error:
            raise UserError(
                f"config.track: {name} cannot be started ({error}); put that right, "
                "or leave it out"
            ) from error
        state |= {"run": tracker.run, "open": tracker.folder}
        self._save()
        self._open[name] = tracker
        self._before[name], self._given[name] = dict(state["sent"]), dict(state["sent"])
        say(f"tracked by {name}; to see it: {tracker.shown_by}")

    def _send(self, step: int, values: Mapping[str, Any], method: str) -> None:
        for name, tracker in [*self._open.items()]:
            if not (new := _after(self._before[name], step, values)):
                continue
            state = self._state[name]
            certain = state["sent"]
            self._given[name] |= dict.fromkeys(new, step)
            try:
                if tracker.durable:
                    # First: better a value that is missing than one that comes twice.
                    state["sent"] = dict(self._given[name])
                    self._save()
                getattr(tracker, method)(step, new)
            except Exception as error:
                state["sent"] = certain
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        del self._open[name]
        self._save()
        say(
            f"{name} failed and is left out ({error}); metrics.jsonl has everything, "
            "and when the run goes on it gets what is missing"
        )

    def _save(self) -> None:
        write_json(self._workdir / STATE_FILE, self._state)


def _split(names: str) -> list[str]:
    return [name for name in dict.fromkeys(names.split(",")) if name]


def _named(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite values of a line of metrics.jsonl, by "split/name"."""
    return {
        f"{line['split']}/{name}": float(value)
        for name, value in line.items()
        if name not in ("step", "split") and value is not None and math.isfinite(value)
    }


def _after(
    before: Mapping[str, int], step: int, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Those of values that are of a later step than their last one."""
    return {name: v for name, v in values.items() if step > before.get(name, -1)}
