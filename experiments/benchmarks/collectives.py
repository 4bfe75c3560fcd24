"""What a compiled program sends between devices, and how long links need for it.

Read from the text of the program (`compiled.as_text()`), which XLA has split into one
program that each device runs: every collective stands in it with the shape of its
arrays and the devices that take part.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from experiments.benchmarks import harness
from experiments.benchmarks.harness import rounded
from experiments.benchmarks.train_step_floor import count_flops

CHIPS = 256
# Assumed share of a chip's peak that a step's products reach.
SHARES = (0.2, 0.4)
HOP_SECONDS = 1e-6
HOP_SOURCE = "https://jax-ml.github.io/scaling-book/sharding/"
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:body|condition|to_apply|calls|\w+_computations?)="
    r"(?:\{([^}]*)\}|%?([\w.-]+))"
)
_DEVICE_COUNTS = ("num_partitions", "replica_count")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """A collective of a compiled program.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the whole array: the reduced or gathered one, the one that is
        scattered; of an exchange or a permutation, what one device gives.
      group: how many devices take part together.
      times: how often a run of the program meets it.
      exact: whether `times` is known; it counts once a loop whose number of passes
        the program does not say, and each branch of a conditional.
    """

    kind: str
    bytes: int
    group: int
    times: int = 1
    exact: bool = True

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one run of the program, in a ring."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}
        return self.times * self.bytes * factor.get(self.kind, share)


def read_collectives(text: str) -> list[Collective]:
    """Returns the collectives that one run of a program meets, equal ones once.

    Args:
      text: of the program, as `compiled.as_text()`.

    Raises:
      ValueError: if the text has no entry computation.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    counted = (re.search(rf"\b{n}=(\d+)", text) for n in _DEVICE_COUNTS)
    everyone = math.prod(int(found[1]) for found in counted if found)

    def walk(name: str, times: int, exact: bool) -> Iterator[Collective]:
        for line in computations[name]:
            instruction = _INSTRUCTION.match(line)
            if not instruction:
                continue
            shape, operation, rest = instruction.groups()
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                group = _group(rest, everyone)
                size = _whole_bytes(shape, kind, group, operation != kind)
                yield Collective(kind, size, group, times, exact)
            elif not operation.endswith(("-done", "-update")):
                trips = _TRIPS.search(rest) if operation == "while" else None
                known = trips or operation not in ("while", "conditional")
                for several, one in _CALLED.findall(rest):
                    for called in (several or one).replace("%", "").split(","):
                        yield from walk(
                            called.strip(),
                            times * int(trips[1] if trips else 1),
                            exact and bool(known),
                        )

    times = collections.Counter()
    for found in walk(entry, 1, True):
        times[found._replace(times=1)] += found.times
    return [found._replace(times=count) for found, count in times.items()]


def _whole_bytes(shape: str, kind: str, group: int, started: bool) -> int:
    sizes = []
    for letters, bits, dimensions in _ARRAY.findall(shape):
        size = 8 if letters == "pred" else int(bits or 0)
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        sizes.append(size // 8)
    if kind == "reduce-scatter":
        return sum(sizes) * group
    if started and kind == "all-gather":
        # The shape of an asynchronous one has the operands too.
        return sum(sizes) * group // (group + 1)
    if started and kind == "collective-permute":
        return sizes[0]
    return sum(sizes)


def _group(rest: str, everyone: int) -> int:
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or axes[name]) for name, part in used)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    return everyone


def summarize(collectives: Iterable[Collective]) -> dict[str, dict[str, Any]]:
    """Returns, by kind and in all, how many there are and what each device moves."""
    collectives = list(collectives)
    found = {}
    for kind in (*KINDS, "total"):
        chosen = [c for c in collectives if kind in (c.kind, "total")]
        if chosen or kind == "total":
            found[kind] = {
                "count": sum(c.times for c in chosen),
                "bytes": sum(c.times * c.bytes for c in chosen),
                "sent": sum(c.sent for c in chosen),
                "groups": sorted({c.group for c in chosen}),
                "exact": all(c.exact for c in chosen),
            }
    return found


class Level(NamedTuple):
    """Devices that are linked alike.

    Attributes:
      devices: how many.
      bandwidth: bytes/s that each sends at best, all of its links in one direction.
      steps: hops that follow one another in an all-reduce; half of them in a gather
        or a scatter.
      hops: links that a byte to any other device crosses, on average.
    """

    devices: int
    bandwidth: float
    steps: int
    hops: float = 1.0


class Pod(NamedTuple):
    """What data sheets say of 256 chips.

    Attributes:
      peak: dense products in bfloat16, floating-point operations/s of a chip.
      levels: the innermost first.
      sources: addresses.
    """

    peak: float
    levels: tuple[Level, ...]
    sources: tuple[str, ...]

    def seconds(self, kind: str, size: float) -> float:
        """The time of a collective over all chips, which nothing else disturbs.

        Args:
          kind: one of `KINDS`.
          size: bytes of the whole array, as `Collective.bytes`.
        """
        if kind in ("all-to-all", "collective-permute"):
            last = self.levels[-1]
            latency = last.steps / 2 * HOP_SECONDS
            return size * last.hops / last.bandwidth + latency
        passes, total = (2 if kind == "all-reduce" else 1), 0.0
        for level in self.levels:
            share = (level.devices - 1) / level.devices
            total += passes * share * size / level.bandwidth
            total += passes * level.steps / 2 * HOP_SECONDS
            size /= level.devices
        return total

    def formula(self, size: float) -> str:
        """Of an all-reduce, with its numbers.

        Args:
          size: bytes of the whole array.
        """
        terms = []
        for level in self.levels:
            terms.append(
                f"2·{level.devices - 1}/{level.devices} · {size / 1e6:.3g} MB / "
                f"{level.bandwidth / 1e9:.0f} GB/s + {level.steps} hops"
            )
            size /= level.devices
        return " + ".join(terms)


def torus(*sides: int, bandwidth: float) -> Level:
    """A torus: a ring along each axis, in both directions at once.

    Args:
      *sides: chips along each axis.
      bandwidth: as `Level.bandwidth`.
    """
    return Level(math.prod(sides), bandwidth, sum(sides), sum(sides) / 4)


def ring(devices: int, bandwidth: float) -> Level:
    """A ring through a switch.

    Args:
      devices: how many.
      bandwidth: as `Level.bandwidth`.
    """
    return Level(devices, bandwidth, 2 * (devices - 1))


# A data sheet's bandwidth of both directions together is halved.
PODS = {
    "TPU v5e, 16×16": Pod(
        197e12,
        (torus(16, 16, bandwidth=400e9 / 2),),
        ("https://docs.cloud.google.com/tpu/docs/v5e",),
    ),
    "TPU v5p, 4×8×8": Pod(
        459e12,
        (torus(4, 8, 8, bandwidth=1200e9 / 2),),
        ("https://docs.cloud.google.com/tpu/docs/v5p",),
    ),
    "H100 or H200, 32×8": Pod(
        989e12,
        (ring(8, 900e9 / 2), ring(32, 400e9 / 8)),
        ("https://jax-ml.github.io/scaling-book/gpus/",),
    ),
}


def project(row: dict[str, Any], pod: Pod) -> dict[str, Any]:
    """Seconds of a step on a pod, and the share of them in which it computes.

    Args:
      row: of a program for as many devices as the pod has chips.
      pod: one of `PODS`.
    """
    paper = harness.CONFIGURATIONS["paper"]
    flops = count_flops(paper, "implicit") / paper.batch
    per_chip = row["batch"] // row["devices"]
    sending = sum(
        c["times"] * pod.seconds(c["kind"], c["bytes"]) for c in row["collectives"]
    )
    computing = {share: flops * per_chip / (pod.peak * share) for share in SHARES}
    return {
        "per_chip": per_chip,
        "sharding": row["sharding"],
        "flops": flops * per_chip,
        "bytes": row["summary"]["total"]["bytes"],
        "communication": sending,
        "computation": computing,
        "efficiency": {s: t / (t + sending) for s, t in computing.items()},
    }


def arithmetic(name: str, found: dict[str, Any]) -> str:
    """A projection of one all-reduce, with its numbers.

    Args:
      name: of the pod.
      found: by `project`.
    """
    pod = PODS[name]
    return (
        f"{name}: all-reduce {pod.formula(found['bytes'])} = "
        f"{rounded(1e3 * found['communication'])} ms; computing "
        f"{found['flops'] / 1e9:.1f} GFLOP / ({SHARES[-1]} · "
        f"{pod.peak / 1e12:.0f} TFLOP/s) = "
        f"{rounded(1e3 * found['computation'][SHARES[-1]])} ms. "
        f"Source: {', '.join(pod.sources)}"
    )
