"""Probes against scikit-learn's linear models, and on what only an MLP can find."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score

from implicit_slots.evaluation.metrics import probes
from implicit_slots.evaluation.metrics.probes import (
    HIDDEN,
    Properties,
    probe_properties,
)

COUNT, DIM = 400, 5
HELD_OUT, CHOOSES = np.arange(COUNT) % 4 == 3, np.arange(COUNT) % 4 == 2


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


@pytest.mark.slow
def test_the_linear_probe_is_that_of_scikit_learn(objects, monkeypatch):
    slots, properties = objects
    held_out, decay = HELD_OUT, 1e-1
    monkeypatch.setattr(probes, "DECAYS", (decay,))
    linear = HIDDEN["linear"]
    got = probe_properties(slots, properties, held_out, CHOOSES, hidden=linear)
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
    got = probe_properties(slots, properties, HELD_OUT, CHOOSES, hidden=mlp)
    assert got["color_accuracy"] > 0.85
    # Of many numbers that mean nothing it learns no more than the mean.
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(COUNT, 64))
    got = probe_properties(noise, properties, HELD_OUT, CHOOSES, hidden=mlp)
    assert got["color_accuracy"] < 0.65 and -0.15 < got["position_r2"] < 0.1
