"""What the keys of `config.data` may hold; a reader says more where it has to."""

from collections.abc import Mapping

from implicit_slots.runtime.values import (
    Flag,
    Kind,
    Number,
    OneOf,
    Place,
    Text,
    Whole,
)

PLACEMENTS = ("host", "device")
# Of COCO's instances: who is seen where several are.
OVERLAPS = ("smaller", "ignored")
# Ids of objects fit into a byte, and its last value is for what is ignored.
MOST_OBJECTS = 254
SIZE = Whole(1)
SHARE = Number(0.0, 1.0)

KINDS: Mapping[str, Kind] = {
    "data.name": Text(),
    "data.resolution": Whole(1, 2**14),
    "data.max_objects": Whole(1, MOST_OBJECTS),
    "data.crop": Text(),
    # How examples are used.
    "data.cache": Place(),
    "data.keep_objects": Whole(0),
    "data.flip": Flag(),
    "data.placement": OneOf(PLACEMENTS),
    "data.workers": Whole(1, 1_000),
    # Files.
    "data.path": Place(),
    "data.dataset": Text(),
    "data.splits.train": Text(),
    "data.splits.validation": Text(),
    "data.splits.test": Text(),
    "data.frame_step": Whole(1),
    "data.masks": Text(),
    "data.overlaps": OneOf(OVERLAPS),
    "data.split_set": Text(),
    "data.variant": Text(),
    "data.test_set": Text(),
    "data.validation_fraction": SHARE,
    "data.test_fraction": SHARE,
    "data.skip_unreadable": Flag(),
    "data.ignore_id": Whole(-1, 2**16 - 1),
    # Embedded scenes.
    "data.train_size": SIZE,
    "data.validation_size": SIZE,
    "data.test_size": SIZE,
    "data.seed": Whole(0),
    "data.min_objects": Whole(1, MOST_OBJECTS),
    "data.zoom": Number(1.0, 100.0, closed="[]"),
    "data.with_masks": Flag(),
}
