"""How slots depend on each other, against maps and sets whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32
from sklearn.linear_model import Ridge
from small_slate import Compiled, section

from implicit_slots.evaluation.metrics import interdependence
from implicit_slots.evaluation.metrics.deletion import shuffle_slots
from implicit_slots.evaluation.metrics.interdependence import (
    Coupling,
    coupling,
    predictability,
)
from implicit_slots.models.build import build_model

BATCH, SLOTS, DIM = 4, 3, 5


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def context(images, slots, dim, share, seed=0):
    """Slots of an image with this share of their variance in common."""
    common = np.sqrt(share) * normal(seed, images, 1, dim)
    return common + np.sqrt(1 - share) * normal(seed + 1, images, slots, dim) + 3


def nested(slots, folds):
    """The definition, by scikit-learn's ridge regression and explicit loops."""
    images, count, dim = slots.shape
    others = np.stack(
        [np.delete(slots, k, axis=1).mean(axis=1) for k in range(count)], axis=1
    )
    part = np.arange(images) % folds

    def fit(chosen, ridge):
        x, y = others[chosen].reshape(-1, dim), slots[chosen].reshape(-1, dim)
        alpha = ridge * np.trace(np.cov(x.T, bias=True)) * len(x) / dim
        return Ridge(alpha=alpha).fit(x, y), y.mean(axis=0)

    def error(model, chosen):
        x, y = others[chosen].reshape(-1, dim), slots[chosen].reshape(-1, dim)
        return ((model.predict(x) - y) ** 2).sum()

    residual = total = 0.0
    for held in range(folds):
        losses = [
            sum(
                error(fit((part != held) & (part != inner), ridge)[0], part == inner)
                for inner in range(folds)
                if inner != held
            )
            for ridge in interdependence._RIDGES
        ]
        best = interdependence._RIDGES[np.argmin(losses)]
        model, mean = fit(part != held, best)
        residual += error(model, part == held)
        total += ((slots[part == held].reshape(-1, dim) - mean) ** 2).sum()
    return 1 - residual / total


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_predictability_equals_scikit_learns_nested_cross_validation(share):
    slots = context(17, SLOTS, DIM, share)
    wanted = nested(slots, 4)
    np.testing.assert_allclose(predictability(slots, folds=4), wanted, atol=1e-8)


def test_common_context_is_found_and_its_share_is_known():
    # The best predictor of one of two slots with correlation c leaves 1 − c² of it.
    slots = context(2000, 2, 8, 0.6)
    np.testing.assert_allclose(predictability(slots), 0.6**2, atol=0.03)


def test_slots_of_different_images_tell_nothing():
    slots = context(400, 4, 64, 0.5)
    assert predictability(slots) > 0.2
    few = jnp.asarray(slots[:60])
    shuffled = np.asarray(shuffle_slots(jax.random.key(0), few))
    # Fewer examples than would bear 64² weights: it is the ridge that keeps R² at 0.
    assert -0.03 < predictability(shuffled) < 0.03


def test_slots_that_others_determine_are_predicted():
    slots = normal(0, 40, SLOTS, DIM)
    duplicated = np.repeat(slots[:, :1], SLOTS, axis=1)
    assert predictability(duplicated) > 1 - 1e-6
    constant = slots - slots.mean(axis=1, keepdims=True) + 1.5
    assert predictability(constant) > 1 - 1e-6


def test_predictability_obeys_its_symmetries():
    slots = context(20, SLOTS, DIM, 0.5)
    value = predictability(slots)
    shuffled = slots[:, [2, 0, 1]]
    np.testing.assert_allclose(predictability(shuffled), value, rtol=1e-9)
    np.testing.assert_allclose(predictability(7 * slots - 2), value, rtol=1e-9)


def test_equal_slots_have_no_predictability():
    assert np.isnan(predictability(np.ones((9, SLOTS, DIM))))


@pytest.mark.parametrize("shape", [(4, 3, 2), (9, 1, 2)])
def test_too_few_images_or_slots_are_refused(shape):
    with pytest.raises(ValueError, match="at least three folds"):
        predictability(np.zeros(shape))
    with pytest.raises(ValueError, match="got 2 folds"):
        predictability(np.zeros((9, 3, 2)), folds=2)


def linear(params, x, z):
    """Each image's own matrix, times a common factor, over its flattened slots."""
    flat = z.reshape(len(z), -1)
    product = jnp.einsum("bij,bj->bi", x["matrix"], flat, precision="highest")
    return (params * product + x["offset"]).reshape(z.shape)


measured = jax.jit(coupling, static_argnums=0)


def of_matrices(matrices, count=SLOTS) -> Coupling:
    batch, size, _ = matrices.shape
    x = {
        "matrix": jnp.asarray(matrices / 2, jnp.float32),
        "offset": jnp.ones((batch, size)),
    }
    z = jnp.asarray(normal(9, batch, count, size // count), jnp.float32)
    return jax.device_get(measured(linear, jnp.float32(2), x, z))


def share_and_blocks(matrix, count):
    size = len(matrix) // count
    norms = np.array(
        [
            [
                np.linalg.norm(
                    matrix[i * size : (i + 1) * size, j * size : (j + 1) * size]
                )
                for j in range(count)
            ]
            for i in range(count)
        ]
    )
    squares = norms**2
    return (squares.sum() - np.trace(squares)) / squares.sum(), norms


def test_coupling_of_linear_maps_equals_numpy():
    size = SLOTS * DIM
    matrices = 0.5 * normal(1, BATCH, size, size) / np.sqrt(size)
    matrices[1] *= 1e-3
    found = of_matrices(matrices)
    for b, matrix in enumerate(matrices):
        inverse = np.linalg.inv(np.eye(size) - matrix) - np.eye(size)
        for got, blocks, wanted in (
            (found.jacobian, found.jacobian_blocks, matrix),
            (found.inverse, found.inverse_blocks, inverse),
        ):
            share, norms = share_and_blocks(wanted, SLOTS)
            np.testing.assert_allclose(got[b], share, rtol=FLOAT32)
            np.testing.assert_allclose(blocks[b], norms, rtol=FLOAT32)
    # Of a small J, the first term of J + J² + … is nearly all.
    np.testing.assert_allclose(found.inverse[1], found.jacobian[1], rtol=1e-3)


def test_slots_that_do_not_see_each_other_are_not_coupled():
    matrices = np.zeros((BATCH, SLOTS, DIM, SLOTS, DIM))
    for k in range(SLOTS):
        matrices[:, k, :, k] = 0.3 * normal(k, BATCH, DIM, DIM)
    found = of_matrices(matrices.reshape(BATCH, SLOTS * DIM, -1))
    np.testing.assert_array_equal(found.jacobian, 0)
    np.testing.assert_array_equal(found.inverse, 0)


def test_slots_in_a_chain_are_coupled_beyond_their_neighbours():
    """Slot k moves slot k + 1 alone: J has one block there, (I − J)⁻¹ all below."""
    chain = np.kron(np.diag(np.full(SLOTS - 1, 0.5), -1), np.eye(DIM))
    found = of_matrices(np.repeat(chain[None], BATCH, axis=0))
    np.testing.assert_allclose(found.jacobian, 1)
    np.testing.assert_allclose(found.inverse, 1)
    root = np.sqrt(DIM)
    steps = np.array([[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0]]) * root
    np.testing.assert_allclose(found.jacobian_blocks[0], steps, rtol=FLOAT32)
    steps[2, 0] = 0.25 * root
    np.testing.assert_allclose(found.inverse_blocks[0], steps, rtol=FLOAT32)


def test_coupling_of_equal_blocks_is_one_less_a_share():
    block = 0.1 * normal(2, DIM, DIM)
    found = of_matrices(np.tile(block, (BATCH, SLOTS, SLOTS)))
    np.testing.assert_allclose(found.jacobian, 1 - 1 / SLOTS, rtol=FLOAT32)
    np.testing.assert_allclose(found.inverse, 1 - 1 / SLOTS, rtol=FLOAT32)


def test_singular_and_vanishing_maps_are_undefined_for_their_image_alone():
    size = SLOTS * DIM
    matrices = 0.3 * normal(3, BATCH, size, size) / np.sqrt(size)
    matrices[0] = np.eye(size)
    # The eigenvalue 1 with eigenvector v, hidden from LU by rounding.
    v = normal(4, size)
    matrices[1] += np.outer(v - matrices[1] @ v, v) / (v @ v)
    matrices[2] = 0
    found = of_matrices(matrices)
    np.testing.assert_array_equal(np.isnan(found.inverse), [True, True, True, False])
    np.testing.assert_array_equal(np.isnan(found.jacobian), [False, False, True, False])
    assert found.jacobian[0] == 0
    assert np.isnan(found.inverse_blocks[:2]).all()
    assert np.isfinite(found.jacobian_blocks).all()


def test_coupling_of_slot_attention_does_not_depend_on_the_order_of_slots():
    model = Compiled(build_model(section(), resolution=16, seed=0))
    image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))

    def measure(m, image, order):
        problem = m.slot_problem(image, jax.random.key(1))
        f, params, x, z = problem
        for _ in range(5):
            z = f(params, x, z)
        return coupling(f, params, x, z[:, order])

    order = jnp.array([2, 0, 1])
    straight = model(measure, image, jnp.arange(3))
    turned = model(measure, image, order)
    for name in ("jacobian", "inverse"):
        value = getattr(straight, name)
        assert ((value > 0) & (value < 1)).all()
        np.testing.assert_allclose(getattr(turned, name), value, rtol=1e-4)
    np.testing.assert_allclose(
        turned.inverse_blocks,
        straight.inverse_blocks[:, order][:, :, order],
        rtol=1e-4,
        atol=1e-6,
    )
