"""Where tensorflow-datasets keeps prepared data, and its files of records."""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from implicit_slots.data.readers.tfrecords import RecordFile
from implicit_slots.data.source import DataError
from implicit_slots.runtime.errors import InvalidValue
from implicit_slots.runtime.files import expand

VERSION = re.compile(r"\d+\.\d+\.\d+")
INFO = "dataset_info.json"


@dataclasses.dataclass(frozen=True)
class Description:
    """What the files of a prepared data set say of it.

    Attributes:
      folder: of this version.
      name: of the data set.
      config: its configuration, or nothing.
      version: its version.
      splits: tensorflow-datasets' `SplitDict`.
      file_format: "array_record", "tfrecord" or another.
    """

    folder: Path
    name: str
    config: str
    version: str
    splits: Any
    file_format: str

    @property
    def dataset(self) -> str:
        """Name and configuration."""
        return f"{self.name}/{self.config}" if self.config else self.name

    def __str__(self) -> str:
        return f"{self.dataset}/{self.version}"


def data_dir(path: str) -> Path:
    """Where data sets are prepared: tensorflow-datasets' own default if not named."""
    from tensorflow_datasets.core import constants

    try:
        return expand(path or constants.DATA_DIR)
    except InvalidValue as error:
        raise DataError(f"{error}: set --config.data.path=FOLDER") from error


def find(dataset: str, root: Path) -> Path | None:
    """The folder of a prepared version, the highest unless one is named.

    Raises:
      DataError: a configuration has to be named, or a folder may not be read.
    """
    name, _, version = dataset.partition(":")
    if not name:
        raise DataError(
            "no data set of tensorflow-datasets is named; set "
            "--config.data.dataset=NAME"
        )
    root = Path(os.path.abspath(root))  # For the sake of its parents.
    try:
        if (root / INFO).is_file():
            return root
        # The path may also be that of the data set, or of its configuration.
        parts = len(Path(name).parts)
        homes = [root / name, *(base / name for base in root.parents[:parts])]
        homes = [
            h
            for place, h in enumerate(homes)
            if h.is_dir() and (place == 0 or h == root or h.parent == root)
        ]
        if not homes:
            return None
        home = homes[0]
        versions = [
            folder
            for folder in home.iterdir()
            if VERSION.fullmatch(folder.name)
            and version in ("", folder.name)
            and (folder / INFO).is_file()
        ]
        configurations = sorted(
            {f.parent.parent.name for f in home.glob(f"*/*/{INFO}")}
        )
    except OSError as error:
        raise _unreadable(root, error) from error
    if not versions and configurations:
        raise DataError(
            f"{home} has no version of data set '{name}' but "
            f"{', '.join(configurations)}; set --config.data.dataset="
            f"{name}/{configurations[0]} if that is the one, or "
            f"--config.data.path={home} if the data set lies in there"
        )
    return max(versions, key=_version_number, default=None)


def _version_number(folder: Path) -> list[int]:
    return [int(number) for number in folder.name.split(".")]


def describe(dataset: str, path: str) -> Description:
    """Finds a prepared data set, whether tensorflow-datasets knows it or not.

    Neither the data set's code nor its description of features is used: both may ask
    for TensorFlow.

    Raises:
      DataError: it is not there; the sentence says how to get it.
    """
    # Slow to import, and only this source needs it.
    from etils import epath
    from tensorflow_datasets.core import dataset_info, naming, splits

    root = data_dir(path)
    folder = find(dataset, root)
    if folder is None:
        check_known(dataset, root)
        raise DataError(
            f"data set '{dataset}' is not prepared in {root}; `python -m "
            "implicit_slots.data prepare` with the same --config does that (for which "
            "it needs TensorFlow; reading does not); or set --config.data.path to "
            "where it is"
        )
    try:
        with (folder / INFO).open("rb"):
            pass
    except OSError as error:
        raise _unreadable(folder / INFO, error) from error
    try:
        info = dataset_info.read_proto_from_builder_dir(str(folder))
        file_format = (
            info.file_format or "tfrecord"
        )  # Written before there was another.
        template = naming.ShardedFileTemplate(
            dataset_name=info.name,
            data_dir=epath.Path(folder),
            filetype_suffix=file_format,
        )
        description = Description(
            folder,
            info.name,
            info.config_name,
            info.version,
            splits.SplitDict.from_proto(
                repeated_split_infos=info.splits, filename_template=template
            ),
            file_format,
        )
    except Exception as error:  # Whatever its readers of JSON and protobuf raise.
        raise DataError(
            f"{folder / INFO} does not describe a data set of tensorflow-datasets: "
            f"{first_line(error)}; prepare or download it again"
        ) from error
    asked, _, version = dataset.partition(":")
    if version not in ("", description.version):
        raise DataError(
            f"{folder} holds version {description.version} of data set '{asked}', not "
            f"{version}; set --config.data.dataset={asked}:{description.version} or "
            "another --config.data.path"
        )
    if asked not in (description.dataset, description.name):
        raise DataError(
            f"{folder} holds data set '{description.dataset}', not '{dataset}'; take "
            "the configuration of that set, or set another --config.data.path"
        )
    return description


def check_known(dataset: str, root: Path) -> None:
    """Refuses what tensorflow-datasets cannot prepare.

    Raises:
      DataError: for MOVi, the sentence says how to copy it.
    """
    import tensorflow_datasets as tfds

    name = re.split("[/:]", dataset)[0]
    if name.startswith("movi_"):
        files = dataset.partition(":")[0]
        files = files if "/" in files else f"{files}/128x128"
        raise DataError(
            f"data set '{dataset}' is not in {root}; copy it with: mkdir -p {root}/"
            f"{name} && gsutil -m cp -r gs://kubric-public/tfds/{files} {root}/{name}/"
        )
    if name not in tfds.list_builders(with_community_datasets=False):
        raise DataError(
            f"tensorflow-datasets cannot find '{dataset}': it is neither in {root} nor "
            "among those that it can prepare; set --config.data.dataset or "
            "--config.data.path"
        )


def instructions(
    description: Description, expression: str, split: str
) -> Sequence[Any]:
    """The files of a split and which of their records belong to it.

    Args:
      description: of the data set.
      expression: of tensorflow-datasets, such as "train[:90%]".
      split: what it is for, in a sentence.

    Returns:
      tensorflow-datasets' `FileInstruction`s.

    Raises:
      DataError: there is no such split, or nothing in it.
    """
    names = ", ".join(sorted(description.splits))
    try:
        found = description.splits[expression].file_instructions
    except Exception as error:  # KeyError, ValueError or AssertionError.
        why = (
            f"has no split '{expression}', only {names}"
            if expression.isidentifier()
            else f"cannot be split by '{expression}': {first_line(error)} (it has "
            f"{names})"
        )
        raise DataError(
            f"data set '{description}' {why}; set --config.data.splits.{split}"
        ) from error
    if not found:
        raise DataError(
            f"split '{expression}' of data set '{description}' is empty; set "
            f"--config.data.splits.{split}"
        )
    return found


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read: {error.strerror or error}; change its permissions, or "
        "set --config.data.path to where the data set is"
    )


def _broken(path: Path, kind: str, error: Exception) -> DataError:
    return DataError(
        f"{path} is not a whole {kind} file: {first_line(error)}; prepare or download "
        "the data set again"
    )


def first_line(error: Exception) -> str:
    """What a library's exception says, as a part of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Records:
    """The records of a split, which lie in several files; thread-safe."""

    def __init__(self, instructions: Sequence[Any], file_format: str):
        """Checks that the files are there; opens none.

        Args:
          instructions: tensorflow-datasets' `file_instructions`.
          file_format: "array_record" or "tfrecord".

        Raises:
          DataError: another format, or files are missing.
        """
        self._instructions = instructions
        self._files = [Path(instruction.filename) for instruction in instructions]
        self._ends = np.cumsum([instruction.take for instruction in instructions])
        folder = self._files[0].parent
        if file_format not in _KINDS:
            raise DataError(
                f"the files in {folder} are {file_format}, which is not read; prepare "
                "the data set with file_format='array_record'"
            )
        self._kind = file_format
        self._open, at_a_time = _KINDS[file_format]
        try:
            sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
        except OSError as error:
            raise _unreadable(folder, error) from error
        missing = [file.name for file in self._files if file.name not in sizes]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self._files)} files of the split "
                f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}) are "
                f"not in {folder}; copy them there or prepare the data set again"
            )
        self._sizes = [sizes[file.name] for file in self._files]
        # A file that two threads open at once is open twice for a moment: harmless.
        self.file = functools.lru_cache(at_a_time)(self._checked_file)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> bytes:
        file, place = self._locate(position)
        records = self.file(file)
        try:
            return records[place]
        except DataError:
            raise
        except Exception as error:  # array_record hands on what its C++ throws.
            raise _broken(self._files[file], self._kind, error) from error

    @property
    def num_files(self) -> int:
        """Number of files."""
        return len(self._files)

    def where(self, position: int) -> str:
        """A record's name in a sentence."""
        file, place = self._locate(position)
        return f"record {place} of {self._files[file]}"

    def digest(self) -> str:
        """SHA-256 of the names and sizes of the files."""
        names = [file.name for file in self._files]
        listing = repr(list(zip(names, self._sizes, strict=True)))
        return hashlib.sha256(listing.encode()).hexdigest()

    def _locate(self, position: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, position, side="right"))
        instruction = self._instructions[file]
        first = int(self._ends[file]) - instruction.take
        return file, instruction.skip + position - first

    def _checked_file(self, file: int) -> Any:
        path = self._files[file]
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            records = self._open(path)
            count = len(records)
        except DataError:
            raise
        except Exception as error:  # array_record hands on what its C++ throws.
            raise _broken(path, self._kind, error) from error
        expected = self._instructions[file].examples_in_shard
        if count != expected:
            raise DataError(
                f"{path} has {count} records instead of {expected}; prepare or "
                "download the data set again"
            )
        return records


def _open_array_record(path: Path) -> Any:
    from array_record.python import array_record_data_source

    return array_record_data_source.ArrayRecordDataSource([str(path)])


# How each kind is opened, and how many are open at a time: MOVi has about a thousand,
# and of the second kind each reading thread has a handle of its own.
_KINDS = {"array_record": (_open_array_record, 256), "tfrecord": (RecordFile, 32)}
