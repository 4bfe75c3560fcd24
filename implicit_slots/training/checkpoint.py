"""Checkpoints with Orbax: written, read, looked through for damage."""

import contextlib
import errno
import json
import logging as standard_logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any, TypedDict

import google_crc32c
import jax
import orbax.checkpoint as ocp
from absl import logging

from implicit_slots.runtime import processes
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import write_atomically
from implicit_slots.runtime.workdir import writing
from implicit_slots.training.state import TrainState

CHECKPOINT_FOLDER = "checkpoints"
BEST_FOLDER = "best"
DAMAGED_FOLDER = "damaged"
CHECKSUM_FILE = "checksums.json"
# How names begin that a Mac, NFS and FUSE give to files of their own.
OF_OTHERS = ("._", ".DS_Store", ".nfs", ".fuse_hidden")


class SavedLoop(TypedDict):
    """What a checkpoint holds of the loop, beside the state.

    Attributes:
      window: the leaves of the training metrics since the last logged step, merged;
        nothing where that is the checkpoint's own step.
      best: the lowest validation loss so far; null if there was none.
    """

    window: list[float]
    best: float | None


class Damaged(Exception):
    """A checkpoint that cannot be read, or holds other numbers than were written."""


class Checkpoints:
    """The checkpoints of one folder, written by all processes together.

    Each holds arrays and JSON, no pickles. Orbax renames it to its name when it is
    complete; a checksum of each file is added then.

    Args:
      folder: where they lie; created if it is not there.
      keep: how many of the latest to keep; None: to read only, beside whoever writes.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int | None):
        self.folder = folder.resolve()
        with _silenced():
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                read_only=keep is None,
                create=keep is not None,
                # What a killed process left of its last one.
                cleanup_tmp_directories=keep is not None,
                # On CPU a background write would read the arrays in place while the
                # next step, which is given their memory, already writes there.
                enable_async_checkpointing=False,
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, latest first.

        As process 0 sees them: on a shared file system another may see them later. All
        processes must ask together.
        """
        return processes.of_main(sorted(self._manager.all_steps(), reverse=True))

    def save(self, state: TrainState, loop: SavedLoop | None = None) -> None:
        """Writes a checkpoint of the state at its step.

        Raises:
          UserError: if it cannot be written; those before it are as they were.
        """
        step = int(state.step)
        loop = loop or SavedLoop(window=[], best=None)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            loop=ocp.args.JsonSave(loop),
        )
        try:
            with _silenced():
                self._manager.save(step, args=items, force=True)
            # A checkpoint that a kill leaves without is whole all the same.
            if processes.is_main():
                sums = json.dumps(_checksums(self.folder / str(step)))
                write_atomically(self.folder / str(step) / CHECKSUM_FILE, sums)
        except Exception as error:  # Orbax raises whatever its storage layer raises
            if processes.lost_another(error):
                raise
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.folder} "
                f"({_reason(error)}); those before it are whole: make room there "
                "and start the same command again"
            ) from error

    def read(self, step: int, like: TrainState) -> tuple[TrainState, SavedLoop]:
        """Reads one checkpoint into the shapes and shardings of `like`.

        Raises:
          Damaged: if it is not what was written.
          UserError: if it cannot be read for another reason; it is whole.
        """
        # Before Orbax reads: it would load numbers that were changed.
        folder, damage, whole = self.folder / str(step), "", False
        with processes.together():
            if processes.is_main():
                damage, whole = _look_through(folder)
        if not processes.agree(not damage):
            raise Damaged(damage)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), loop=ocp.args.JsonRestore()
        )
        found: Any = None
        failure: Exception | None = None
        try:
            with _silenced():
                found = self._manager.restore(step, args=items)
            found = TrainState(**found["state"]), SavedLoop(**found["loop"])
        except Exception as error:  # Orbax raises whatever its storage layer raises
            failure = error
        if processes.agree(failure is None):
            return found
        reason = "another process cannot" if failure is None else _reason(failure)
        if not processes.agree(not whole):  # Process 0 knows.
            raise UserError(_unread(folder, reason)) from failure
        raise Damaged(reason) from failure

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a checkpoint out of the way; returns where it lies now."""
        target = self.folder.parent / DAMAGED_FOLDER / str(step)
        if processes.is_main():
            while target.exists():
                target = target.with_name(f"{target.name}-again")
            with writing(self.folder.parent):
                target.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(target)
        processes.barrier("set aside")
        self._manager.reload()
        return target

    def close(self) -> None:
        """Lets go of the directory."""
        self._manager.close()


def restore(
    checkpoints: Checkpoints, like: TrainState, *, set_aside: bool
) -> tuple[TrainState, SavedLoop] | None:
    """Reads the latest checkpoint that is whole; None if there is none at all.

    Args:
      checkpoints: where to look.
      like: gives shapes and shardings.
      set_aside: whether damaged ones are moved out of the way; else they are left.

    Raises:
      UserError: if there are checkpoints and each is damaged.
    """
    damaged: dict[int, Damaged] = {}
    for step in checkpoints.steps():
        try:
            found = checkpoints.read(step, like)
        except Damaged as damage:
            damaged[step] = damage
            continue
        for other, damage in damaged.items():
            place = checkpoints.folder / str(other)
            moved = f"; now {checkpoints.set_aside(other)}" if set_aside else ""
            processes.say(f"the checkpoint {place} is damaged ({damage}){moved}")
        return found
    if damaged:
        step, damage = next(iter(damaged.items()))
        raise UserError(
            f"no checkpoint of {checkpoints.folder} can be read (step {step}: "
            f"{damage}); start again with another --workdir"
        )
    return None


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of a run's checkpoints, from the first to the last."""
    folder = workdir / CHECKPOINT_FOLDER
    with contextlib.closing(Checkpoints(folder, keep=None)) as checkpoints:
        return sorted(checkpoints.steps())


def _checksums(folder: pathlib.Path) -> dict[str, int]:
    """Of every file that Orbax wrote to a checkpoint, by its name within."""
    return {
        file.relative_to(folder).as_posix(): google_crc32c.value(file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(OF_OTHERS)
    }


def _look_through(folder: pathlib.Path) -> tuple[str, bool]:
    """Looks for damage in a checkpoint's files.

    Files that were not written with it are none: other programs leave theirs
    (.DS_Store, ._*, .nfs*, Thumbs.db).

    Returns:
      What is wrong, or nothing; whether that is known: a checkpoint may have no
      checksums.

    Raises:
      UserError: if they cannot be read now, which says nothing of what they hold.
    """
    try:
        wanted = json.loads((folder / CHECKSUM_FILE).read_text())
        for name, checksum in sorted(wanted.items()):
            try:
                found = google_crc32c.value((folder / name).read_bytes())
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return f"{name} is missing", True
            if found != checksum:
                return f"{name} is not as it was written", True
    except FileNotFoundError:
        return "", False
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror}"
        if error.errno == errno.EIO:  # The disk has lost it.
            return reason, True
        raise UserError(_unread(folder, reason)) from error
    except (AttributeError, ValueError):
        return f"{CHECKSUM_FILE} cannot be read", True
    return "", True


def _unread(folder: pathlib.Path, reason: str) -> str:
    """What is said of a checkpoint that cannot be read although it may be whole."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((folder / CHECKSUM_FILE).read_text())
        if others := sorted(_checksums(folder).keys() - {*known, CHECKSUM_FILE}):
            reason += f"; no run wrote {others[0]}, which may be why"
    return (
        f"the checkpoint {folder} cannot be read ({reason}); it is left as it is: put "
        "that right and start the same command again"
    )


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keeps Orbax from showing a traceback for each array of a damaged or full disk."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    # What its tasks and threads have to say may come at any time later.
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _reason(error: Exception) -> str:
    """The point of a storage error, whose text may be pages."""
    text = str(error)
    for known in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
        if os.strerror(known) in text:
            return os.strerror(known)
    return text.strip(": \n").split(":")[0].split("\n")[0][:80] or type(error).__name__


def open_checkpoints(
    workdir: pathlib.Path, name: str, keep: int | None
) -> contextlib.closing[Checkpoints]:
    """Opens a folder of checkpoints of a workdir; `keep` as `Checkpoints` has it."""
    with writing(workdir):
        return contextlib.closing(Checkpoints(workdir / name, keep=keep))
