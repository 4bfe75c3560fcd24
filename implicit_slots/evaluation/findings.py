"""What is evaluated, on what, and what was found."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from tqdm import tqdm

from implicit_slots.data.batches import evaluation_batches
from implicit_slots.data.registry import Source, usage_of
from implicit_slots.data.source import Batch
from implicit_slots.evaluation.steps import EvaluationSteps
from implicit_slots.runtime import processes
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import shard_batch

READ = ("image", "features", "segmentation", "shadow", "objects", "mask")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated, and on what.

    Attributes:
      config: the whole configuration.
      steps: the compiled functions.
      params: of the model.
      mesh: the devices.
      source: the images.
      batch_size: how many at a time, over all devices.
      quiet: no progress.
      split: of the source; that of an evaluation unless given.
    """

    config: Config
    steps: EvaluationSteps
    params: PyTree
    mesh: jax.sharding.Mesh
    source: Source
    batch_size: int
    quiet: bool = False
    split: str = ""

    def progress(self, steps: Iterable[Any], desc: str) -> Iterable[Any]:
        """A bar on a terminal, on process 0."""
        quiet = self.quiet or not processes.is_main()
        return tqdm(steps, desc=desc, disable=True if quiet else None, file=sys.stderr)

    def count(self, wanted: int) -> int:
        """How many images: all for 0, no more than there are."""
        return min(wanted or len(self.source), len(self.source))

    def batches(
        self, count: int, desc: str, source: Source | None = None
    ) -> Iterator[tuple[int, PyTree, Batch]]:
        """The first images in batches: their number, on the devices, on this host.

        What is on the host is this process's share.

        Args:
          count: how many images, 0 for all.
          desc: what is said of the progress.
          source: to be read in the place of the subject's.
        """
        batches = evaluation_batches(
            source or self.source,
            self.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=usage_of(self.config.data)["workers"],
        )
        total = math.ceil(self.count(count) / self.batch_size)
        with contextlib.closing(batches):
            for number, batch in zip(
                self.progress(range(total), desc), batches, strict=False
            ):
                host = {name: batch[name] for name in READ if name in batch}
                yield number, shard_batch(host, self.mesh), host


@dataclasses.dataclass
class Findings:
    """What an evaluation found.

    Attributes:
      images: values per image, by name; NaN where a number is not defined.
      numbers: those of the whole set, by name.
      absent: of what is not there the reason, by name.
      notes: sentences.
      curves: see `curve`.
      shown: what each group leaves for pictures.
      shifts: of each shift of the data its meaning and metrics, see shifts.py.
    """

    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    numbers: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    curves: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    shown: dict[str, Any] = dataclasses.field(default_factory=dict)
    shifts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Returns mean, standard deviation over images, and count, by name."""
        found = {}
        for name, values in self.images.items():
            values = values[~np.isnan(values)].astype(np.float64)
            spread = float(values.std(ddof=1)) if len(values) > 1 else None
            mean = float(values.mean()) if len(values) else math.nan
            found[name] = {"mean": mean, "std": spread, "count": len(values)}
        for name, (value, count) in self.numbers.items():
            found[name] = {"mean": value, "std": None, "count": count}
        return found


def curve(
    title: str,
    labels: tuple[str, str],
    x: np.ndarray,
    values: np.ndarray,
    *,
    log: bool = False,
) -> dict[str, Any]:
    """Median and quartiles over images of [x, images], for the report.

    Args:
      title: of the plot.
      labels: of its axes, with units.
      x: one number per row.
      values: NaN where not defined.
      log: whether the values span magnitudes.
    """
    kept = [row[~np.isnan(row)] for row in np.asarray(values, np.float64)]

    def at(quantile):
        return [float(np.quantile(row, quantile)) if len(row) else None for row in kept]

    return {
        "title": title,
        "x_label": labels[0],
        "y_label": labels[1],
        "x": np.asarray(x).tolist(),
        "series": {"median": at(0.5), "low": at(0.25), "high": at(0.75)},
        "log": log,
    }


def kept_values(values: dict[str, jax.Array], host: Batch) -> dict[str, np.ndarray]:
    """A batch's values without those of padding, from all processes."""
    kept = kept_rows(host)
    return {name: np.asarray(value)[kept] for name, value in values.items()}


def kept_rows(host: Batch) -> np.ndarray:
    """Which examples of a batch are no padding, over all processes."""
    if jax.process_count() == 1:
        return host["mask"]
    return np.ravel(multihost_utils.process_allgather(host["mask"]))


def joined(rows: list[dict[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """All batches' values one after the other; the first `count`, or all for 0."""
    return {
        name: np.concatenate([row[name] for row in rows])[: count or None]
        for name in rows[0]
    }
