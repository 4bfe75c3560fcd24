"""Writes a data set into the cache at the training resolution, once."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import PIL
from jaxtyping import PyTree

from implicit_slots.data import registry
from implicit_slots.data.prepared.cache import BlockCache, Prepared
from implicit_slots.data.readers.frames import FrameSource, Progress, stack
from implicit_slots.data.scenes.source import Scenes
from implicit_slots.data.sets.tfds import Tfds
from implicit_slots.data.source import Batch, DataError, Example, Source
from implicit_slots.runtime.progress import bar

# Examples that are decoded by one thread and marked as there together.
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
    continued.

    Args:
      config: the section `config.data`.
      split: "train", "validation" or "test".
      progress: wraps an iterable to show how far it is, as `tqdm` does.
      say: is told what was found and done, a line at a time.
      workers: threads that decode; as many as cores unless given.

    Returns:
      The prepared source.

    Raises:
      DataError: the files are not there or cannot be used, the disk is full, or the
        cache holds something else; what was written so far is kept.
    """
    asked = registry.request(config, split)
    folder = asked.folder
    if folder is None:
        raise DataError(
            "there is no cache to prepare; name one with --config.data.cache=FOLDER"
        )
    source = registry.open_prepared(asked, compare=True)
    if source is not None:
        say(f"{split}: {len(source):,} examples, already prepared in {folder}")
        return source
    files = _open_or_download(asked, say)
    if isinstance(files, Scenes):
        files.render_all(progress)
        say(f"{split}: {len(files):,} scenes, rendered into {files.folder}")
        return files
    assert isinstance(files, FrameSource | registry.Subset)
    is_new = not folder.is_dir()
    example = files.decode(0)
    blocks = _blocks(asked, files, example, folder)
    done = sum(blocks.has(block) for block in range(blocks.num_blocks))
    if not done:
        files.check(progress)
    if not is_new:
        say(
            f"{split}: going on after {done} of {blocks.num_blocks} blocks"
            if done
            else f"{split}: starting anew, nothing that was there can be used"
        )
    _write(blocks, progress, workers or os.cpu_count() or 1)
    blocks.finish()
    source = Prepared(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    published = asked.data_set.published.get(split, len(source))
    of = f" (published: {published:,})" if len(source) != published else ""
    say(f"{split}: {len(source):,} examples{of}, {size / 1e6:,.1f} MB in {folder}")
    return source


def _open_or_download(asked: registry.Request, say: Callable[[str], Any]) -> Any:
    """The data set's own files; tensorflow-datasets fetches those that it can."""
    if asked.data_set.reader is Tfds:
        dataset = asked.arguments["dataset"]
        if not Tfds.is_prepared(dataset, asked.path):
            Tfds.download(dataset, asked.path, say)
    return registry.open_files(asked)


def _blocks(
    asked: registry.Request,
    files: "FrameSource | registry.Subset",
    example: Example,
    folder: Path,
) -> BlockCache:
    """The cache of these files, empty or as far as it was filled."""
    stored = _stored(example)
    count = len(files)

    def make(first: int) -> Batch:
        last = count - 1
        # A block past the end repeats the last example, which is then cut off.
        return stack([files.decode(min(first + i, last)) for i in range(block)])

    block = min(BLOCK, count)
    manifest = {
        **asked.identity,
        "path": registry.resolved(asked.path),
        "files": files.fingerprint(),
        "pillow": PIL.__version__,
    }
    need = count * sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        raise DataError(
            f"the cache {folder.parent} cannot be written ({error.strerror}); name "
            "another folder with --config.data.cache=FOLDER"
        ) from error
    if not folder.is_dir() and free < need:
        raise DataError(
            f"{folder.parent} has {free / 1e6:,.1f} MB free and the examples need "
            f"{need / 1e6:,.1f} MB; make room, or name another folder with "
            "--config.data.cache=FOLDER"
        )
    return BlockCache(
        make, stored, count=count, block=block, folder=folder, manifest=manifest
    )


def _stored(example: Example) -> PyTree:
    """Types in the cache: ids fit into a byte."""
    return {
        name: leaf.astype(np.uint8) if name in ("segmentation", "shadow") else leaf
        for name, leaf in example.items()
    }


def _write(blocks: BlockCache, progress: Progress, workers: int) -> None:
    """Makes every missing block, several at a time; stops at the first failure."""
    missing = [b for b in range(blocks.num_blocks) if not blocks.has(b)]
    done = blocks.num_blocks - len(missing)
    pool = ThreadPoolExecutor(workers)
    try:
        shown = progress(
            pool.map(blocks.fill, missing),
            total=blocks.num_blocks,
            initial=done,
            desc="preparing",
            unit="block",
        )
        for _ in shown:
            pass
    finally:
        pool.shutdown(cancel_futures=True)
