"""The type and range of every key of a configuration, declared once."""

from collections.abc import Mapping
from typing import Any

from implicit_slots.data import options
from implicit_slots.data.source import SPLITS
from implicit_slots.evaluation.probing import MATCHES
from implicit_slots.models import (
    feature_slots,
    image_encoder,
    kernels,
    slate,
    slot_attention,
    vit,
)
from implicit_slots.models.build import (
    ADJOINTS,
    LINEAR_SOLVERS,
    MODELS,
    SOLVERS,
    defaults,
)
from implicit_slots.models.layers import POSITION_KINDS, PRECISIONS
from implicit_slots.runtime.config import Config, flat
from implicit_slots.runtime.devices import SHARDINGS
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.tracker_libraries import TRACKERS
from implicit_slots.runtime.values import (
    Flag,
    Kind,
    Name,
    Number,
    OneOf,
    Place,
    Several,
    Whole,
    Wholes,
    check_values,
)
from implicit_slots.runtime.workdir import ABSENT

SCHEDULES = ("constant", "half_life", "cosine", "plateau")
CLIPPINGS = ("none", "l2", "max_norm")
COUNT, ANY = Whole(1), Whole(0)
# Of layers: what a model of any machine has, so that a slip is not built for hours.
SIZE, DEPTH = Whole(1, 2**16), Whole(1, 1_000)
SHARE, RATE = Number(0.0, 1.0, closed="[]"), Number(0.0, 1.0)
NOT_NEGATIVE, POSITIVE = Number(), Number(closed="")
# Infinity switches an alarm off.
LIMIT = Number(closed="[]")


def _solver(names: Mapping[str, Any]) -> dict[str, Kind]:
    return {
        "name": OneOf(tuple(names)),
        "max_steps": COUNT,
        "rtol": NOT_NEGATIVE,
        "atol": NOT_NEGATIVE,
        "damping": Number(0.0, 1.0, closed="]"),
        "patience": COUNT,
        "depth": COUNT,
        "ridge": POSITIVE,
        "restart": Flag(),
        "memory": COUNT,
    }


def _below(section: str, kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    return {f"{section}.{key}": kind for key, kind in kinds.items()}


MODEL: Mapping[str, Kind] = {
    "name": OneOf(tuple(MODELS)),
    **_below("solver", _solver(SOLVERS)),
    **_below(
        "adjoint",
        {
            "name": OneOf(tuple(ADJOINTS)),
            "terms": COUNT,
            "steps": COUNT,
            "damping": Number(0.0, 1.0, closed="]"),
            "max_terms": COUNT,
            "rtol": POSITIVE,
            "remat": Flag(),
            **_below("solver", _solver(LINEAR_SOLVERS)),
        },
    ),
    # Slot attention.
    "num_slots": Whole(1, 2**16),
    "slot_size": SIZE,
    "slot_mlp_size": SIZE,
    "slot_heads": DEPTH,
    "epsilon": POSITIVE,
    "attention_gain": POSITIVE,
    "normalizer": OneOf(slot_attention.NORMALIZERS),
    "initial_slots": OneOf(slot_attention.INITIAL_SLOTS),
    "straight_through": Flag(),
    # SLATE.
    "vocab_size": Whole(1, 2**20),
    "dvae_features": SIZE,
    "width": SIZE,
    "num_blocks": DEPTH,
    "num_heads": DEPTH,
    "dropout": RATE,
    "attention_dropout": RATE,
    "kernels": OneOf(kernels.KERNELS),
    "remat": Flag(),
    "hard": Flag(),
    "initial_positions": OneOf(POSITION_KINDS),
    "position_scale": NOT_NEGATIVE,
    "tokenizer": OneOf(slate.TOKENIZERS),
    "inputs": OneOf(slate.INPUTS),
    "encoder_features": SIZE,
    "encoder_strides": Wholes(1, 2**10),
    "encoder_kernels": Wholes(1, 2**10),
    "encoder_padding": OneOf(image_encoder.PADDINGS),
    "encoder_positions": OneOf(image_encoder.POSITIONS),
    "decoder_order": OneOf(tuple(dict.fromkeys(slate.ORDERS + feature_slots.ORDERS))),
    "drop_tokens": SHARE,
    "token_weighting": SHARE,
    # Slots of frozen features.
    "vit": OneOf(tuple(vit.LAYOUTS)),
    "vit_norm": Flag(),
    "decoder": OneOf(feature_slots.DECODERS),
    "decoder_layers": DEPTH,
    "decoder_blocks": DEPTH,
    "decoder_heads": DEPTH,
    "cached_features": Flag(),
    # Autoencoder and set predictor.
    "features": SIZE,
    "decoder_features": SIZE,
    "decoder_strides": Wholes(1, 2**10),
    "broadcast_side": Whole(0, 2**14),
    "head_size": SIZE,
}

KINDS: Mapping[str, Kind] = {
    "name": Name(),
    "seed": Whole(0, 2**32 - 1),  # JAX would take a larger one's remainder.
    "num_steps": COUNT,
    "batch_size": COUNT,
    "accumulate": COUNT,
    "sharding": OneOf(SHARDINGS),
    "optimize_programs": Flag(),
    "track": Several(tuple(TRACKERS)),
    "precision": OneOf(tuple(PRECISIONS)),
    **_below("model", MODEL),
    "features.weights": Place(),
    **options.KINDS,
    "optimizer.learning_rate": NOT_NEGATIVE,
    "optimizer.dvae_learning_rate": NOT_NEGATIVE,
    "optimizer.slots_learning_rate": NOT_NEGATIVE,
    "optimizer.dvae_steps": ANY,
    "optimizer.warmup_steps": ANY,
    "optimizer.schedule": OneOf(SCHEDULES),
    "optimizer.plateau_patience": COUNT,
    "optimizer.plateau_factor": Number(0.0, 1.0, closed=""),
    "optimizer.half_life": POSITIVE,
    "optimizer.clip": OneOf(CLIPPINGS),
    "optimizer.clip_limit": POSITIVE,
    "optimizer.ema_decay": RATE,
    "temperature.start": POSITIVE,
    "temperature.end": POSITIVE,
    "temperature.steps": ANY,
    "initial_noise.start": NOT_NEGATIVE,
    "initial_noise.end": NOT_NEGATIVE,
    "initial_noise.steps": ANY,
    "penalty.attention_entropy": NOT_NEGATIVE,
    "penalty.slot_coupling": NOT_NEGATIVE,
    "diagnostics.every": ANY,
    "diagnostics.num_examples": COUNT,
    "diagnostics.krylov": COUNT,
    "diagnostics.powers": ANY,
    "evaluation.split": OneOf(tuple(SPLITS)),
    "evaluation.inception": Place(),
    "evaluation.lpips": Place(),
    # Of an evaluation's groups 0 images are all there are, where all can be measured.
    "evaluation.masks.every": ANY,
    "evaluation.masks.num_images": ANY,
    "evaluation.masks.starts": COUNT,
    "evaluation.masks.resolution": Whole(0, 2**14),
    "evaluation.rendering.every": ANY,
    "evaluation.rendering.num_images": ANY,
    "evaluation.properties.every": ANY,
    "evaluation.properties.num_images": ANY,
    "evaluation.probes.every": ANY,
    "evaluation.probes.num_images": ANY,
    "evaluation.probes.match": OneOf(MATCHES),
    "evaluation.deletion.every": ANY,
    "evaluation.deletion.num_images": COUNT,
    "evaluation.deletion.orders": COUNT,
    "evaluation.fixed_points.every": ANY,
    "evaluation.fixed_points.num_images": COUNT,
    "evaluation.fixed_points.iterations": COUNT,
    "evaluation.fixed_points.initialisations": COUNT,
    "nonfinite.skip": Flag(),
    "nonfinite.stop_after": COUNT,
    "alarms.enabled": Flag(),
    "alarms.gradient_growth": LIMIT,
    "alarms.spectral_norm": LIMIT,
    "alarms.mask_similarity": LIMIT,
    "alarms.largest_slot": LIMIT,
    "alarms.attention_entropy": LIMIT,
    "alarms.backward_failed": LIMIT,
    "alarms.patience": COUNT,
    "profile.start": ANY,
    "profile.steps": COUNT,
    "log_every": COUNT,
    "validate_every": COUNT,
    "draw_every": COUNT,
    "checkpoint_every": COUNT,
    "keep_checkpoints": COUNT,
    "num_pictures": COUNT,
    "num_scored": COUNT,
}
# Of the data and the model, whose other keys depend on their names.
NEEDED = (
    *("data.name", "data.resolution", "data.max_objects"),
    *("model.solver.name", "model.adjoint.name", "model.adjoint.solver.name"),
)
# Those of SLATE's alone.
OF_SLATE = ("temperature.", "optimizer.dvae_")
# Those of slots of frozen features alone.
OF_FEATURES = ("features.",)


def check_keys(config: Config) -> None:
    """Refuses a configuration whose keys or values are not those of this version.

    Raises:
      UserError: naming the first key that is wrong, missing or unknown.
    """
    values = flat(config.to_dict())
    check_values(values, KINDS)
    name = values.get("model.name")
    of_model = {f"model.{key}" for key in defaults(name)} if name else {"model.name"}
    own = {"model.name", *of_model - {"model.solver", "model.adjoint"}}
    needed = [
        key
        for key in KINDS
        if not key.startswith(("data.", "model."))
        and (name == "slate" or not key.startswith(OF_SLATE))
        and (name == "feature_slots" or not key.startswith(OF_FEATURES))
    ]
    for key in (*sorted(own), *NEEDED, *needed):
        if key not in values and key not in ABSENT:
            raise UserError(
                f"config.{key} is missing: an older version wrote this configuration, "
                "or another program; copy the key from configs/base.py into it"
            )
    for key in values:
        known = key in KINDS or key.startswith("data.")  # Its reader knows.
        if key.startswith("model.") and key.count(".") == 1:
            known = key in own
        if not known:
            of = f" of {name}" if key.startswith("model.") else ""
            raise UserError(
                f"config.{key} is no key{of}; configs/base.py declares them"
            )
