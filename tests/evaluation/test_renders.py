"""Distances of sets of renders, and scenes of other images' slots."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from configs import scenes
from implicit_slots.data.source import Source
from implicit_slots.evaluation import renders
from implicit_slots.evaluation.findings import Findings, Subject
from implicit_slots.evaluation.metrics.frechet import frechet_distance
from implicit_slots.evaluation.metrics.kernel_distance import kernel_distance
from implicit_slots.evaluation.steps import EvaluationSteps
from implicit_slots.models.outputs import Encoded
from implicit_slots.runtime.devices import build_mesh

SLOTS, BATCH = 3, 4


class Numbered(Source):
    """Images of one level each, so that what is rendered tells where it came from."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def batch(self, indices):
        """Those of these indices."""
        levels = np.asarray(indices, np.float32)[:, None, None, None] / 10
        return {"image": np.tile(levels, (1, 2, 2, 3))}


class Model:
    """Slot k of an image is (the image's level, k); a render is the slots' levels."""

    def __init__(self):
        self.scenes = []

    def encode(self, params, image, number) -> Any:
        """The slots."""
        level = jnp.tile(image[:, 0, 0, :1], (1, SLOTS))
        order = jnp.broadcast_to(jnp.arange(SLOTS, dtype=jnp.float32), level.shape)
        return Encoded(None, jnp.stack([level, order], axis=2), level[..., None], None)  # pyright: ignore

    def rendering(self, params, image, number):
        """A brighter image."""
        return {"slots/mse": jnp.ones(len(image))}, {"slots": image + 0.05}

    def render(self, params, slots, present):
        """Notes the slots; returns their levels as channels."""
        assert present.all() and len(slots) == BATCH
        self.scenes.append(np.asarray(slots))
        return jnp.tile(slots[:, None, None, :, 0], (1, 2, 2, 1))


def measure(count, monkeypatch, num_images=0):
    def features(images):
        mean = jnp.asarray(images).mean(axis=(1, 2))
        return jnp.concatenate([mean, mean**2], axis=1)

    networks = {"random": features, "inception": features}
    monkeypatch.setattr(renders, "_features", lambda subject: networks)
    config = scenes.get_config("smoke")
    config.evaluation.rendering.num_images = num_images
    model = Model()
    fields: Any = dict.fromkeys(EvaluationSteps._fields)
    fields |= {n: getattr(model, n) for n in ("encode", "rendering", "render")}
    steps, mesh = EvaluationSteps(**fields), build_mesh(BATCH)
    subject = Subject(config, steps, {}, mesh, Numbered(count), BATCH, quiet=True)
    findings = Findings()
    renders.rendering(subject, findings)
    return findings, np.concatenate(model.scenes) if model.scenes else None, features


@pytest.mark.parametrize(("there", "num_images"), [(7, 5), (5, 0)])
def test_composed_scenes_have_slots_of_different_images(there, num_images, monkeypatch):
    """Of as many images as are asked for: neither more nor what pads a batch."""
    count = 5
    findings, made, features = measure(there, monkeypatch, num_images)
    assert made is not None
    kept = made[:count]
    levels = np.round(10 * kept[..., 0]).astype(int)
    for scene in levels:
        assert len(set(scene)) == SLOTS  # no two slots of one image
    for place in range(SLOTS):  # every slot once, and where it was
        assert sorted(levels[:, place]) == list(range(count))
        assert (kept[:, place, 1] == place).all()
    images = Numbered(count).batch(np.arange(count))["image"]
    true = np.asarray(features(images))
    sets = {
        "slots": np.asarray(features(images + np.float32(0.05))),
        "composed": np.asarray(features(kept[:, None, None, :, 0])),
    }
    assert findings.numbers.keys() == {
        f"{name}/{metric}"
        for name in sets
        for metric in ("frechet_random", "fid", "kid")
    }
    for name, other in sets.items():
        for metric, distance in (
            ("frechet_random", frechet_distance),
            ("fid", frechet_distance),
            ("kid", kernel_distance),
        ):
            got, images_of = findings.numbers[f"{name}/{metric}"]
            assert images_of == count
            assert np.isclose(got, distance(true, other), rtol=1e-4, atol=1e-7)


def test_fewer_images_than_slots_compose_nothing(monkeypatch):
    findings, made, _ = measure(2, monkeypatch)
    assert made is None and "slots/kid" in findings.numbers
    assert findings.absent["composed/fid"] == "it needs as many images as slots, 3"
    findings, made, _ = measure(1, monkeypatch)
    assert findings.absent["slots/fid"] == "it needs two images or more"


def test_lpips_is_of_each_image_and_its_own_render(monkeypatch):
    def perceived(image, rendered):
        apart = {n: abs(r - image).mean(axis=(1, 2, 3)) for n, r in rendered.items()}
        return {
            f"{name}/lpips": value + image[:, 0, 0, 0] for name, value in apart.items()
        }

    monkeypatch.setattr(renders, "_perceived", lambda subject: perceived)
    findings, *_ = measure(5, monkeypatch)
    want = 0.05 + np.arange(5) / 10
    np.testing.assert_allclose(findings.images["slots/lpips"], want, rtol=1e-5)
    assert "lpips" not in findings.absent
    monkeypatch.undo()
    findings, *_ = measure(5, monkeypatch)
    assert findings.absent["lpips"] == renders.NO_LPIPS
    assert "slots/lpips" not in findings.images
