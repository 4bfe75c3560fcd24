"""Where metrics go: metrics.jsonl always, and the trackers of `config.track`."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from implicit_slots.runtime.config import Config
from implicit_slots.runtime.files import finite, write_atomically
from implicit_slots.runtime.trackers import Trackers
from implicit_slots.runtime.workdir import METRICS_FILE, writing


class MetricWriter:
    """Appends to `metrics.jsonl`, and sends the same to the run's trackers.

    Lines after `step` are removed first: they were written by a run that was stopped
    before its next checkpoint, and will be written again.

    Args:
      workdir: the run's directory.
      config: of the run, for its trackers; None for none.
      step: the step that the run starts from; None if it will write nothing, as in
        all processes but one.

    Attributes:
      history: the lines that were there before, up to `step`.

    Raises:
      UserError: the workdir cannot be written, or a tracker cannot be started.
    """

    def __init__(
        self, workdir: pathlib.Path, config: Config | None = None, *, step: int | None
    ):
        self._path = workdir / METRICS_FILE
        self._trackers = None
        self._silent = step is None
        self.history: list[dict[str, Any]] = []
        if step is None:
            return
        if self._path.exists():
            with writing(workdir):
                written = read_metrics(workdir)
                self.history = [line for line in written if line["step"] <= step]
                lines = "".join(json.dumps(line) + "\n" for line in self.history)
                write_atomically(self._path, lines)
        if config is not None:
            self._trackers = Trackers(workdir, config, step=step, history=self.history)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes the values of one step; what is not finite becomes null."""
        if self._silent:
            return
        line = finite({"step": step, "split": split, **values})
        with writing(self._path.parent), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._trackers is not None:
            self._trackers.write(step, split, values)

    def write_image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Shows a picture, uint8 [height, width, 3], in the trackers."""
        if self._trackers is not None:
            self._trackers.draw(step, name, picture)

    def close(self) -> None:
        """Writes what trackers still hold."""
        if self._trackers is not None:
            self._trackers.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl; a last line cut short is left out."""
    lines = []
    for line in (workdir / METRICS_FILE).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
