"""Batches: a pure function of (seed, step), whoever reads them and however."""

import time

import numpy as np
import pytest

from implicit_slots.data.batches import (
    EvaluationBatches,
    TrainBatches,
    epoch_order,
    evaluation_batches,
    read_ahead,
)
from implicit_slots.data.prepared.cache import gather
from implicit_slots.data.source import DataError, Source


def train_batches(source, *, start_step=0, threads=2, ahead=16, **options):
    return read_ahead(
        TrainBatches(source, **options),
        start_step=start_step,
        threads=threads,
        ahead=ahead,
    )


class Numbers(Source):
    """Examples that hold their index."""

    def __init__(self, length, shuffle_first_epoch=True):
        self.length = length
        self.shuffle_first_epoch = shuffle_first_epoch

    def __len__(self):
        return self.length

    def batch(self, indices):
        """The indices themselves."""
        return {"image": indices, "objects": {"twice": 2 * indices}}


def read(batches, count):
    """The first few batches, after which the reading threads are ended."""
    result = [next(batches)["image"].tolist() for _ in range(count)]
    batches.close()
    return result


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10])
def test_every_epoch_visits_every_example_once(batch_size):
    """Also where the batch does not divide the epoch: batches then straddle two."""
    batches = train_batches(Numbers(10), batch_size=batch_size, seed=0)
    visited = np.concatenate(read(batches, 80 // batch_size))
    epochs = visited[:70].reshape(7, 10)
    np.testing.assert_array_equal(np.sort(epochs, -1), np.tile(np.arange(10), (7, 1)))
    assert len(np.unique(epochs, axis=0)) == 7


def test_the_first_epoch_is_sequential_where_the_source_says_so():
    batches = train_batches(Numbers(10, False), batch_size=4, seed=0)
    visited = np.concatenate(read(batches, 5))
    np.testing.assert_array_equal(visited[:10], np.arange(10))
    assert not np.array_equal(visited[10:], np.arange(10))
    # Later epochs are those of a source that shuffles from the start.
    shuffled = np.concatenate(read(train_batches(Numbers(10), batch_size=4, seed=0), 5))
    np.testing.assert_array_equal(visited[10:], shuffled[10:])
    assert not np.array_equal(shuffled[:10], np.arange(10))


def test_a_batch_depends_on_seed_and_step_alone():
    """Not on the start, the threads, or how far is read ahead."""
    options = {"batch_size": 4, "seed": 5}
    whole = read(train_batches(Numbers(30), **options), 40)
    for start in (0, 1, 7, 33):
        for more in ({}, {"threads": 4, "ahead": 9}, {"threads": 0}):
            batches = train_batches(Numbers(30), start_step=start, **options, **more)
            assert read(batches, 7) == whole[start : start + 7]
    direct = TrainBatches(Numbers(30), 4, 5)
    assert [direct[step]["image"].tolist() for step in range(40)] == whole
    other = read(train_batches(Numbers(30), batch_size=4, seed=6), 40)
    assert other != whole


def test_resuming_replays_nothing():
    """A start after a billion steps reads a handful of batches, not a billion."""
    read_indices = []

    class Recorded(Numbers):
        def batch(self, indices):
            read_indices.append(indices)
            return super().batch(indices)

    batches = train_batches(
        Recorded(30), batch_size=4, seed=0, start_step=10**9, ahead=3
    )
    assert (
        read(batches, 2)[0] == TrainBatches(Numbers(30), 4, 0)[10**9]["image"].tolist()
    )
    assert len(read_indices) <= 2 + 3


def test_processes_share_each_batch():
    """Shares are disjoint, and in order they are the single process's batch."""
    single = read(train_batches(Numbers(30), batch_size=12, seed=0), 6)
    shares = [
        read(
            train_batches(
                Numbers(30), batch_size=12, seed=0, process_index=p, process_count=3
            ),
            6,
        )
        for p in range(3)
    ]
    assert [a + b + c for a, b, c in zip(*shares, strict=True)] == single


@pytest.mark.parametrize("process_count", [1, 2])
@pytest.mark.parametrize("length", [1, 8, 9, 16])
def test_evaluation_visits_everything_once_and_marks_padding(length, process_count):
    visited = []
    for p in range(process_count):
        batches = list(
            evaluation_batches(
                Numbers(length), 8, process_index=p, process_count=process_count
            )
        )
        assert len(batches) == -(-length // 8)
        for batch in batches:
            assert batch["image"].shape == batch["mask"].shape == (8 // process_count,)
            assert batch["mask"].dtype == bool
            np.testing.assert_array_equal(batch["objects"]["twice"], 2 * batch["image"])
            visited += batch["image"][batch["mask"]].tolist()
    assert sorted(visited) == list(range(length))


def test_the_order_of_an_epoch_never_changes():
    """Pinned: a later version of this code or of NumPy must not reorder a run."""
    assert epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(12, 3, 8).tolist() == [7, 5, 3, 6, 2, 0, 1, 4]


def test_an_epochs_order_is_fair():
    """Over many epochs each example falls on each place equally often."""
    orders = np.stack([epoch_order(1, epoch, 5) for epoch in range(2000)])
    counts = np.stack([np.bincount(places, minlength=5) for places in orders.T])
    assert np.abs(counts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)


def test_what_cannot_be_batched_is_one_sentence():
    with pytest.raises(DataError, match="has 3 examples, fewer than one batch of 4"):
        train_batches(Numbers(3), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="batch of 4 cannot be split evenly over 3"):
        train_batches(Numbers(9), batch_size=4, seed=0, process_count=3)
    with pytest.raises(ValueError, match="process 2 of 2 does not exist"):
        evaluation_batches(Numbers(9), 4, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluation_batches(Numbers(9), 0)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        train_batches(Numbers(9), batch_size=4, seed=-1)


def test_an_error_while_reading_ahead_reaches_the_caller():
    """As itself, so that its sentence is what the user reads."""

    class Broken(Numbers):
        def batch(self, indices):
            raise DataError("image x.png cannot be read")

    batches = train_batches(Broken(9), batch_size=4, seed=0)
    with pytest.raises(DataError) as error:
        next(batches)
    assert str(error.value) == "image x.png cannot be read"
    batches.close()


def test_reading_from_memory_costs_far_less_than_a_step():
    """Under a millisecond for 32 images of 32x32; the best of many, for noise."""

    class Stored(Numbers):
        def __init__(self):
            super().__init__(5000)
            self.images = {"image": np.zeros((5000, 32, 32, 3), np.uint8)}

        def batch(self, indices):
            return gather(self.images, indices)

    batches = train_batches(Stored(), batch_size=32, seed=0, threads=0)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3
    assert len(EvaluationBatches(Stored(), 32)) == 157
