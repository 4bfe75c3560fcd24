"""The autoregressive decoder of features: causality, orders, a loop in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from implicit_slots.models.build import split_model
from implicit_slots.models.feature_decoders import AutoregressiveDecoder, patch_orders
from implicit_slots.models.layers import NORM_EPSILON

SIDE, WIDTH, SLOT, HEADS = 3, 8, 5, 2
PATCHES = SIDE**2
ORDERS = 9
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def parts():
    """Structure, and parameters that are far from how they begin."""

    def build():
        return AutoregressiveDecoder(
            SIDE,
            SLOT,
            WIDTH,
            num_blocks=2,
            num_heads=HEADS,
            orders=ORDERS,
            rngs=nnx.Rngs(0),
        )

    graphdef, shapes = split_model(nnx.eval_shape(build))
    generator = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.5 * generator.standard_normal(leaf.shape), leaf.dtype)

    return graphdef, jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def decode(parts):
    """The decoder as a compiled function of slots, features and order."""
    compiled = jax.jit(
        lambda slots, features, order, present: nnx.merge(*parts)(
            slots, features, order=order, present=present
        )
    )
    everyone = np.ones((2, 3), bool)
    return lambda slots, features, order=0, present=everyone: compiled(
        slots, features, np.int32(order), present
    )


@pytest.fixture(scope="module")
def given():
    generator = np.random.default_rng(1)
    slots = generator.standard_normal((2, 3, SLOT)).astype(np.float32)
    features = generator.standard_normal((2, PATCHES, WIDTH)).astype(np.float32)
    return slots, features


@pytest.mark.parametrize("order", [0, 8])
def test_a_patch_depends_on_the_patches_before_it_alone(decode, given, order):
    slots, features = given
    places = patch_orders(SIDE)[order]
    made, shares = decode(slots, features, order)
    for first in range(PATCHES):
        changed = features.copy()
        changed[:, places[first:]] += 1
        other, of_slots = decode(slots, changed, order)
        same, after = places[: first + 1], places[first + 1 :]
        assert np.array_equal(made[:, same], other[:, same])
        assert np.array_equal(shares[:, :, same], of_slots[:, :, same])
        assert np.all(np.any(made[:, after] != other[:, after], axis=-1))


def test_orders_are_spots():
    """Rows and columns from each corner; a spiral from the middle."""
    orders = patch_orders(3)
    assert orders.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 3, 6, 1, 4, 7, 2, 5, 8],
        [2, 5, 8, 1, 4, 7, 0, 3, 6],
        [2, 1, 0, 5, 4, 3, 8, 7, 6],
        [8, 5, 2, 7, 4, 1, 6, 3, 0],
        [8, 7, 6, 5, 4, 3, 2, 1, 0],
        [6, 3, 0, 7, 4, 1, 8, 5, 2],
        [6, 7, 8, 3, 4, 5, 0, 1, 2],
        [4, 1, 0, 3, 6, 7, 8, 5, 2],
    ]
    assert np.array_equal(np.sort(patch_orders(4), axis=1), [range(16)] * 9)
    # Neighbours follow each other, and the last is the corner at the top.
    rows, columns = np.divmod(patch_orders(4)[8], 4)
    assert np.all(np.abs(np.diff(rows)) + np.abs(np.diff(columns)) == 1)
    assert patch_orders(4)[8].tolist()[-4:] == [15, 11, 7, 3]


@pytest.mark.parametrize("order", [0, 5])
def test_the_decoder_is_that_of_a_loop_in_numpy(parts, decode, given, order):
    """With the order 0 row by row: without the option nothing is put anywhere else."""
    params = parts[1]
    slots, features = (np.asarray(x, np.float64) for x in given)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    places = patch_orders(SIDE)[order] if order else range(PATCHES)

    def norm(x, of):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + NORM_EPSILON
        )
        return x * of["scale"] + of["bias"]

    def dense(x, of):
        return x @ of["kernel"] + of.get("bias", 0)

    def attend(x, memory, of):
        q, k, v = (
            dense(y, of[f"project_{n}"]).reshape(len(y), HEADS, -1)
            for n, y in (("q", x), ("k", memory), ("v", memory))
        )
        logits = np.einsum("hd,shd->hs", q[0], k) / np.sqrt(q.shape[-1])
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        read = np.einsum("hs,shd->hd", weights, v).reshape(-1)
        return dense(read, of["project_o"]), weights.mean(axis=0)

    made, shares = np.zeros_like(features), np.zeros((2, 3, PATCHES))
    for image in range(2):
        memory = norm(dense(slots[image], params["read"]), params["norm_read"])
        seen = [[], []]  # By block: what self-attention has read so far.
        before = params["begin"][order]
        for place in places:
            x = norm(dense(before, params["enter"]), params["norm_enter"])
            weights = np.empty(0)
            for number in range(2):
                of = params["transformer"]["blocks"][number]
                normed = norm(x, of["norm_self"])
                x = normed if number == 0 else x
                seen[number].append(normed)
                x = (
                    x
                    + attend(
                        normed[None], np.stack(seen[number]), of["self_attention"]
                    )[0]
                )
                read, weights = attend(
                    norm(x, of["norm_cross"])[None], memory, of["cross_attention"]
                )
                x = x + read
                hidden = dense(norm(x, of["norm_mlp"]), of["mlp"]["enter"])
                x = x + dense(np.maximum(hidden, 0), of["mlp"]["leave"])
            made[image, place] = norm(x, params["transformer"]["norm"])
            shares[image, :, place] = weights
            before = features[image, place]
    found, of_slots = decode(*given, order)
    np.testing.assert_allclose(found, made, atol=1e-4)
    np.testing.assert_allclose(of_slots, shares, atol=TOLERANCE)
    np.testing.assert_allclose(of_slots.sum(axis=1), 1, atol=TOLERANCE)


def test_an_absent_slot_is_not_read(decode, given):
    slots, features = given
    present = np.array([[True, False, True]] * 2)
    made, shares = decode(slots, features, 0, present)
    other = decode(slots + np.eye(3)[1][:, None].astype("f"), features, 0, present)
    assert np.array_equal(made, other[0]) and np.array_equal(shares, other[1])
    assert not np.any(shares[:, 1])
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=TOLERANCE)
