"""One training step again, alone: the one at which a run stopped.

`write` leaves what that takes in the workdir's replay/: the state before the step, as a
checkpoint, and the step's batch, so that neither data nor the steps before are needed.
`run` takes the step apart.
"""

import pathlib
import shutil
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from implicit_slots.data.batches import TrainBatches
from implicit_slots.data.registry import Source, usage_of
from implicit_slots.models.images import as_float, seen
from implicit_slots.runtime import processes
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import build_mesh, replicate, shard_batch
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import write_atomically
from implicit_slots.runtime.workdir import writing
from implicit_slots.training import nonfinite
from implicit_slots.training.checkpoint import Checkpoints, Damaged
from implicit_slots.training.nonfinite import REPLAY_FOLDER
from implicit_slots.training.state import Faults, TrainState
from implicit_slots.training.step import Steps

BATCH_FILE = "batch.npz"
REPORT_FILE = "report.txt"


def write(
    config: Config, workdir: pathlib.Path, source: Source, state: TrainState
) -> None:
    """Saves what the last skipped step began with.

    Args:
      config: the whole configuration.
      workdir: the run's directory.
      source: the training data.
      state: after the step, which changed nothing but the step's number.
    """
    folder = workdir / REPLAY_FOLDER
    index = int(state.faults.last) - 1
    if processes.is_main():
        batches = TrainBatches(
            source, config.batch_size, config.seed, flip=usage_of(config.data)["flip"]
        )
        named: dict[str, Any] = {
            jax.tree_util.keystr(path, simple=True, separator="/"): as_float(leaf)
            if leaf.dtype == jnp.bfloat16  # NumPy's files know none.
            else leaf
            for path, leaf in jax.tree.leaves_with_path(batches[index])
        }
        with writing(workdir):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            np.savez(folder / BATCH_FILE, **named)
    processes.barrier("replay")
    none = Faults(*(0 * count for count in state.faults))
    before = state._replace(step=0 * state.step + index, faults=none)
    with writing(workdir):
        checkpoints = Checkpoints(folder / "state", keep=1)
    checkpoints.save(before)
    checkpoints.close()


def run(
    config: Config, workdir: pathlib.Path, steps: Steps, like: TrainState
) -> dict[str, Any]:
    """Takes the saved step apart, prints what was not finite first, and says where.

    Args:
      config: the whole configuration.
      workdir: of a run that stopped because of skipped steps.
      steps: the compiled functions.
      like: a state of the run's structure.

    Returns:
      "step", and "failed": the name of what failed first, or None if nothing did.

    Raises:
      UserError: if there is nothing to replay, or it cannot be read.
    """
    folder = workdir / REPLAY_FOLDER
    if not (folder / BATCH_FILE).exists():
        raise UserError(
            f"{workdir} has no step to replay: a run leaves one when it stops after "
            "config.nonfinite.stop_after skipped steps in a row"
        )
    checkpoints = Checkpoints(folder / "state", keep=None)
    mesh = build_mesh(config.batch_size, parts=config.accumulate)
    try:
        state, _ = checkpoints.read(checkpoints.steps()[0], replicate(like, mesh))
        with np.load(folder / BATCH_FILE) as saved:
            batch: dict[str, Any] = {}
            for name in saved.files:
                *outer, last = name.split("/")
                inner = batch
                for part in outer:
                    inner = inner.setdefault(part, {})
                inner[last] = saved[name]
    except (Damaged, IndexError, OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read ({error})") from error
    finally:
        checkpoints.close()
    batch = shard_batch(batch, mesh)
    step = int(state.step) + 1
    steps = steps.at(step)
    gradient, losses, _ = jax.device_get(steps.examine(state, batch))
    rows = [_row("the images", seen(batch))]
    rows += _rows("parameter", state.params)
    rows += [_row(f"loss {name}", value) for name, value in losses.items()]
    rows += _rows("gradient of", gradient)
    after, _ = steps.train(state, batch)
    failed = None
    last = [f"step {step}, replayed"]
    if int(after.faults.skipped):
        failed = steps.checks[int(after.faults.check)]
        last += [nonfinite.explain(after.faults, steps.checks)]
        last += [_first_operation(steps, after._replace(step=after.step - 1), batch)]
    else:
        last += [
            "nothing was other than finite this time: the device, the versions or the "
            "configuration are not those of the run"
        ]
    text = "\n".join([*_table(rows), "", *last])
    print(text)
    with writing(workdir):
        write_atomically(folder / REPORT_FILE, text + "\n")
    print(f"written to {folder / REPORT_FILE}")
    return {"step": step, "failed": failed}


def _rows(kind: str, tree: PyTree) -> list[tuple[str, int, int, float]]:
    return [
        _row(f"{kind} {jax.tree_util.keystr(path, simple=True, separator='.')}", leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def _row(name: str, values: jax.typing.ArrayLike) -> tuple[str, int, int, float]:
    """Name, count of numbers, how many are not finite, largest of the others."""
    array = np.asarray(values)
    finite = np.isfinite(array)
    largest = np.abs(array[finite].astype(np.float64)).max(initial=0)
    return name, array.size, int((~finite).sum()), float(largest)


def _table(rows: list[tuple[str, int, int, float]]) -> list[str]:
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'':{width}}  {'numbers':>10}  {'not finite':>10}  largest finite"]
    for name, size, bad, largest in rows:
        lines.append(f"{name:{width}}  {size:>10,}  {bad:>10,}  {largest:.3g}")
    return lines


def _first_operation(steps: Steps, state: TrainState, batch: PyTree) -> str:
    """Runs the step operation by operation until one makes a NaN; says which."""
    try:
        with jax.debug_nans(True):
            jax.block_until_ready(steps.examine(state, batch))
    except FloatingPointError as error:
        places = [
            f"{pathlib.Path(frame.filename).name}:{frame.lineno} {frame.line}"
            for frame in traceback.extract_tb(error.__traceback__)
            if "implicit_slots" in frame.filename
        ]
        return "\n".join(
            [f"the first operation with a NaN: {str(error).splitlines()[0]}", *places]
        )
    return "no operation made a NaN: the first number that is not finite is infinite"
