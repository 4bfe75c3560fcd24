"""Iterating on and counting fixed points, on maps whose fixed points are known."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32, relative_error
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score
from small_slate import RESOLUTION, Compiled, section

from implicit_slots.evaluation.metrics.fixed_points import (
    CONVERGED,
    SAME,
    find_basins,
    iterate,
    mask_agreement,
    masks_settled,
    settle,
)
from implicit_slots.fixed_point import Picard
from implicit_slots.models.build import build_model
from implicit_slots.models.slot_attention import Problem

pytestmark = pytest.mark.usefixtures("strict_promotion")

ATOL = 1e-6  # a few float32 roundings of a number of size one


@dataclasses.dataclass(frozen=True)
class Toy:
    """A map of each entry alone; a slot attends to inputs along itself."""

    kind: str
    attention: bool = False

    def __call__(self, params, x, z):
        """(params, x, z) -> z, or (z, attention)."""
        z = MAPS[self.kind](params, x, z)
        attention = jax.nn.softmax(jnp.einsum("bkd,bnd->bkn", z, x), axis=1)
        return (z, attention) if self.attention else z


MAPS = {
    "affine": lambda params, x, z: params["a"] * z + params["b"],
    # Two attractors per entry, ±0.9949, and the sign of the start says which.
    "tanh": lambda params, x, z: jnp.tanh(3 * z),
    # The same where the inputs are above zero; elsewhere it swings for ever.
    "mixed": lambda params, x, z: jnp.where(x[:, :1, :1] > 0, jnp.tanh(3 * z), -z),
}


@functools.cache
def iteration(kind, steps, trained):
    def iterated(params, x, z0):
        problem = Problem(Toy(kind), params, x, z0)  # pyright: ignore[reportArgumentType]
        return iterate(problem, steps=steps, trained=trained)

    return jax.jit(iterated)


def iterated(kind, z0, x=None, params=None, *, steps, trained=1):
    x = np.ones((len(z0), 2, z0.shape[2])) if x is None else x
    arrays = jax.tree.map(jnp.float32, (params, x, z0))
    return jax.device_get(iteration(kind, steps, trained)(*arrays))


def affine_problem(seed=0, batch=3, slots=4, dim=3, inputs=50):
    rng = np.random.default_rng(seed)
    # Entries that shrink at different speeds: winners change for a while.
    params = {
        "a": rng.uniform(0.3, 0.95, size=(1, slots, dim)),
        "b": rng.normal(size=(1, slots, dim)),
    }
    x = rng.normal(size=(batch, inputs, dim))
    return 4 * rng.normal(size=(batch, slots, dim)), x, params


def test_residual_of_a_contraction_is_the_closed_form():
    z0, x, params = affine_problem()
    found = iterated("affine", z0, x, params, steps=12, trained=7)
    a, fixed = params["a"], params["b"] / (1 - params["a"])

    def norm(z):
        return np.sqrt((z**2).sum(axis=(1, 2)))

    def iterate_of(step):
        return fixed + a**step * (z0 - fixed)

    want = [
        norm(a**step * (a - 1) * (z0 - fixed)) / norm(iterate_of(step + 1))
        for step in range(12)
    ]
    assert relative_error(found.residual, np.transpose(want)) < FLOAT32
    assert relative_error(found.slots, iterate_of(12)) < FLOAT32


@pytest.mark.parametrize("trained", [1, 7, 12])
def test_mask_flips_equal_a_loop(trained):
    z, x, params = affine_problem(1)
    found = iterated("affine", z, x, params, steps=12, trained=trained)
    winners = []
    for step in range(12):
        z = params["a"] * z + params["b"]
        scores = np.einsum("bkd,bnd->bkn", z, x)
        attention = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found.attention[step], attention, atol=1e-4)
        winners.append(scores.argmax(axis=1))
    for step, image in np.ndindex(12, len(z)):
        changed = [
            winners[step][image, n] != winners[trained - 1][image, n] for n in range(50)
        ]
        np.testing.assert_allclose(
            found.mask_flips[image, step], np.mean(changed), atol=ATOL
        )
    assert not found.mask_flips[:, trained - 1].any()
    assert found.mask_flips[:, 0 if trained > 1 else 11].all()


def test_masks_have_settled_where_nothing_flips_any_more():
    """A share for each iteration, and the first one whose masks are all later ones'."""
    z, x, params = affine_problem(1)
    found = iterated("affine", z, x, params, steps=12, trained=7)
    winners = found.attention.argmax(axis=2)  # [iterations, images, inputs]
    got = masks_settled(jnp.asarray(found.mask_changes))
    for image in range(3):
        changed = [
            np.mean(winners[step, image] != winners[step - 1, image])
            for step in range(1, 12)
        ]
        np.testing.assert_allclose(found.mask_changes[image], changed, atol=ATOL)
        first = next(
            step
            for step in range(12)
            if all(
                (winners[later, image] == winners[step, image]).all()
                for later in range(step, 12)
            )
        )
        assert got[image] == first + 1
    # To and fro, and not at all, and after a single iteration.
    changes = jnp.array([[0.5, 0.0, 0.0], [0.5, 0.0, 0.1], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(masks_settled(changes), [2, 4, 1])
    np.testing.assert_array_equal(masks_settled(changes[:, :0]), [1, 1, 1])


def test_an_oscillation_never_arrives():
    z0 = np.random.default_rng(2).normal(size=(3, 2, 4))
    found = iterated("mixed", z0, -np.ones((3, 2, 4)), steps=9)
    np.testing.assert_allclose(found.residual, 2, atol=ATOL)
    basins = find_basins(found.slots, found.residual[:, -1])
    assert np.isnan(basins.fixed_points)
    assert (basins.largest_basin, basins.unconverged) == (0, 1)
    np.testing.assert_array_equal(basins.labels, [-1, -1, -1])


def signs_of_sets(slots, starts, dim, seed):
    """Starts of the tanh map, and the fixed point of each: its signs in any order."""
    z0 = np.random.default_rng(seed).normal(size=(starts, slots, dim))
    z0 += 0.1 * np.sign(z0)  # away from the repelling zero
    return z0, [tuple(sorted(map(tuple, np.sign(z)))) for z in z0]


@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (1, 2), (2, 3)])
def test_known_attractors_are_counted_up_to_the_order_of_slots(shape):
    z0, known = signs_of_sets(shape[0], 40, shape[1], seed=3)
    found = iterated("tanh", z0, steps=30)
    basins = find_basins(found.slots, found.residual[:, -1])
    assert basins.fixed_points == len(set(known)) > 1
    assert basins.unconverged == 0
    assert basins.largest_basin == max(map(known.count, known)) / 40
    for i, j in itertools.combinations(range(40), 2):
        assert (basins.labels[i] == basins.labels[j]) == (known[i] == known[j])


def test_what_did_not_converge_is_counted_and_in_no_basin():
    z0, known = signs_of_sets(2, 40, 1, seed=4)
    arrives = np.random.default_rng(4).random(40) < 0.5
    x = np.broadcast_to(np.where(arrives, 1, -1)[:, None, None], (40, 2, 1))
    found = iterated("mixed", z0, x, steps=30)
    basins = find_basins(found.slots, found.residual[:, -1])
    arrived = [known[i] for i in np.flatnonzero(arrives)]
    assert 0 < arrives.sum() < 40
    assert basins.fixed_points == len(set(arrived)) == 3
    np.testing.assert_allclose(basins.unconverged, 1 - arrives.mean(), atol=ATOL)
    assert basins.largest_basin == max(map(arrived.count, arrived)) / 40
    np.testing.assert_array_equal(basins.labels == -1, ~arrives)


def clouds(seed, slots, starts=24, centres=4, spread=SAME / 3):
    """Sets of slots near some centres, in random orders."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(centres, slots, 3))
    sets = centre[rng.integers(0, centres, starts)]
    sets = sets + spread * rng.normal(size=sets.shape)
    sets = np.stack([z[rng.permutation(slots)] for z in sets])
    return sets.astype(np.float32)


def brute_force(sets):
    """Labels by trying every order of slots, and SciPy's single linkage."""
    sets = np.asarray(sets, np.float64)
    size = np.sqrt(np.mean(np.sum(sets**2, axis=(1, 2))))
    distances = np.zeros((len(sets), len(sets)))
    for i, j in itertools.combinations(range(len(sets)), 2):
        distances[i, j] = distances[j, i] = min(
            np.linalg.norm(sets[i][list(order)] - sets[j]) / size
            for order in itertools.permutations(range(sets.shape[1]))
        )
    tree = linkage(squareform(distances), "single")
    return np.asarray(fcluster(tree, SAME, "distance"))


def same_partition(a, b):
    return adjusted_rand_score(a, b) == 1


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_basins_equal_brute_force(slots):
    counts = []
    # Tight, so wide that some points fall out of their cloud, and no clouds at all.
    for seed, spread in enumerate((0.1 * SAME, 0.4 * SAME, 0.8 * SAME, 10.0)):
        sets = clouds(seed, slots, spread=spread)
        basins = find_basins(sets, np.zeros(len(sets), np.float32))
        want = brute_force(sets)
        assert same_partition(basins.labels, want)
        assert basins.fixed_points == want.max()
        assert basins.largest_basin == np.bincount(want).max() / len(sets)
        counts.append(want.max())
    assert counts[0] == 4 and counts[-1] == 24 and len(set(counts)) > 2


def test_order_and_scale_of_slots_do_not_matter():
    sets = clouds(5, 3)
    residual = np.zeros(len(sets), np.float32)
    want = find_basins(sets, residual)
    rng = np.random.default_rng(5)
    mixed = np.stack([z[rng.permutation(3)] for z in sets])
    for other in (mixed, np.float32(1e-6) * sets, np.float32(1e6) * sets):
        basins = find_basins(other, residual)
        assert same_partition(basins.labels, want.labels)
        assert basins[:3] == want[:3]


def test_a_chain_is_one_fixed_point_and_a_gap_parts_it():
    step = 0.9 * SAME
    places = step * np.arange(12, dtype=np.float32)
    sets = np.ones((12, 1, 1), np.float32) + places[:, None, None]
    sets *= 1 / sets[6]  # the scale is the root mean square of all
    residual = np.zeros(12, np.float32)
    assert find_basins(sets, residual).fixed_points == 1
    residual[5] = 2 * CONVERGED  # without it the chain has a gap
    basins = find_basins(sets, residual)
    assert basins.fixed_points == 2
    assert basins.largest_basin == 6 / 12
    np.testing.assert_allclose(basins.unconverged, 1 / 12)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_slots_that_are_all_alike_are_one_fixed_point(value):
    sets = np.full((5, 3, 2), value, np.float32)
    basins = find_basins(sets, np.zeros(5, np.float32))
    assert basins[:3] == (1, 1, 0)
    np.testing.assert_array_equal(basins.labels, 0)


def test_a_set_is_more_than_which_slots_it_has():
    # Each slot of one is in the other, not equally often.
    sets = np.array([[[0.0], [0.0], [1.0]], [[0.0], [1.0], [1.0]]], np.float32)
    assert find_basins(sets, np.zeros(2, np.float32)).fixed_points == 2


def test_converged_is_up_to_the_tolerance_and_never_what_is_not_finite():
    tolerance = np.float32(CONVERGED)
    residual = np.array([0, 0.9 * tolerance, 1.1 * tolerance, np.nan, np.inf])
    sets = np.ones((5, 2, 2), np.float32)
    sets[3:] = np.nan
    basins = find_basins(sets, residual.astype(np.float32))
    np.testing.assert_array_equal(basins.labels, [0, 0, -1, -1, -1])
    np.testing.assert_allclose(basins[:3], [1, 0.4, 0.6])


def one_hot(winners, slots):
    attention = np.eye(slots, dtype=np.float32)[winners].swapaxes(1, 2)
    return jnp.asarray(0.6 * attention + 0.4 / slots)


agreement = jax.jit(mask_agreement)


@pytest.mark.parametrize("starts", [2, 6, 20])
def test_agreement_is_the_mean_over_pairs(starts):
    rng = np.random.default_rng(starts)
    true = rng.integers(0, 4, 30)
    noise = rng.integers(0, 4, (starts, 30))
    winners = np.where(rng.random((starts, 30)) < 0.3, noise, true)
    # Each with the next ones, at most eight: for up to nine starts, with all.
    scores = [
        adjusted_rand_score(winners[i], winners[(i + offset) % starts])
        for i in range(starts)
        for offset in range(1, min(8, starts - 1) + 1)
    ]
    got = agreement(one_hot(winners, 4))
    np.testing.assert_allclose(got, np.mean(scores), atol=ATOL)
    # Which slot is which does not matter.
    renamed = np.stack([rng.permutation(4)[row] for row in winners])
    np.testing.assert_allclose(agreement(one_hot(renamed, 4)), got, atol=ATOL)


def test_other_fixed_points_may_mean_the_same_masks():
    winners = np.tile(np.random.default_rng(6).integers(0, 3, 30), (5, 1))
    np.testing.assert_allclose(agreement(one_hot(winners, 3)), 1, atol=ATOL)


def test_agreement_of_masks_that_share_nothing_and_of_one_start():
    winners = np.random.default_rng(7).integers(0, 4, (12, 2000))
    assert abs(agreement(one_hot(winners, 4))) < 0.01
    assert np.isnan(agreement(one_hot(winners[:1], 4)))
    assert agreement(one_hot(np.zeros((3, 9), int), 1)) == 1


STEPS = 12


@pytest.fixture(scope="module")
def slate():
    """A small model, what it says of two images, and its slots iterated on."""
    compiled = Compiled(build_model(section(), resolution=RESOLUTION, seed=0))
    trained = compiled.model.slot_attention.solver.max_steps + 1
    rng = np.random.default_rng(8)
    image = rng.random((2, RESOLUTION, RESOLUTION, 3), np.float32)

    def everything(model, image, key):
        problem = model.slot_problem(image, key)
        z0, x = problem.z0, problem.x
        # The images again, with the same initial slots in another order.
        both = problem._replace(
            x=jnp.concatenate([x, x]),
            z0=jnp.concatenate([z0, jnp.roll(z0, 1, axis=1)]),
        )
        return (
            model.encode(image, key=key),
            iterate(both, steps=STEPS, trained=trained),
            Picard(max_steps=STEPS, trace=True)
            .solve(functools.partial(problem.f, problem.params, x), z0)
            .trace,
        )

    results = compiled(everything, jnp.asarray(image), jax.random.key(0))
    return trained, *jax.device_get(results)


def test_residual_is_that_of_the_diagnostics(slate):
    _, _, trajectory, trace = slate
    assert trajectory.residual.shape == (4, STEPS)
    assert trajectory.attention.shape == (STEPS, 4, 3, (RESOLUTION // 4) ** 2)
    np.testing.assert_allclose(trajectory.attention.sum(axis=2), 1, atol=ATOL)
    np.testing.assert_allclose(trajectory.residual[:2], trace, rtol=FLOAT32, atol=ATOL)


def test_an_implicit_adjoint_applies_the_map_once_more(slate):
    trained, encoded, trajectory, _ = slate
    own = encoded.attention.reshape(2, 3, -1)
    ours = trajectory.attention[:, :2]
    np.testing.assert_allclose(ours[trained - 1], own, atol=ATOL)
    assert np.abs(ours[trained - 2] - own).max() > 10 * ATOL
    assert not trajectory.mask_flips[:, trained - 1].any()


def test_the_order_of_initial_slots_changes_nothing(slate):
    _, _, found, _ = slate
    np.testing.assert_allclose(found.residual[2:], found.residual[:2], atol=ATOL)
    np.testing.assert_allclose(found.mask_flips[2:], found.mask_flips[:2], atol=ATOL)
    turned = np.roll(found.slots[:2], 1, axis=1)
    assert relative_error(found.slots[2:], turned) < FLOAT32


@pytest.mark.parametrize("steps", [1, 7])
def test_settling_keeps_the_end_of_the_trajectory(steps):
    rng = np.random.default_rng(9)
    x = rng.normal(size=(2, 5, 3))
    arrays = [jnp.float32(a) for a in (x, rng.normal(size=(2, 4, 3)))]

    @jax.jit
    def both(x, z0):
        problem = Problem(Toy("tanh"), None, x, z0)  # pyright: ignore[reportArgumentType]
        return iterate(problem, steps=steps, trained=1), settle(problem, steps=steps)

    trajectory, (slots, residual, attention) = both(*arrays)
    assert relative_error(slots, trajectory.slots) < FLOAT32
    assert relative_error(residual, trajectory.residual[:, -1]) < FLOAT32
    assert relative_error(attention, trajectory.attention[-1]) < FLOAT32
