"""The deletion study against loops in NumPy, and controls whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32
from small_slate import Compiled, section

from implicit_slots.evaluation.metrics.deletion import (
    Deletions,
    Regions,
    delete_in_turn,
    mask_regions,
    object_regions,
    random_orders,
    shuffle_slots,
    summarise,
)
from implicit_slots.models.build import build_model

BATCH, SLOTS, OBJECTS, SIDE, ORDERS = 5, 4, 5, 16, 3


def quiet(iterable, **_):
    return iterable


def boxes(seed=0):
    """Object masks with the last object of each image unseen, and shadows."""
    rng = np.random.default_rng(seed)
    segmentation = np.zeros((BATCH, SIDE, SIDE), np.int32)
    for image in segmentation:
        for k in range(OBJECTS - 1):
            row, column = rng.integers(0, SIDE - 6, 2)
            image[row : row + 6, column : column + 5] = k + 1
    shadow = np.roll(segmentation, 2, axis=2) * (segmentation == 0)
    shadow[:, :2, :2] = np.where(segmentation[:, :2, :2] == 0, OBJECTS, 0)
    return segmentation, shadow


def matches(seed=0):
    """A slot for all objects but some, and one idle slot in each image."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(SLOTS)[: SLOTS - 1] for _ in range(BATCH)]
    matched = np.full((BATCH, OBJECTS), -1, np.int32)
    matched[:, 1:SLOTS] = chosen
    return matched


def regions_of(segmentation, shadow, matched):
    return object_regions(
        jnp.asarray(segmentation),
        jnp.asarray(matched),
        num_slots=SLOTS,
        shadow=None if shadow is None else jnp.asarray(shadow),
    )


def study(render, slots=None, regions=None, **arguments):
    if slots is None:
        slots = jnp.zeros((BATCH, SLOTS, 2))
    if regions is None:
        regions = regions_of(*boxes(), matches())
    orders = random_orders(jax.random.key(3), ORDERS, BATCH, SLOTS)
    deletions, renders = delete_in_turn(
        jax.jit(render), slots, regions, orders, progress=quiet, **arguments
    )
    return deletions, renders, np.asarray(orders)


def noise(shape, seed):
    """Numbers that depend on the image and on who is present, the same on each call."""
    weights = np.random.default_rng(seed).normal(size=(SLOTS, *shape))
    weights = jnp.asarray(weights, jnp.float32)
    return lambda slots, present: jax.nn.sigmoid(
        jnp.tensordot(present.astype(jnp.float32) + slots[..., 0], weights, 1)
    )


def scene_without(seed=7):
    """A source's counterfactual, any function of what is removed."""
    levels = np.random.default_rng(seed).integers(0, 40, (OBJECTS, SIDE, SIDE, 3))

    def without(removed):
        images = 200 - np.tensordot(removed.astype(int), levels, 1)
        return images.astype(np.uint8)

    return without


def test_regions_are_the_objects_and_shadows_of_the_matched_slot():
    (segmentation, shadow), matched = boxes(), matches()
    for shade in (shadow, None):
        pixels, owned, counted = regions_of(segmentation, shade, matched)
        assert counted.all()
        for b in range(BATCH):
            for s in range(SLOTS):
                expected = np.zeros((SIDE, SIDE), bool)
                for k in range(OBJECTS):
                    assert owned[b, s, k] == (matched[b, k] == s)
                    if matched[b, k] == s and (segmentation[b] == k + 1).any():
                        expected |= segmentation[b] == k + 1
                        if shade is not None:
                            expected |= shade[b] == k + 1
                np.testing.assert_array_equal(pixels[b, s], expected)


def test_an_object_that_is_nowhere_seen_has_no_region():
    segmentation, shadow = boxes()
    matched = np.full((BATCH, OBJECTS), -1, np.int32)
    matched[:, OBJECTS - 1] = 2
    regions = regions_of(segmentation, shadow, matched)
    assert (shadow == OBJECTS).any()
    assert not regions.pixels.any()
    assert regions.objects[:, 2, OBJECTS - 1].all()


def test_regions_from_masks_share_out_the_whole_image():
    attention = jax.nn.softmax(
        jax.random.normal(jax.random.key(0), (BATCH, SLOTS, 4, 4)), axis=1
    )
    regions = mask_regions(attention, SIDE, SIDE)
    assert (np.asarray(regions.pixels).sum(axis=1) == 1).all()
    # Bilinear weights do not change on a grid of the same size.
    same = mask_regions(attention, 4, 4).pixels
    winners = np.asarray(attention).argmax(axis=1)
    np.testing.assert_array_equal(np.asarray(same).argmax(axis=1), winners)
    assert regions.objects.shape == (BATCH, SLOTS, 0)


def expected_numbers(render, read, without, image, slots, regions, orders):
    """The definitions, in float64: image by image, pixel by pixel."""
    pixels, owned = np.asarray(regions.pixels), np.asarray(regions.objects)
    names = [name for name in Deletions._fields if name != "render_error"]
    table = {name: np.full((ORDERS, SLOTS - 1, BATCH), np.nan) for name in names}

    def look(present):
        removed = (owned & ~present[..., None]).any(axis=1)
        return (
            np.asarray(render(slots, jnp.asarray(present)), np.float64),
            np.asarray(read(slots, jnp.asarray(present)), np.float64),
            without(removed) / 255.0,
        )

    for order in range(ORDERS):
        present = np.ones((BATCH, SLOTS), bool)
        old = look(present)
        for step in range(SLOTS - 1):
            for b in range(BATCH):
                present[b, orders[order, b, step]] = False
            new = look(present)
            for b in range(BATCH):
                region = pixels[b, orders[order, b, step]]
                change = ((new[0][b] - old[0][b]) ** 2).sum(axis=-1)
                scene = ((new[2][b] - old[2][b]) ** 2).sum(axis=-1)
                rise = new[1][b] - old[1][b]
                where = order, step, b
                error = ((new[0][b] - new[2][b]) ** 2).sum()
                table["counterfactual_error"][where] = error
                if not region.any():
                    table["idle_change"][where] = change.sum()
                    continue
                table["change"][where] = change.sum()
                table["spill"][where] = change[~region].sum()
                table["spill_share"][where] = change[~region].sum() / change.sum()
                table["scene_spill"][where] = scene[~region].sum()
                inside = outside = 0.0
                size = SIDE // len(rise)
                for r in range(len(rise)):
                    for c in range(len(rise)):
                        cell = np.s_[r * size : (r + 1) * size]
                        cells = region[cell, c * size : (c + 1) * size]
                        inside += rise[r, c] if cells.any() else 0
                        outside += 0 if cells.any() else rise[r, c]
                table["object_cross_entropy"][where] = inside
                table["spill_cross_entropy"][where] = outside
            old = new
    first = look(np.ones((BATCH, SLOTS), bool))[0]
    table["render_error"] = ((first - image) ** 2).sum(axis=(1, 2, 3))
    return table


def test_numbers_equal_their_definitions():
    rng = np.random.default_rng(5)
    slots = jnp.asarray(rng.normal(size=(BATCH, SLOTS, 2)), jnp.float32)
    image = rng.random((BATCH, SIDE, SIDE, 3)).astype(np.float32)
    render, read = noise((SIDE, SIDE, 3), 0), noise((4, 4), 1)
    regions = regions_of(*boxes(), matches())
    without = scene_without()
    deletions, renders, orders = study(
        render,
        slots,
        regions,
        read=jax.jit(read),
        image=jnp.asarray(image),
        without=without,
    )
    wanted = expected_numbers(render, read, without, image, slots, regions, orders)
    for name, values in deletions._asdict().items():
        np.testing.assert_allclose(
            values, wanted[name], rtol=10 * FLOAT32, atol=1e-5, err_msg=name
        )
    # One idle slot in each image: both kinds occur.
    assert np.isfinite(deletions.spill).sum() > np.isfinite(deletions.idle_change).sum()
    assert np.isfinite(deletions.idle_change).any()

    present = np.ones((BATCH, SLOTS), bool)
    assert len(renders) == SLOTS
    for step in range(SLOTS):
        np.testing.assert_allclose(renders[step], render(slots, jnp.asarray(present)))
        present[np.arange(BATCH), orders[0, :, step]] = False

    # Slots' names mean nothing.
    renamed = np.random.default_rng(1).permutation(SLOTS)
    back = np.argsort(renamed)
    again, _ = delete_in_turn(
        jax.jit(lambda s, p: render(s[:, back], p[:, back])),
        slots[:, renamed],
        Regions(*(leaf[:, renamed] for leaf in regions)),
        jnp.asarray(back[orders]),
        progress=quiet,
    )
    np.testing.assert_array_equal(again.spill_share, deletions.spill_share)


def test_pasted_objects_do_not_spill():
    """Slots that are objects: a deletion gives the ground back and touches no more."""
    rng = np.random.default_rng(2)
    segmentation, shadow = boxes()
    ground = rng.integers(0, 255, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    image = rng.integers(0, 255, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    matched = matches()
    regions = regions_of(segmentation, shadow, matched)

    def paste(kept, original):
        """The image where an object of those kept, or its shadow, is seen."""
        ids = np.arange(1, OBJECTS + 1)[:, None, None]
        seen = (segmentation[:, None] == ids) | (shadow[:, None] == ids)
        shown = (seen & kept[..., None, None]).any(axis=1) | (
            (segmentation == 0) & (shadow == 0)
        )
        return np.where(shown[..., None], original, ground)

    def render(slots, present):
        owner = np.where(matched < 0, SLOTS, matched)
        kept = np.pad(np.asarray(present), ((0, 0), (0, 1)), constant_values=True)
        kept = np.take_along_axis(kept, owner, axis=1)
        return jnp.asarray(paste(kept, image) / 255, jnp.float32)

    orders = random_orders(jax.random.key(0), ORDERS, BATCH, SLOTS)
    deletions, _ = delete_in_turn(
        render,
        jnp.zeros((BATCH, SLOTS, 1)),
        regions,
        orders,
        image=jnp.asarray(image / 255, jnp.float32),
        without=lambda removed: paste(~removed, image),
        progress=quiet,
    )
    owned = np.isfinite(deletions.spill)
    assert owned.sum() == np.isfinite(deletions.change).sum() > 0
    assert (deletions.change[owned] > 1).all()
    for name in ("spill", "spill_share", "scene_spill"):
        assert (getattr(deletions, name)[owned] == 0).all(), name
    assert (deletions.idle_change[~owned] == 0).all()
    assert deletions.counterfactual_error.max() < 1e-6
    assert deletions.render_error.max() < 1e-6


def test_a_render_of_the_number_left_spills_the_share_outside():
    """Every pixel is (number of slots left) / K: each changes by 1/K alike."""

    def render(slots, present):
        level = present.sum(axis=1)[:, None, None, None] / SLOTS
        return jnp.broadcast_to(level, (BATCH, SIDE, SIDE, 3))

    regions = regions_of(*boxes(), matches())
    deletions, _, orders = study(render, regions=regions)
    areas = np.asarray(regions.pixels).sum(axis=(2, 3)) / SIDE**2
    chosen = areas[np.arange(BATCH)[:, None], orders[:, :, :-1]].swapaxes(1, 2)
    expected = np.where(chosen > 0, 1 - chosen, np.nan)
    np.testing.assert_allclose(deletions.spill_share, expected, rtol=FLOAT32)
    whole = 3 * SIDE**2 / SLOTS**2
    np.testing.assert_allclose(deletions.spill, expected * whole, rtol=FLOAT32)
    for name in ("scene_spill", "spill_cross_entropy", "counterfactual_error"):
        assert np.isnan(getattr(deletions, name)).all()
    assert np.isnan(deletions.render_error).all()


def test_a_render_that_does_not_change_has_no_share():
    deletions, _, _ = study(lambda s, p: jnp.zeros((BATCH, SIDE, SIDE, 3)))
    assert np.isnan(deletions.spill_share).all()
    assert np.nanmax(deletions.spill) == 0
    assert np.isnan(deletions.spill).any()


def test_a_source_without_a_renderer_leaves_scenes_undefined():
    deletions, _, _ = study(noise((SIDE, SIDE, 3), 0), without=lambda removed: None)
    assert np.isnan(deletions.counterfactual_error).all()
    assert np.isnan(deletions.scene_spill).all()
    assert not np.isnan(deletions.spill).all()


def test_orders_are_random_permutations():
    orders = np.asarray(random_orders(jax.random.key(0), 40, 7, SLOTS))
    assert (np.sort(orders, axis=-1) == np.arange(SLOTS)).all()
    counts = np.bincount(orders[..., 0].ravel(), minlength=SLOTS)
    assert counts.min() > 40 * 7 / SLOTS / 2
    assert (orders[:, 0] != orders[:, 1]).any() and (orders[0] != orders[1]).any()


@pytest.mark.parametrize("batch", [SLOTS, 11])
def test_shuffled_slots_share_no_image(batch):
    names = np.arange(batch)[:, None] * 100 + np.arange(SLOTS)
    pair = jnp.asarray(names), jnp.asarray(names)[..., None, None] * 2
    mixed, doubled = shuffle_slots(jax.random.key(4), pair)
    np.testing.assert_array_equal(doubled[..., 0, 0], 2 * mixed)
    images, places = np.divmod(np.asarray(mixed), 100)
    assert (places == np.arange(SLOTS)).all()
    assert (np.sort(images, axis=0) == np.arange(batch)[:, None]).all()
    assert all(len(set(row)) == SLOTS for row in images.tolist())


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="at least as many images as slots: 4, got 3"):
        shuffle_slots(jax.random.key(0), jnp.zeros((3, 4)))
    pixels = jnp.zeros((1, 1, 4, 4), bool)
    regions = Regions(pixels, jnp.zeros((1, 1, 2), bool), ~pixels)
    orders = jnp.zeros((1, 1, 1), int)
    with pytest.raises(ValueError, match="at least two, got 1"):
        delete_in_turn(
            noise((4, 4, 3), 0), jnp.zeros((1, 1, 1)), regions, orders, progress=quiet
        )


def test_the_summary_averages_what_is_defined():
    values = np.full((2, 3, 4), np.nan, np.float32)
    values[:, 0] = np.arange(8).reshape(2, 4)
    values[1, 1, 2] = 6
    fields = {name: values for name in Deletions._fields}
    fields["render_error"] = np.array([1, 2, np.nan, 3], np.float32)
    table = summarise(Deletions(**fields))
    np.testing.assert_array_equal(table["left"], [3, 2, 1])
    np.testing.assert_array_equal(table["counted"], [8, 1, 0])
    np.testing.assert_array_equal(table["spill"], [3.5, 6, np.nan])
    np.testing.assert_array_equal(table["render_error"], [2, 2, 2])


@pytest.mark.slow
def test_a_model_goes_through_the_study():
    model = Compiled(build_model(section(), resolution=SIDE, seed=0))
    image = jax.random.uniform(jax.random.key(0), (BATCH, SIDE, SIDE, 3))
    encoded = model(lambda m, i: m.encode(i, key=jax.random.key(1)), image)
    tokens, slots = encoded.tokens, encoded.slots
    count = slots.shape[1]

    def call(method):
        compiled = jax.jit(
            lambda p, s, present: method(model.merge(p), s, present),
        )
        return lambda s, present: compiled(model.params, s, present)

    render = call(lambda m, s, present: m.render(s, present=present))
    read = call(lambda m, s, present: m.read(tokens, s, present=present).cross_entropy)
    deletions, renders = delete_in_turn(
        render,
        slots,
        mask_regions(encoded.attention, SIDE, SIDE),
        random_orders(jax.random.key(0), 2, BATCH, count),
        read=read,
        image=image,
        progress=quiet,
    )
    assert renders.shape == (count, BATCH, SIDE, SIDE, 3)
    owned = np.isfinite(deletions.spill)
    assert owned.any()
    assert (deletions.spill[owned] <= deletions.change[owned]).all()
    # Rises inside and outside add up to the whole rise, which needs no region.
    orders = np.asarray(random_orders(jax.random.key(0), 2, BATCH, count))
    present = np.arange(count) != orders[0, :, :1]
    rise = read(slots, jnp.asarray(present)) - read(slots, jnp.ones_like(present))
    parts = deletions.spill_cross_entropy + deletions.object_cross_entropy
    whole = np.asarray(rise).sum(axis=(1, 2))
    np.testing.assert_allclose(
        parts[0, 0][owned[0, 0]], whole[owned[0, 0]], rtol=1e-3, atol=1e-4
    )
