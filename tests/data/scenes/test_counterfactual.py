"""Scenes without some of their objects, against the scenes with them."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from implicit_slots.data.scenes import rendering
from implicit_slots.data.scenes import source as source_module
from implicit_slots.data.scenes.source import Scenes
from implicit_slots.data.source import Batch, Source

RESOLUTION = 32
OBJECTS = 4
COUNT = 12


def few_scenes(count=COUNT):
    return Scenes(
        split="test",
        resolution=RESOLUTION,
        train_size=1,
        validation_size=1,
        test_size=count,
        min_objects=2,
        max_objects=OBJECTS,
    )


@pytest.fixture(scope="module")
def source():
    return few_scenes()


@pytest.fixture(scope="module")
def batch(source):
    return source.batch(np.arange(COUNT))


def only(places):
    """Each image without the object at one place."""
    return np.arange(OBJECTS) == np.asarray(places)[:, None]


def test_removing_nothing_gives_the_images_own_bytes(source, batch):
    indices = np.array([3, 0, 11, 3, *range(COUNT)])  # More than a block.
    removed = np.zeros((len(indices), OBJECTS), bool)
    images = source.without(indices, removed)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, batch["image"][indices])
    np.testing.assert_array_equal(
        source.without(indices[:1], removed[:1]), batch["image"][indices[:1]]
    )


def test_scenes_read_once_are_rendered_without_their_neighbours(batch, monkeypatch):
    scenes = few_scenes(64 * 32)
    calls, render = [], scenes._render

    def counted(indices, **keep):
        calls.append(indices)
        return render(indices, **keep)

    monkeypatch.setattr(scenes, "_render", counted)
    indices = np.array([3, *range(100, 2000, 50)])  # Of as many blocks.
    found = scenes.once(indices)
    assert len(calls) == 2 and not scenes._is_kept.any()
    of_one = jax.tree.map(lambda leaf: leaf[0], found)
    jax.tree.map(
        np.testing.assert_array_equal,
        of_one,
        jax.tree.map(lambda leaf: leaf[3], batch),
    )
    kept = scenes.batch(indices[:3])
    assert found["segmentation"].dtype == kept["segmentation"].dtype
    assert np.array_equal(scenes.once(indices[:3])["image"], kept["image"])
    assert len(calls) == 2 + 3  # Those that are kept are not rendered again.


def test_one_thread_compiles_what_renders_and_others_wait(monkeypatch):
    scenes = few_scenes()
    active, most = [], []

    def render(indices, **keep):
        active.append(indices)
        most.append(len(active))
        time.sleep(0.05)
        active.pop()
        return {"image": np.zeros((32, 16, 16, 3), np.uint8)}

    monkeypatch.setattr(scenes, "_render", render)
    monkeypatch.setattr(source_module, "_COMPILED", set())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(scenes._draw, [np.arange(32)] * 2))
        assert most == [1, 1]
        list(pool.map(scenes._draw, [np.arange(32)] * 2))
    assert most == [1, 1, 1, 2]


def test_removing_what_is_not_there_changes_nothing(source, batch):
    images = source.without(np.arange(COUNT), ~batch["objects"]["present"])
    assert not batch["objects"]["present"].all()
    np.testing.assert_array_equal(images, batch["image"])


def test_removing_everything_leaves_empty_ground(source, batch):
    images = source.without(np.arange(COUNT), np.ones((COUNT, OBJECTS), bool))
    # Ground is grey, lit by lamps that stand elsewhere in each scene, and smooth.
    levels = images.astype(int)
    assert np.ptp(levels, axis=-1).max() <= 20
    for axis in (1, 2):
        assert np.abs(np.diff(levels, axis=axis)).max() <= 8
        assert np.abs(np.diff(batch["image"].astype(int), axis=axis)).max() > 50


def test_an_object_takes_its_shadow_along_and_leaves_the_rest(source, batch):
    indices = np.arange(COUNT)
    before = batch["image"].astype(int)
    for place in range(2):  # The fewest objects of a scene.
        after = source.without(indices, only(np.full(COUNT, place)))
        change = np.abs(after.astype(int) - before).max(axis=-1)
        own = batch["segmentation"] == place + 1
        shade = batch["shadow"] == place + 1
        assert change[own].mean() > 10
        assert change[shade].mean() > 5
        # Another object lacks a reflection at most, and rubber reflects nothing.
        metal = batch["objects"]["material"] == 1
        others = batch["segmentation"]
        rubber = ~np.take_along_axis(
            np.pad(metal, ((0, 0), (1, 0))), others.reshape(COUNT, -1), axis=1
        ).reshape(others.shape)
        inner = (others > 0) & ~own & rubber
        for axis in (1, 2):  # Pixels on an edge are part of two things.
            for step in (1, -1):
                inner &= np.roll(others, step, axis) == others
        assert inner.sum() > 50
        assert change[inner].max() == 0


def test_objects_may_be_removed_one_by_one_per_image(source, batch):
    places = np.arange(COUNT) % OBJECTS
    images = source.without(np.arange(COUNT), only(places))
    expected = rendering.render_batch(
        0,
        "test",
        np.arange(COUNT, dtype=np.int32),
        min_objects=2,
        max_objects=OBJECTS,
        resolution=RESOLUTION,
        keep=~only(places),
    )
    np.testing.assert_array_equal(images, jax.device_get(expected["image"]))
    there = batch["objects"]["present"][np.arange(COUNT), places]
    changed = (images != batch["image"]).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed, there)


def test_a_source_without_a_renderer_has_none():
    class Frames(Source):
        def __len__(self) -> int:
            return 1

        def batch(self, indices) -> Batch:
            return {"image": np.zeros((len(indices), 4, 4, 3), np.uint8)}

    assert Frames().without(np.arange(1), np.zeros((1, OBJECTS), bool)) is None
