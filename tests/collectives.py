"""What a compiled program sends between devices.

Read from the text of the program (`compiled.as_text()`), which XLA has split into one
program that each device runs: every collective stands in it with the shape of its
arrays and the devices that take part.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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
