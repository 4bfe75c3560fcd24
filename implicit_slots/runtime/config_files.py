"""Where a --config is found: in the working directory, or among the package's own."""

import importlib
import importlib.util
import os
import pathlib
import sys
import types
from typing import Any

from implicit_slots.runtime.files import expand

FOLDER = "configs"
_PACKAGE = pathlib.Path(__file__).parents[1]


def find_config(file: str) -> str:
    """Returns the path of a configuration file, as a user named it.

    A relative path is looked for in the working directory and, if it begins with
    configs/, among the configurations that were installed with the package.

    Raises:
      UserError: it is the address of a bucket, or there is no home folder for ~.
    """
    path = expand(file) if file else pathlib.Path()
    if not path.is_file() and path.parts[:1] == (FOLDER,):
        for folder in _installed():
            if (folder.parent / path).is_file():
                return str(folder.parent / path)
    return str(path) if file else file


def load_config(source: str) -> Any:
    """Returns the configuration of FILE or FILE:variant.

    Raises:
      ValueError: there is no such file or variant.
    """
    file, _, variant = source.partition(":")
    file = find_config(file)
    spec = importlib.util.spec_from_file_location("loaded_configuration", file)
    if spec is None or spec.loader is None or not os.path.isfile(file):
        raise ValueError(f"there is no configuration file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant or None)


def provide_configs() -> None:
    """Lets configurations import `configs` where the working directory has no such.

    A folder `configs` of the user's own keeps its modules, and gets the package's.
    """
    sought = f"{FOLDER}.base"
    if sought in sys.modules or _is_importable(sought):
        return
    module: Any = sys.modules.get(FOLDER)
    if not hasattr(module, "__path__"):
        module = sys.modules[FOLDER] = types.ModuleType(FOLDER)
        module.__path__ = []
    module.__path__ = [*module.__path__, *map(os.fspath, _installed())]


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Its parent is not there, or is no package.
        return False


def _installed() -> list[pathlib.Path]:
    """The package's configurations: within it in a wheel, else beside it."""
    folders = (_PACKAGE / FOLDER, _PACKAGE.parent / FOLDER)
    return [folder for folder in folders if (folder / "base.py").is_file()]
