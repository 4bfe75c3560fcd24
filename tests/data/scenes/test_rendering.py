"""Pictures of the procedural scenes: laws, and a float64 ray caster to agree with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from implicit_slots.data.scenes import rendering, sampling
from implicit_slots.data.source import CLEVR_CODES

RESOLUTION = 64
BATCH = 24
MIN, MAX = 3, 6


def draw(indices=None, seed=0, split="train", keep=None, zoom=1.0):
    indices = np.arange(BATCH) if indices is None else indices
    batch = rendering.render_batch(
        seed,
        split,
        indices,
        resolution=RESOLUTION,
        min_objects=MIN,
        max_objects=MAX,
        keep=keep,
        zoom=zoom,
    )
    return jax.device_get(batch)


def sample(index, split="train"):
    key = sampling.scene_key(0, split, index)
    return sampling.sample_scene(key, min_objects=MIN, max_objects=MAX)


@pytest.fixture(scope="module")
def batch():
    return draw()


@pytest.fixture(scope="module")
def drawn():
    """The batch's scenes without their images."""
    return jax.device_get(jax.jit(jax.vmap(sample))(jnp.arange(BATCH)))


# An independent ray caster: float64, first hits by solving for the ray's parameter.


def first_hit(shape, centre, radius, rotation, origin, direction):
    """Ray parameter of the first hit, infinite where there is none."""
    turn = np.array(
        [
            [np.cos(rotation), np.sin(rotation), 0],
            [-np.sin(rotation), np.cos(rotation), 0],
            [0, 0, 1],
        ]
    )
    o, d = (origin - centre) @ turn.T, direction @ turn.T
    if shape == "cube":
        a, b = (-radius - o) / d, (radius - o) / d
        enter, leave = np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)
        return np.where(enter <= leave, enter, np.inf)
    axes = 3 if shape == "sphere" else 2
    o2, d2 = o[..., :axes], d[..., :axes]
    a, b = (d2 * d2).sum(-1), (o2 * d2).sum(-1)
    inside = b * b - a * ((o2 * o2).sum(-1) - radius**2)
    root = np.sqrt(np.maximum(inside, 0))
    enter, leave = (-b - root) / a, (-b + root) / a
    if shape == "cylinder":
        a, b = (-radius - o[..., 2]) / d[..., 2], (radius - o[..., 2]) / d[..., 2]
        enter = np.maximum(enter, np.minimum(a, b))
        leave = np.minimum(leave, np.maximum(a, b))
    return np.where((inside >= 0) & (enter <= leave), enter, np.inf)


def hits(scene, i, origin, direction, swell=0.0):
    """First hits with each object of scene i, objects first."""
    radius = np.where(scene.size == CLEVR_CODES["size"].index("large"), 0.7, 0.35)
    half = radius / np.sqrt(2)
    radius = np.where(scene.shape == CLEVR_CODES["shape"].index("cube"), half, radius)
    return np.stack(
        [
            first_hit(
                CLEVR_CODES["shape"][scene.shape[i, k]],
                scene.position[i, k].astype(np.float64),
                radius[i, k] + swell,
                float(scene.rotation[i, k]),
                origin,
                direction,
            )
            if scene.present[i, k]
            else np.full(
                np.broadcast_shapes(origin.shape, direction.shape)[:-1], np.inf
            )
            for k in range(MAX)
        ]
    )


def camera_rays(camera):
    """Through the pixel centres of rows 29:221, columns 64:256 of a 320x240 frame."""
    centres = (np.arange(RESOLUTION) + 0.5) * 192 / RESOLUTION
    v, u = np.meshgrid(29 + centres, 64 + centres, indexing="ij")
    forward = -camera / np.linalg.norm(camera)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    millimetres = 32 / 320
    return (
        35 * forward
        + ((u - 160) * millimetres)[..., None] * right
        + ((120 - v) * millimetres)[..., None] * np.cross(right, forward)
    )


def test_segmentation_agrees_with_a_float64_ray_caster(batch, drawn):
    wrong = 0
    for i in range(BATCH):
        camera = drawn.camera[i].astype(np.float64)
        t = hits(drawn, i, camera, camera_rays(camera))
        expected = np.where(np.isinf(t.min(0)), 0, t.argmin(0) + 1)
        wrong += np.sum(expected != batch["segmentation"][i])
    assert wrong <= 2e-5 * batch["segmentation"].size  # two pixels of 98,304


def test_shadows_lie_where_a_float64_ray_caster_finds_lamps_blocked(batch, drawn):
    sun = np.array([11.66081, -6.62799, 25.82317]) * 100
    in_sun_shadow = 0
    for i in range(BATCH):
        camera = drawn.camera[i].astype(np.float64)
        rays = camera_rays(camera)
        point = camera - rays * (camera[2] / rays[..., 2])[..., None]
        ground = batch["segmentation"][i] == 0
        shadow = batch["shadow"][i]
        assert not shadow[~ground].any()
        lamps = [*drawn.lamps[i].astype(np.float64), sun]
        to_lamps = [lamp - point for lamp in lamps]
        # Half a lamp's light is gone where the ray to its centre is blocked, and the
        # sun gives more than a fifth of all light.
        core = np.isfinite(hits(drawn, i, point, to_lamps[-1], -0.02)).any(0) & ground
        in_sun_shadow += core.sum()
        assert np.all(shadow[core] > 0)
        near = [np.isfinite(hits(drawn, i, point, to, 0.1)) for to in to_lamps]
        for k in range(MAX):
            assert np.any(near, 0)[k][shadow == k + 1].all()
    assert in_sun_shadow > 500


def test_same_indices_give_the_same_bytes_and_other_seeds_others(batch):
    again = draw()
    jax.tree.map(np.testing.assert_array_equal, again, batch)
    assert not np.array_equal(draw(seed=1)["image"], batch["image"])
    assert len({image.tobytes() for image in batch["image"]}) == BATCH


def test_a_scene_has_the_same_bytes_alone_and_in_any_place_of_a_batch(batch):
    for i in range(BATCH):
        alone = draw(np.array([i]))
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_array_equal(a[0], b[i]), alone, batch
        )
    reversed_batch = draw(np.arange(BATCH)[::-1])
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[::-1], b), reversed_batch, batch
    )


def test_drawing_at_once_as_on_an_accelerator_gives_the_same_scenes(batch):
    at_once = jax.jit(
        jax.vmap(lambda index: rendering.render(sample(index), RESOLUTION))
    )
    at_once = jax.device_get(at_once(jnp.arange(BATCH)))
    difference = np.abs(at_once["image"].astype(int) - batch["image"])
    assert difference.max() <= 1  # grey levels: rounding only
    for name in ("segmentation", "shadow"):
        assert np.mean(at_once[name] != batch[name]) < 1e-4


def test_splits_share_one_compilation_and_are_each_their_own(batch, monkeypatch):
    del batch  # has compiled
    monkeypatch.setattr(rendering, "render", None)  # tracing again would call it
    for split in ("validation", "test"):
        scene = jax.jit(jax.vmap(lambda i, s=split: sample(i, s)))(jnp.arange(BATCH))
        attributes = draw(split=split)["objects"]
        np.testing.assert_array_equal(attributes["color"], scene.color)
        np.testing.assert_allclose(attributes["position"], scene.position, rtol=1e-5)


@pytest.mark.slow
def test_zoom_shows_the_middle_of_a_larger_picture(drawn):
    scene = jax.tree.map(lambda leaf: jnp.asarray(leaf[:8]), drawn)

    def render(resolution, zoom):
        draw_all = jax.vmap(lambda s: rendering.render(s, resolution, zoom=zoom))
        return jax.device_get(jax.jit(draw_all)(scene))

    middle = slice(RESOLUTION // 2, RESOLUTION // 2 + RESOLUTION)
    large = {k: v[:, middle, middle] for k, v in render(2 * RESOLUTION, 1.0).items()}
    zoomed = render(RESOLUTION, 2.0)
    # The same rays, up to rounding.
    for name in ("segmentation", "shadow"):
        assert np.mean(zoomed[name] != large[name]) < 1e-3
    difference = np.abs(zoomed["image"].astype(int) - large["image"])
    assert np.mean(difference > 1) < 1e-3  # grey levels


# Zoomed, more objects are cut by the frame, and what is left is more often hidden.
@pytest.mark.parametrize(
    ("zoom", "hidden", "small"), [(1.0, 0, 0.01), (2.0, 0.01, 0.02)]
)
def test_nearly_every_object_can_be_seen(zoom, hidden, small):
    # The generator asks for 200 pixels of the whole frame; the sampler judges by discs.
    least = 200 * (RESOLUTION / 192) ** 2
    visible = []
    for first in range(0, 8 * BATCH, BATCH):
        batch = draw(np.arange(first, first + BATCH), zoom=zoom)
        seen = [(batch["segmentation"] == k + 1).sum((1, 2)) for k in range(MAX)]
        visible.append(np.stack(seen, 1)[batch["objects"]["present"]])
    visible = np.concatenate(visible)
    assert np.mean(visible == 0) <= hidden
    assert np.mean(visible < 0.8 * least) < small


def test_masks_name_present_objects_only(batch):
    for i in range(BATCH):
        there = {0, *(np.flatnonzero(batch["objects"]["present"][i]) + 1)}
        assert set(np.unique(batch["segmentation"][i])) == there
        assert set(np.unique(batch["shadow"][i])) <= there
        assert len(np.unique(batch["shadow"][i])) > 1


def test_an_objects_pixel_position_lies_in_its_mask_unless_something_is_nearer(batch):
    found = 0
    attributes = batch["objects"]
    for i, k in zip(*np.nonzero(attributes["present"]), strict=True):
        column, row = np.floor(attributes["pixel_position"][i, k]).astype(int)
        if not (0 <= column < RESOLUTION and 0 <= row < RESOLUTION):
            continue
        seen = batch["segmentation"][i, row, column]
        assert seen > 0
        nearer = attributes["depth"][i, seen - 1] < attributes["depth"][i, k]
        assert seen == k + 1 or nearer
        found += seen == k + 1
    assert found > 0.8 * attributes["present"].sum()


def neighbours(mask):
    """The eight neighbours of every pixel; beyond the frame, 0."""
    padded, (h, w) = np.pad(mask, 1), mask.shape
    return np.stack(
        [
            padded[a : a + h, b : b + w]
            for a in range(3)
            for b in range(3)
            if (a, b) != (1, 1)
        ]
    )


def test_taking_an_object_out_changes_only_what_it_touched(batch):
    present = batch["objects"]["present"]
    victim = present.argmax(1)
    keep = np.ones((BATCH, MAX), bool)
    keep[np.arange(BATCH), victim] = False
    without = draw(keep=keep)
    changed = 0
    for i in range(BATCH):
        name = victim[i] + 1
        mask, after = batch["segmentation"][i], without["segmentation"][i]
        gone = mask == name
        assert name not in after and name not in without["shadow"][i]
        np.testing.assert_array_equal(after[~gone], mask[~gone])
        np.testing.assert_array_equal(
            present[i], without["objects"]["present"][i]
        )  # the attributes describe the scene, not the picture

        before, now = batch["image"][i].astype(int), without["image"][i].astype(int)
        change = np.abs(now - before).max(-1)
        # Blended edges reach one pixel further than the mask.
        around = gone | (neighbours(gone) > 0).any(0)
        metal = np.append(False, batch["objects"]["material"][i] == 1)[mask]
        inside = (neighbours(mask) == mask).all(0) & ~around
        untouched = (mask == 0) & (batch["shadow"][i] == 0) & ~around
        # Four lamps may each lose less than a tenth of the light: 6 grey levels.
        assert change[untouched & inside].max() <= 24
        assert change[(mask > 0) & ~metal & inside].max(initial=0) == 0
        assert np.all(now[(mask == 0) & inside] >= before[(mask == 0) & inside])
        changed += (change[gone] > 12).sum()
    assert changed > 1000


def test_keeping_everything_changes_nothing(batch):
    kept = draw(keep=np.ones((BATCH, MAX), bool))
    jax.tree.map(np.testing.assert_array_equal, kept, batch)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="split must be one of"):
        draw(split="trian")
    with pytest.raises(ValueError, match=r"zoom must be at least 1, got 0\.5"):
        draw(zoom=0.5)
