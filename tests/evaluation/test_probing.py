"""Which objects and images a probe is fitted on, and on which it is scored."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import scenes
from implicit_slots.data.source import Source
from implicit_slots.evaluation import probing, steps
from implicit_slots.evaluation.findings import Findings, Subject
from implicit_slots.evaluation.metrics.segmentation import matched_slots
from implicit_slots.evaluation.setup import Setup
from implicit_slots.evaluation.steps import EvaluationSteps
from implicit_slots.runtime.devices import build_mesh
from implicit_slots.runtime.prng import Given

IMAGES, OBJECTS, BATCH = 13, 3, 4


class Objects(Source):
    """Images whose objects have their image's number in every attribute.

    What is known of them beside the image is named.
    """

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
        batch = {"image": np.zeros((len(indices), 2, 2, 3), np.uint8)}
        known = {"segmentation": np.zeros((len(indices), 2, 2), np.int32)}
        known |= {"objects": objects}
        return batch | {name: known[name] for name in self._names}


def assign(params, batch, number):
    """Slots are their image's number; the last object is not to be seen."""
    number = batch["objects"]["position"][..., :1]
    seen = np.arange(OBJECTS)[None] < OBJECTS - np.ones((len(number), 1))
    return number, np.where(seen, OBJECTS - 1, -1), seen, batch["objects"]


@pytest.fixture
def asked(monkeypatch):
    """What the probes are given, by the order in which they are."""
    calls: list[Any] = []

    def note(slots, places, properties, held_out, chosen_on, *, hidden):
        assert set(places.images[chosen_on].tolist()) == {3, 8}
        assert slots[:, 0, 0].tolist() == list(range(IMAGES))
        calls.append((places, properties, held_out, hidden))
        return {"color_accuracy": 0.5, "position_r2": 0.25}

    monkeypatch.setattr(probing, "probe_properties", note)
    return calls


def measure(*names, match="auto"):
    config, source = scenes.get_config("smoke"), Objects(*names)
    config.evaluation.probes.match = match
    fields: Any = dict.fromkeys(EvaluationSteps._fields)
    own = EvaluationSteps(**(fields | {"assign": assign}))
    subject = Subject(config, own, {}, build_mesh(BATCH), source, BATCH, quiet=True)
    findings = Findings()
    probing.probes(subject, findings)
    return findings


@pytest.mark.parametrize(
    ("names", "match", "kind"),
    [
        (("objects", "segmentation"), "auto", ""),
        (("objects", "segmentation"), "masks", ""),
        (("objects", "segmentation"), "loss", "by_loss/"),
        (("objects",), "auto", "by_loss/"),
    ],
)
def test_no_image_is_both_fitted_and_scored_and_each_object_has_its_own_slot(
    asked, names, match, kind
):
    """By masks where there are some, by loss elsewhere: then it is said."""
    findings = measure(*names, match=match)
    assert findings.notes == ([probing.BY_LOSS] if kind else [])
    assert findings.numbers.keys() == {
        f"{kind}{prefix}{name}/{key}"
        for prefix in ("", "shuffled/")
        for name in ("linear", "mlp")
        for key in ("color_accuracy", "position_r2")
    }
    assert findings.numbers[f"{kind}linear/position_r2"] == (0.25, 2)
    assert [call[3] for call in asked] == [0, 128, 0, 128]
    for place, (places, properties, held_out, _) in enumerate(asked):
        images = places.images.tolist()
        # The object without a slot is left out, and what pads a batch.
        assert images == [image for image in range(IMAGES) for _ in range(2)]
        if kind:
            assert places.slots is None
        else:
            assert places.slots.tolist() == [OBJECTS - 1] * len(images)
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
    for names, match, reason in (
        ((), "auto", probing.NOT_TOLD),
        (("segmentation",), "loss", probing.NOT_TOLD),
        (("objects",), "masks", probing.NO_PLACES),
    ):
        assert measure(*names, match=match).absent == {"probes": reason}
    assert not asked


def test_without_masks_an_object_in_view_is_to_be_seen(monkeypatch):
    """Not one outside of the crop, none that is padding, none of a broken model."""
    slots = np.zeros((2, 3, 4), np.float32)
    slots[1, 2, 3] = np.nan
    encoded = SimpleNamespace(slots=jnp.asarray(slots))
    model = SimpleNamespace(encode=lambda image, key: encoded)
    monkeypatch.setattr(Setup, "model", lambda setup, params: model)
    config = scenes.get_config("smoke")
    setup, given = Setup(nnx.graphdef(nnx.Dict()), config, None), Given.of(config)
    place = np.array([[0, 0], [5.9, 3.9], [6, 1], [1, 4], [1, -0.1], [1, 1]])
    present = np.arange(6) < 5
    objects = {"pixel_position": jnp.tile(place.astype(np.float32), (2, 1, 1))}
    objects |= {"present": jnp.tile(present, (2, 1))}
    batch = {"image": jnp.zeros((2, 4, 6, 3), jnp.uint8), "objects": objects}
    found = steps.assign(setup, given, {}, batch, jnp.int32(0))
    assert found[0] is encoded.slots and found[3] is objects
    assert np.asarray(found[1]).tolist() == [[-1] * 6] * 2
    assert np.asarray(found[2]).tolist() == [[True, True, *[False] * 4], [False] * 6]
    # Data that tell no places in the image.
    del objects["pixel_position"]
    found = steps.assign(setup, given, {}, batch, jnp.int32(0))
    assert np.asarray(found[2])[0].tolist() == present.tolist()


def test_an_object_has_the_slot_that_covers_it():
    true = np.zeros((1, 4, 4), np.int32)
    true[0, :2], true[0, 3, 3] = 2, 1
    maps = np.zeros((1, 3, 4, 4), np.float32)
    maps[0, 1], maps[0, 2, :2], maps[0, 0] = 0.1, 0.9, 0.05
    maps[0, 0, 3, 3] = 0.8
    got = matched_slots(jnp.asarray(maps), jnp.asarray(true), max_true=3)
    assert np.asarray(got).tolist() == [[0, 2, -1]]
