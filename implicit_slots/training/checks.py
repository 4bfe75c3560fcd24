"""What is refused before anything is written, and what is noted."""

import json
import pathlib

import jax
import numpy as np

from implicit_slots.data import registry
from implicit_slots.data.source import CLEVR_CODES
from implicit_slots.models.build import model_class
from implicit_slots.models.dvae import STRIDE
from implicit_slots.models.noise import MOST_WORDS
from implicit_slots.models.slot_attention import LEARNED
from implicit_slots.runtime import trackers
from implicit_slots.runtime.config import Config, flat
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand
from implicit_slots.runtime.workdir import (
    ABSENT,
    CONFIG_FILE,
    GONE,
    WEIGHTS_FILE,
    is_same_place,
)
from implicit_slots.training.checkpoint import CHECKPOINT_FOLDER
from implicit_slots.training.values import check_keys

MODES = ("train", "evaluate", "replay")
CHECKPOINTS = ("latest", "best")
STARTS = "evaluation.masks.starts"
CACHED = "model.cached_features"

# What a run may change when it goes on; anything else makes it another run.
MAY_CHANGE = {
    "num_steps",
    "log_every",
    "validate_every",
    "draw_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sharding",
    "optimize_programs",
    "track",
    "nonfinite.stop_after",
    "alarms.enabled",
    "alarms.gradient_growth",
    "alarms.spectral_norm",
    "alarms.mask_similarity",
    "alarms.largest_slot",
    "alarms.attention_entropy",
    "alarms.backward_failed",
    "alarms.patience",
    "profile.start",
    "profile.steps",
    "num_pictures",
    "num_scored",
    "diagnostics.every",
    "diagnostics.num_examples",
    "diagnostics.krylov",
    "diagnostics.powers",
    "data.cache",
    "data.placement",
    "data.test_set",
    "data.workers",
    # How the same model is computed.
    "precision",
    "model.kernels",
    "model.remat",
    "model.adjoint.remat",
}


def check(config: Config, mode: str, checkpoint: str = "latest") -> None:
    """Refuses a configuration that cannot be trained with.

    Raises:
      UserError: naming the key.
    """
    if mode not in MODES:
        raise UserError(f"--mode must be one of {', '.join(MODES)}, got {mode!r}")
    check_keys(config)
    if mode == "train":
        trackers.check(config.get("track", ABSENT["track"]))
    reads_them = mode == "evaluate" or config.evaluation.rendering.every > 0
    for name in ("inception", "lpips"):
        file = config.evaluation.get(name, "")
        if file and reads_them and not expand(file).exists():
            raise UserError(
                f"there is no file {file}, which config.evaluation.{name} names"
            )
    check_slate(config)
    check_noise(config)
    if config.evaluation.masks.get("starts", ABSENT[STARTS]) > 1:
        check_starts(config)
    reads = model_class(config.model.name).reads
    if registry.usage_of(config.data)["flip"] and "objects" in reads:
        raise UserError(
            "config.data.flip mirrors images, not the positions this model learns; "
            "set --config.data.flip=False"
        )
    if checkpoint not in CHECKPOINTS:
        raise UserError(
            f"--checkpoint must be one of {', '.join(CHECKPOINTS)}, got {checkpoint!r}"
        )
    if mode == "replay" and jax.process_count() > 1:
        raise UserError("--mode=replay takes one process; leave out the others")
    if mode == "evaluate" and jax.process_count() > 1:
        raise UserError(
            "--mode=evaluate takes one process, with all devices of its host; leave "
            "out the others"
        )
    if checkpoint != "latest" and mode != "evaluate":
        raise UserError("--checkpoint is for --mode=evaluate; runs resume the latest")


def check_starts(config: Config, key: str = f"config.{STARTS}") -> None:
    """Refuses several starts where they cannot differ or none is better.

    Args:
      config: of the model.
      key: what the user set, for the sentence.

    Raises:
      UserError: naming the key.
    """
    if not hasattr(model_class(config.model.name), "render"):
        raise UserError(
            f"{key} chooses initial slots by their reconstruction, which "
            f"{config.model.name} does not make; set it to 1"
        )
    if config.model.initial_slots in LEARNED:
        raise UserError(
            f"{key} needs random initial slots, and this model's are "
            f"{config.model.initial_slots}: every start would be the same; set it to 1"
        )


def check_slate(config: Config) -> None:
    """Refuses what SLATE alone has, where it is wrong.

    Raises:
      UserError: naming the key.
    """
    if config.model.name != "slate":
        return
    # A resolution below the stride is refused where the model is built.
    side = max(config.data.resolution // STRIDE, 1)
    tokens = side**2 * config.model.vocab_size
    most = MOST_WORDS // tokens
    fixed = config.model.get("tokenizer") == "patches"
    if not fixed and config.batch_size // config.accumulate > most:
        raise UserError(
            f"this model draws noise for at most {most:,} images at a time; split a "
            f"step's {config.batch_size:,} with --config.accumulate"
        )
    dvae_steps = config.optimizer.get("dvae_steps", 0)
    if dvae_steps and fixed:
        raise UserError(
            'config.model.tokenizer="patches" has no dVAE to train: leave '
            "config.optimizer.dvae_steps at 0"
        )


def check_noise(config: Config) -> None:
    """Refuses noise on initial slots that are drawn.

    Raises:
      UserError: naming the key.
    """
    noise = config.get("initial_noise")
    if noise is None:
        return
    if max(noise.start, noise.end) > 0 and config.model.initial_slots not in LEARNED:
        raise UserError(
            "config.initial_noise is for learned initial slots: set "
            "config.model.initial_slots=learned, or the noise to 0"
        )


def crowding(config: Config) -> str:
    """A note where images may hold more than slots can tell apart, or nothing."""
    most = config.data.max_objects
    if 0 < config.data.get("keep_objects", 0) < most:
        most = config.data.keep_objects
    if most < config.model.num_slots:
        return ""
    return (
        f"note: images may hold {most} objects and a ground, for "
        f"{config.model.num_slots} slots: some slots then share; "
        "--config.model.num_slots and --config.data.keep_objects are the keys"
    )


def check_read(
    source: registry.Source, reads: tuple[str, ...], split: str, num_slots: int
) -> None:
    """Refuses data without what the model learns from, beside images.

    Raises:
      UserError: naming what is missing.
    """
    if reads == ("image",):
        return
    batch = source.batch(np.arange(1))
    for name in reads:
        if name not in batch:
            raise UserError(
                f"the model learns from '{name}', which the {split} split does not "
                "have; the embedded scenes have them with "
                "--config.data.with_masks=True, CLEVR in its own files"
            )
    objects = batch["objects"]
    most = objects["present"].shape[1]
    if most > num_slots:
        raise UserError(
            f"the model has {num_slots} slots for up to {most} objects: set "
            f"--config.model.num_slots={most}, or a smaller config.data.max_objects"
        )
    unknown = sorted(CLEVR_CODES.keys() - objects.keys())
    if unknown:
        raise UserError(
            f"the model learns CLEVR's attributes, and the {split} split does not name "
            f"{', '.join(unknown)} of objects"
        )


def check_same_run(
    config: Config, workdir: pathlib.Path, *, training: bool = True
) -> None:
    """Refuses a workdir that holds another configuration's run, or a model alone.

    Args:
      config: of this run.
      workdir: where the other may be.
      training: whether the run is to go on, and not only to be evaluated, which other
        data serve for as well.

    Raises:
      UserError: naming the first key that differs.
    """
    path = workdir / CONFIG_FILE
    has_checkpoints = (workdir / CHECKPOINT_FOLDER).exists()
    if (workdir / WEIGHTS_FILE).exists() and not has_checkpoints:
        raise UserError(
            f"{workdir} holds a model without its run; make a run of it with python -m "
            f"implicit_slots.interop --source={workdir} --target=DIR --config=FILE"
        )
    if not path.exists():
        if has_checkpoints:
            raise UserError(
                f"{workdir} holds checkpoints but no {CONFIG_FILE} that says of what; "
                "choose another --workdir"
            )
        return
    try:
        before = {**ABSENT, **flat(json.loads(path.read_text()))}
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(
            f"{path} is not a run's configuration; choose another --workdir"
        ) from error
    now = {**ABSENT, **flat(json.loads(config.to_json()))}
    for key in sorted((before.keys() | now.keys()) - MAY_CHANGE - {*GONE}):
        if key.startswith("evaluation."):
            continue
        if not training and key.startswith("data.") and key != "data.resolution":
            continue
        if not training and key == CACHED and before.get(key):
            continue  # Its transformer is put back.
        if key == "data.path" and is_same_place(before.get(key), now.get(key)):
            continue
        if before.get(key) != now.get(key):
            raise UserError(
                f"{workdir} holds another run: its {key} is {before.get(key)!r}, this "
                f"configuration's is {now.get(key)!r}; choose another --workdir or set "
                "that key back"
            )
