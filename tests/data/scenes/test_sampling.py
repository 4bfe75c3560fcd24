"""Procedural scenes: their keys and laws of placement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from implicit_slots.data.scenes import sampling
from implicit_slots.data.source import CLEVR_CODES, SPLITS

MIN, MAX = 3, 6


@pytest.fixture(scope="module")
def drawn():
    """1500 scenes."""

    def one(index):
        key = sampling.scene_key(0, "train", index)
        return sampling.sample_scene(key, min_objects=MIN, max_objects=MAX)

    return jax.device_get(jax.jit(jax.vmap(one))(jnp.arange(1500)))


def radii(scene):
    """Radius of the disc an object stands in, and its radius or half side."""
    footprint = np.where(scene.size == CLEVR_CODES["size"].index("large"), 0.7, 0.35)
    cube = scene.shape == CLEVR_CODES["shape"].index("cube")
    return footprint, np.where(cube, footprint / np.sqrt(2), footprint)


def test_splits_and_indices_have_different_keys():
    indices = jnp.arange(2000)
    keys = [
        jax.vmap(lambda i, s=split: sampling.scene_key(7, s, i))(indices)
        for split in SPLITS
    ]
    data = np.concatenate([jax.random.key_data(k) for k in keys])
    assert len(np.unique(data, axis=0)) == len(data)


def test_objects_keep_their_distance_and_lie_in_the_frame(drawn):
    footprint, _ = radii(drawn)
    xy = drawn.position[..., :2]
    gap = np.linalg.norm(xy[:, :, None] - xy[:, None], axis=-1)
    gap -= footprint[:, :, None] + footprint[:, None]
    pairs = (
        drawn.present[:, :, None] & drawn.present[:, None] & ~np.eye(MAX, dtype=bool)
    )
    assert gap[pairs].min() >= 0.25 - 1e-5  # the generator's min_dist
    assert np.abs(xy[drawn.present]).max() <= 3
    _, half = radii(drawn)
    np.testing.assert_allclose(drawn.position[..., 2], half, rtol=1e-6)


def test_every_number_of_objects_in_range_occurs_about_equally_often(drawn):
    counts = np.bincount(drawn.present.sum(1), minlength=MAX + 1)
    assert counts[:MIN].sum() == 0
    assert len(counts) == MAX + 1
    # 1500 scenes over four numbers; five standard deviations are 84.
    assert np.all(np.abs(counts[MIN:] - 375) < 84)


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("shape", CLEVR_CODES["shape"]),
        ("size", CLEVR_CODES["size"]),
        ("material", CLEVR_CODES["material"]),
        ("color", CLEVR_CODES["color"]),
    ],
)
def test_every_attribute_occurs_about_equally_often(drawn, field, names):
    counts = np.bincount(getattr(drawn, field)[drawn.present], minlength=len(names))
    assert len(counts) == len(names)
    assert np.all(np.abs(counts / counts.mean() - 1) < 0.2)


def test_zoom_enlarges_about_the_middle_of_the_image(drawn):
    scene = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), drawn)
    plain = sampling.objects(scene, 64)
    zoomed = sampling.objects(scene, 64, zoom=2.5)
    np.testing.assert_allclose(
        zoomed["pixel_position"], 32 + 2.5 * (plain["pixel_position"] - 32), rtol=1e-4
    )
    for name in plain.keys() - {"pixel_position"}:
        np.testing.assert_array_equal(zoomed[name], plain[name])


def test_misuse_is_named():
    with pytest.raises(ValueError, match="split must be one of"):
        sampling.scene_key(0, "trian", 0)
    with pytest.raises(ValueError, match="got 5 and 4"):
        sampling.sample_scene(jax.random.key(0), min_objects=5, max_objects=4)
    with pytest.raises(ValueError, match=r"zoom must be at least 1, got 0\.5"):
        sampling.sample_scene(jax.random.key(0), zoom=0.5)
