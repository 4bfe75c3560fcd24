"""Masks of a user's own images, of a model that is known in full."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from implicit_slots.drawing.grids import slot_colours
from implicit_slots.evaluation import prediction
from implicit_slots.evaluation.prediction import UNSEEN, find_images, largest, predict
from implicit_slots.fixed_point import Stats
from implicit_slots.models.outputs import Encoded, Reading
from implicit_slots.runtime.errors import UserError

SIDE = 8


class Halves(nnx.Module):
    """Slot 1 is the right half, slot 0 the rest; slots are noise, or of the image.

    It renders the first number of the first slot, as a grey.
    """

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def encode(self, image, *, key):  # noqa: D102
        count = len(image)
        slots = jnp.abs(jax.random.normal(key, (count, 2, 3))) * self.scale[...]
        right = jnp.broadcast_to(jnp.arange(SIDE) >= SIDE // 2, (count, SIDE, SIDE))
        attention = jnp.stack([~right, right], axis=1).astype(jnp.float32)
        stats = Stats(*[jnp.zeros(count)] * len(Stats._fields))
        return Encoded(None, slots, attention, stats)

    def read(self, tokens, slots):  # noqa: D102
        shape = (*slots.shape[:2], SIDE, SIDE)
        return Reading(None, jnp.full(shape, 1 / slots.shape[1]))

    def render(self, slots):  # noqa: D102
        grey = slots[:, 0, :1, None, None]
        return jnp.broadcast_to(grey, (len(slots), SIDE, SIDE, 3))


def config(starts=1, **data):
    section = {"resolution": SIDE, **data}
    masks = {"masks": {"starts": starts}}
    return ConfigDict({"seed": 0, "data": section, "evaluation": masks})


@pytest.fixture
def grey(tmp_path):
    """Writes a grey picture and returns its path."""

    def write(name, level=128, size=(SIDE, SIDE)):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (level,) * 3).save(file)
        return file

    return write


def refuse(name, error):
    raise error


def test_images_have_the_names_of_their_files(grey, tmp_path):
    for name in ("a.png", "b.JPG", "b.png", "sub/a.png"):
        grey(f"in/{name}")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    (tmp_path / "in" / ".hidden.png").touch()
    folder = str(tmp_path / "in")
    found = find_images([folder])
    assert list(found) == ["a", "b.JPG", "b.png", "sub/a"]
    assert found["sub/a"] == tmp_path / "in" / "sub" / "a.png"
    assert find_images([f"{folder}/*.png", f"{folder}/a.png"]) == {
        "a": tmp_path / "in" / "a.png",
        "b": tmp_path / "in" / "b.png",
    }
    # A file that was named is taken whatever its name; a folder's others are not.
    assert list(find_images([f"{folder}/notes.txt"])) == ["notes"]
    with pytest.raises(UserError, match=r"would both be written as a\.png; rename"):
        find_images([f"{folder}/a.png", f"{folder}/sub/a.png"])
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        find_images([f"{folder}/nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no picture in"):
        find_images([str(tmp_path / "empty")])


def test_bytes_that_are_no_text_become_a_name_that_is(grey, tmp_path):
    os.rename(grey("in/a.png"), os.fsencode(tmp_path / "in") + b"/\xff.png")
    assert list(find_images([str(tmp_path / "in")])) == ["\\xff"]


def test_nothing_depends_on_what_lies_beside_an_image(grey, monkeypatch):
    """Its place in a batch, other images, those that cannot be read."""
    monkeypatch.setattr(prediction, "BATCH", 2)
    a, b, broken = grey("a.png", 10), grey("b.png", 200), grey("c.png")
    broken.write_bytes(b"")
    images = {"b": b, "c": broken, "a": a, "again": b, "last": b}
    left_out = []
    found = dict(
        predict(Halves(), config(), images, lambda n, e: left_out.append((n, str(e))))
    )
    assert list(found) == ["b", "a", "again", "last"]
    ((name, sentence),) = left_out
    assert name == "c" and "c.png cannot be read (not a picture)" in sentence
    for other in ("a", "again", "last"):
        np.testing.assert_array_equal(found[other].slots, found["b"].slots)
    want = np.abs(jax.random.normal(jax.random.key(0), (1, 2, 3)))[0]
    np.testing.assert_allclose(found["b"].slots, want, rtol=1e-6)
    assert found["a"].image.max() == 10 and found["a"].reconstruction is not None


def test_the_start_that_reconstructs_an_image_best_counts(grey):
    images = {str(level): grey(f"{level}.png", level) for level in (0, 102, 204)}
    found = predict(Halves(), config(starts=6), images, refuse)
    key = jax.random.key(0)
    keys = [key, *(jax.random.fold_in(key, start) for start in range(1, 6))]
    tried = np.array([np.abs(jax.random.normal(k, (1, 2, 3))[0, 0, 0]) for k in keys])
    for name, made in found:
        best = tried[np.argmin((tried - int(name) / 255) ** 2)]
        np.testing.assert_allclose(made.slots[0, 0], best, rtol=1e-6)
        assert made.reconstruction is not None
        np.testing.assert_allclose(made.reconstruction, best, rtol=1e-6)


def test_masks_have_the_images_own_size_and_say_what_is_not_seen(grey, tmp_path):
    file = grey("wide.png", size=(30, 10))
    ((_, made),) = predict(Halves(), config(), {"wide": file}, refuse)
    assert made.kind == "attention"
    with Image.open(file) as picture:
        box = prediction.box_of(config(), picture)
        overlay = prediction.write(made, picture, box, tmp_path / "out" / "wide")
    assert box == (10, 0, 20, 10)
    with Image.open(tmp_path / "out" / "wide.masks.png") as masks:
        assert masks.mode == "P" and masks.size == (30, 10)
        ids, seen = np.array(masks), np.array(masks.convert("RGB"))
    want = [UNSEEN] * 10 + [0] * 5 + [1] * 5 + [UNSEEN] * 10
    np.testing.assert_array_equal(ids, [want] * 10)
    np.testing.assert_array_equal(seen[0, 10], slot_colours(2)[0])
    # 45 % of the image, 55 % of the slot's colour; the rest is as it was.
    drawn = np.asarray(overlay, float)
    np.testing.assert_array_equal(drawn[:, :10], 128)
    mixed = 0.45 * 128 + 0.55 * slot_colours(2)[1].astype(float)
    np.testing.assert_allclose(drawn[0, 19], mixed, atol=1)
    with Image.open(tmp_path / "out" / "wide.overlay.png") as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(overlay))
    with np.load(tmp_path / "out" / "wide.npz") as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "slots": (2, 3),
            "attention": (2, SIDE, SIDE),
            "image": (SIDE, SIDE, 3),
            "decoder": (2, SIDE, SIDE),
            "reconstruction": (SIDE, SIDE, 3),
        }
        np.testing.assert_array_equal(arrays["slots"], made.slots)


def test_masks_are_read_as_they_are_scored():
    """Shares bilinearly at the image's size, then the largest, the first on a tie."""
    shares = np.random.default_rng(0).random((4, 3, 5), np.float32)
    shares[3] = shares[1]
    scored = jax.image.resize(shares, (4, 24, 40), "bilinear")
    np.testing.assert_array_equal(largest(shares, 40, 24), np.argmax(scored, axis=0))
