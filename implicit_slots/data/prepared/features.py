"""Frozen features of a data set on disk, which training reads in the place of images.

What makes them is no matter of this file: it is told by a description, as JSON, and the
file of its weights by their hash.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import ml_dtypes
import numpy as np
from jaxtyping import Int

from implicit_slots.data import registry
from implicit_slots.data.prepared.cache import Prepared
from implicit_slots.data.prepared.cache_folder import cache_folder, is_finished
from implicit_slots.data.source import Batch, DataError, Source

FIELD = "features"
# Raised when the same description stands for other numbers.
VERSION = 1
# How they lie on disk: NumPy's files know no bfloat16.
STORED = np.uint16


class FeatureSet(NamedTuple):
    """Features of the examples of a split, as they are or mirrored.

    Attributes:
      images: the request for the images that they are made of.
      transformer: what makes them, as JSON, all but weights from a file.
      mirrored: whether the images are turned left to right before.
    """

    images: registry.Request
    transformer: Mapping[str, Any]
    mirrored: bool = False

    @property
    def split(self) -> str:
        """Which split."""
        return self.images.arguments["split"]

    @property
    def identity(self) -> dict[str, Any]:
        """What the features depend on, as JSON, all but weights from a file."""
        images = self.images.identity
        parts = [images["name"], self.transformer["vit"]]
        return {
            "name": "-".join([*parts, *["mirrored"] * self.mirrored]),
            "split": self.split,
            "resolution": images["resolution"],
            "images": images,
            "transformer": self.transformer,
            "version": VERSION,
        }

    @property
    def folder(self) -> Path:
        """Where they lie.

        Raises:
          DataError: there is no cache.
        """
        if not (cache := self.images.usage["cache"]):
            raise DataError(
                "there is no cache of features; name one with "
                "--config.data.cache=FOLDER"
            )
        return cache_folder(cache, self.identity)

    def open(self, weights: str | None, *, compare: bool = False) -> Prepared | None:
        """The features, if they are all there.

        Args:
          weights: hash of the file of weights, if it is there to be compared.
          compare: whether to compare the images' files also at the same path.

        Raises:
          DataError: they are of other images, or of other weights.
        """
        if not is_finished(self.folder):
            return None
        stored = Prepared(self.folder)
        stored.check(self.identity)
        if weights is not None and stored.manifest.get("weights") != weights:
            raise DataError(
                f"the features in {self.folder} were made with other weights than "
                "config.features.weights holds; remove that folder and prepare it "
                "again, or name another cache with --config.data.cache=FOLDER"
            )
        moved = registry.resolved(self.images.path) != stored.manifest.get("path")
        if (compare or moved) and self.images.path:
            registry.check_files(self.images, stored)
        return stored

    def opened(self, weights: str | None) -> Prepared:
        """As `open`.

        Raises:
          DataError: also if they are not there.
        """
        if (stored := self.open(weights)) is None:
            mirrored = " mirrored" if self.mirrored else ""
            raise DataError(
                f"the{mirrored} features of split '{self.split}' are not in "
                f"{self.folder}: make them by --mode=prepare with the same --config, "
                "or let the transformer run in every step by "
                "--config.model.cached_features=False"
            )
        return stored


class Features(Source):
    """Features in the place of images, or beside them.

    Attributes:
      stored: where they are.
    """

    def __init__(
        self,
        stored: Prepared,
        *,
        mirrored: Prepared | None = None,
        images: Source | None = None,
    ):
        """Puts together what is read.

        Args:
          stored: the features.
          mirrored: those of mirrored images.
          images: of which everything else is read; None for nothing else.
        """
        self.stored = stored
        self.twin = None if mirrored is None else Features(mirrored)
        self._images = images

    def __len__(self) -> int:
        return len(self.stored)

    def batch(self, indices: Int[np.ndarray, " batch"]) -> Batch:
        """Also `features` bfloat16 [batch, patches, width]."""
        batch = {} if self._images is None else self._images.batch(indices)
        stored = self.stored.batch(indices)[FIELD]
        return {**batch, FIELD: stored.view(ml_dtypes.bfloat16)}


def open_features(
    data: ml_collections.ConfigDict | ml_collections.FrozenConfigDict,
    split: str,
    transformer: Mapping[str, Any],
    weights: str | None,
) -> Features:
    """The features of a split: to train, alone; else beside images and masks.

    Args:
      data: the section `config.data`.
      split: "train", "validation" or "test".
      transformer: see `FeatureSet`.
      weights: see `FeatureSet.open`.

    Raises:
      DataError: they are not there, or of something else.
    """
    request = registry.request(data, split)
    stored = FeatureSet(request, transformer).opened(weights)
    if split != "train":
        return Features(stored, images=registry.build(data, split))
    twin = FeatureSet(request, transformer, mirrored=True)
    mirrored = twin.opened(weights) if request.usage["flip"] else None
    if mirrored is not None and request.usage["placement"] == "device":
        raise DataError(
            "features and those of mirrored images are read from the host: set "
            "--config.data.placement=host, or --config.data.flip=False"
        )
    return Features(stored, mirrored=mirrored)


def hash_file(file: Path) -> str:
    """A hash of a file's bytes, as manifests have it.

    Raises:
      OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
