"""Encodes a data set once, so that training needs no transformer: `--mode=prepare`."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from implicit_slots.data import registry
from implicit_slots.data.prepared.cache import Prepared, Writer, unwritable
from implicit_slots.data.prepared.features import FIELD, STORED, FeatureSet
from implicit_slots.data.prepared.prepare import BLOCK, in_order
from implicit_slots.data.source import SPLITS, DataError, Source
from implicit_slots.models.images import as_float
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import lock
from implicit_slots.runtime.progress import bar
from implicit_slots.runtime.weights import write_weights
from implicit_slots.training import frozen
from implicit_slots.training.checks import check
from implicit_slots.training.pretrained import named

IMAGE = ("image",)

Encode = Callable[[np.ndarray], np.ndarray]


class Missing(NamedTuple):
    """Features of a split that are not all there.

    Attributes:
      features: what they are.
      images: what they are made of.
      writer: of their folder; knows how many are there.
    """

    features: FeatureSet
    images: Source
    writer: Writer


def run(
    config: Config,
    splits: Sequence[str] = SPLITS,
    *,
    say: Callable[[str], Any] = functools.partial(print, flush=True),
) -> None:
    """Encodes what is not encoded yet of some splits.

    Args:
      config: the whole configuration.
      splits: which ones. Of training images that `data.flip` mirrors there are two
        sets of features.
      say: is told what is there and what will be written, a line at a time.

    Raises:
      UserError: the model reads no features, the weights are not there, the disk has
        no room, or the cache holds something else; what was written so far is kept.
    """
    check(config, "train")
    if config.model.name != "feature_slots":
        raise UserError(
            f"{config.model.name} reads images and no features; python -m "
            "implicit_slots.data prepare, with the same --config, makes their cache"
        )
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"--splits must be some of {', '.join(SPLITS)}")
    description = frozen.description(config)
    wanted = {*splits, *["train"] * (description["drawn"] is not None)}
    sources = {split: registry.build(config.data, split, IMAGE) for split in wanted}
    weights = frozen.weights_hash(config)
    sets = [
        FeatureSet(registry.request(config.data, split), description, mirrored)
        for split in splits
        for mirrored in (False, True)
        if not mirrored or (split == "train" and registry.usage_of(config.data)["flip"])
    ]
    text = json.dumps(description, sort_keys=True)
    key = weights or hashlib.sha256(text.encode()).hexdigest()
    made_by = f"{description['vit']}-{key[:8]}.safetensors"
    with contextlib.ExitStack() as stack:
        missing = []
        for features in sets:
            folder = features.folder
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(folder))
            except OSError as error:
                raise unwritable(folder, error) from error
            if (stored := features.open(weights, compare=True)) is not None:
                say(f"{_told(features)} of {len(stored):,} images are in {folder}")
                continue
            images = sources[features.split]
            manifest = {**_origin(features, images), "made_by": made_by}
            writer = Writer(
                folder,
                features.identity | manifest | {"weights": weights},
                count=len(images),
                block=BLOCK,
            )
            missing.append(Missing(features, images, writer))
        if not missing:
            return
        structure, params = frozen.made(config, sources.get("train"))
        _announce(missing, description, say)
        folder = sets[0].folder.parent
        try:
            if not (folder / made_by).exists():
                arrays = {name: np.asarray(leaf) for name, leaf in named(params)}
                write_weights(folder / made_by, arrays)
        except OSError as error:
            raise unwritable(folder, error) from error
        encode = _encoder(structure, params, final_norm=description["vit_norm"])
        for split in splits:
            of_split = [part for part in missing if part.features.split == split]
            if of_split:
                _write(of_split, encode, config.data.get("workers", 1))
                for part in of_split:
                    say(f"{_told(part.features)}: written")


def _told(features: FeatureSet) -> str:
    return f"{features.split}: {'mirrored ' * features.mirrored}features"


def _origin(features: FeatureSet, images: Source) -> Mapping[str, Any]:
    """Of a manifest what tells where the images are from."""
    if isinstance(images, Prepared):
        files = images.manifest["files"]
    else:
        fingerprint = getattr(images, "fingerprint", dict)
        files = fingerprint()
    return {"path": registry.resolved(features.images.path), "files": files}


def _announce(
    missing: Sequence[Missing], description: Mapping[str, Any], say: Callable[..., Any]
) -> None:
    """Says how large the features are; refuses what the disk has no room for."""
    size = description["patches"] * description["width"] * np.dtype(STORED).itemsize
    need = 0
    for part in missing:
        count, done = len(part.images), part.writer.count
        need += size * (count - done)
        text = f"{_told(part.features)} of {count:,} images, {size * count / 1e6:,.1f}"
        going_on = f", {done:,} of them are there" if done else ""
        say(f"{text} MB, to {part.features.folder}{going_on}")
    cache = missing[0].features.folder.parent
    free = shutil.disk_usage(cache).free
    if free < need:
        raise DataError(
            f"{cache} has {free / 1e6:,.1f} MB free and the features need "
            f"{need / 1e6:,.1f} MB; make room, or name another folder with "
            "--config.data.cache=FOLDER"
        )


def _encoder(structure: nnx.GraphDef, params: Any, *, final_norm: bool) -> Encode:
    """From bytes [n, H, W, 3] to features as they are stored, of at most a block."""

    @jax.jit
    def features(params, image):
        vit = nnx.merge(structure, params)
        return vit(as_float(image), final_norm=final_norm).astype(jnp.bfloat16)

    params = jax.tree.map(jnp.asarray, params)

    def encode(images: np.ndarray) -> np.ndarray:
        # One program: the last block is filled up.
        whole = np.resize(images, (BLOCK, *images.shape[1:]))
        return np.asarray(features(params, whole)).view(STORED)[: len(images)]

    return encode


def _write(missing: Sequence[Missing], encode: Encode, workers: int) -> None:
    """Encodes a split's images, each of them read once."""
    images = missing[0].images
    begin = min(part.writer.count for part in missing)
    jobs = (
        functools.partial(
            images.batch, np.arange(first, min(first + BLOCK, len(images)))
        )
        for first in range(begin, len(images), BLOCK)
    )
    starts = range(begin, len(images), BLOCK)
    blocks: Iterator[Any] = in_order(jobs, min(workers, os.cpu_count() or 1))
    for first, batch in bar(
        zip(starts, blocks, strict=True), total=len(starts), desc="encoding"
    ):
        for part in missing:
            if part.writer.count > first:
                continue
            seen = batch["image"]
            seen = seen[:, :, ::-1] if part.features.mirrored else seen
            part.writer.append({FIELD: encode(seen)})
    for part in missing:
        part.writer.finish()
