"""What the benchmarks share: sizes, statistics, flags, reports."""

import argparse
import datetime
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs import base
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError

DVAE_FEATURES = 64
PRECISIONS = ("float32", "bfloat16")  # of our products


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
    adjoint: str,
    precision: str = "float32",
    **changes: Any,
) -> Config:
    """The whole configuration of a run of this size; else as configs/base.py says.

    Args:
      configuration: the sizes.
      adjoint: "implicit" or "vanilla", a variant of configs/base.py.
      precision: of the products.
      changes: keys of the section `model`.

    Raises:
      UserError: if there is no such adjoint.
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
    try:
        return base.set_variant(config, adjoint)
    except ValueError as error:
        raise UserError(str(error)) from error


def draw_images(configuration: Configuration) -> np.ndarray:
    """Images of random bytes: time does not depend on what they show."""
    side = configuration.resolution
    shape = (configuration.batch, side, side, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def spread(turns: list[list[float]]) -> dict[str, Any]:
    """Median and quartiles of all steps, and the steps."""
    flat = [seconds for turn in turns for seconds in turn]
    low, median, high = np.quantile(flat, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "quartiles": [low, high], "turns": turns}


def ratio(turns: list[list[float]], others: list[list[float]]) -> dict[str, float]:
    """Median and range over the rounds of the ratio of the medians in a round."""
    ratios = [
        statistics.median(turn) / statistics.median(other)
        for turn, other in zip(turns, others, strict=True)
    ]
    return {
        "median": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def build_parser(description: str | None, out: str, configurations: str):
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--configurations",
        default=configurations,
        help="of " + ",".join(CONFIGURATIONS),
    )
    parser.add_argument("--batch", type=positive, help="instead of the configuration's")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--official", type=Path, help="checkout of official SLATE")
    parser.add_argument("--out", type=Path, default=Path("experiments/results") / out)
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
    chosen = []
    for name in choices("--configurations", flags.configurations, CONFIGURATIONS):
        configuration = CONFIGURATIONS[name]
        if flags.batch is not None:
            configuration = replace(configuration, batch=flags.batch)
        chosen.append(configuration)
    return chosen


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
            raise UserError(
                f"{flag} must be some of {', '.join(possible)}, got {name!r}"
            )
    return names


def all_facts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of every contestant of every configuration."""
    return [
        contestant["facts"]
        for result in results.values()
        for contestant in result["contestants"].values()
    ]


def about(flags: argparse.Namespace, facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Date, hardware, versions and flags; the facts are the contestants'."""
    versions: dict[str, str] = {}
    for known in facts:
        versions = known["versions"] | versions
    hardware = {
        "device": facts[0]["device"],
        "cpu": cpu_name(),
        "cores": core_count(),
    }
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "versions": versions,
        "flags": {k: v for k, v in vars(flags).items() if k not in ("official", "out")},
    }


def cpu_name() -> str:
    """The processor's own name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def core_count() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def report(
    flags: argparse.Namespace,
    contest: Callable[[Configuration], dict[str, Any]],
    draw: Callable[[dict[str, Any], Path], None],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Measures every configuration of the flags; writes picture, table and numbers.

    Args:
      flags: of the script.
      contest: lets the contestants of a configuration take turns.
      draw: makes the picture of the results at a path.
      table: of the results, in Markdown.
    """
    results = {
        configuration.name: {
            "sizes": str(configuration),
            "contestants": contest(configuration),
        }
        for configuration in pick(flags)
    }
    draw(results, beside(flags.out, "png"))
    write(flags, all_facts(results), results, table(results))


def write(
    flags: argparse.Namespace,
    facts: list[dict[str, Any]],
    results: dict[str, Any],
    table: str,
) -> None:
    """Prints the table; writes it as OUT.md, and the numbers as OUT.json.

    Args:
      flags: of the script.
      facts: of those who were measured, ours first.
      results: by configuration.
      table: in Markdown.
    """
    numbers = about(flags, facts) | {"results": results}
    hardware, versions = numbers["hardware"], numbers["versions"]
    where = f"{hardware['cores']} core(s) of {hardware['cpu']}"
    if hardware["device"] != "cpu":
        where = f"{hardware['device']}; host: {where}"
    names = {"jax": "JAX", "torch": "PyTorch"}
    packages = ", ".join(
        f"{n} {versions[k]}" for k, n in names.items() if k in versions
    )
    text = f"{where}; {packages}; {numbers['date']}.\n\n{table}\n"
    print("\n" + text)
    beside(flags.out, "md").write_text(text)
    beside(flags.out, "json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"wrote {flags.out}.md, .json and .png")


def beside(out: Path, suffix: str) -> Path:
    """OUT.suffix, whatever dots OUT has, in a folder that exists."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent / f"{out.name}.{suffix}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rounded(number: float) -> str:
    """Three digits, and no exponent for what is large."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
