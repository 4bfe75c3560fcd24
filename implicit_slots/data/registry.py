"""The table of data sets, and how a configuration's section becomes a source."""

import dataclasses
import functools
import inspect
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Int

from implicit_slots.data.options import KINDS
from implicit_slots.data.prepared.cache import Prepared
from implicit_slots.data.prepared.cache_folder import cache_folder, is_finished
from implicit_slots.data.readers.files import readable
from implicit_slots.data.readers.frame_source import FrameSource, Progress
from implicit_slots.data.scenes.source import Scenes
from implicit_slots.data.sets.clevr_mirror import ClevrMirror
from implicit_slots.data.sets.clevrtex import ClevrTex
from implicit_slots.data.sets.coco import Coco
from implicit_slots.data.sets.folder import ImageFolder
from implicit_slots.data.sets.multi_object import MultiObject
from implicit_slots.data.sets.multi_object_files import LAYOUTS, split_sizes
from implicit_slots.data.sets.shapestacks import ShapeStacks
from implicit_slots.data.sets.tfds import Tfds
from implicit_slots.data.sets.voc import Voc
from implicit_slots.data.source import SPLITS, Batch, DataError, Example, Source
from implicit_slots.runtime import processes
from implicit_slots.runtime.config import Config, flat
from implicit_slots.runtime.errors import InvalidValue
from implicit_slots.runtime.files import expand
from implicit_slots.runtime.progress import bar
from implicit_slots.runtime.values import check_values

# Keys of config.data that are not the reader's: how its examples are used.
USAGE = MappingProxyType(
    {"cache": "", "keep_objects": 0, "flip": False, "placement": "host", "workers": 2}
)
# A look into every file before a run costs a second per few thousand files: larger sets
# are looked through when they are prepared, or else frame by frame as they are read.
CHECKED = 20_000
# Arguments that the test split alone depends on.
OF_TEST = ("test_set",)
# Arguments that are younger than caches: their defaults are no part of what a cache is.
YOUNGER = MappingProxyType({"overlaps": "smaller"})
# What the readers make of files, of all others 1: raised when a change of the code
# changes examples, so that caches of before are not taken for theirs.
READERS_VERSIONS = MappingProxyType({"folder": 2, "coco": 2, "coco_tfds": 2, "tfds": 2})


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A row of the table.

    Attributes:
      reader: the class that reads it.
      fixed: arguments of the reader that the name stands for.
      published: number of examples of each split, where the publication says.
      files: what a user has to put below `path`, and where to get it; empty where
        the reader itself says so.
    """

    reader: Callable[..., Source]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: Mapping[str, int] = dataclasses.field(default_factory=dict)
    files: str = ""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a section asks for, every default filled in.

    Attributes:
      data_set: the row of the table.
      arguments: of its reader, `split` among them.
      usage: how the examples are used: `USAGE`, with the section's values.
      identity: what the examples depend on, as JSON. Where the files are is not part
        of it, so that a cache can move to a machine that does not have them.
    """

    data_set: DataSet
    arguments: Mapping[str, Any]
    usage: Mapping[str, Any]
    identity: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Where the data set's files are; empty for its default, or if it has none."""
        return self.arguments.get("path", "")

    @property
    def folder(self) -> Path | None:
        """Where these examples lie once they are prepared; None without a cache."""
        cache = self.usage["cache"]
        return cache_folder(cache, self.identity) if cache else None


SOURCES: Mapping[str, DataSet] = {
    "scenes": DataSet(Scenes),
    "folder": DataSet(
        ImageFolder,
        files="images/, optional masks/ with the same names, optional scenes.json",
    ),
    "tfds": DataSet(Tfds),
    "clevr": DataSet(
        Tfds,
        {"dataset": "clevr"},
        {"train": 70_000, "validation": 15_000, "test": 15_000},
    ),
    **{
        name: DataSet(MultiObject, {"dataset": name}, split_sizes(name))
        for name in LAYOUTS
    },
    "clevr_mirror": DataSet(
        ClevrMirror, files="images/*.png and scenes/*.json of the same names"
    ),
    "shapestacks": DataSet(
        ShapeStacks,
        files="recordings/, splits/ and, for masks, iseg/, from "
        "shapestacks.robots.ox.ac.uk",
    ),
    "clevrtex": DataSet(
        ClevrTex,
        files="clevrtex_<variant>/ as it is unpacked, from "
        "robots.ox.ac.uk/~vgg/data/clevrtex",
    ),
    "coco": DataSet(
        Coco,
        published={"train": 118_287, "validation": 5_000, "test": 5_000},
        files="train2017/, val2017/ and annotations/, from cocodataset.org",
    ),
    "coco_tfds": DataSet(
        Tfds,
        {"dataset": "coco/2017_panoptic"},
        {"train": 118_287, "validation": 5_000, "test": 5_000},
    ),
    "voc": DataSet(
        Voc,
        published={"train": 10_582, "validation": 1_449, "test": 1_449},
        files="VOCdevkit/VOC2012/, from host.robots.ox.ac.uk/pascal/VOC/voc2012",
    ),
    "shapes3d": DataSet(
        Tfds,
        {"dataset": "shapes3d"},
        {"train": 400_000, "validation": 29_999, "test": 29_999},
    ),
    "movi_a": DataSet(Tfds, {"dataset": "movi_a/128x128"}),
    "movi_c": DataSet(Tfds, {"dataset": "movi_c/128x128"}),
    "movi_e": DataSet(Tfds, {"dataset": "movi_e/128x128"}),
}


def build(
    config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict,
    split: str,
    keys: Collection[str] | None = None,
) -> Source:
    """The source that a configuration's section describes.

    A finished cache is read where `config.data.cache` has one; else frames are decoded
    when they are asked for. A compressed record file needs the cache.

    Args:
      config: `name`, a key of `SOURCES`, arguments of its reader, and keys of `USAGE`.
      split: "train", "validation" or "test".
      keys: what its batches hold; None for all there is.

    Raises:
      DataError: an unknown name, split or option, or data that cannot be used.
    """
    asked = request(config, split)
    source = open_prepared(asked, keys)
    if source is None:
        source = open_files(asked, keys)
    check_cheaply(source)
    return source


def check_cheaply(source: Source) -> None:
    """Looks into a data set's own files if that takes seconds.

    Raises:
      DataError: they cannot be used, or need a prepared cache.
    """
    if isinstance(source, MultiObject) or (
        isinstance(source, FrameSource | Subset) and len(source) <= CHECKED
    ):
        source.check(bar)


def open_prepared(
    asked: Request, keys: Collection[str] | None = None, *, compare: bool = False
) -> Prepared | None:
    """The cache of a request, if it is finished.

    Args:
      asked: the request.
      keys: what its batches hold; None for all there is.
      compare: whether to compare it with the files at `path`, also where it was made
        from files of the same path.

    Raises:
      DataError: it is not what was asked for.
    """
    if asked.folder is None or not is_finished(asked.folder):
        return None
    source = Prepared(asked.folder, keys)
    source.check(asked.identity)
    if compare or resolved(asked.path) != source.manifest.get("path"):
        check_files(asked, source)
    return source


def request(
    config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict, split: str
) -> Request:
    """Completes a section with defaults and checks its names and values.

    Raises:
      DataError: an unknown name, split or option, one that is missing, or a value that
        an option cannot hold.
    """
    options: dict[str, Any] = config.to_dict()
    try:
        check_values({f"data.{k}": value for k, value in flat(options).items()}, KINDS)
    except InvalidValue as error:
        raise DataError(str(error)) from None
    name = options.pop("name", None)
    if name not in SOURCES:
        raise DataError(
            f"unknown data set '{name}'; choose config.data.name from "
            f"{', '.join(SOURCES)}"
        )
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; choose from {', '.join(SPLITS)}")
    data_set = SOURCES[name]
    parameters = dict(inspect.signature(data_set.reader).parameters)
    for own in ("split", "keys"):
        parameters.pop(own)
    possible = [p for p in (*parameters, *USAGE) if p not in data_set.fixed]
    unknown = sorted(options.keys() - set(possible))
    if unknown:
        raise DataError(
            f"data set '{name}' has no option {', '.join(unknown)}; it has "
            f"{', '.join(dict.fromkeys(possible))}"
        )
    given = {**options, **data_set.fixed}
    arguments: dict[str, Any] = {"split": split}
    for option, parameter in parameters.items():
        if option not in given and parameter.default is inspect.Parameter.empty:
            raise DataError(
                f"data set '{name}' needs {option}; set --config.data.{option}"
            )
        arguments[option] = given.get(option, parameter.default)
    usage = usage_of(given)
    # Where something lies is not what it is.
    leave = {"path", *(OF_TEST if split != "test" else ())}
    identity = {
        "name": name,
        **{
            key: value
            for key, value in arguments.items()
            if key not in leave and YOUNGER.get(key) != value
        },
        "keep_objects": usage["keep_objects"],
        "readers": READERS_VERSIONS.get(name, 1),
    }
    if isinstance(splits := identity.get("splits"), Mapping):
        identity["splits"] = splits.get(split)  # The other splits' are not its own.
    if name == "folder":
        identity["folder"] = os.path.basename(resolved(arguments["path"]))
    return Request(data_set, arguments, usage, identity)


def open_files(
    asked: Request, keys: Collection[str] | None = None
) -> "Source | Subset":
    """Opens the data set's own files; neither decodes nor checks them.

    Says what of them is left out.

    Of a compressed file the examples of at most `keep_objects` objects are unknown
    until it is read: there is no `Subset` of it, its `stream` leaves them out.

    Raises:
      DataError: they are not there or cannot be used.
    """
    try:
        source = asked.data_set.reader(**asked.arguments, keys=keys)
    except DataError as error:
        files = asked.data_set.files
        if files and not (asked.path and os.path.exists(expand(asked.path))):
            raise DataError(f"{error}; it reads {files}") from error
        raise
    for note in source.notes:
        _say_once(f"note: {note}")
    most = asked.usage["keep_objects"]
    if most == 0 or (isinstance(source, MultiObject) and source.is_packed):
        return source
    if not isinstance(source, FrameSource):
        raise DataError(
            f"data set '{asked.identity['name']}' has no option keep_objects; set its "
            "number of objects instead"
        )
    kept = np.flatnonzero(source.count_objects(bar) <= most)
    if not len(kept):
        raise nothing_kept(asked)
    return Subset(source, kept)


def nothing_kept(asked: Request) -> DataError:
    """The sentence for `keep_objects` that leaves out all, to be raised."""
    return DataError(
        f"no example of split '{asked.arguments['split']}' has at most "
        f"{asked.usage['keep_objects']} objects; set --config.data.keep_objects "
        "higher, or 0 to keep all"
    )


def check_files(asked: Request, source: Prepared) -> None:
    """Refuses a cache of other files than those at `path`; with none there is no check.

    Raises:
      DataError: the files are not those that the cache was made from.
    """
    try:
        files: Any = asked.data_set.reader(**asked.arguments)
        now = json.loads(json.dumps(files.fingerprint()))
    except DataError as error:
        if not _are_there(asked):
            return
        raise DataError(
            f"the cache {source.folder} was made from {source.manifest.get('path')} "
            f"and cannot be compared with {asked.path}: {error}"
        ) from error
    if now != source.manifest.get("files"):
        raise DataError(
            f"the cache {source.folder} was made from other files than are in "
            f"{asked.path or 'the default folder'} now; remove that "
            "cache and prepare it again, or name another with "
            "--config.data.cache=FOLDER"
        )


def _are_there(asked: Request) -> bool:
    """Whether the files of a data set seem to be at its path, whole or not."""
    if asked.data_set.reader is Tfds:
        return Tfds.is_prepared(asked.arguments["dataset"], asked.path)
    return bool(asked.path) and os.path.exists(expand(asked.path))


@functools.cache
def _say_once(text: str) -> None:
    """Prints a line, however many splits it is true of."""
    processes.say(readable(text))


class Subset(Source):
    """Some of a source's frames, in order."""

    def __init__(self, source: FrameSource, indices: Int[np.ndarray, " examples"]):
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """The examples of these indices, stacked."""
        return self._source.batch(self._indices[indices])

    def decode(self, index: int) -> Example:
        """One example, without a leading axis."""
        return self._source.decode(int(self._indices[index]))

    def check(self, progress: Progress) -> None:
        """Looks into every file, those of frames that are left out among them."""
        self._source.check(progress)

    def fingerprint(self) -> dict[str, Any]:
        """What the examples depend on beside the options."""
        return self._source.fingerprint()


def resolved(path: str) -> str:
    """A path as manifests have it, empty for a data set's default."""
    return os.path.realpath(expand(path)) if path else ""


def usage_of(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `USAGE` in a section, with defaults for those it does not have."""
    return {option: config.get(option, default) for option, default in USAGE.items()}
