"""Pyramids and cones, against points of lines that lie in them or do not."""

from functools import partial

import jax
import numpy as np
import pytest

from implicit_slots.data.scenes.unseen_shapes import UNSEEN_SURFACES

RADIUS = 0.7
STEP = 1 / 500
LINES = 500
WIDTHS = (
    lambda x, y: np.maximum(np.abs(x), np.abs(y)),  # a pyramid is square
    np.hypot,
)


def lines(steepest):
    """Points about the centre, and unit directions that go down; radians."""
    rng = np.random.default_rng(0)
    around, up = rng.uniform(0, 2 * np.pi, LINES), rng.uniform(0.1, steepest, LINES)
    level = np.cos(up)
    d = np.stack([level * np.cos(around), level * np.sin(around), -np.sin(up)])
    return rng.uniform(-RADIUS, RADIUS, (3, LINES)), d


def first_inside(code, o, d):
    """How far along each line its first point in the body is; infinite without one."""
    t = np.arange(-4 * RADIUS, 4 * RADIUS, STEP)
    x, y, z = (p[:, None] + t * q[:, None] for p, q in zip(o, d, strict=True))
    inside = (np.abs(z) <= RADIUS) & (WIDTHS[code](x, y) <= (RADIUS - z) / 2)
    return np.where(inside.any(1), t[inside.argmax(1)], np.inf)


@partial(jax.jit, static_argnums=0)
def surface(code, o, d):
    return UNSEEN_SURFACES[code](tuple(o), tuple(d), RADIUS, 1e-3)[:3]


def trace(code, o, d):
    """Outline, distance along the line and normal, as float64."""
    found = surface(code, o.astype(np.float32), d.astype(np.float32))
    return [np.asarray(leaf, np.float64) for leaf in found]


@pytest.mark.parametrize("code", [0, 1])
def test_lines_meet_a_shape_where_they_enter_it(code):
    o, d = lines(1.5)
    outline, *_ = trace(code, o, d)
    hit = np.isfinite(first_inside(code, o, d))
    clear = np.abs(outline) > STEP
    assert 0.2 < hit.mean() < 0.8 and clear.mean() > 0.97
    np.testing.assert_array_equal(outline[clear] > 0, hit[clear])
    # Near the outline, a line that is moved across by so much is so much farther.
    side = np.cross(d.T, [1, 2, 3]).T
    side /= np.linalg.norm(side, axis=0)
    across = side, np.cross(d.T, side.T).T
    slopes = [(trace(code, o + 1e-3 * v, d)[0] - outline) / 1e-3 for v in across]
    near = np.hypot(*slopes)[np.abs(outline) < 0.05 * RADIUS]
    assert len(near) >= 40
    assert abs(np.quantile(near, [0.1, 0.9]) - 1).max() < 0.05

    o, d = lines(0.9)  # the sides fall by 1.1
    outline, t, lean = trace(code, o, d)
    hit = outline > 0.05 * RADIUS
    entered = first_inside(code, o, d)
    assert hit.sum() > 50
    np.testing.assert_allclose(t[hit], entered[hit], atol=2 * STEP)
    # Two lines beside it meet the surface in the plane that is tangent to it.
    beside = [o + np.array(v)[:, None] for v in ([0.005, 0, 0], [0, 0.005, 0])]
    a, b = (p + trace(code, p, d)[1] * d - (o + t * d) for p in beside)
    normal = np.cross(a.T, b.T).T
    cos = np.sum(normal * lean, 0) / np.linalg.norm(normal, axis=0)
    cos /= np.linalg.norm(lean, axis=0)
    assert np.quantile(cos[hit], 0.05) > 0.99  # but across an edge
