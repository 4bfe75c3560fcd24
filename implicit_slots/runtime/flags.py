"""Flags, and what is wrong with them in one sentence: what every command shares."""

import difflib
import re
import sys
from collections.abc import Collection

from absl import flags

from implicit_slots.runtime.config import flat
from implicit_slots.runtime.config_files import (
    find_config,
    load_config,
    provide_configs,
)
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.signals import open_streams, silence

FILE_FLAG = re.compile(r"flag --config=(?!None:)")


def is_flag(name: str, argument: str) -> bool:
    """Whether an argument is --name or --name=value."""
    return argument.startswith("-") and argument.lstrip("-").split("=")[0] == name


def flag_value(name: str, argv: list[str]) -> str | None:
    """Returns a flag's value before flags are parsed; None if it is not given.

    The last one counts, as when they are parsed.
    """
    value = None
    for place, argument in enumerate(argv):
        if is_flag(name, argument):
            rest = argv[place + 1 : place + 2]
            value = argument.partition("=")[2] if "=" in argument else "".join(rest)
    return value


def without(name: str, argv: list[str]) -> list[str]:
    """Returns arguments without a flag and its value."""
    kept: list[str] = []
    rest = iter(argv)
    for argument in rest:
        if not is_flag(name, argument):
            kept.append(argument)
        elif "=" not in argument:
            next(rest, None)
    return kept


def drop_output() -> None:
    """Sends what is still to be printed nowhere: its reader (`| head`) is gone."""
    silence([sys.stdout.fileno()])


def refuse_rest(argv: list[str]) -> None:
    """Ends a command that was given more than flags: a space in a value splits it."""
    if argv[1:]:
        print(
            f"error: {argv[1]!r} is no flag; put quotes around a value with spaces",
            file=sys.stderr,
        )
        sys.exit(2)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags of a command that has a --config; `app.run`'s flags_parser.

    Exits with code 2 for bad flags, 1 for a configuration that is not there or a key
    that it does not have.
    """
    open_streams()
    try:
        provide_configs()
        rest = flags.FLAGS(_found(argv))
        config = flags.FLAGS["config"].value
        _ = config and config.name  # a file that cannot be loaded fails here
        return rest
    except flags.Error as error:
        # ml_collections puts the traceback of a failing configuration file before
        # the last line, which alone says what is wrong.
        sentence = str(error).strip().splitlines()[-1]
        sentence = re.sub(r"^[\w.]*(ValueError|InvalidValue): ", "", sentence)
        print(f"error: {sentence}", file=sys.stderr)
        # --config=FILE:variant is the configuration's fault, --config.key=value and the
        # rest are flags'.
        sys.exit(1 if FILE_FLAG.match(str(error)) else 2)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped before anything was done")
    except ImportError as error:
        sys.exit(
            f"error: the configuration needs a module that is not there ({error}); "
            "start from the project's root"
        )
    except BrokenPipeError:  # `--help | head`
        drop_output()
        sys.exit(1)
    except OSError:
        # From the arguments: with --config.key=value the flag has no value yet.
        file = (flag_value("config", argv) or "").split(":")[0]
        sys.exit(f"error: there is no configuration file {file}")
    except (KeyError, AttributeError) as error:
        sys.exit(f"error: {_wrong_key(argv) or str(error).splitlines()[0]}")


def _wrong_key(argv: list[str]) -> str:
    """Names the first --config.KEY that there is not, and those that may be meant."""
    try:
        # A run's own is FILE:what, as --config=FILE:variant.
        known = flat(load_config(flag_value("config", argv) or "").to_dict())
    except Exception:
        known = {}
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=")[0]
        key = name.removeprefix("config.")
        if key == name or key in known or not argument.startswith("-"):
            continue
        return no_key(key, known)
    return ""


def no_key(key: str, known: Collection[str]) -> str:
    """Returns a sentence for a key that there is not."""
    meant = " or ".join(nearest(key, known))
    remedy = f"did you mean {meant}?" if meant else "configs/base.py declares them"
    return f"the configuration has no key {key}; {remedy}"


def nearest(key: str, known: Collection[str]) -> list[str]:
    """Returns the keys that may be meant, the nearest first.

    A key without a section whose name is in several is any of them; else it is one.

    Args:
      key: with dots between its sections.
      known: the keys that there are.
    """

    def name_of(key: str) -> str:
        return key.rpartition(".")[2]

    def distance(other: str) -> float:
        return -difflib.SequenceMatcher(a=other, b=key).ratio()

    names = {name_of(other) for other in known}
    close = difflib.get_close_matches(name_of(key), names, n=1)
    if not close:
        return difflib.get_close_matches(key, known, n=1)
    meant = sorted((k for k in known if name_of(k) == close[0]), key=distance)
    return meant[:3] if close[0] == key else meant[:1]


def _found(argv: list[str]) -> list[str]:
    """Arguments that name the configuration by the path where it is."""
    if not (value := flag_value("config", argv)):
        return argv
    file, colon, variant = value.partition(":")
    place = next(i for i, argument in enumerate(argv) if is_flag("config", argument))
    found = f"--config={find_config(file)}{colon}{variant}"
    return [*argv[:place], found, *without("config", argv[place:])]
