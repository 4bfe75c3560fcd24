"""A probe of Fig. 9: what does it matter to the others whether the ground has a slot?

In each image the ground's slot is the one whose decoder mask covers most of the true
ground. All slots but one are deleted twice, the others in the same random order: with
the ground's kept to the last, and with the ground's gone first.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from implicit_slots.data.source import Batch
from implicit_slots.evaluation.findings import Subject
from implicit_slots.evaluation.groups import regions_of, without_of
from implicit_slots.evaluation.metrics import deletion
from implicit_slots.models.images import seen
from implicit_slots.runtime.prng import Purpose, purpose_key

KEPT, GONE = "ground_kept", "ground_gone"
ERROR = "counterfactual_error"


def ground_slots(attention: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
    """Which slot is the ground's.

    Args:
      attention: of the decoder, [batch, slots, rows, columns].
      segmentation: [batch, height, width], 0 on the ground; a multiple of the grid.

    Returns:
      [batch], the slot with the most weight on cells by their share of ground.
    """
    batch, _, rows, columns = attention.shape
    side = segmentation.shape[2] // columns
    ground = (segmentation == 0).reshape(batch, rows, -1, columns, side)
    share = ground.mean(axis=(2, 4))
    return np.einsum("bshw,bhw->bs", attention, share).argmax(axis=1)


def orders_of(key: jax.Array, ground: np.ndarray, slots: int) -> np.ndarray:
    """Returns [2, batch, slots]: the ground's slot last, and the same with it first."""
    batch = len(ground)
    order = np.asarray(deletion.random_orders(key, 1, batch, slots)[0])
    others = order[order != ground[:, None]].reshape(batch, slots - 1)
    its = ground[:, None]
    return np.stack([np.hstack([others, its]), np.hstack([its, others])])


def measure(subject: Subject) -> Iterator[tuple[str, float]]:
    """Error against the true deletion by slots left: `ground_kept/…@k`, `ground_gone`.

    Of the first `evaluation.deletion.num_images` images; empty without true masks.
    """
    indices = np.arange(subject.count(subject.config.evaluation.deletion.num_images))
    batch: Batch = subject.source.batch(indices)
    if "segmentation" not in batch:
        return
    encoded = subject.steps.encode(subject.params, seen(batch), 0)
    slots = encoded.slots
    everything = jnp.ones(slots.shape[:2], bool)
    read = subject.steps.read(subject.params, encoded.tokens, slots, everything)
    ground = ground_slots(np.asarray(read.attention), batch["segmentation"])
    key = purpose_key(subject.config.seed, Purpose.EVALUATE, 0)
    found, _ = deletion.delete_in_turn(
        lambda slots, present: subject.steps.render(subject.params, slots, present),
        slots,
        regions_of(subject, batch, read.attention),
        jnp.asarray(orders_of(key, ground, slots.shape[1])),
        without=without_of(subject, indices),
        progress=subject.progress,
    )
    for name, errors in zip((KEPT, GONE), found.counterfactual_error, strict=True):
        for left, values in zip(range(len(errors), 0, -1), errors, strict=True):
            yield f"{name}/{ERROR}@{left}", float(np.mean(values))
