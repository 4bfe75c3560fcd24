"""What a compiled program does on a device, read from its text.

XLA's `compiled.as_text()` is the program of one device: what it sends to the others,
and what it launches, with the shapes of all arrays. On a TPU the compiler adds how
many cycles it expects of each operation.
"""

import collections
import math
import pathlib
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
# What launches nothing.
FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# What runs the computations that it names; all else that names one is a kernel.
RUNS = ("call", "conditional", "while", "async-start")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
# An array in a TPU's memory on the chip, which has tiles and a memory space.
_ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^}]*T\([^}]*S\(\d\)\}")
_CALLED = re.compile(
    r"\b(?:body|condition|to_apply|calls|\w+_computations?)="
    r"(?:\{([^}]*)\}|%?([\w.-]+))"
)
_DEVICE_COUNTS = ("num_partitions", "replica_count")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# What a kernel of ours says of itself; what is around it has the same metadata.
_KERNEL_CYCLES = re.compile(r'"kernel_cycles":"(\d+)"')
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n(.*)\n\}")
_OPERAND = re.compile(r"%([\w.-]+)")
_NAME = re.compile(r'op_name="([^"]*)"')
# What a library's call may use beside its operands, and mostly does not.
_WORKSPACE = re.compile(r", [su]8\[\d+\]\{0\}(?=\)$)")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_PACKAGE = pathlib.Path(__file__).parents[1]


class Instruction(NamedTuple):
    """A line of a program's text.

    Attributes:
      name: of its result.
      shape: of its result, as it stands there.
      operation: such as "fusion".
      rest: operands and attributes.
    """

    name: str
    shape: str
    operation: str
    rest: str

    @property
    def called(self) -> list[str]:
        """Names of the computations that it names."""
        return [
            name.strip()
            for several, one in _CALLED.findall(self.rest)
            for name in (several or one).replace("%", "").split(",")
        ]

    @property
    def operands(self) -> list[str]:
        """Names of what it reads, in order."""
        depth = 1
        for end, letter in enumerate(self.rest):
            depth += (letter in "({[") - (letter in ")}]")
            if not depth:
                return _OPERAND.findall(self.rest[:end])
        return []


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


class Kernel(NamedTuple):
    """What a program launches as one: a fusion, a call of a library, a copy.

    Attributes:
      name: of JAX's operation; "" where it has none.
      source: the innermost line of this package that it comes from, with its function;
        "" where there is none.
      operation: XLA's, such as "fusion".
      bytes: of all that it reads of the device's memory and writes to it; what a TPU
        keeps on the chip is left out. Of an array that it only takes a slice of, or
        writes a slice into, the slice's.
      cycles: that the compiler expects of it, or of a kernel in Pallas what its
        metadata say as "kernel_cycles"; 0 where nothing is said.
      times: how often a run of the program launches it.
    """

    name: str
    source: str
    operation: str
    bytes: int
    cycles: int
    times: int


class _Program:
    """A program's computations by name, and how to walk them."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        entry, found = None, []
        for line in _KERNEL_METADATA.sub(r"kernel_metadata={\1}", text).splitlines():
            if header := _COMPUTATION.match(line):
                found = self.computations[header[2]] = []
                entry = header[2] if header[1] else entry
            elif instruction := _INSTRUCTION.match(line):
                found.append(Instruction(*instruction.groups()))
        if entry is None:
            raise ValueError(
                "this is not the text of a compiled program: it has no ENTRY"
            )
        self.entry = entry
        counted = (re.search(rf"\b{n}=(\d+)", text) for n in _DEVICE_COUNTS)
        self.devices = math.prod(int(found[1]) for found in counted if found)
        self.sources = _sources(text)

    def met(
        self, into: Iterable[str] | None
    ) -> Iterator[tuple[Instruction, int, bool]]:
        """Yields what a run meets, how often, and whether that is known.

        Args:
          into: the operations whose computations are walked; None: all.
        """

        def walk(
            name: str, times: int, exact: bool
        ) -> Iterator[tuple[Instruction, int, bool]]:
            for instruction in self.computations[name]:
                operation = instruction.operation
                yield instruction, times, exact
                if operation.endswith(("-done", "-update")):
                    continue
                if into is not None and operation not in into:
                    continue
                trips = _TRIPS.search(instruction.rest)
                known = trips or operation not in ("while", "conditional")
                passes = int(trips[1]) if trips and operation == "while" else 1
                for called in instruction.called:
                    yield from walk(called, times * passes, exact and bool(known))

        return walk(self.entry, 1, True)

    def slices(self, computation: str) -> dict[int, int]:
        """Bytes of the slices that a fusion takes or writes of its k-th operand.

        Operands that it uses in any other way are left out.
        """
        inside = self.computations[computation]
        found = {}
        for parameter in inside:
            if parameter.operation != "parameter":
                continue
            sizes = [
                _sliced(i, parameter.name)
                for i in inside
                if parameter.name in i.operands
            ]
            if sizes and None not in sizes:
                index = int(parameter.rest.partition(")")[0])
                found[index] = sum(size for size in sizes if size is not None)
        return found


def read_kernels(text: str) -> list[Kernel]:
    """Returns what one run of a program launches.

    Args:
      text: of the program, as `compiled.as_text()`.

    Raises:
      ValueError: if the text has no entry computation.
    """
    program = _Program(text)
    sizes = {
        i.name: _stored(i.shape)
        for inside in program.computations.values()
        for i in inside
    }
    found = []
    for instruction, times, _ in program.met(RUNS):
        operation = instruction.operation
        if operation in FREE or operation in RUNS or operation.endswith("-done"):
            continue
        read = [sizes.get(name, 0) for name in instruction.operands]
        written = sizes[instruction.name]
        if operation == "custom-call":
            written = _stored(_WORKSPACE.sub("", instruction.shape))
        if operation == "copy-start":
            read = []  # Its result has the operand too.
        if operation == "slice-start":
            # So has this one, all of it; then the slice.
            read = array_bytes(instruction.shape)[1:2]
            written = _stored(instruction.shape.partition("), ")[2])
        if operation == "fusion":
            (called,) = instruction.called[:1]
            for index, size in program.slices(called).items():
                if index < len(read):
                    read[index] = min(read[index], size)
            root = program.computations[called][-1]
            if written and root.operation == "dynamic-update-slice":
                inner = {i.name: i.shape for i in program.computations[called]}
                written = sum(array_bytes(inner.get(root.operands[1], "")))
        name = _NAME.search(instruction.rest)
        frame = _FRAME.search(instruction.rest)
        says = _KERNEL_CYCLES if operation == "custom-call" else _CYCLES
        cycles = says.search(instruction.rest)
        found.append(
            Kernel(
                name[1] if name else "",
                program.sources.get(frame[1], "") if frame else "",
                operation,
                sum(read) + written,
                int(cycles[1]) if cycles else 0,
                times,
            )
        )
    return found


def read_collectives(text: str) -> list[Collective]:
    """Returns the collectives that one run of a program meets, equal ones once.

    Args:
      text: of the program, as `compiled.as_text()`.

    Raises:
      ValueError: if the text has no entry computation.
    """
    program = _Program(text)
    times = collections.Counter()
    for instruction, count, exact in program.met(None):
        operation = instruction.operation
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            group = _group(instruction.rest, program.devices)
            started = operation != kind
            size = _whole_bytes(instruction.shape, kind, group, started)
            times[Collective(kind, size, group, 1, exact)] += count
    return [found._replace(times=count) for found, count in times.items()]


def array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array of a shape as a program's text has it."""
    sizes = []
    for letters, bits, dimensions in _ARRAY.findall(shape):
        size = 8 if letters == "pred" else int(bits or 0)
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        sizes.append(size // 8)
    return sizes


def _stored(shape: str) -> int:
    """Bytes that lie in the device's memory, not on the chip."""
    return sum(array_bytes(_ON_CHIP.sub("", shape)))


def _sources(text: str) -> dict[str, str]:
    """The tables at the top of a program's text: a frame's number to its source."""

    def table(title: str) -> dict[str, str]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        lines = found[1].splitlines() if found else []
        return dict(line.split(" ", 1) for line in lines)

    def field(line: str, name: str) -> str:
        found = re.search(rf"\b{name}=(\d+)", line)
        return found[1] if found else ""

    files, functions = table("FileNames"), table("FunctionNames")
    locations, frames = table("FileLocations"), table("StackFrames")
    found = {}
    for frame in frames:
        at, before = frame, ""
        while at in frames and at != before:
            place = locations.get(field(frames[at], "file_location_id"), "")
            file = pathlib.Path(files.get(field(place, "file_name_id"), "").strip('"'))
            if file.is_relative_to(_PACKAGE):
                function = functions.get(field(place, "function_name_id"), "").strip(
                    '"'
                )
                where = f"{file.relative_to(_PACKAGE)}:{field(place, 'line')}"
                found[frame] = f"{where} {function}"
                break
            before, at = at, field(frames[at], "parent_frame_id")
    return found


def _sliced(instruction: Instruction, name: str) -> int | None:
    """Bytes that an instruction reads of an array that it slices; None if all."""
    if instruction.operands[0] == name:
        if instruction.operation in ("slice", "dynamic-slice"):
            return sum(array_bytes(instruction.shape))
        if instruction.operation == "dynamic-update-slice":
            return 0  # What is under the update is not read; the rest stays.
    return None


def _whole_bytes(shape: str, kind: str, group: int, started: bool) -> int:
    sizes = array_bytes(shape)
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
