"""Batches on devices: the same wherever the data lies and however many read it."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from implicit_slots.data.batches import TrainBatches
from implicit_slots.data.source import DataError, Source
from implicit_slots.runtime.devices import build_mesh
from implicit_slots.training import device_batches

# Run by one or several processes: which bytes of which batches their devices hold.
PROGRAM = """
import json, sys, zlib
sys.path.insert(0, {tests!r})
import jax, numpy as np
index, count, port = map(int, sys.argv[1:])
if count > 1:
    jax.distributed.initialize(f"localhost:{{port}}", count, index)
from training.test_device_batches import Pictures
from implicit_slots.training import device_batches
from implicit_slots.runtime.devices import build_mesh
held = {{}}
for placement in ("host", "device"):
    batches = device_batches.train_batches(
        Pictures(), build_mesh(8), batch_size=8, seed=3, start_step=5, flip=True,
        placement=placement,
    )
    for step in range(6):
        batch = batches.next()
        for path, leaf in jax.tree.leaves_with_path(batch):
            for shard in leaf.addressable_shards:
                first = shard.index[0].start or 0
                name = f"{{placement}} {{step}} {{jax.tree_util.keystr(path)}}"
                for row, values in enumerate(np.asarray(shard.data), first):
                    held[f"{{name}} {{row}}"] = zlib.crc32(np.ascontiguousarray(values))
        total = jax.jit(lambda x: x.astype(int).sum())(batch["image"])
        held[f"{{placement}} {{step}} total"] = int(total)
print(json.dumps(held))
"""


class Pictures(Source):
    """Thirty-seven small examples, each unlike the others and its mirror image."""

    def __len__(self):
        return 37

    def batch(self, indices):
        """Functions of the index."""
        index = np.asarray(indices)[:, None, None]
        grid = (index * 5 + 3 * np.arange(6) + 30 * np.arange(4)[:, None]) % 251
        place = np.arange(2) + index[:, 0]
        return {
            "image": np.stack([grid, grid + 1, grid + 2], -1).astype(np.uint8),
            "segmentation": (grid % 3).astype(np.int32),
            "objects": {
                "present": place % 3 > 0,
                "pixel_position": np.stack([place / 4, place * 1.5], -1).astype("f4"),
            },
        }


def processes(count, devices):
    """Runs the program in `count` processes of `devices` each; what they hold."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"]
        + f" --xla_force_host_platform_device_count={devices}",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(tests=tests)]
            + [str(number) for number in (index, count, port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    held = []
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        held.append(json.loads(output.splitlines()[-1]))
    return held


@pytest.fixture(scope="module")
def single():
    (held,) = processes(1, 1)
    return held


def test_device_and_host_placement_give_the_same_batches(single):
    """Bit for bit, mirrored examples included."""
    for key, checksum in single.items():
        if key.startswith("host"):
            assert single[key.replace("host", "device")] == checksum, key


def test_devices_share_the_single_devices_batch(single):
    (held,) = processes(1, 4)
    assert held == single


@pytest.mark.slow
def test_two_processes_read_the_batches_of_one(single):
    """Two devices each: disjoint shares, whose union is the single process's batch."""
    one, other = processes(2, 2)
    rows = [key for key in one if not key.endswith("total")]
    assert not set(rows) & set(other)
    assert one | other == single


def test_mirrored_examples_are_half_of_them_and_of_seed_and_step():
    batches = TrainBatches(Pictures(), 32, seed=1, flip=True)
    flips = np.concatenate([batches.flips(step) for step in range(100)])
    assert abs(flips.mean() - 0.5) < 4 * np.sqrt(0.25 / len(flips))
    plain = TrainBatches(Pictures(), 32, seed=1)
    for step in (0, 7):
        before, after = plain[step], batches[step]
        for row, flipped in enumerate(batches.flips(step)):
            expected = before["image"][row, :, :: -1 if flipped else 1]
            np.testing.assert_array_equal(after["image"][row], expected)
            there = before["objects"]["present"][row]
            column = before["objects"]["pixel_position"][row, :, 0]
            moved = np.where(there & flipped, 6 - column, column)
            np.testing.assert_array_equal(
                after["objects"]["pixel_position"][row, :, 0], moved
            )
    np.testing.assert_array_equal(
        TrainBatches(Pictures(), 32, 1, 1, 2, True).flips(7), batches.flips(7)[16:]
    )
    assert (
        TrainBatches(Pictures(), 32, 2, flip=True).flips(7) != batches.flips(7)
    ).any()


def test_what_does_not_fit_into_a_device_is_one_sentence():
    class Small:
        def memory_stats(self):
            return {"bytes_limit": 5000, "bytes_in_use": 2500}

    device_batches._check_memory([Small()], 2000)
    with pytest.raises(DataError, match=r"set --config\.data\.placement=host"):
        device_batches._check_memory([Small()], 2001)


def test_a_resident_set_is_read_once_and_in_pieces(monkeypatch):
    monkeypatch.setattr(device_batches, "CHUNK", 10)
    asked = []

    class Counted(Pictures):
        def batch(self, indices):
            asked.append(len(indices))
            return super().batch(indices)

    batches = device_batches.train_batches(
        Counted(), build_mesh(4), batch_size=4, seed=0, start_step=0, placement="device"
    )
    expected = TrainBatches(Pictures(), 4, 0)
    for step in range(20):
        jax.tree.map(np.testing.assert_array_equal, batches.next(), expected[step])
    assert sorted(asked) == [1, 7, 10, 10, 10]


def test_an_error_comes_with_its_own_batch():
    """Read ahead or not: the batches before it are good, and trained on."""
    steps = TrainBatches(Pictures(), 4, 0)
    bad = 5  # In the first epoch, so that no step before has the same images.

    class Broken(Pictures):
        def batch(self, indices):
            if steps.indices(bad)[0] in indices:
                raise DataError("image x.png cannot be read")
            return super().batch(indices)

    batches = device_batches.train_batches(
        Broken(), build_mesh(4), batch_size=4, seed=0, start_step=0, workers=1
    )
    with contextlib.closing(batches):
        for step in range(bad):
            jax.tree.map(np.testing.assert_array_equal, batches.next(), steps[step])
        with pytest.raises(DataError, match=r"image x\.png cannot be read"):
            batches.next()
        with pytest.raises(DataError, match=r"image x\.png cannot be read"):
            batches.next()


def test_only_idle_devices_count_as_waiting():
    """A slow source is waited for; a fast one never, however long a step takes."""

    class Slow(Pictures):
        def batch(self, indices):
            time.sleep(0.05)
            return super().batch(indices)

    for source, low, high in ((Slow(), 0.2, 10), (Pictures(), 0, 0.1)):
        batches = device_batches.train_batches(
            source, build_mesh(4), batch_size=4, seed=0, start_step=0, workers=1
        )
        with contextlib.closing(batches):
            batches.next()
            time.sleep(0.3)
            began = batches.waited
            for _ in range(30 if low else 6):
                batches.next()
                if not low:
                    time.sleep(0.05)
            assert low < batches.waited - began + 1e-9 < high


def test_closing_ends_the_threads():
    batches = device_batches.train_batches(
        Pictures(), build_mesh(4), batch_size=4, seed=0, start_step=0
    )
    assert isinstance(batches, device_batches.Sent)
    batches.next()
    batches.close()
    assert not batches._thread.is_alive()
