"""Probes against scikit-learn, on what only an MLP finds, and matched by loss."""

from typing import Any

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score

from implicit_slots.evaluation.metrics import probes
from implicit_slots.evaluation.metrics.probes import (
    HIDDEN,
    Places,
    Properties,
    probe_properties,
)
from implicit_slots.evaluation.probing import _shuffled

COUNT, DIM = 400, 5
HELD_OUT, CHOOSES = np.arange(COUNT) % 4 == 3, np.arange(COUNT) % 4 == 2
# An image of its own for each, with a single slot.
APART = Places(np.arange(COUNT), np.zeros(COUNT, int))


@pytest.fixture(scope="module")
def objects():
    """Slots with a linear category, one that is an exclusive or, and a position."""
    rng = np.random.default_rng(0)
    slots = rng.normal(size=(COUNT, DIM)) * [1, 2, 3, 1, 1] + 5
    z = slots - 5
    return slots, Properties(
        {
            "shape": (z @ rng.normal(size=(DIM, 3))).argmax(axis=1),
            "color": ((z[:, 0] > 0) ^ (z[:, 3] > 0)).astype(np.int64),
        },
        {"position": z @ rng.normal(size=(DIM, 2)) + rng.normal(size=(COUNT, 2))},
    )


def probe(slots, properties, hidden):
    """Of objects whose slots are known."""
    of_images = slots[:, None]
    return probe_properties(
        of_images, APART, properties, HELD_OUT, CHOOSES, hidden=hidden
    )


@pytest.mark.slow
def test_the_linear_probe_is_that_of_scikit_learn(objects, monkeypatch):
    slots, properties = objects
    held_out, decay = HELD_OUT, 1e-1
    monkeypatch.setattr(probes, "DECAYS", (decay,))
    linear = HIDDEN["linear"]
    got = probe(slots, properties, hidden=linear)
    x = (slots - slots[~held_out].mean(0)) / slots[~held_out].std(0)
    count = np.sum(~held_out)
    for name, codes in properties.categories.items():
        model = LogisticRegression(C=1 / (2 * decay * count))
        model.fit(x[~held_out], codes[~held_out])
        want = model.score(x[held_out], codes[held_out])
        # One that lies on the border may fall to either side.
        assert abs(got[f"{name}_accuracy"] - want) < 0.015
    y = properties.positions["position"]
    y = (y - y[~held_out].mean(0)) / y[~held_out].std(0)
    model = Ridge(alpha=decay * count * 2).fit(x[~held_out], y[~held_out])
    want = r2_score(y[held_out], model.predict(x[held_out]))
    assert abs(got["position_r2"] - want) < 1e-3
    assert got["shape_accuracy"] > 0.85 and got["color_accuracy"] < 0.7


@pytest.mark.slow
def test_an_mlp_finds_what_no_line_parts_and_nothing_where_nothing_is(objects):
    slots, properties = objects
    mlp = HIDDEN["mlp"]
    got = probe(slots, properties, hidden=mlp)
    assert got["color_accuracy"] > 0.85
    # Of many numbers that mean nothing it learns no more than the mean.
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(COUNT, 64))
    got = probe(noise, properties, hidden=mlp)
    assert got["color_accuracy"] < 0.65 and -0.15 < got["position_r2"] < 0.1


def scenes(count=60, num_slots=6, dim=16) -> Any:
    """Slots in any order, of which three say exactly what is true of an object.

    Returns slots, places, properties, which are held out, and which choose.
    """
    rng, objects = np.random.default_rng(0), 3
    codes = rng.integers(0, 8, (count, objects))
    position = rng.normal(size=(count, objects, 2))
    told = np.concatenate([np.eye(8)[codes], position], 2)
    slots = rng.normal(size=(count, num_slots, dim)) / 2
    slots[:, :objects] = told @ rng.normal(size=(10, dim))
    order = rng.permuted(np.tile(np.arange(num_slots), (count, 1)), axis=1)
    slots = np.take_along_axis(slots, order[..., None], 1)
    images = np.repeat(np.arange(count), objects)
    places = Places(images, np.argsort(order, 1)[:, :objects].ravel())
    properties = Properties({"color": codes.ravel()}, {"at": position.reshape(-1, 2)})
    return slots, places, properties, images % 5 == 4, images % 5 == 3


def test_matched_by_loss_a_probe_finds_what_slots_tell_in_whatever_order():
    """What matching alone is worth is far from it: the properties of other objects.

    From the first start alone it would find half of the colours here.
    """
    slots, places, properties, held_out, chosen_on = scenes()

    def by_loss(slots, properties):
        split = held_out, chosen_on
        unknown = places._replace(slots=None)
        return probe_properties(slots, unknown, properties, *split, hidden=0)

    got = by_loss(slots, properties)
    assert got["color_accuracy"] == 1 and got["at_r2"] > 0.99
    order = np.random.default_rng(1).permuted(np.tile(range(6), (60, 1)), axis=1)
    turned = np.take_along_axis(slots, order[..., None], 1)
    assert by_loss(turned, properties) == pytest.approx(got, abs=1e-4)
    others = jax.tree.map(lambda values: _shuffled(values, held_out), properties)
    control = by_loss(slots, others)
    # Chance is 1/8 and 0; of six slots the best one does better.
    assert 0.1 < control["color_accuracy"] < 0.5 and -0.3 < control["at_r2"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_by_loss_and_by_known_slots_it_is_the_same(hidden):
    """Of an MLP too, which from a matching of its own would miss colours here."""
    slots, places, told, *split = scenes(80, 5, 12)
    known = probe_properties(slots, places, told, *split, hidden=hidden)
    assert known["color_accuracy"] == 1 and known["at_r2"] > 0.99
    unknown = places._replace(slots=None)
    found = probe_properties(slots, unknown, told, *split, hidden=hidden)
    assert found == pytest.approx(known, abs=0.01)


def test_objects_have_slots_of_their_own_at_the_least_cost():
    """Of each image alone; objects that are not asked for, or too many, have none."""
    costs = np.array([[1, 2], [0, 9], [5, 1], [3, 8], [2, 7], [9, 9]], np.float32)
    images = np.array([0, 0, 2, 2, 2, 3])
    which = np.array([True, True, True, True, True, False])
    assert probes._cheapest(costs, images, which).tolist() == [1, 0, 1, -1, 0, -1]
