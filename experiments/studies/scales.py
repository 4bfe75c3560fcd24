"""How large a study is: what the arms of each scale have in common; see README.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.studies.runs import Arm, resolve
from implicit_slots.runtime.errors import UserError

Base = tuple[str, dict[str, object]]

SCALES = ("smoke", "cpu", "codes", "tokens", "folder", "gpu", "paper")
SEEDS: Mapping[str, int] = dict.fromkeys(SCALES, 3) | {"smoke": 1, "paper": 4}
GAUSSIAN = {"model.initial_slots": "gaussian", "model.straight_through": False}
UNROLLED = {"model.adjoint.name": "unrolled"}
# What lets slots that read the codebook's tokens find objects; see `slate`.
CODES = {
    "model.inputs": "tokens",
    "model.position_scale": 1.0,
    "model.token_weighting": 0.75,
}
GRADIENTS: Mapping[str, dict[str, Any]] = {"vanilla": UNROLLED, "implicit": {}}

_SMOKE = {
    "num_steps": 4,
    "log_every": 2,
    "validate_every": 2,
    "draw_every": 4,
    "checkpoint_every": 2,
    "data.cache": "",
    "data.with_masks": False,
    "evaluation.fixed_points.iterations": 2,  # each is a program of its own
    "evaluation.masks.num_images": 8,
    "evaluation.rendering.num_images": 8,
    "evaluation.properties.num_images": 8,
}
_KEEP_ALL = {"keep_checkpoints": 1_000}


def slate(scale: str) -> Base:
    """Returns the configuration file of SLATE and what a scale changes of it.

    "cpu" is configs/scenes.py with three objects, four slots and 5,000 steps; "codes"
    the same with slots that read the tokens of its fixed codebook, positions as strong
    as published, and more weight on rare tokens (results/notes/finding_objects.md says
    what these are worth); "tokens" the same of the published model, whose slots read
    the tokens of a dVAE that is trained beside them, 8,000 steps; "folder" is
    configs/folder.py with 6,000 steps; "gpu" configs/scenes.py whole; "paper"
    CLEVR-Mirror as published. All start from Gaussian slots, as published: from learned
    ones there is but one start.
    """
    if scale == "smoke":
        changes = {**_SMOKE, "diagnostics.every": 2, "diagnostics.num_examples": 2}
        return "configs/scenes.py:tokens-smoke", changes | {"diagnostics.krylov": 4}
    if scale == "paper":
        return "configs/clevr_mirror.py", {"diagnostics.every": 5_000, **_KEEP_ALL}
    if scale == "gpu":
        changes = {"diagnostics.every": 1_000, **_KEEP_ALL, **GAUSSIAN}
        return "configs/scenes.py", changes
    steps = {"cpu": 5_000, "codes": 5_000, "tokens": 8_000, "folder": 6_000}[scale]
    changes: dict[str, object] = {
        "num_steps": steps,
        "validate_every": 500,
        "checkpoint_every": 1_000,
        "draw_every": steps,
        "num_scored": 128,
        "diagnostics.every": 500,
        "evaluation.masks.num_images": 128,
        "evaluation.rendering.num_images": 128,
        **_KEEP_ALL,
        **GAUSSIAN,
    }
    if scale == "folder":
        return "configs/folder.py", changes
    changes |= {"data.max_objects": 3, "model.num_slots": 4}
    if scale == "cpu":
        return "configs/scenes.py", changes
    if scale == "codes":
        return "configs/scenes.py", changes | CODES
    return "configs/scenes.py:tokens", changes | {"batch_size": 8}


# What multiplies vanilla's rates and implicit's: found among `FACTORS` by the
# cross-entropy of two seeds that no other study has (rates.py).
FACTORS = (1.0, 1.5, 2.0, 3.0)
BEST: Mapping[str, tuple[float, float]] = {"cpu": (1.5, 1.5), "codes": (2.0, 2.0)}


def rates(base: Base, factor: float) -> dict[str, object]:
    """Returns what multiplies the rates of encoder, slots and decoder by a factor.

    The dVAE's stays: it gets no gradient from them.
    """
    file, changes = base
    optimizer = resolve(Arm("", file, changes), 0).optimizer
    names = ("learning_rate", "slots_learning_rate")
    return {f"optimizer.{name}": factor * optimizer[name] for name in names}


def gradients(scale: str) -> dict[str, dict[str, Any]]:
    """Returns by name what makes either gradient of SLATE, each at its own rates."""
    factors = BEST.get(scale, (1.0, 1.0))
    return {
        name: {**changes, **(rates(slate(scale), factor) if factor != 1.0 else {})}
        for (name, changes), factor in zip(GRADIENTS.items(), factors, strict=True)
    }


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


def shorter(name: str, scale: str) -> Base:
    """Returns the same of `locatello` in two minutes: "cpu" makes fewer steps."""
    file, changes = locatello(name, scale)
    if scale == "cpu":
        steps = {"autoencoder": 3_000, "set_prediction": 1_500}[name]
        changes = changes | {"num_steps": steps, "checkpoint_every": steps // 3}
    return file, changes


def slates(scale: str, *probes: str) -> list[Arm]:
    """Returns the arms of both gradients of SLATE, each at its own rates."""
    return [
        arm(slate(scale), name, changes, probes)
        for name, changes in gradients(scale).items()
    ]


def vanilla_of(base: Base) -> Base:
    """Returns a base's `:vanilla`, which may have settings of its own."""
    file, changes = base
    if ":" in file:  # Variants do not combine.
        return file, {**changes, **UNROLLED}
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
