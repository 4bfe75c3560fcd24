"""True masks of another resolution than the images that the model sees."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs import folder
from implicit_slots.data import registry
from implicit_slots.data.source import IGNORED
from implicit_slots.evaluation import groups
from implicit_slots.evaluation.findings import Findings, Subject
from implicit_slots.evaluation.steps import EvaluationSteps
from implicit_slots.runtime.devices import build_mesh


@pytest.mark.parametrize(("resolution", "side"), [(32, 32), (0, 16), (16, 16)])
def test_masks_are_scored_at_their_own_resolution(tmp_path, resolution, side):
    """A mask of 32x32 is as it lies on disk, while the image is halved."""
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, (4, 32, 32)).astype(np.uint8)
    true[:, :3] = 255  # Void.
    for kind in ("images", "masks"):
        (tmp_path / kind / "test").mkdir(parents=True)
    for number, mask in enumerate(true):
        Image.fromarray(mask).save(tmp_path / "masks" / "test" / f"{number}.png")
        image = Image.new("RGB", (32, 32), (9 * number, 0, 0))
        image.save(tmp_path / "images" / "test" / f"{number}.png")
    config = folder.get_config("smoke")
    config.data.update(path=str(tmp_path), cache="", resolution=16, max_objects=2)
    config.evaluation.masks.resolution = resolution
    seen = []

    def measure(params, batch, number) -> Any:
        seen.append(batch)
        return {}, {}

    steps = EvaluationSteps(*[measure] * len(EvaluationSteps._fields))
    source = registry.build(config.data, "test")
    subject = Subject(config, steps, {}, build_mesh(4), source, 4, quiet=True)
    findings = Findings()
    groups.masks(subject, findings)
    (batch,) = seen
    assert batch["image"].shape == (4, 16, 16, 3)
    assert batch["segmentation"].shape == (4, side, side)
    if side == 32:
        wanted = np.where(true == 255, IGNORED, true.astype(np.int32))
        assert np.array_equal(batch["segmentation"], wanted)
    said = f"masks are scored at {side}×{side} pixels"
    other = ", the model sees images of 16×16" if side == 32 else ""
    assert said + other in findings.notes
