"""Several processes of one run: how they find each other, agree, wait and end."""

import contextlib
import os
import socket
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from implicit_slots.runtime.errors import UserError

# A process that is gone is missed after so many seconds, and the others end. Beats come
# from a thread of C++, which neither a long compilation nor Python's lock holds up.
HEARTBEAT_SECONDS = 20
# Only a wait longer than this is worth a line.
PATIENCE_SECONDS = 15
FLAGS = "--coordinator=HOST:PORT --num_processes=N --process_index=I"

# Whether `initialize` found the others. JAX says so while it is still looking for them.
_connected = False


def is_main() -> bool:
    """Whether this is the one process that prints and writes for all."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, in one process."""
    if is_main():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Waits until every process is here; nothing to do for one alone."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(ok: bool) -> bool:
    """Whether it is ok in every process; all must ask together."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def same(text: str) -> bool:
    """Whether every process has the same text; all must ask together."""
    if jax.process_count() == 1:
        return True
    mine = np.uint32(zlib.crc32(text.encode()))
    return bool(np.all(multihost_utils.process_allgather(mine) == mine))


def of_main(numbers: Sequence[int]) -> list[int]:
    """Returns process 0's numbers, in every process; all must ask together."""
    if jax.process_count() == 1:
        return list(numbers)
    broadcast = multihost_utils.broadcast_one_to_all
    count = int(broadcast(np.int32(len(numbers))))
    mine = np.zeros(count, np.int32)
    if is_main():
        mine[:] = numbers
    return np.asarray(broadcast(mine)).tolist()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails in one process within the context stops all of them after it.

    Raises:
      UserError: if it failed in another process.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if agree(failure is None):
        return
    if failure is None:
        raise UserError("another process of this run stopped; it says why")
    raise failure


def is_connected() -> bool:
    """Whether this is one of several processes that run together."""
    return _connected


def leave(message: str) -> NoReturn:
    """Ends this process with a message and exit code 1, whatever the others do.

    `sys.exit` would wait minutes for them: JAX ends only when all processes do, and
    the others may wait for this one. They notice that it is gone, at the latest after
    `HEARTBEAT_SECONDS`.
    """
    if not _connected:
        sys.exit(message)
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        # Without process 0 JAX aborts the others where they are. Those that stop for
        # the same reason get to say so.
        time.sleep(1)
    os._exit(1)


def lost_another(error: Exception) -> bool:
    """Whether an error only says that another process of this run is gone.

    The connections that it held break, on CPU (Gloo) and GPU (NCCL); JAX has no type
    for that.
    """
    signs = ("Gloo", "closed by peer", "reset by peer", "remote process exited")
    return _connected and any(sign in str(error) for sign in signs)


def initialize(
    mode: str = "auto",
    *,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    timeout: int = 300,
) -> str:
    """Connects this process to the others of its run, before JAX touches a device.

    Args:
      mode: "off": it is the only one. "auto": it is one of several where coordinator,
        count and index say so, or a cluster that `find_cluster` knows. "on": it is one
        of several, and JAX has to find the others.
      coordinator: "host:port" of process 0, which all processes can reach.
      count: how many processes there are.
      index: which of them this is, from 0.
      timeout: seconds to wait for the others.

    Returns:
      What to say of it, such as "process 0 of 4 (SLURM)"; "" for a process alone.

    Raises:
      UserError: if only some of coordinator, count and index are given, or the
        processes do not find each other.
    """
    if mode == "off":
        return ""
    cluster = find_cluster(os.environ)
    if cluster is None:
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = {
        "--coordinator": coordinator,
        "--num_processes": count,
        "--process_index": index,
    }
    missing = [flag for flag, value in given.items() if value is None]
    settings: dict[str, Any]
    if coordinator and not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT")
    if not missing:
        if index == 0:
            _check_free(int(str(coordinator).rpartition(":")[2]))
        # A cluster has no say then, nor in which devices are used.
        settings = {"cluster_detection_method": "deactivate"}
        settings |= {"num_processes": count, "process_id": index}
        settings |= {"coordinator_address": coordinator}
        cluster = None
    elif len(missing) < len(given):
        raise UserError(
            f"one of several processes needs {FLAGS}, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )
    elif cluster or mode == "on":
        settings = {"local_device_ids": _own_devices(os.environ)}
    else:
        return ""
    _connect(settings, timeout)
    if jax.process_count() == 1:
        return ""
    global _connected
    _connected = True
    source = f" ({cluster})" if cluster else ""
    return f"process {jax.process_index()} of {jax.process_count()}{source}"


def find_cluster(environment: Mapping[str, str]) -> str | None:
    """Returns the cluster that started this process as one of several, or None.

    One process alone is none of several, even on a cluster: a job with a single task,
    a shell or a notebook within a larger job, a pod, a TPU with a single host.

    Args:
      environment: the environment variables of the process.
    """

    def number(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() else 0

    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    # A job's own script has SLURM_NTASKS too, but only what srun starts is a task of
    # a step; an interactive shell is a step of a single task in a job of several.
    if "SLURM_STEP_NODELIST" in environment and number("SLURM_NTASKS") > 1:
        if number("SLURM_STEP_NUM_TASKS") != 1:
            return "SLURM"
        return None
    hosts = environment.get(
        "TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", "")
    )
    # JAX sets TPU_ML_PLATFORM when it is imported on a Cloud TPU.
    if not hosts and "TPU_ML_PLATFORM" in environment:
        if "TPU_SKIP_MDS_QUERY" not in environment:
            hosts = _tpu_hosts()
    if "," in hosts or number("MEGASCALE_NUM_SLICES") > 1:
        return "Cloud TPU"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environment):
        return "Kubernetes"
    return None


def _tpu_hosts() -> str:
    """What the metadata server of a Cloud TPU VM says of its pod; "" without one."""
    request = urllib.request.Request(
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
        "worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _check_free(port: int) -> None:
    """Refuses a port that JAX would crash on."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error.strerror}); pass all "
            "processes another port in --coordinator"
        ) from error


def _own_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Returns [] for all devices that this process sees, None to leave it to JAX.

    Under SLURM and Open MPI JAX gives each process the one device of its local rank.
    That wastes devices where a host has one process, and fails where the cluster shows
    each process its own devices only.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    alone = (
        environment["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
        if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment
        else environment.get("SLURM_STEP_NUM_NODES") == environment.get("SLURM_NTASKS")
    )
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    bound = "SLURM_GPUS_PER_TASK" in environment or (len(visible) == 1 and visible[0])
    return [] if alone or bound else None


def _connect(settings: dict[str, Any], timeout: int) -> None:
    """Calls jax.distributed.initialize, and says what is wrong where it does not end.

    JAX aborts the whole process when the others do not answer. It therefore waits in a
    thread of its own, longer than this one does.
    """
    failures: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                **settings,
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(min(PATIENCE_SECONDS, timeout))
    if thread.is_alive() and timeout > PATIENCE_SECONDS:
        print(
            f"waiting up to {timeout} s for the other processes of this run",
            file=sys.stderr,
        )
        thread.join(timeout - PATIENCE_SECONDS)
    if thread.is_alive():
        raise UserError(
            f"the other processes of this run did not answer in {timeout} s; start "
            "all of them with the same coordinator, which each must reach, or this one "
            "alone with --distributed=off"
        )
    if failures:
        raise UserError(
            "the processes of this run cannot find each other "
            f"({str(failures[0]).splitlines()[0]}); pass {FLAGS}, or "
            "--distributed=off to a process alone"
        ) from failures[0]
