"""Pyramids and cones: shapes that no unshifted scene has; outlines and surfaces.

Both are as high as they are wide. The functions are those of ``shapes``, of the same
arguments and results.
"""

import jax.numpy as jnp

from implicit_slots.data.scenes.sampling import dot
from implicit_slots.data.scenes.shapes import along


def _cross(a, b):
    return (
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    )


# Of the base, and up to the apex at (0, 0, r).
_EDGES = ((1, 0, 0), (0, 1, 0), (1, 1, 2), (1, -1, 2), (-1, 1, 2), (-1, -1, 2))


def _pyramid_outline(o, d, r):
    # The outline is a polygon whose sides are normal to d x edge (separating axes).
    outline = None
    for edge in _EDGES:
        n = _cross(d, edge)
        base = r * (jnp.abs(n[0]) + jnp.abs(n[1]))
        most = jnp.maximum(base - r * n[2], r * n[2])
        least = jnp.minimum(-base - r * n[2], r * n[2])
        at = dot(n, o)
        side = jnp.minimum(most - at, at - least)
        side /= jnp.sqrt(jnp.maximum(dot(n, n), 1e-12))
        outline = side if outline is None else jnp.minimum(outline, side)
    return outline


def _pyramid(o, d, r, bevel):
    # Four faces, whose normals are (±2, 0, 1) and (0, ±2, 1); the line enters through
    # the last of those that face it.
    t = None
    for axis in (0, 1):
        for sign in (-1, 1):
            toward = 2 * sign * d[axis] + d[2]
            t_i = (r - 2 * sign * o[axis] - o[2]) / jnp.minimum(toward, -1e-6)
            t_i = jnp.where(toward < 0, t_i, -jnp.inf)
            t = t_i if t is None else jnp.maximum(t, t_i)
    x, y, _ = along(o, d, t)
    face = jnp.clip(0.5 + 0.5 * (jnp.abs(x) - jnp.abs(y)) / (bevel * r), 0.0, 1.0)
    lean = (
        2 * face * jnp.sign(x),
        2 * (1 - face) * jnp.sign(y),
        jnp.ones_like(x),
    )
    return _pyramid_outline(o, d, r), t, lean, jnp.zeros_like(x)


def _cone_outline(o, d, r):
    # The hull of the base's ellipse and the apex: the ellipse, or the triangle between
    # the apex and where its tangents touch. On the ground, along and across the line,
    # the base is a disc about 0 and the apex falls on (apex, 0).
    flat2 = jnp.maximum(d[0] * d[0] + d[1] * d[1], 1e-12)
    flat = jnp.sqrt(flat2)
    v = (o[0] * d[1] - o[1] * d[0]) / flat
    u = (o[0] * d[0] + o[1] * d[1]) / flat - (r + o[2]) * flat / d[2]
    steep = u / d[2]
    cap = (r * r - u * u - v * v) / (
        2 * jnp.sqrt(jnp.maximum(steep * steep + v * v, 1e-12))
    )
    apex = -2 * r * flat / d[2]
    cos = r / jnp.maximum(apex, r)
    sin = jnp.sqrt(1 - cos * cos)
    v = jnp.abs(v)
    # In the ground; across the line, a side's distance is foreshortened.
    tangent = (r - u * cos - v * sin) * -d[2] / jnp.sqrt(1 - flat2 * sin * sin)
    triangle = jnp.minimum(tangent, (u - r * cos) * -d[2])
    return jnp.maximum(cap, jnp.minimum(triangle, r * sin - v))


def _cone(o, d, r, bevel):
    del bevel
    # x² + y² = (r - z)² / 4, the nearer of two points: no camera looks down as steeply
    # as the side falls.
    high = r - o[2]
    a = jnp.maximum(d[0] * d[0] + d[1] * d[1] - d[2] * d[2] / 4, 1e-6)
    b = o[0] * d[0] + o[1] * d[1] + high * d[2] / 4
    c = o[0] * o[0] + o[1] * o[1] - high * high / 4
    t = (-b - jnp.sqrt(jnp.maximum(b * b - a * c, 0.0))) / a
    x, y, _ = along(o, d, t)
    radial = 0.5 * jnp.sqrt(jnp.maximum(x * x + y * y, 1e-12))
    lean = (x / radial, y / radial, jnp.ones_like(x))
    return _cone_outline(o, d, r), t, lean, jnp.zeros_like(x)


# By the code of the shape in whose place they stand: cube, sphere, cylinder.
UNSEEN_OUTLINES = (_pyramid_outline, _cone_outline, _cone_outline)
UNSEEN_SURFACES = (_pyramid, _cone, _cone)
