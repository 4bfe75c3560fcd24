"""Command line: `python -m implicit_slots.main --config=configs/scenes.py`."""

import os
import pathlib
import shlex
import sys
import time

from absl import app, flags, logging
from ml_collections import config_flags

from implicit_slots.command_line import parse
from implicit_slots.training.allocator import keep_freed_memory

_BEGAN = time.perf_counter()

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with an optional :variant.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything is written; runs/<name> unless told otherwise."
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate"], "Train, or evaluate a trained model."
)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    """Runs what the flags say; exits with 1 on what the user can put right."""
    # Orbax and clu report every file they touch at INFO.
    logging.set_verbosity(logging.WARNING)
    keep_freed_memory()
    # After the flags are parsed: --help needs no JAX.
    from implicit_slots.data.base import DataError
    from implicit_slots.training.errors import UserError
    from implicit_slots.training.run import run

    config = _CONFIG.value
    workdir = pathlib.Path(_WORKDIR.value or os.path.join("runs", config.name))
    try:
        run(config, workdir, mode=_MODE.value, command=_command(), began=_BEGAN)
    except (UserError, DataError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command resumes {workdir}")


def _command() -> str:
    return shlex.join(["python", "-m", "implicit_slots.main", *sys.argv[1:]])


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
