"""Time to render images through their slots: ours alone, or beside official SLATE.

    python -m experiments.benchmarks.sampling
    python -m experiments.benchmarks.sampling --official=DIR

Needs `pip install -e '.[experiments]'`, and for DIR a checkout of
github.com/singhgautam/slate and PyTorch. Ours takes a minute or two; the official code
half a minute for each image batch of (b) and minutes for one of (c) on two cores.

Measured is the whole way from images to images: the dVAE's encoder, slot attention, one
token after another, the dVAE's decoder. Ours is the compiled `SLATE.reconstruct` of a
run (which also renders the dVAE's own reconstruction), PyTorch's
`reconstruct_autoregressive` without gradients or dropout. "generate alone" is our
tokens from given slots, the likeliest one each time. Processes and turns are those of
contestants.py. Writes sampling.md and .json.
"""

import functools
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from experiments.benchmarks import contestants, harness, official_slate
from experiments.benchmarks.contestants import Bench, Contestant
from experiments.benchmarks.harness import Configuration, markdown, positive, rounded
from implicit_slots.evaluation.validation import build_validation_steps
from implicit_slots.runtime import compiling

WHOLE, GENERATE = "ours, reconstruct", "ours, generate alone"


def build_reconstruct(configuration: Configuration, precision: str) -> Bench:
    """The compiled reconstruction of a run."""
    compiling.enable_cache()
    config = harness.build_config(configuration, precision=precision)
    graphdef, params, _, _ = harness.build_run(config)
    steps = build_validation_steps(graphdef, config)
    image = harness.draw_images(configuration)
    arguments = jax.device_put((params, image), jax.devices()[0])
    return contestants.jax_bench(functools.partial(steps.reconstruct, *arguments, 0))


def build_generate(configuration: Configuration, precision: str) -> Bench:
    """`SLATE.generate` from drawn slots, compiled."""
    compiling.enable_cache()
    config = harness.build_config(configuration, precision=precision)
    graphdef, params, _, _ = harness.build_run(config)

    @jax.jit
    def generate(params, slots):
        return nnx.merge(graphdef, params).generate(slots)

    shape = (configuration.batch, configuration.slots, configuration.width)
    slots = jax.random.normal(jax.random.key(0), shape)
    return contestants.jax_bench(functools.partial(generate, params, slots))


def build_official(directory: Path, configuration: Configuration) -> Bench:
    """The official autoregressive reconstruction."""
    model = official_slate.build(directory, configuration).eval()
    import torch  # pyright: ignore[reportMissingImports]

    image = official_slate.images(configuration)

    @torch.no_grad()
    def step(image=image):
        return model.reconstruct_autoregressive(image)

    bench = official_slate.bench(step)
    # Eager code needs no more than four tokens to be warm.
    bench.wait(step(image[:, :, :8, :8]))
    return bench


def contest(configuration: Configuration, flags: Any, isolate: bool) -> dict[str, Any]:
    """Lets the contestants of one configuration take turns; returns what was found."""
    start = functools.partial(Contestant, steps=flags.steps, isolate=isolate)
    given = configuration, flags.precision
    everyone = [
        start(WHOLE, build_reconstruct, *given),
        start(GENERATE, build_generate, *given),
    ]
    if flags.official:
        official = build_official, flags.official, configuration
        everyone.append(Contestant("PyTorch", *official, steps=1, keep_memory=False))
    found = contestants.compete(everyone, flags.rounds)
    tokens = configuration.batch * configuration.tokens
    for values in found.values():
        values["tokens_per_second"] = tokens / values["seconds"]["median"]
    if flags.official:
        speedup = contestants.compare(found["PyTorch"], found[WHOLE])
        found[WHOLE]["speedup"] = speedup
    return found


def table(results: dict[str, Any]) -> str:
    """One row per configuration and contestant."""
    header = ["", "contestant", "s, median (quartiles)", "tokens/s", "MB"]
    header += ["PyTorch's time by it (range)"]
    rows = []
    for name, result in results.items():
        for contestant, values in result["contestants"].items():
            speedup, peak = values.get("speedup"), values["peak_bytes"]
            rows.append(
                [
                    f"({name})",
                    contestant,
                    harness.between(values["seconds"]),
                    rounded(values["tokens_per_second"]),
                    f"{peak / 2**20:.0f}" if peak else "",
                    harness.ranged(speedup, 1),
                ]
            )
    return markdown(header, rows)


def main(arguments: list[str] | None = None, *, isolate: bool = True) -> None:
    """Measures, prints the table and writes it, and the numbers."""
    parser = harness.contest_parser(__doc__, "sampling", "b,c")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each")
    parser.add_argument("--steps", type=positive, default=3, help="of ours in one turn")
    flags = parser.parse_args(arguments)
    official_slate.check(flags.official)
    contestants.report(flags, lambda c: contest(c, flags, isolate), table)


if __name__ == "__main__":
    harness.script(main)
