"""Devices that are not here: XLA's compilers for TPUs and GPUs need none.

`devices_of("v5e:16x16")` describes a pod slice, `devices_of("h100:8")` a host with
eight GPUs, and `jax.jit(f).lower(…).compile()` on their mesh gives the program that
would run there. It cannot be run.
"""

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from implicit_slots.runtime.errors import UserError

HERE = "here"


class Chip(NamedTuple):
    """What its maker says of a device.

    Attributes:
      memory: bytes.
      bandwidth: bytes a second to and from that memory.
      bfloat16: operations a second in bfloat16 products.
      float32: the same in what JAX's default precision does to float32: one bfloat16
        pass on a TPU, TF32 on a GPU.
      clock: cycles a second, of a TPU; None where it is not known.
    """

    memory: float
    bandwidth: float
    bfloat16: float
    float32: float
    clock: float | None = None


# cloud.google.com/tpu/docs: v5e, v5p, v6e.
TPUS: Mapping[str, Chip] = {
    "v5e": Chip(16e9, 0.819e12, 197e12, 197e12, 1.5e9),
    "v5p": Chip(95e9, 2.765e12, 459e12, 459e12, 1.75e9),
    "v6e": Chip(32e9, 1.64e12, 918e12, 918e12),
}
# NVIDIA's data sheets, SXM, without sparsity.
GPUS: Mapping[str, Chip] = {
    "a100": Chip(80e9, 2.039e12, 312e12, 156e12),
    "h100": Chip(80e9, 3.35e12, 989e12, 495e12),
    "h200": Chip(141e9, 4.8e12, 989e12, 495e12),
}
# XLA's GpuTargetConfigProto: shared memory of a core and of a block that asks for it,
# cores, second-level cache, clock in GHz, compute capability, name.
_GPU_TARGETS = {
    "a100": (167936, 166912, 108, 41943040, 1.41, (8, 0), "NVIDIA A100-SXM4-80GB"),
    "h100": (233472, 232448, 132, 52428800, 1.98, (9, 0), "NVIDIA H100 80GB HBM3"),
    "h200": (233472, 232448, 132, 62914560, 1.98, (9, 0), "NVIDIA H200"),
}
_TARGET = """\
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {per_core}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: {per_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
_CUDA = ("xla_cuda13", "xla_cuda12")
EXAMPLES = "v5e:2x4, v5e:16x16, v5p:2x2x2, h100, h100:8, h200, a100, here"


class Topology(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: as the user gave it.
      devices: JAX's, or descriptions of them.
      chip: what its maker says; None where it is not known.
      platform: "tpu", "gpu" or "cpu".
    """

    name: str
    devices: list[Any]
    chip: Chip | None
    platform: str


def prepare(name: str) -> None:
    """Sets what must be set before JAX starts, to compile for devices elsewhere.

    Args:
      name: see `devices_of`.
    """
    if name == HERE:
        return
    # No look-out for devices, nor for the TPU's metadata server. JAX, which is imported
    # by now, no longer reads its variable; processes that are started do.
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Any that there are: libtpu warns in many lines of what it cannot find out.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Two that compile at a time do not want the same TPU: they want none.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Libraries that ask the driver for their version, which is not there.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    # Without a GPU nothing is tuned, and Triton's untuned tiles fail.
    flag = "--xla_gpu_enable_triton_gemm=false"
    if "xla_gpu_enable_triton_gemm" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def devices_of(name: str, slices: int = 1) -> Topology:
    """Returns the devices of a name.

    Args:
      name: a TPU generation and its slice ("v5e:16x16"), a GPU and how many of them
        ("h100", "h100:8"), or "here".
      slices: of a TPU, joined by the data centre's network; of GPUs, hosts.

    Raises:
      UserError: an unknown name, a slice that the compiler does not know, or a compiler
        that is not installed.
    """
    if slices < 1:
        raise UserError(f"--slices must be positive, got {slices}")
    if name == HERE:
        if slices > 1:
            raise UserError("--slices is for devices elsewhere: set --topology too")
        devices = jax.devices()
        return Topology(name, devices, None, devices[0].platform)
    kind, _, shape = name.lower().partition(":")
    if kind in TPUS:
        return _tpus(name, kind, shape, slices)
    if kind in GPUS:
        return _gpus(name, kind, shape, slices)
    raise UserError(
        f"there is no topology {name!r}; --topology is one of "
        f"{', '.join((*TPUS, *GPUS))}, with how many: {EXAMPLES}"
    )


def _tpus(name: str, kind: str, shape: str, slices: int) -> Topology:
    axes, example = (3, "2x2x1") if kind == "v5p" else (2, "2x4")
    if not re.fullmatch(rf"\d+(x\d+){{{axes - 1}}}", shape):
        raise UserError(
            f"--topology={name} lacks the slice's shape, {axes} numbers such as "
            f"{kind}:{example}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"to compile for {name} libtpu is needed, not a TPU; "
            "pip install 'implicit_slots[tpu]'"
        )
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if set(shape) == set("1x"):
        more["chips_per_host_bounds"] = (1, 1, 1)  # else four or more
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **more
        )
    except Exception as error:
        raise UserError(
            f"the TPU's compiler knows no {name}: {_last_line(error)}; "
            "see https://cloud.google.com/tpu/docs for the slices that there are"
        ) from error
    name += f", {slices} slices" if slices > 1 else ""
    return Topology(name, list(found.devices), TPUS[kind], "tpu")


def _gpus(name: str, kind: str, shape: str, hosts: int) -> Topology:
    count = shape or "1"
    if not count.isdecimal() or not int(count):
        raise UserError(
            f"--topology={name} must end in a number of GPUs, such as {kind}:8"
        )
    plugins = (f"jax_plugins.{plugin}" for plugin in _CUDA)
    if not any(_is_there(plugin) for plugin in plugins):
        raise UserError(
            f"to compile for {name} JAX's CUDA plugin is needed, not a GPU; "
            "pip install 'implicit_slots[cuda]'"
        )
    chip = GPUS[kind]
    per_core, per_block, cores, cache, clock, (major, minor), title = _GPU_TARGETS[kind]
    target = _TARGET.format(
        per_core=per_core,
        per_block=per_block,
        cores=cores,
        units=64 if kind == "a100" else 128,
        bandwidth=int(chip.bandwidth),
        cache=cache,
        clock=clock,
        memory=int(chip.memory),
        major=major,
        minor=minor,
        name=title,
    )
    try:
        found = topologies.get_topology_desc(
            "gpu", "cuda", target_config=target, topology=f"1x{hosts}x{count}"
        )
    except Exception as error:
        raise UserError(
            f"the GPU's compiler cannot be asked for {name}: {_last_line(error)}"
        ) from error
    name += f", {hosts} hosts" if hosts > 1 else ""
    return Topology(name, list(found.devices), chip, "gpu")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].rstrip(".")
