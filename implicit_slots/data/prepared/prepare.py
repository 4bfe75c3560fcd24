"""Writes a data set into the cache at the training resolution, once."""

import collections
import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_collections
import PIL

from implicit_slots.data import registry
from implicit_slots.data.prepared.cache import Prepared, Writer, unwritable
from implicit_slots.data.readers.frame_source import FrameSource, Progress, stack
from implicit_slots.data.scenes.source import Scenes
from implicit_slots.data.sets.multi_object import MultiObject
from implicit_slots.data.sets.tfds import Tfds
from implicit_slots.data.source import DataError, Example, Source
from implicit_slots.runtime.files import lock
from implicit_slots.runtime.progress import bar

# Examples that are written and marked as there together.
BLOCK = 64


def prepare(
    config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict,
    split: str,
    *,
    progress: Progress = bar,
    say: Callable[[str], Any] = print,
    workers: int | None = None,
) -> Source:
    """Makes sure that a split is in the cache, whole.

    What is there already is left as it is; what an interrupted preparation left is
    continued. A second preparation of the same split waits for the first.

    Args:
      config: the section `config.data`.
      split: "train", "validation" or "test".
      progress: wraps an iterable to show how far it is, as `tqdm` does.
      say: is told what was found and done, a line at a time.
      workers: threads that decode; as many as cores unless given.

    Returns:
      The prepared source; scenes, which are rendered by each run, as they are.

    Raises:
      DataError: the files are not there or cannot be used, the disk is full, or the
        cache holds something else; what was written so far is kept.
    """
    asked = registry.request(config, split)
    if asked.data_set.reader is Scenes:
        say(f"{split}: scenes are rendered by each run, there is nothing to prepare")
        return registry.build(config, split)
    folder = asked.folder
    if folder is None:
        raise DataError(
            "there is no cache to prepare; name one with --config.data.cache=FOLDER"
        )
    source = registry.open_prepared(asked, compare=True)
    if source is None:
        files = _open_or_download(asked, say)
        with contextlib.ExitStack() as stack:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(folder))
            except OSError as error:
                raise unwritable(folder, error) from error
            source = registry.open_prepared(asked, compare=True)
            if source is None:
                return _write(asked, files, folder, progress, say, workers)
    say(f"{split}: {len(source):,} examples, already prepared in {folder}")
    return source


def _open_or_download(
    asked: registry.Request, say: Callable[[str], Any]
) -> FrameSource | registry.Subset:
    """The data set's own files; tensorflow-datasets fetches those that it can."""
    if asked.data_set.reader is Tfds:
        dataset = asked.arguments["dataset"]
        if not Tfds.is_prepared(dataset, asked.path):
            Tfds.download(dataset, asked.path, say)
    files = registry.open_files(asked)
    assert isinstance(files, FrameSource | registry.Subset)
    return files


def _write(
    asked: registry.Request,
    files: FrameSource | registry.Subset,
    folder: Path,
    progress: Progress,
    say: Callable[[str], Any],
    workers: int | None,
) -> Prepared:
    """Writes what is missing of a split's cache."""
    split, is_new = asked.arguments["split"], not folder.is_dir()
    manifest = {
        **asked.identity,
        "path": registry.resolved(asked.path),
        "files": files.fingerprint(),
        "pillow": PIL.__version__,
    }
    is_stream = isinstance(files, MultiObject) and files.is_packed
    writer = Writer(
        folder,
        manifest,
        count=len(files),
        block=BLOCK,
        is_exact=not (is_stream and _most(asked)),
    )
    if not writer.count and not is_stream:
        files.check(progress)
    if not is_new:
        say(
            f"{split}: going on after {writer.count:,} of {len(files):,} examples"
            if writer.count
            else f"{split}: starting anew, nothing that was there can be used"
        )
    examples = progress(
        in_order(decoders(asked, files, writer.count), workers or os.cpu_count() or 1),
        total=len(files),
        initial=writer.count,
        desc="preparing",
        unit="example",
    )
    block = []
    for example in examples:
        block.append(example)
        if len(block) == BLOCK:
            writer.append(stack(block))
            block = []
    if block:
        writer.append(stack(block))
    if not writer.count:
        raise registry.nothing_kept(asked)
    writer.finish()
    source = Prepared(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    published = asked.data_set.published.get(split, len(source))
    of = f" (published: {published:,})" if len(source) != published else ""
    say(f"{split}: {len(source):,} examples{of}, {size / 1e6:,.1f} MB in {folder}")
    return source


def decoders(
    asked: registry.Request, files: FrameSource | registry.Subset, skip: int = 0
) -> Iterator[Callable[[], Example]]:
    """What decodes each example, in order.

    Args:
      asked: the request.
      files: the data set's own, as `registry.open_files` gives them.
      skip: number of examples to pass over.
    """
    if isinstance(files, MultiObject) and files.is_packed:
        return files.stream(most=_most(asked), skip=skip)
    return (functools.partial(files.decode, i) for i in range(skip, len(files)))


def _most(asked: registry.Request) -> int:
    return asked.usage["keep_objects"]


def in_order(jobs: Iterable[Callable[[], Example]], workers: int) -> Iterator[Example]:
    """What jobs return, in their order; so many threads work ahead."""
    pool = ThreadPoolExecutor(workers)
    pending = collections.deque()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
