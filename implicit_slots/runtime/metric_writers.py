"""Where metrics go: metrics.jsonl always, TensorBoard where TensorFlow is present."""

import importlib.util
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from implicit_slots.runtime.files import finite, write_atomically
from implicit_slots.runtime.workdir import METRICS_FILE, writing


class MetricWriter:
    """Appends to `metrics.jsonl`, and to TensorBoard's event file where it can.

    Lines after `step` are removed first: they were written by a run that was stopped
    before its next checkpoint, and will be written again. (TensorBoard's file keeps
    them, and shows them twice.)

    Args:
      workdir: the run's directory.
      step: the step that the run starts from; None if it will write nothing, as in
        all processes but one.

    Attributes:
      history: the lines that were there before, up to `step`.
    """

    def __init__(self, workdir: pathlib.Path, *, step: int | None):
        self._path = workdir / METRICS_FILE
        self._tensorboard = None
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
        self._tensorboard = _tensorboard(workdir)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes the values of one step; what is not finite becomes null."""
        if self._silent:
            return
        line = finite({"step": step, "split": split, **values})
        with writing(self._path.parent), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._tensorboard is not None:
            self._tensorboard.write_scalars(
                step, {f"{split}/{name}": value for name, value in values.items()}
            )

    def write_image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Shows a picture, uint8 [height, width, 3], in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.write_images(step, {name: picture[None]})

    def close(self) -> None:
        """Flushes what TensorBoard still holds."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl; a last line cut short is left out."""
    lines = []
    for line in (workdir / METRICS_FILE).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _tensorboard(workdir: pathlib.Path) -> Any:
    """A clu summary writer, or None: it needs TensorFlow and TensorBoard both."""
    if not all(importlib.util.find_spec(n) for n in ("tensorflow", "tensorboard")):
        return None
    import tensorflow as tf  # pyright: ignore
    from clu import metric_writers

    # TensorFlow would otherwise take the accelerator's memory from JAX.
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return metric_writers.SummaryWriter(str(workdir))
