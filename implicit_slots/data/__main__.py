"""Command line: `python -m implicit_slots.data prepare --config=configs/clevr.py`.

Commands:
  prepare  writes the data set into the cache at the training resolution.
  inspect  prints shapes and counts, and draws a sheet of examples with their masks.
  verify   compares a prepared cache with its checksums, byte by byte.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand
from implicit_slots.runtime.flags import drop_output, parse

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with an optional :variant.", lock_config=True
)
_SPLITS = flags.DEFINE_list(
    "splits", ["train", "validation", "test"], "Which splits, with commas."
)
_OUTPUT = flags.DEFINE_string(
    "output", "", "inspect: folder of the sheets; runs/inspect unless told otherwise."
)
_COUNT = flags.DEFINE_integer("count", 32, "inspect: examples on a sheet.", 1)
flags.mark_flag_as_required("config")

COMMANDS = ("prepare", "inspect", "verify")


def main(argv: list[str]) -> None:
    """Runs a command; exits with 1 on what the user can put right."""
    logging.set_verbosity(logging.WARNING)
    if len(argv) != 2 or argv[1] not in COMMANDS:
        print(
            f"error: name one command: {', '.join(COMMANDS)}; got "
            f"{' '.join(argv[1:]) or 'none'}",
            file=sys.stderr,
        )
        sys.exit(2)
    run = {"prepare": prepare, "inspect": inspect, "verify": verify}[argv[1]]
    try:
        # After the flags are parsed: --help needs no JAX.
        from implicit_slots.runtime.devices import find_devices
    except KeyboardInterrupt:
        sys.exit("stopped before anything was done")
    try:
        find_devices()
        for split in _SPLITS.value:
            run(split)
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        drop_output()
        sys.exit("the output is read no more; the same command goes on where it was")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")


def prepare(split: str) -> None:
    """Writes a split into the cache."""
    from implicit_slots.data.prepared import prepare

    prepare.prepare(_CONFIG.value.data, split)


def verify(split: str) -> None:
    """Compares a split in the cache with its checksums."""
    from implicit_slots.data import registry
    from implicit_slots.data.source import DataError
    from implicit_slots.runtime.progress import bar

    source = registry.open_prepared(registry.request(_CONFIG.value.data, split))
    if source is None:
        raise DataError(
            f"split '{split}' is not prepared; python -m implicit_slots.data prepare "
            "does that, for all data sets but scenes"
        )
    source.verify(bar)
    print(f"{split}: {len(source):,} examples, every block as it was written")


def inspect(split: str) -> None:
    """Prints what a split holds and draws its first examples."""
    from implicit_slots.data.prepared import inspect
    from implicit_slots.data.source import DataError
    from implicit_slots.drawing import grids

    config = _CONFIG.value
    lines, batch = inspect.look(config.data, split, _COUNT.value)
    print(f"{config.name}, {split} {lines}")
    folder = expand(_OUTPUT.value or "runs/inspect")
    path = folder / f"{config.name}_{split}.png"
    try:
        grids.save_png(inspect.sheet(batch), path)
    except OSError as error:
        raise DataError(
            f"the sheet {path} cannot be written ({error.strerror}); name another "
            "folder with --output=FOLDER"
        ) from error
    print(f"  sheet: {path}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
