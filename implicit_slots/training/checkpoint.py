"""Checkpoints with Orbax, and the guard that a workdir belongs to one model."""

import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from implicit_slots.config import Config
from implicit_slots.training.errors import UserError
from implicit_slots.training.state import TrainState

CONFIG_FILE = "config.json"


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's directory; they lie in its `checkpoints/`.
      keep: how many of the latest to keep.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int):
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").resolve(),
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
        """Reads the latest checkpoint into the shapes and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        restored = self._manager.restore(
            self.latest_step(), args=ocp.args.StandardRestore(abstract)
        )
        return TrainState(**restored)

    def close(self) -> None:
        """Lets go of the directory."""
        self._manager.close()


def check_same_model(config: Config, workdir: pathlib.Path) -> None:
    """Refuses a workdir whose checkpoints are another model's.

    Raises:
      UserError: naming the first key that differs.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return
    try:
        before = _identity(json.loads(path.read_text()))
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not a run's configuration; choose another --workdir"
        ) from error
    now = _identity(json.loads(config.to_json()))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{workdir} holds another model's run: its {key} is "
                f"{before.get(key)!r}, this configuration's is {now.get(key)!r}; "
                "choose another --workdir or set that key back"
            )


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that decide which parameters there are and what they mean."""
    flat = {"data.resolution": config["data"]["resolution"]}

    def add(prefix: str, section: dict[str, Any]) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                add(f"{prefix}.{key}", value)
            else:
                flat[f"{prefix}.{key}"] = value

    add("model", config["model"])
    return flat
