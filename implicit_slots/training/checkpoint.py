"""Checkpoints with Orbax, and the guard that a workdir belongs to one model."""

import json
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from implicit_slots.config import Config
from implicit_slots.training.errors import UserError
from implicit_slots.training.state import TrainState

CONFIG_FILE = "config.json"
CHECKPOINT_FOLDER = "checkpoints"

# What a run may change when it goes on; anything else makes it another run.
MAY_CHANGE = {
    "num_steps",
    "log_every",
    "validate_every",
    "draw_every",
    "checkpoint_every",
    "keep_checkpoints",
    "num_pictures",
    "num_scored",
    "diagnostics.every",
    "diagnostics.num_examples",
    "diagnostics.krylov",
    "diagnostics.powers",
    "data.cache",
    "data.placement",
    "data.test_set",
    "data.workers",
    # How the same model is computed.
    "precision",
    "model.attention",
    "model.remat",
    "model.adjoint.remat",
}


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's directory; they lie in its `checkpoints/`.
      keep: how many of the latest to keep.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int):
        self._manager = ocp.CheckpointManager(
            (workdir / CHECKPOINT_FOLDER).resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                # On CPU a background write would read the arrays in place while the
                # next step, which is given their memory, already writes there.
                enable_async_checkpointing=False,
            ),
        )

    def latest_step(self) -> int | None:
        """Returns the step of the latest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint of the state at its step."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(state._asdict()))

    def restore(self, like: TrainState) -> TrainState:
        """Reads the latest checkpoint into the shapes and shardings of `like`.

        Raises:
          UserError: if it cannot be read.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        step = self.latest_step()
        try:
            restored = self._manager.restore(
                step, args=ocp.args.StandardRestore(abstract)
            )
        except Exception as error:  # Orbax raises whatever its storage layer raises
            raise UserError(
                f"the checkpoint of step {step} in {self._manager.directory} cannot be "
                f"read; remove {self._manager.directory / str(step)} to resume from "
                f"the one before ({type(error).__name__})"
            ) from error
        return TrainState(**restored)

    def close(self) -> None:
        """Lets go of the directory."""
        self._manager.close()


def check_same_run(
    config: Config, workdir: pathlib.Path, *, training: bool = True
) -> None:
    """Refuses a workdir that holds another configuration's run.

    Args:
      config: of this run.
      workdir: where the other may be.
      training: whether the run is to go on, and not only to be evaluated: then its
        data must be where they were, or nothing would tell them from others.

    Raises:
      UserError: naming the first key that differs.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        if (workdir / CHECKPOINT_FOLDER).exists():
            raise UserError(
                f"{workdir} holds checkpoints but no {CONFIG_FILE} that says of what; "
                "choose another --workdir"
            )
        return
    try:
        before = _flat(json.loads(path.read_text()))
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(
            f"{path} is not a run's configuration; choose another --workdir"
        ) from error
    now = _flat(json.loads(config.to_json()))
    may_change = MAY_CHANGE if training else MAY_CHANGE | {"data.path"}
    for key in sorted((before.keys() | now.keys()) - may_change):
        if key == "data.path" and _is_one_place(before.get(key), now.get(key)):
            continue
        if before.get(key) != now.get(key):
            raise UserError(
                f"{workdir} holds another run: its {key} is {before.get(key)!r}, this "
                f"configuration's is {now.get(key)!r}; choose another --workdir or set "
                "that key back"
            )


def _is_one_place(path: str | None, other: str | None) -> bool:
    if not path or not other:
        return False
    return os.path.realpath(path) == os.path.realpath(other)


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Keys with dots, as on the command line."""
    flat = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
