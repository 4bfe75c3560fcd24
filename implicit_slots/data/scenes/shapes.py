"""Cubes, spheres and cylinders, seen along a line: outlines and surfaces.

A "vector" is a tuple of three arrays, as in ``sampling``.
"""

import jax.numpy as jnp
from jax import lax

from implicit_slots.data.scenes.sampling import dot


def along(origin, direction, t):
    """The point of a line at a distance from its origin."""
    return tuple(o + t * d for o, d in zip(origin, direction, strict=True))


def unit(v):
    """A vector of length one."""
    scale = lax.rsqrt(jnp.maximum(dot(v, v), 1e-12))
    return tuple(c * scale for c in v)


# Signed distance, positive inside, from a line to the outline of a shape seen along
# that line. `o`, `d`: a point of the line and its unit direction in the shape's frame
# (centre at 0, axis z), d pointing downwards; `r`: radius or half side.


def _cube_outline(o, d, r):
    # The outline is a hexagon whose sides are normal to d x e_i (separating axes).
    def side(i, j):
        length = jnp.sqrt(jnp.maximum(d[i] * d[i] + d[j] * d[j], 1e-12))
        reach = r * (jnp.abs(d[i]) + jnp.abs(d[j]))
        return (reach - jnp.abs(o[i] * d[j] - o[j] * d[i])) / length

    return jnp.minimum(jnp.minimum(side(0, 1), side(1, 2)), side(2, 0))


def _sphere_outline(o, d, r):
    b = dot(o, d)
    return r - jnp.sqrt(jnp.maximum(dot(o, o) - b * b, 0.0))


def _cylinder_outline(o, d, r):
    # The hull of the two caps' ellipses: either ellipse, or the band between them.
    # (u, v) are ground coordinates along and across the line, seen foreshortened.
    flat2 = jnp.maximum(d[0] * d[0] + d[1] * d[1], 1e-12)
    flat = jnp.sqrt(flat2)
    v = (o[0] * d[1] - o[1] * d[0]) / flat
    u = (o[0] * d[0] + o[1] * d[1]) / flat
    slope = flat / d[2]
    top, bottom = u + (r - o[2]) * slope, u + (-r - o[2]) * slope

    def cap(w):
        steep = w / d[2]
        return (r * r - w * w - v * v) / (
            2 * jnp.sqrt(jnp.maximum(steep * steep + v * v, 1e-12))
        )

    band = jnp.minimum(-top, bottom) * -d[2]
    return jnp.maximum(
        jnp.maximum(cap(top), cap(bottom)), jnp.minimum(r - jnp.abs(v), band)
    )


OUTLINES = (_cube_outline, _sphere_outline, _cylinder_outline)


# What the camera sees of a shape: the outline's signed distance; how far along the
# line the surface is met (or nearly so, outside the outline); the normal there, not
# of unit length; and how far into an edge that is, 0..1. Edges are rounded by `bevel`,
# a share of r, in their normals only: CLEVR's are, and it anti-aliases them.


def _round(x, bevel):
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - (1 - bevel), 0.0) / bevel


def _cube(o, d, r, bevel):
    t = None
    for o_i, d_i in zip(o, d, strict=True):
        d_i = jnp.where(jnp.abs(d_i) < 1e-6, 1e-6, d_i)
        t_i = (-jnp.sign(d_i) * r - o_i) / d_i
        t = t_i if t is None else jnp.maximum(t, t_i)
    point = along(o, d, t)
    lean = tuple(_round(jnp.clip(c / r, -1.0, 1.0), bevel) for c in point)
    edge = jnp.clip(1.6 * (sum(jnp.abs(c) for c in lean) - 1), 0.0, 1.0)
    return _cube_outline(o, d, r), t, lean, edge


def _sphere(o, d, r, bevel):
    del bevel
    b = dot(o, d)
    t = -b - jnp.sqrt(jnp.maximum(b * b - dot(o, o) + r * r, 0.0))
    return _sphere_outline(o, d, r), t, along(o, d, t), jnp.zeros_like(b)


def _cylinder(o, d, r, bevel):
    flat2 = jnp.maximum(d[0] * d[0] + d[1] * d[1], 1e-12)
    b = (o[0] * d[0] + o[1] * d[1]) / flat2
    c = (o[0] * o[0] + o[1] * o[1] - r * r) / flat2
    side = -b - jnp.sqrt(jnp.maximum(b * b - c, 0.0))
    t = jnp.maximum(side, (r - o[2]) / d[2])
    x, y, z = along(o, d, t)
    radial = jnp.sqrt(jnp.maximum(x * x + y * y, 1e-12))
    out = _round(jnp.minimum(radial / r, 1.0), bevel)
    up = _round(jnp.clip(z / r, -1.0, 1.0), bevel)
    edge = jnp.clip(1.6 * (out + jnp.abs(up) - 1), 0.0, 1.0)
    return (
        _cylinder_outline(o, d, r),
        t,
        (x * out / radial, y * out / radial, up),
        edge,
    )


SURFACES = (_cube, _sphere, _cylinder)
