"""Command line: `python -m implicit_slots.main --config=configs/scenes.py`."""

import os
import pathlib
import re
import shlex
import sys
import time

from absl import app, flags, logging
from ml_collections import config_flags

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
FILE_FLAG = re.compile(r"flag --config=(?!None:)")


def main(_: list[str]) -> None:
    """Runs what the flags say; exits with 1 on what the user can put right."""
    # Orbax and clu report every file they touch at INFO.
    logging.set_verbosity(logging.WARNING)
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


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; what is wrong with them is one sentence.

    Exit code 2 for bad flags, 1 for a configuration that is not there or a key that
    it does not have.
    """
    try:
        rest = flags.FLAGS(argv)
        _CONFIG.value.name  # noqa: B018  (a file that cannot be loaded fails here)
        return rest
    except flags.Error as error:
        # ml_collections puts the traceback of a failing configuration file before
        # the last line, which alone says what is wrong.
        sentence = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        print(f"error: {sentence}", file=sys.stderr)
        # --config=FILE:variant is the configuration's fault, --config.key=value and the
        # rest are flags'.
        sys.exit(1 if FILE_FLAG.match(str(error)) else 2)
    except ImportError as error:
        sys.exit(
            f"error: the configuration needs a module that is not there ({error}); "
            "start from the project's root"
        )
    except OSError:
        file = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
        sys.exit(f"error: there is no configuration file {file}")
    except (KeyError, AttributeError) as error:
        key = str(error.args[0]).splitlines()[0].strip("'\"")
        sys.exit(
            f"error: the configuration has no key {key}; configs/base.py declares them"
        )


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
