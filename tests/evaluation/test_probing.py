"""Which objects and images a probe is fitted on, and on which it is scored."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from configs import scenes
from implicit_slots.data.source import Source
from implicit_slots.evaluation import probing
from implicit_slots.evaluation.findings import Findings, Subject
from implicit_slots.evaluation.metrics.segmentation import matched_slots
from implicit_slots.evaluation.steps import EvaluationSteps
from implicit_slots.runtime.devices import build_mesh

IMAGES, OBJECTS, BATCH = 13, 3, 4


class Objects(Source):
    """Images whose objects have their image's number in every attribute."""

    def __init__(self, *names):
        self._names = names

    def __len__(self):
        return IMAGES

    def batch(self, indices):
        """Those of these indices."""
        number = np.tile(np.asarray(indices)[:, None], (1, OBJECTS))
        place = np.stack([number, number], axis=2).astype(np.float32)
        objects = {"present": number >= 0, "color": number.astype(np.int32)}
        objects |= {"position": place, "rotation": place[..., 0]}
        batch = {"segmentation": np.zeros((len(indices), 2, 2), np.int32)}
        batch |= {"image": np.zeros((len(indices), 2, 2, 3), np.uint8)}
        return batch | {"objects": objects} if self._names else batch


def assign(params, batch, number):
    """An object's slot is its image's number; the last object has none."""
    number = batch["objects"]["position"][..., :1]
    matched = np.arange(OBJECTS)[None] < OBJECTS - np.ones((len(number), 1))
    return number, matched, batch["objects"]


@pytest.fixture
def asked(monkeypatch):
    """What the probes are given, by the order in which they are."""
    calls: list[Any] = []

    def note(slots, properties, held_out, chosen_on, *, hidden):
        assert set(slots[chosen_on, 0].astype(int).tolist()) == {3, 8}
        calls.append((slots, properties, held_out, hidden))
        return {"color_accuracy": 0.5, "position_r2": 0.25}

    monkeypatch.setattr(probing, "probe_properties", note)
    return calls


def measure(source):
    config = scenes.get_config("smoke")
    fields: Any = dict.fromkeys(EvaluationSteps._fields)
    steps = EvaluationSteps(**(fields | {"assign": assign}))
    subject = Subject(config, steps, {}, build_mesh(BATCH), source, BATCH, quiet=True)
    findings = Findings()
    probing.probes(subject, findings)
    return findings


def test_no_image_is_both_fitted_and_scored_and_each_object_has_its_own_slot(asked):
    findings = measure(Objects("all"))
    assert findings.numbers.keys() == {
        f"{prefix}{name}/{key}"
        for prefix in ("", "shuffled/")
        for name in ("linear", "mlp")
        for key in ("color_accuracy", "position_r2")
    }
    assert findings.numbers["linear/position_r2"] == (0.25, 2)
    assert [call[3] for call in asked] == [0, 128, 0, 128]
    for place, (slots, properties, held_out, _) in enumerate(asked):
        images = slots[:, 0].astype(int).tolist()
        # The object without a slot is left out, and what pads a batch.
        assert images == [image for image in range(IMAGES) for _ in range(2)]
        assert [i for i, held in zip(images, held_out, strict=True) if held] == [
            *(4, 4, 9, 9)
        ]
        assert properties.categories.keys() == {"color"}
        assert properties.positions.keys() == {"position"}
        told = properties.categories["color"]
        np.testing.assert_array_equal(properties.positions["position"][:, 1], told)
        assert (told.tolist() == images) == (place < 2)
        # Shuffled on either side alone.
        assert set(told[held_out].tolist()) == {4, 9}


def test_data_that_tell_of_no_objects_have_no_probes(asked):
    findings = measure(Objects())
    assert findings.absent == {"probes": probing.NOT_TOLD} and not asked


def test_an_object_has_the_slot_that_covers_it():
    true = np.zeros((1, 4, 4), np.int32)
    true[0, :2], true[0, 3, 3] = 2, 1
    maps = np.zeros((1, 3, 4, 4), np.float32)
    maps[0, 1], maps[0, 2, :2], maps[0, 0] = 0.1, 0.9, 0.05
    maps[0, 0, 3, 3] = 0.8
    got = matched_slots(jnp.asarray(maps), jnp.asarray(true), max_true=3)
    assert np.asarray(got).tolist() == [[0, 2, -1]]
