"""Flags, and what is wrong with them in one sentence: what every command shares."""

import os
import re
import sys

from absl import flags

FILE_FLAG = re.compile(r"flag --config=(?!None:)")


def is_flag(name: str, argument: str) -> bool:
    """Whether an argument is --name or --name=value."""
    return argument.startswith("-") and argument.lstrip("-").split("=")[0] == name


def flag_value(name: str, argv: list[str]) -> str | None:
    """Returns a flag's value before flags are parsed; None if it is not given."""
    for place, argument in enumerate(argv):
        if is_flag(name, argument):
            rest = argv[place + 1 : place + 2]
            return argument.partition("=")[2] if "=" in argument else "".join(rest)
    return None


def drop_output() -> None:
    """Sends what is still to be printed nowhere: its reader (`| head`) is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(argv: list[str]) -> list[str]:
    """Parses the flags of a command that has a --config; `app.run`'s flags_parser.

    Exits with code 2 for bad flags, 1 for a configuration that is not there or a key
    that it does not have.
    """
    try:
        rest = flags.FLAGS(argv)
        config = flags.FLAGS["config"].value
        _ = config and config.name  # a file that cannot be loaded fails here
        return rest
    except flags.Error as error:
        # ml_collections puts the traceback of a failing configuration file before
        # the last line, which alone says what is wrong.
        sentence = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        print(f"error: {sentence}", file=sys.stderr)
        # --config=FILE:variant is the configuration's fault, --config.key=value and the
        # rest are flags'.
        sys.exit(1 if FILE_FLAG.match(str(error)) else 2)
    except KeyboardInterrupt:
        sys.exit("stopped before anything was done")
    except ImportError as error:
        sys.exit(
            f"error: the configuration needs a module that is not there ({error}); "
            "start from the project's root"
        )
    except OSError:
        # From the arguments: with --config.key=value the flag has no value yet.
        file = (flag_value("config", argv) or "").split(":")[0]
        sys.exit(f"error: there is no configuration file {file}")
    except (KeyError, AttributeError) as error:
        # ml_collections quotes its message twice: \'key\'\\nDid you mean "other" …
        text = str(error.args[0]).replace("\\n", "\n").replace("\\'", "'")
        key = text.splitlines()[0].strip("'\"")
        meant = re.search(r'Did you mean "(\w+)"', text)
        suggestion = f"did you mean {meant[1]}?" if meant else ""
        sys.exit(
            f"error: the configuration has no key {key}; "
            f"{suggestion or 'configs/base.py declares them'}"
        )
