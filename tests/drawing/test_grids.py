"""Pictures are read back pixel by pixel from the places where they must be."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from implicit_slots.drawing import grids
from implicit_slots.drawing.grids import (
    FONT_SIZE,
    GAP,
    MARGIN,
    NEUTRAL,
    NOT_FINITE,
    contact_sheet,
    reconstruction_grid,
    save_png,
    slot_colours,
)
from implicit_slots.evaluation.metrics.segmentation import attention_to_masks

TOP = MARGIN + 2 * FONT_SIZE
SIZE, SCALE, SLOTS = 32, 3, 4
VIEWS = ("image", "dvae", "slots", "true", "predicted")


def scene(batch=3, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.random((batch, SLOTS, 8, 8), np.float32)
    return {
        "image": rng.integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8),
        "dvae": rng.random((batch, SIZE, SIZE, 3), np.float32),
        "slots": rng.random((batch, SIZE, SIZE, 3), np.float32),
        "attention": weights / weights.sum(axis=1, keepdims=True),
        "segmentation": rng.integers(0, 3, (batch, SIZE, SIZE), np.int32),
    }


def tile(picture, row, column, first_slot=5, top=TOP):
    """The tile's pixels, each once, after checking that each is a whole block."""
    side = SIZE * SCALE
    left = MARGIN + column * (side + GAP) + 2 * GAP * (column >= first_slot)
    top += row * (side + GAP)
    block = picture[top : top + side, left : left + side]
    small = block[::SCALE, ::SCALE]
    np.testing.assert_array_equal(block, small.repeat(SCALE, 0).repeat(SCALE, 1))
    return small


def test_grid_has_a_row_per_example_and_a_column_per_view_and_slot():
    picture = reconstruction_grid(**scene())
    step = SIZE * SCALE + GAP
    height = TOP + 3 * step - GAP + MARGIN
    width = MARGIN + (len(VIEWS) + SLOTS) * step - GAP + 2 * GAP + MARGIN
    assert picture.shape == (height, width, 3)


def test_grid_shows_images_and_reconstructions():
    arrays = scene()
    picture = reconstruction_grid(**arrays)
    for row in range(3):
        np.testing.assert_array_equal(tile(picture, row, 0), arrays["image"][row])
        for column, name in ((1, "dvae"), (2, "slots")):
            shown = tile(picture, row, column) / 255
            np.testing.assert_allclose(shown, arrays[name][row], atol=0.51 / 255)


def test_grid_without_dvae_and_segmentation_lacks_their_columns():
    arrays = scene()
    arrays |= {"dvae": None, "segmentation": None}
    picture = reconstruction_grid(**arrays)
    shown = tile(picture, 0, 1, first_slot=3) / 255
    np.testing.assert_allclose(shown, arrays["slots"][0], atol=0.51 / 255)
    assert picture.shape[1] == 2 * MARGIN + 7 * (SIZE * SCALE + GAP) + GAP


def test_masks_drawn_are_the_masks_scored():
    arrays = scene()
    picture = reconstruction_grid(**arrays)
    masks = np.asarray(attention_to_masks(jnp.asarray(arrays["attention"]), SIZE, SIZE))
    for row in range(3):
        shown = tile(picture, row, VIEWS.index("predicted"))
        np.testing.assert_array_equal(shown, slot_colours(SLOTS)[masks[row]])


def test_a_slot_shows_the_image_where_it_attends_and_white_elsewhere():
    arrays = scene(batch=1)
    arrays["attention"] = np.zeros((1, SLOTS, 8, 8), np.float32)
    arrays["attention"][0, 1] = 1
    arrays["attention"][0, 2] = 0.5
    picture = reconstruction_grid(**arrays)
    image = arrays["image"][0]
    assert (tile(picture, 0, 5) == 255).all()
    np.testing.assert_array_equal(tile(picture, 0, 6), image)
    half = 127.5 + image / 2
    np.testing.assert_allclose(tile(picture, 0, 7), half, atol=0.5)


def test_true_masks_have_the_colour_of_the_slot_that_covers_them():
    arrays = scene(batch=1)
    # Quarters of the image: three objects and background, found by slots 2, 0, 3;
    # slot 1 finds nothing and the first quarter goes to slot 3 as well.
    quarter = np.repeat(np.repeat(np.array([[0, 1], [2, 3]], np.int32), 16, 0), 16, 1)
    slot_of = np.array([3, 2, 0, 3])
    found = slot_of[quarter]
    found[:2, :2] = 2  # a few wrong pixels change nothing
    quarter[:16, :4] = 3  # object 3 is the larger part of what slot 3 covers
    arrays["segmentation"] = quarter[None]
    arrays["attention"] = np.eye(SLOTS, dtype=np.float32)[found].transpose(2, 0, 1)[
        None
    ]
    shown = tile(reconstruction_grid(**arrays), 0, VIEWS.index("true"))
    colours = slot_colours(SLOTS)
    expected = np.stack([np.array(NEUTRAL), colours[2], colours[0], colours[3]])
    np.testing.assert_array_equal(shown, expected[quarter])


def test_what_is_not_finite_is_magenta_and_breaks_nothing():
    arrays = scene(batch=1)
    arrays["dvae"][0, 3, 4, 1] = np.nan
    arrays["slots"][:] = np.inf
    arrays["attention"][:] = np.nan
    picture = reconstruction_grid(**arrays)
    magenta = (tile(picture, 0, 1) == NOT_FINITE).all(axis=-1)
    assert magenta[3, 4]
    assert magenta.sum() == 1
    for column in (2, 5):
        assert (tile(picture, 0, column) == NOT_FINITE).all()


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save_png(reconstruction_grid(**scene()), tmp_path / "images" / f"{name}.png")
    one, two = sorted((tmp_path / "images").iterdir())
    assert one.read_bytes() == two.read_bytes()
    with Image.open(one) as opened:
        np.testing.assert_array_equal(
            np.asarray(opened), reconstruction_grid(**scene())
        )


def test_contact_sheet_goes_row_by_row():
    images = scene(batch=5)["image"]
    picture = contact_sheet(images, columns=2)
    for index in range(5):
        shown = tile(picture, index // 2, index % 2, top=MARGIN)
        np.testing.assert_array_equal(shown, images[index])
    assert picture.shape[1] == 2 * MARGIN + 2 * SIZE * SCALE + GAP


def test_contact_sheet_sets_masks_below_images():
    arrays = scene(batch=2)
    picture = contact_sheet(arrays["image"], arrays["segmentation"])
    shown = tile(picture, 0, 1, top=MARGIN + SIZE * SCALE + 1)
    colours = np.concatenate([[NEUTRAL], slot_colours(2)])
    np.testing.assert_array_equal(shown, colours[arrays["segmentation"][1]])


def test_what_no_metric_counts_is_white_in_true_masks():
    arrays = scene(batch=2)
    arrays["segmentation"][:, :3] = -1
    sheet = contact_sheet(arrays["image"], arrays["segmentation"])
    shown = tile(sheet, 0, 1, top=MARGIN + SIZE * SCALE + 1)
    grid = tile(reconstruction_grid(**arrays), 0, VIEWS.index("true"))
    for masks in (shown, grid):
        white = (masks == 255).all(axis=-1)
        assert white[:3].all() and not white[3:].any()


def test_large_images_keep_their_pixels():
    images = np.zeros((1, 128, 128, 3), np.uint8)
    side = 128 + 2 * MARGIN
    assert contact_sheet(images).shape == (side, side, 3)


def test_more_slots_than_colours_still_differ():
    assert len(np.unique(slot_colours(24), axis=0)) == 24


# Linear RGB as seen without red, green or blue cones, and with all (Machado et al.,
# 2009, severity 1).
SIGHT = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
    "normal": np.eye(3),
}


def cielab(linear):
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722]]
    to_xyz.append([0.0193, 0.1192, 0.9505])
    xyz = linear @ np.transpose(to_xyz) / np.sum(to_xyz, axis=1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_stay_apart_for_every_reader(sight):
    colours = np.concatenate([[NEUTRAL], slot_colours(len(grids.PALETTE))])
    srgb = colours / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = cielab(np.clip(linear @ np.transpose(SIGHT[sight]), 0, 1))
    nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
    assert nearest > 22
