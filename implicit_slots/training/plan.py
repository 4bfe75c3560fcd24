"""What a run would need of devices that are not here: `--mode=plan`.

The real train step is compiled for them, by their own compiler, and its program is
read. Nothing is run and nothing is written, and no data is opened.
"""

import collections
import math
import pathlib
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from implicit_slots.models.build import (
    count_parameters,
    model_class,
)
from implicit_slots.runtime import compiling
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.devices import DATA_AXIS, traced_for
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.programs import (
    KINDS,
    Collective,
    Kernel,
    read_collectives,
    read_kernels,
)
from implicit_slots.runtime.topologies import HERE, Topology, devices_of
from implicit_slots.training.checks import check
from implicit_slots.training.frozen import description, is_cached
from implicit_slots.training.parts import build_parts
from implicit_slots.training.state import TrainState

# Share of a device's memory that a program may fill: the rest is the runtime's.
USABLE = 0.9
LARGEST = 8


class Plan(NamedTuple):
    """A train step as it was compiled, for one device of many.

    Attributes:
      topology: the devices.
      config: of the run.
      parameters: how many the model has.
      holds: bytes on a device by what they are; "temporaries" are the step's own.
      flops: as XLA counts them, a loop's body once; 0 where it does not say.
      kernels: what a step launches.
      collectives: what it sends.
      overlapped: of the collectives' sends how many the schedule lets other work
        overlap, and how many there are.
      seconds: that compiling took here.
    """

    topology: Topology
    config: Config
    parameters: int
    holds: dict[str, int]
    flops: float
    kernels: list[Kernel]
    collectives: list[Collective]
    overlapped: tuple[int, int]
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes on a device."""
        return sum(self.holds.values())

    @property
    def launched(self) -> int:
        """Kernels of a step."""
        return sum(kernel.times for kernel in self.kernels)

    @property
    def moved(self) -> int:
        """Bytes that a step's kernels read and write."""
        return sum(kernel.times * kernel.bytes for kernel in self.kernels)

    @property
    def cycles(self) -> int:
        """Cycles that a TPU's compiler expects of a step; 0 elsewhere."""
        return sum(kernel.times * kernel.cycles for kernel in self.kernels)


def make(config: Config, topology: Topology) -> Plan:
    """Compiles a configuration's train step for devices.

    Args:
      config: the whole configuration.
      topology: the devices.

    Raises:
      UserError: if the batch cannot be split over the devices, or the compiler says
        that the program does not fit.
    """
    parts = build_parts(config, "plan", devices=topology.devices)
    state, batch = parts.state_shapes(), train_batch(config, parts.mesh)
    began = time.perf_counter()
    try:
        with traced_for(topology.platform):
            compiled = parts.steps.train.compile(state, batch)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the step does not fit {topology.name}: {_needed(error)}"
            f"{advice(config, topology)}"
        ) from error
    seconds = time.perf_counter() - began
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    holds = held(state, batch)
    holds["temporaries"] = memory.temp_size_in_bytes
    holds["program"] = memory.generated_code_size_in_bytes
    return Plan(
        topology=topology,
        config=config,
        parameters=count_parameters(parts.shapes),
        holds=holds,
        flops=float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        kernels=read_kernels(text),
        collectives=read_collectives(text),
        overlapped=overlapped(text),
        seconds=seconds,
    )


def train_batch(config: Config, mesh: jax.sharding.Mesh) -> PyTree:
    """Shapes of a training batch of a configuration, whatever its data."""
    rows = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    batch, side = config.batch_size, config.data.resolution

    def shape(*dimensions: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *dimensions), dtype, sharding=rows)

    found: dict[str, Any] = {"image": shape(side, side, 3, dtype=jnp.uint8)}
    if is_cached(config):
        told = description(config)
        size = told["patches"], told["width"]
        found = {"features": shape(*size, dtype=jnp.bfloat16)}
    if "objects" in model_class(config.model.name).reads:
        objects = config.data.get("max_objects") or config.model.num_slots
        found["objects"] = {
            "present": shape(objects, dtype=jnp.bool_),
            "position": shape(objects, 3, dtype=jnp.float32),
            **{
                name: shape(objects, dtype=jnp.int32)
                for name in ("size", "material", "shape", "color")
            },
        }
    return found


def held(state: TrainState, batch: PyTree) -> dict[str, int]:
    """Bytes of a device by what it holds between steps."""
    return {
        "parameters": _bytes(state.params),
        "moving average": _bytes(state.ema),
        "optimiser": _bytes((state.opt_state, state.plateau, state.faults)),
        "batch": _bytes(batch),
    }


def _bytes(tree: PyTree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def overlapped(text: str) -> tuple[int, int]:
    """How many of a program's collectives begin and end apart, and how many there are.

    Work that stands between in the schedule may run meanwhile.
    """
    lines = text.splitlines()
    whole = sum(f" {kind}(" in line for line in lines for kind in KINDS)
    apart = sum(f" {kind}-start(" in line for line in lines for kind in KINDS)
    apart += sum(" async-start(" in line for line in lines)
    return apart, whole + apart


def advice(config: Config, topology: Topology, share: float = 2.0) -> str:
    """What makes a step smaller, that is not set yet.

    Args:
      config: of the run.
      topology: the devices.
      share: of what may be filled that the step takes.
    """
    ways = []
    if config.precision != "bfloat16":
        ways.append("--config.precision=bfloat16")
    if config.model.get("remat") is False:
        ways.append("--config.model.remat=True")
    parts = config.accumulate * 2 ** max(1, math.ceil(math.log2(share)))
    ways.append(f"--config.accumulate={parts}")
    if config.sharding != "fsdp" and len(topology.devices) > 1:
        ways.append("--config.sharding=fsdp")
    return f"try {', '.join(ways)}, or more devices"


def out_of_memory(error: Exception, config: Config, workdir: pathlib.Path) -> str:
    """The sentence for a run that the memory was too small for.

    Args:
      error: that says so.
      config: of the run.
      workdir: of the run.
    """
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    here = devices_of(HERE)
    return (
        f"there is not enough memory ({reason}); {advice(config, here)}, or a smaller "
        "--config.batch_size; --mode=plan says what a step needs before it runs; "
        "another batch_size or accumulate takes another --workdir, all else resumes "
        f"{workdir}"
    )


def _needed(error: Exception) -> str:
    for line in str(error).splitlines():
        if "Used" in line or "Total" in line or "exceeded" in line.lower():
            return f"{line.strip().rstrip('.')}; "
    return ""


def fitting_batches(config: Config, devices: int) -> list[int]:
    """The batch sizes next to the configuration's that devices and parts divide."""
    unit = devices * config.accumulate
    below = config.batch_size // unit * unit
    return [
        size
        for size in (below - unit, below, below + unit, below + 2 * unit)
        if size > 0
    ]


def describe(plan: Plan) -> str:
    """Returns the plan as lines of text."""
    config, topology, chip = plan.config, plan.topology, plan.topology.chip
    count = len(topology.devices)
    each = config.batch_size // count
    lines = [
        f"{config.name} on {topology.name}: {count} {topology.platform} device(s), "
        f"{each} image(s) each"
        + (f", in {config.accumulate} parts" if config.accumulate > 1 else "")
        + f"; {config.sharding}, {config.precision}",
        f"{plan.parameters:,} parameters; the train step compiled in "
        f"{plan.seconds:.0f} s here",
        "",
        "memory of a device",
    ]
    lines += [
        f"  {name:15} {_size(size):>10}" for name, size in plan.holds.items() if size
    ]
    total = f"  {'total':15} {_size(plan.memory):>10}"
    if chip:
        share = plan.memory / chip.memory
        fits = "fits"
        if share > USABLE:
            fits = f"does not fit: {advice(config, topology, share / USABLE)}"
        total += f" of {_size(chip.memory)} ({share:.0%}): {fits}"
    lines += [total, "", "work of a device in a step"]
    lines += [f"  {row}" for row in _work(plan)]
    lines += ["", "sent by a device in a step"]
    lines += [f"  {row}" for row in _sent(plan)]
    batches = ", ".join(f"{size:,}" for size in fitting_batches(config, count))
    lines += ["", f"batch sizes next to this one that divide: {batches}"]
    return "\n".join(lines)


def _work(plan: Plan) -> Iterable[str]:
    chip = plan.topology.chip
    if plan.flops:
        row = f"{_digits(plan.flops / 1e9)} GFLOP (a loop's body counted once)"
        if chip:
            bfloat16 = plan.config.precision == "bfloat16"
            rate = chip.bfloat16 if bfloat16 else chip.float32
            row += f": at least {_digits(1e3 * plan.flops / rate)} ms at its peak"
        yield row
    row = f"{plan.launched:,} kernels that read and write {_size(plan.moved)}"
    if chip:
        row += f": at least {_digits(1e3 * plan.moved / chip.bandwidth)} ms"
    yield row
    if plan.cycles:
        cycles = _digits(plan.cycles / 1e6)
        row = f"{cycles} million cycles by the compiler's estimate and our kernels'"
        if chip and chip.clock:
            row += f": {_digits(1e3 * plan.cycles / chip.clock)} ms"
        yield row
    for part, moved in largest(plan.kernels):
        yield f"  {_size(moved):>10}  {part}"


def largest(kernels: Iterable[Kernel]) -> list[tuple[str, int]]:
    """The lines of the package whose kernels move the most bytes, and those bytes."""
    moved = collections.Counter()
    for kernel in kernels:
        source = kernel.source or kernel.name.rpartition("/")[2]
        moved[source or f"({kernel.operation})"] += kernel.times * kernel.bytes
    return moved.most_common(LARGEST)


def _sent(plan: Plan) -> Iterable[str]:
    real = [found for found in plan.collectives if found.group > 1]
    if not real:
        yield "nothing"
        return
    kinds: dict[str, list[Collective]] = {}
    for found in real:
        kinds.setdefault(found.kind, []).append(found)
    for kind, those in kinds.items():
        sent = sum(found.sent for found in those)
        times = sum(found.times for found in those)
        yield f"{times} {kind}: {_size(sent)}"
    apart, whole = plan.overlapped
    yield f"{apart} of {whole} begin and end apart, so that other work overlaps them"


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _size(count: int | float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def run(config: Config, topology: Topology) -> None:
    """Prints the plan of a configuration on devices.

    Raises:
      UserError: see `make`, and what no run can be made of.
    """
    check(config, "train")
    with compiling.optimised(config.get("optimize_programs", True)):
        print(describe(make(config, topology)), flush=True)
