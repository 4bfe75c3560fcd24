"""How large a study is: what the arms of each scale have in common; see README.md."""

from collections.abc import Mapping, Sequence

from experiments.studies.runs import Arm
from implicit_slots.runtime.errors import UserError

Base = tuple[str, dict[str, object]]

SCALES = ("smoke", "cpu", "folder", "gpu", "paper")
SEEDS: Mapping[str, int] = {"smoke": 1, "cpu": 3, "folder": 3, "gpu": 3, "paper": 4}

_SMOKE = {
    "num_steps": 4,
    "log_every": 2,
    "validate_every": 2,
    "draw_every": 4,
    "checkpoint_every": 2,
    "data.cache": "",
    "data.with_masks": False,
    "evaluation.fixed_points.iterations": 5,
    "evaluation.masks.num_images": 8,
    "evaluation.rendering.num_images": 8,
    "evaluation.properties.num_images": 8,
}
_KEEP_ALL = {"keep_checkpoints": 1_000}


def slate(scale: str) -> Base:
    """Returns the configuration file of SLATE and what a scale changes of it.

    "cpu" is configs/scenes.py:tokens at 32x32 with three objects, four slots and 2,000
    steps; "folder" the same of configs/folder.py:tokens; "gpu" the whole of
    scenes.py:tokens; "paper" CLEVR-Mirror as published.
    """
    if scale == "smoke":
        changes = {**_SMOKE, "diagnostics.every": 2, "diagnostics.num_examples": 2}
        return "configs/scenes.py:tokens-smoke", changes | {"diagnostics.krylov": 4}
    if scale == "paper":
        return "configs/clevr_mirror.py", {"diagnostics.every": 5_000, **_KEEP_ALL}
    changes: dict[str, object] = {
        "diagnostics.every": 700,
        "evaluation.rendering.num_images": 128,
        **_KEEP_ALL,
    }
    if scale in ("cpu", "folder"):
        changes |= {
            "data.resolution": 32,
            "num_steps": 2_000,
            "validate_every": 200,
            "checkpoint_every": 400,
            "draw_every": 2_000,
            "num_scored": 16,
            "diagnostics.every": 200,
        }
    if scale == "cpu":
        changes |= {"data.max_objects": 3, "model.num_slots": 4}
    return f"configs/{'folder' if scale == 'folder' else 'scenes'}.py:tokens", changes


def trained_slate(scale: str) -> Base:
    """Returns the same for what slots hold: "cpu" and "folder" train longer."""
    file, changes = slate(scale)
    if scale in ("cpu", "folder"):
        changes = changes | {
            "batch_size": 8,
            "num_steps": 8_000,
            "validate_every": 500,
            "checkpoint_every": 2_000,
            "draw_every": 8_000,
            "num_scored": 128,
            "diagnostics.every": 1_000,
        }
    return file, changes


def locatello(name: str, scale: str) -> Base:
    """Returns the same of "autoencoder" or "set_prediction".

    Raises:
      UserError: for the set predictor on a folder: not every one has attributes.
    """
    if (name, scale) == ("set_prediction", "folder"):
        raise UserError(
            "properties of objects are not studied on a folder of images; choose "
            "another --scale, or another study"
        )
    file = f"configs/{name}_scenes.py"
    if scale == "smoke":
        masks = {"data.with_masks": name == "set_prediction"}
        return f"{file}:smoke", {**_SMOKE, **masks}
    if scale == "paper":
        published = {"autoencoder": "clevr6", "set_prediction": "clevr"}
        return f"configs/{name}_{published[name]}.py", {**_KEEP_ALL}
    if scale == "folder":
        file = f"configs/{name}_folder.py"
    return file, {**_KEEP_ALL}


VANILLA: Mapping[str, object] = {"model.adjoint.name": "unrolled"}


def both(base: Base, *probes: str) -> list[Arm]:
    """Returns the arms of both gradients, alike in all else."""
    return [arm(base, "vanilla", VANILLA, probes), arm(base, "implicit", {}, probes)]


def vanilla_of(base: Base) -> Base:
    """Returns a base's `:vanilla`, which may have settings of its own."""
    file, changes = base
    if ":" in file:  # Variants do not combine.
        return file, {**changes, **VANILLA}
    return f"{file}:vanilla", changes


def arm(
    base: Base,
    name: str,
    changes: Mapping[str, object] | None = None,
    probes: Sequence[str] = (),
) -> Arm:
    """Returns an arm: a base with some keys changed."""
    file, common = base
    return Arm(name, file, {**common, **(changes or {})}, tuple(probes))
