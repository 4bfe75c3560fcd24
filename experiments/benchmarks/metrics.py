"""What masks cost to score, against the forward pass of the model that makes them.

    python -m experiments.benchmarks.metrics [--turns=5] [--batch=4] [--out=OUT]

Question: are foreground ARI and matching, for a batch of 64 images of 128x128 and 12
slots, well below the model's own forward time? Two minutes on one CPU core. The model
is that of configs/base.py (the paper's) at 128x128, `--batch` images at a time and
scaled up to 64; turns alternate. Writes OUT.md and OUT.json.
"""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from configs import base
from experiments.benchmarks import harness
from implicit_slots.evaluation.metrics import iou
from implicit_slots.evaluation.metrics.locality import locality
from implicit_slots.evaluation.metrics.rand_index import adjusted_rand_index
from implicit_slots.evaluation.metrics.segmentation import (
    attention_to_masks,
    score_masks,
)
from implicit_slots.models.build import build_model

IMAGES, SIDE, SLOTS, OBJECTS = 64, 128, 12, 10


def contestants(batch: int) -> dict[str, tuple[Callable[[], object], float]]:
    """What is timed, by name, and by how much its time is scaled up to 64 images."""
    keys = jax.random.split(jax.random.key(0), 3)
    logits = 3 * jax.random.normal(keys[0], (IMAGES, SLOTS, SIDE // 4, SIDE // 4))
    attention = jax.nn.softmax(logits, axis=1)
    true = jax.random.randint(keys[1], (IMAGES, 16, 16), 0, OBJECTS + 1)
    true = true.repeat(SIDE // 16, axis=1).repeat(SIDE // 16, axis=2)
    shadow = jnp.roll(true, 4, axis=2)
    scores = jax.random.uniform(keys[2], (IMAGES, OBJECTS, SLOTS))

    @jax.jit
    def fg_ari(attention, true):
        masks = attention_to_masks(attention, SIDE, SIDE)
        sizes = {"max_true": OBJECTS, "num_predicted": SLOTS}
        return adjusted_rand_index(true, masks, foreground_only=True, **sizes)

    everything = jax.jit(functools.partial(score_masks, max_true=OBJECTS))
    where = jax.jit(functools.partial(locality, max_true=OBJECTS))
    match = jax.jit(iou.match)
    section = base.get_config("model", base.scenes()).model
    graphdef, params = nnx.split(build_model(section, resolution=SIDE, seed=0))

    @jax.jit
    def forward(params, image):
        output = nnx.merge(graphdef, params)(
            {"image": image}, temperature=1.0, key=jax.random.key(1), deterministic=True
        )
        return output.losses, output.attention

    image = jax.random.uniform(jax.random.key(2), (batch, SIDE, SIDE, 3))
    return {
        "foreground ARI": (lambda: fg_ari(attention, true), 1),
        "matching": (lambda: match(scores), 1),
        "all of score_masks": (lambda: everything(attention, true), 1),
        "locality": (lambda: where(attention, true, shadow), 1),
        "forward pass": (lambda: forward(params, image), IMAGES / batch),
    }


def main(arguments: list[str] | None = None) -> None:
    """Times all in turn and writes OUT.json and OUT.md."""
    parser = harness.build_parser(__doc__, "metrics")
    parser.add_argument("--turns", type=harness.positive, default=5)
    parser.add_argument("--batch", type=harness.positive, default=4)
    flags = parser.parse_args(arguments)
    timed = contestants(flags.batch)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(flags.turns + 1):
        for name, (run, scale) in timed.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if turn:  # The first compiles.
                seconds[name].append(scale * (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole = medians["forward pass"]
    rows = [[n, f"{s:.4f}", f"{s / whole:.2%}"] for n, s in medians.items()]
    text = (
        f"{IMAGES} images of {SIDE}x{SIDE}, {SLOTS} slots, {OBJECTS} objects; medians "
        f"of {flags.turns} alternating turns; the forward pass is that of "
        f"{flags.batch} images, scaled up.\n\n"
    ) + harness.markdown(["", "seconds", "share of the forward pass"], rows)
    results = {"seconds": seconds, "medians": medians}
    harness.write(flags, [harness.jax_facts()], results, text)


if __name__ == "__main__":
    harness.script(main)
