"""Time to render images through their slots: ours alone, or beside official SLATE.

    python -m experiments.benchmarks.sampling
    python -m experiments.benchmarks.sampling --official=DIR
    python -m experiments.benchmarks.sampling --variants=greedy,temperature,top_k

Needs `pip install -e '.[experiments]'`, and for DIR a checkout of
github.com/singhgautam/slate and PyTorch. Ours takes a minute or two; the official code
half a minute for each image batch of (b) and minutes for one of (c) on two cores.

Measured is the whole way from images to images: the dVAE's encoder, slot attention, one
token after another, the dVAE's decoder. Ours is the compiled `SLATE.reconstruct` of a
run (which also renders the dVAE's own reconstruction), PyTorch's
`reconstruct_autoregressive` without gradients or dropout. "generate alone" is our
tokens from given slots. The variants other than greedy are `SLATE.generate` at
temperature one, and among the 16 likeliest tokens. Processes and turns are those of
contestants.py. Writes sampling.md, .json and .png.
"""

import functools
import inspect
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib
from flax import nnx

from experiments.benchmarks import contestants, harness, official_slate
from experiments.benchmarks.contestants import Bench, Contestant
from experiments.benchmarks.harness import Configuration, markdown, positive, rounded
from implicit_slots.evaluation.validation import build_validation_steps
from implicit_slots.models.build import build, split_model
from implicit_slots.models.slate import SLATE
from implicit_slots.runtime import compiling
from implicit_slots.runtime.errors import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Wanted: the official time by ours.
TARGETS = {"b": "30", "c": "more than (b)"}
WHOLE = "ours, reconstruct"
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "top_k": 16},
}


def build_reconstruct(configuration: Configuration, precision: str) -> Bench:
    """The compiled reconstruction of a run."""
    compiling.enable_cache()
    config = harness.build_config(
        configuration, adjoint="implicit", precision=precision
    )
    graphdef, params = split_model(build(config))
    reconstruct = build_validation_steps(graphdef, config).reconstruct
    image = harness.draw_images(configuration)
    arguments = jax.device_put((params, image), jax.devices()[0])
    return _bench(functools.partial(reconstruct, *arguments, 0))


def build_generate(configuration: Configuration, precision: str, variant: str) -> Bench:
    """`SLATE.generate` from drawn slots, compiled."""
    compiling.enable_cache()
    config = harness.build_config(
        configuration, adjoint="implicit", precision=precision
    )
    graphdef, params = split_model(build(config))
    options = VARIANTS[variant]
    if set(options) - set(inspect.signature(SLATE.generate).parameters):
        raise UserError(f"this version's SLATE.generate has no variant {variant!r}")

    @jax.jit
    def generate(params, slots, key):
        model: Any = nnx.merge(graphdef, params)
        return model.generate(slots, **options, **({"key": key} if options else {}))

    shape = (configuration.batch, configuration.slots, configuration.width)
    slots = jax.random.normal(jax.random.key(0), shape)
    return _bench(functools.partial(generate, params, slots, jax.random.key(1)))


def _bench(step) -> Bench:
    jax.block_until_ready(step())
    facts = contestants.jax_facts()
    return Bench(
        step=step,
        wait=jax.block_until_ready,
        facts=facts,
        peak=contestants.jax_peak,
        chained=facts["platform"] != "cpu",
    )


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
    print(f"({configuration.name}) {configuration}", file=sys.stderr, flush=True)
    start = functools.partial(Contestant, steps=flags.steps, isolate=isolate)
    given = configuration, flags.precision
    everyone = [start(WHOLE, build_reconstruct, *given)]
    for variant in harness.choices("--variants", flags.variants, VARIANTS):
        name = f"ours, generate alone, {variant}"
        everyone.append(start(name, build_generate, *given, variant))
    if flags.official:
        official = build_official, flags.official, configuration
        everyone.append(Contestant("PyTorch", *official, steps=1, keep_memory=False))
    contestants.check_platforms(everyone)
    turns = contestants.alternate(everyone, flags.rounds)
    found = {}
    for contestant in everyone:
        seconds = harness.spread(turns[contestant.name])
        found[contestant.name] = {
            "seconds": seconds,
            "tokens_per_second": configuration.batch
            * configuration.tokens
            / seconds["median"],
            "facts": contestant.facts,
            "peak_bytes": contestant.close(),
        }
    if flags.official:
        found[WHOLE] |= {
            "speedup": harness.ratio(turns["PyTorch"], turns[WHOLE]),
            "target": TARGETS.get(configuration.name, ""),
        }
    return found


def table(results: dict[str, Any]) -> str:
    """One row per configuration and contestant."""
    header = ["", "", "s, median (quartiles)", "tokens/s", "MB"]
    header += ["PyTorch's time by it (range)", "wanted"]
    rows = []
    for name, result in results.items():
        for contestant, values in result["contestants"].items():
            seconds = values["seconds"]
            low, high = seconds["quartiles"]
            speedup, peak = values.get("speedup"), values["peak_bytes"]
            row = [
                f"({name})",
                contestant,
                "{} ({} to {})".format(*map(rounded, (seconds["median"], low, high))),
                rounded(values["tokens_per_second"]),
                f"{peak / 2**20:.0f}" if peak else "",
                "",
                values.get("target", ""),
            ]
            if speedup:
                row[5] = "{median:.1f} ({low:.1f} to {high:.1f})".format(**speedup)
            rows.append(row)
    return markdown(header, rows)


def draw(results: dict[str, Any], path: Path) -> None:
    """Tokens per second as bars, one axis per configuration."""
    figure, axes = plt.subplots(
        1,
        len(results),
        figsize=(1 + 4.5 * len(results), 2.4),
        layout="constrained",
        squeeze=False,
    )
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        found = result["contestants"]
        rates = [values["tokens_per_second"] for values in found.values()]
        colors = ["tab:blue" if n.startswith("ours") else "0.7" for n in found]
        bars = axis.barh(range(len(found)), rates, color=colors)
        axis.bar_label(bars, [*map(rounded, rates)], padding=3, fontsize=9)
        axis.set_yticks(range(len(found)), list(found))
        axis.invert_yaxis()
        axis.margins(x=0.3)
        axis.set(xlabel="tokens a second", title=f"({name})")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None, *, isolate: bool = True) -> None:
    """Measures, prints the table and writes it, the picture and the numbers."""
    parser = harness.build_parser(__doc__, "sampling", "b,c")
    parser.add_argument("--variants", default="greedy", help="of " + ",".join(VARIANTS))
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each")
    parser.add_argument("--steps", type=positive, default=3, help="of ours in one turn")
    flags = parser.parse_args(arguments)
    official_slate.check(flags.official)
    harness.report(flags, lambda c: contest(c, flags, isolate), draw, table)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
