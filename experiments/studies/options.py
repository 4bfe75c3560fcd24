"""What each option of the small SLATE is worth: it without one, or with another.

    python -m experiments.studies.options --out=DIR

Every arm is configs/scenes.py with some keys changed, trained for `--steps` steps (the
cosine ends there) from the same seeds, and scored on validation scenes. Arms that lie
in DIR already are not trained again; `--arms` takes some only, so that two processes
can share the work. A run's logs, pictures and checkpoints are left out: an arm costs
one compilation.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import scenes
from experiments.studies.drawing import MASKS
from experiments.studies.statistics import Rule, paired_effect
from implicit_slots.data.batches import TrainBatches
from implicit_slots.evaluation.validation import (
    HeldOut,
    build_validation_steps,
    validate,
)
from implicit_slots.runtime import compiling
from implicit_slots.runtime.files import expand, write_atomically, write_json
from implicit_slots.runtime.prng import Given
from implicit_slots.training.codebook import with_codebook
from implicit_slots.training.parts import Parts, build_parts
from implicit_slots.training.state import first_state

DEFAULT = "as it is"
# A dVAE has no shares of tokens to weigh them by.
_DVAE = {"model.tokenizer": "dvae", "model.token_weighting": 0.0}
_UNROLLED = {"model.adjoint.name": "unrolled"}
_GAUSSIAN = {"model.initial_slots": "gaussian", "model.straight_through": False}
ARMS: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {},
    "slots read tokens": {"model.inputs": "tokens"},
    "kernels 4 and 3": {"model.encoder_kernels": (4, 3)},
    "positions added": {"model.encoder_positions": "added"},
    "gate from 0.25": {"model.position_scale": 0.25},
    "dVAE, no token weights": _DVAE,
    "no token weights": {"model.token_weighting": 0.0},
    "no dropped tokens": {"model.drop_tokens": 0.0},
    "random order": {"model.decoder_order": "random"},
    "Gaussian slots": _GAUSSIAN,
    "a Gaussian a slot": {**_GAUSSIAN, "model.initial_slots": "gaussians"},
    "learned slots with noise": {"initial_noise.start": 1.0},
    "predicted slots": {"model.initial_slots": "predicted"},
    "damped normalizer": {"model.normalizer": "damped"},
    "gain 1": {"model.attention_gain": 1.0},
    "one rate": {"optimizer.slots_learning_rate": 0.0},
    "clipped at 1": {"optimizer.clip_limit": 1.0},
    "vanilla": _UNROLLED,
    "vanilla, half again the rates": {
        **_UNROLLED,
        "optimizer.learning_rate": 2.25e-3,
        "optimizer.slots_learning_rate": 1.125e-3,
    },
    "vanilla, twice the rates": {
        **_UNROLLED,
        "optimizer.learning_rate": 3e-3,
        "optimizer.slots_learning_rate": 1.5e-3,
    },
    "half again the rates": {
        "optimizer.learning_rate": 2.25e-3,
        "optimizer.slots_learning_rate": 1.125e-3,
    },
    "twice the rates": {
        "optimizer.learning_rate": 3e-3,
        "optimizer.slots_learning_rate": 1.5e-3,
    },
    "vanilla, half the rates": {
        **_UNROLLED,
        "optimizer.learning_rate": 7.5e-4,
        "optimizer.slots_learning_rate": 3.75e-4,
    },
}
NAMES = {**MASKS, "cross_entropy": "cross-entropy"}
RULE = Rule(
    claim="",
    metric="",
    a="",
    b=DEFAULT,
    expected="higher",
    better="higher",
    by="difference",
    least=0.0,
)


def train(parts: Parts, seed: int, steps: int) -> Any:
    """Trains from a seed; returns the last state."""
    config = parts.config.copy_and_resolve_references()
    config.seed = seed
    assert parts.train is not None
    state = with_codebook(first_state(config, parts.optimizer), parts.train, seed)
    given = Given.of(config)
    batches = TrainBatches(parts.train, config.batch_size, seed)
    for step in range(steps):
        state, _ = parts.steps.train.function(given, state, batches[step])
    return state


def measure(arm: str, *, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Trains an arm from every seed.

    Returns:
      The arm, the steps, the seeds; and lists with a value for each seed: what
      validation measures, and "seconds".
    """
    config = scenes.get_config()
    config.data.cache = ""
    config.num_steps = steps
    config.initial_noise.steps = steps // 2
    config.update_from_flattened_dict(ARMS[arm])
    parts = build_parts(config, "train")
    held_out = HeldOut(
        build_validation_steps(parts.graphdef, config, parts.mesh),
        config,
        parts.mesh,
        parts.held_out["validation"],
    )
    found: dict[str, list[float]] = {"seconds": []}
    for seed in seeds:
        began = time.perf_counter()
        state = jax.block_until_ready(train(parts, seed, steps))
        found["seconds"].append(time.perf_counter() - began)
        for name, value in validate(held_out, state.params, state.step).items():
            found.setdefault(name, []).append(float(value))
    return {"arm": arm, "steps": steps, "seeds": list(seeds), **found}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns Markdown: the default's values, and the others' differences to them."""
    rows = [
        ["", *NAMES.values()],
        ["---"] * (1 + len(NAMES)),
    ]
    default = results[DEFAULT]
    for arm in [arm for arm in ARMS if arm in results]:
        found, cells = results[arm], []
        for name in NAMES:
            digits = 0 if name == "cross_entropy" else 2
            if arm == DEFAULT:
                cells.append(", ".join(f"{v:.{digits}f}" for v in found[name]))
                continue
            effect = paired_effect(
                dict(zip(found["seeds"], found[name], strict=True)),
                dict(zip(default["seeds"], default[name], strict=True)),
                RULE,
            )
            assert effect is not None
            low, high = effect.low, effect.high
            cells.append(
                f"{effect.median:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            )
        rows.append([arm, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Trains what is missing and prints the table of what there is."""
    parser = argparse.ArgumentParser(description="What each option of SLATE is worth.")
    parser.add_argument("--out", type=expand, required=True)
    parser.add_argument("--steps", type=int, default=2_500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    options = parser.parse_args(arguments)
    compiling.enable_cache()
    options.out.mkdir(parents=True, exist_ok=True)

    def file(arm: str) -> Path:
        return options.out / f"{arm.replace(' ', '_').replace(',', '')}.json"

    seeds = list(range(options.seeds))

    def read(arm: str) -> dict[str, Any] | None:
        """What lies there of an arm with the same steps and seeds."""
        found = json.loads(file(arm).read_text()) if file(arm).exists() else {}
        same = (found.get("steps"), found.get("seeds")) == (options.steps, seeds)
        return found if same else None

    for arm in options.arms:
        if read(arm) is None:
            found = measure(arm, steps=options.steps, seeds=seeds)
            write_json(file(arm), found)
            print(arm, {n: np.round(found[n], 3).tolist() for n in NAMES}, flush=True)
    results = {arm: found for arm in ARMS if (found := read(arm)) is not None}
    if DEFAULT in results:
        write_atomically(options.out / "options.md", table(results))
        print(table(results))


if __name__ == "__main__":
    main()
