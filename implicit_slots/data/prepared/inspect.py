"""What a split holds, as text and as a picture: the first look at any data."""

import itertools

import ml_collections
import numpy as np

from implicit_slots.data import registry
from implicit_slots.data.prepared import prepare
from implicit_slots.data.prepared.cache import Prepared
from implicit_slots.data.readers.frame_source import stack
from implicit_slots.data.scenes.source import Scenes
from implicit_slots.data.sets.multi_object import MultiObject
from implicit_slots.data.source import IGNORED, Batch
from implicit_slots.drawing import grids


def look(
    config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict,
    split: str,
    count: int,
) -> tuple[str, Batch]:
    """A description of a split, in lines, and its first examples.

    Args:
      config: the section `config.data`.
      split: "train", "validation" or "test".
      count: most examples.

    Raises:
      DataError: the data cannot be used, or there is no example.
    """
    asked = registry.request(config, split)
    source = registry.open_prepared(asked)
    if source is None:
        source = registry.open_files(asked)
    if isinstance(source, MultiObject) and source.is_packed:
        found = itertools.islice(prepare.decoders(asked, source), count)
        examples = [decode() for decode in found]
        if not examples:
            raise registry.nothing_kept(asked)
        batch = stack(examples)
        most = asked.usage["keep_objects"]
        rest = f", less those of more than {most} objects" if most else ""
        head = f"(read from the start): {len(source):,} examples{rest}"
    else:
        registry.check_cheaply(source)
        batch = source.batch(np.arange(min(count, len(source))))
        origin = "decoded on the fly"
        if isinstance(source, Prepared):
            origin = "prepared"
        elif isinstance(source, Scenes):
            origin = "rendered"
        head = f"({origin}): {len(source):,} examples"
    return "\n".join([head, *describe(batch)]), batch


def describe(batch: Batch) -> list[str]:
    """Lines on some examples: keys with shapes and types, colours, objects."""
    lines = []
    for name, leaf in sorted(batch.items()):
        fields = leaf if isinstance(leaf, dict) else {"": leaf}
        for field, values in sorted(fields.items()):
            shape = " x ".join(str(side) for side in values.shape[1:]) or "scalar"
            key = f"{name}.{field}" if field else name
            lines.append(f"  {key:<24} {values.dtype!s:<8} {shape}")
    image = batch["image"].astype(np.float64)
    mean = ", ".join(f"{v:.1f}" for v in image.mean((0, 1, 2)))
    lines.append(
        f"  the first {len(image)}: mean colour ({mean}), least {image.min():.0f}, "
        f"largest {image.max():.0f}"
    )
    counts = count_objects(batch)
    if counts is not None:
        numbers, times = np.unique(counts, return_counts=True)
        pairs = zip(numbers, times, strict=True)
        text = ", ".join(f"{n} in {t} image{'s' * bool(t > 1)}" for n, t in pairs)
        lines.append(f"  number of objects: {text}")
        if "segmentation" in batch:
            ground = np.mean(batch["segmentation"] == 0)
            line = f"  background: {ground:.1%} of the pixels"
            ignored = np.mean(batch["segmentation"] == IGNORED)
            line += f"; ignored by all metrics: {ignored:.1%}" if ignored else ""
            lines.append(line)
    return lines


def sheet(batch: Batch) -> grids.Picture:
    """Images with their masks, and the number of objects under each."""
    counts = count_objects(batch)
    captions = None
    if counts is not None:
        captions = ["1 object" if n == 1 else f"{n} objects" for n in counts]
    return grids.contact_sheet(
        batch["image"], batch.get("segmentation"), captions=captions
    )


def count_objects(batch: Batch) -> np.ndarray | None:
    """Objects of each example, by attributes, or else by ids in the crop's mask."""
    if "objects" in batch:
        return batch["objects"]["present"].sum(-1)
    if "segmentation" in batch:
        return np.array([np.sum(np.unique(m) > 0) for m in batch["segmentation"]])
    return None
