"""What the benchmarks share: sizes, statistics, flags, pages."""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from configs import base
from implicit_slots.models.build import build, split_model
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand
from implicit_slots.runtime.versions import versions
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.step import build_steps

DVAE_FEATURES = 64
PRECISIONS = ("float32", "bfloat16")  # of our products
RESULTS = Path("experiments/results")
MARKERS = "osDv^<>P*X"


@dataclass(frozen=True)
class Configuration:
    """Sizes of a model and of its batch; slots and their MLP have the width too."""

    name: str
    resolution: int
    batch: int
    vocab: int
    width: int
    blocks: int
    heads: int
    slots: int
    iterations: int

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return (self.resolution // 4) ** 2

    def __str__(self) -> str:
        return (
            f"{self.resolution}×{self.resolution}, batch {self.batch}, V {self.vocab}, "
            f"D {self.width}, {self.blocks} blocks, {self.heads} heads, "
            f"{self.slots} slots, {self.iterations} iterations"
        )


CONFIGURATIONS = {
    configuration.name: configuration
    for configuration in (
        Configuration("a", 64, 8, 512, 64, 4, 4, 6, 3),
        Configuration("b", 64, 16, 1024, 192, 4, 4, 7, 3),
        Configuration("c", 96, 4, 4096, 192, 8, 8, 12, 7),
        Configuration("paper", 96, 50, 4096, 192, 8, 8, 12, 7),
        Configuration("tiny", 16, 2, 16, 16, 1, 2, 3, 2),
    )
}


def build_config(
    configuration: Configuration,
    *,
    adjoint: str = "implicit",
    precision: str = "float32",
    **changes: Any,
) -> Config:
    """The whole configuration of a run of this size; else as configs/base.py says.

    Args:
      configuration: the sizes.
      adjoint: "implicit" or "vanilla", a variant of configs/base.py.
      precision: of the products.
      changes: keys of the section `model`.
    """
    config = base.get_config("benchmark", base.scenes())
    config.batch_size = configuration.batch
    config.data.resolution = configuration.resolution
    config.model.update(
        vocab_size=configuration.vocab,
        dvae_features=DVAE_FEATURES,
        width=configuration.width,
        num_blocks=configuration.blocks,
        num_heads=configuration.heads,
        num_slots=configuration.slots,
        slot_size=configuration.width,
        slot_mlp_size=configuration.width,
    )
    config.model.solver.max_steps = configuration.iterations
    config.model.update(changes)
    config.precision = precision
    return base.set_variant(config, adjoint)


def build_run(config: Config) -> tuple[Any, Any, Any, Any]:
    """Returns a run's graphdef, parameters, optimiser and steps, ready to compile."""
    graphdef, params = split_model(build(config))
    optimizer = build_optimizer(config.optimizer, params, num_steps=config.num_steps)
    return graphdef, params, optimizer, build_steps(graphdef, optimizer, config)


def draw_images(configuration: Configuration) -> np.ndarray:
    """Images of random bytes: time does not depend on what they show."""
    side = configuration.resolution
    shape = (configuration.batch, side, side, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def spread(turns: list[list[float]]) -> dict[str, Any]:
    """Median and quartiles of all steps, and the steps."""
    everything = [seconds for turn in turns for seconds in turn]
    low, median, high = np.quantile(everything, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "quartiles": [low, high], "turns": turns}


def span(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    median = statistics.median(values)
    return {"median": median, "low": min(values), "high": max(values)}


def ratio(turns: list[list[float]], others: list[list[float]]) -> dict[str, float]:
    """Median and range over the rounds of the ratio of the medians in a round."""
    pairs = zip(turns, others, strict=True)
    return span([statistics.median(one) / statistics.median(two) for one, two in pairs])


def build_parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with the flag that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=expand, default=RESULTS / out)
    return parser


def contest_parser(doc: str | None, out: str, configurations: str):
    """A parser with the flags of all that compare ours with the official code."""
    parser = build_parser(doc, out)
    known = "of " + ",".join(CONFIGURATIONS)
    parser.add_argument("--configurations", default=configurations, help=known)
    parser.add_argument("--batch", type=positive, help="instead of the configuration's")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--official", type=expand, help="checkout of official SLATE")
    return parser


def positive(text: str) -> int:
    """An argument that is a whole number from one on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number: {text!r}")
    return int(text)


def pick(flags: argparse.Namespace) -> list[Configuration]:
    """The configurations that the flags name.

    Raises:
      UserError: if one does not exist.
    """
    names = choices("--configurations", flags.configurations, CONFIGURATIONS)
    chosen = [CONFIGURATIONS[name] for name in names]
    return [replace(c, batch=flags.batch or c.batch) for c in chosen]


def choices(
    flag: str, text: str, possible: Iterable[str], *, between: str = ","
) -> list[str]:
    """The names in a flag that lists them.

    Raises:
      UserError: if one is not possible.
    """
    names = text.split(between)
    for name in names:
        if name not in possible:
            known = ", ".join(possible)
            raise UserError(f"{flag} must be some of {known}, got {name!r}")
    return names


def script(main: Callable[[], None]) -> None:
    """Runs a script; what the user can put right is a sentence."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")


def jax_facts() -> dict[str, Any]:
    """What JAX runs on in this process."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "versions": versions(),
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore
    }


def cpu_name() -> str:
    """The processor's own name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(
    flags: argparse.Namespace,
    facts: Sequence[dict[str, Any]],
    results: Any,
    text: str,
    picture: Figure | None = None,
) -> None:
    """Prints a page; writes it as OUT.md, the numbers as OUT.json, a picture.

    Args:
      flags: of the script.
      facts: of those who were measured, ours first.
      results: as JSON takes them.
      text: of the page, in Markdown.
      picture: OUT.png.
    """
    versions: dict[str, str] = {}
    for known in facts:
        versions = known["versions"] | versions
    date, device = datetime.date.today().isoformat(), facts[0]["device"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    hardware = {"device": device, "cpu": cpu_name(), "cores": cores or os.cpu_count()}
    numbers = {
        "date": date,
        "hardware": hardware,
        "versions": versions,
        # Folders are this machine's own.
        "flags": {k: v for k, v in vars(flags).items() if not isinstance(v, Path)},
        "results": results,
    }
    where = f"{hardware['cores']} core(s) of {hardware['cpu']}"
    where = where if device == "cpu" else f"{device}; host: {where}"
    names = {"jax": "JAX", "torch": "PyTorch", "libtpu": "libtpu"}
    names |= {f"jax-cuda{n}-plugin": f"CUDA {n} plugin" for n in (12, 13)}
    packages = ", ".join(f"{names[k]} {versions[k]}" for k in names if k in versions)
    page = f"{where}; {packages}; {date}.\n\n{text}\n"
    print("\n" + page)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    # OUT may have dots of its own.
    Path(f"{flags.out}.md").write_text(page)
    Path(f"{flags.out}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    if picture:
        picture.savefig(f"{flags.out}.png", dpi=130)
    print(f"wrote {flags.out}.md, .json{' and .png' if picture else ''}")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, without the columns in which nothing stands."""
    kept = [i for i, _ in enumerate(header) if any(row[i] for row in rows)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in lines)


def rounded(number: float) -> str:
    """Three digits, and no exponent for what is large."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def between(seconds: Mapping[str, Any], scale: float = 1.0) -> str:
    """Median and quartiles of `spread`, as a cell of a table."""
    values = (seconds["median"], *seconds["quartiles"])
    return "{} ({} to {})".format(*(rounded(scale * value) for value in values))


def ranged(span: Mapping[str, float] | None, digits: int = 2) -> str:
    """Median and range of `span`, as a cell of a table; empty without any."""
    keys = ("median", "low", "high")
    values = [f"{span[key]:.{digits}f}" for key in keys] if span else []
    return "{} ({} to {})".format(*values) if values else ""
