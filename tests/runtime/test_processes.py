"""How processes find each other, and what is refused before they wait."""

import json
import os
import socket
import subprocess
import sys

import pytest

from implicit_slots.runtime import processes
from implicit_slots.runtime.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
TPU = {"TPU_ML_PLATFORM": "JAX"}

# Run by each of two processes: what it is told, and what they agree on.
PROGRAM = """
import json, sys
from implicit_slots.runtime import processes
from implicit_slots.runtime.errors import UserError
address, index = sys.argv[1], int(sys.argv[2])
told = processes.initialize(coordinator=address, count=2, index=index, timeout=60)
processes.barrier("both are here")
try:
    with processes.together():
        if index:
            raise UserError("process 1 fails")
except UserError as error:
    failure = str(error)
answers = [processes.agree(True), processes.agree(index == 0), processes.is_main()]
# Process 1 sees another file system: it sees fewer checkpoints, or more.
answers += [processes.of_main(seen[index]) for seen in ([[20, 10], [10]], [[], [5]])]
processes.say("said once")
print(json.dumps([told, answers, failure]), flush=True)
if index:
    processes.leave("error: left")
try:
    processes.barrier("never reached by both")
except Exception as error:
    assert processes.lost_another(error) and not processes.lost_another(ValueError())
    processes.leave("error: the other one left")
"""

FAILURES = ["another process of this run stopped; it says why", "process 1 fails"]

LONELY = """
import sys
from implicit_slots.runtime import processes
from implicit_slots.runtime.errors import UserError
try:
    processes.initialize(coordinator=sys.argv[1], count=2, index=1, timeout=1)
except UserError as error:
    processes.leave(f"error: {error}")
"""


def free_address():
    """A host and port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(program, *arguments):
    """A process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),
        (SLURM, "SLURM"),
        # A single task; a job's own script; a shell in a job of several tasks.
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (OPEN_MPI, "Open MPI"),
        (OPEN_MPI | SLURM, "Open MPI"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (POD, None),
        (POD | {"JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU"),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, None),
        (TPU | POD | {"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, "Cloud TPU"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "Cloud TPU"),
    ],
)
def test_only_one_of_several_is_in_a_cluster(environment, cluster):
    assert processes.find_cluster(environment) == cluster


@pytest.mark.parametrize(("hosts", "cluster"), [("a,b", "Cloud TPU"), ("a", None)])
def test_a_tpu_machine_asks_for_its_pod(monkeypatch, hosts, cluster):
    monkeypatch.setattr(processes, "_tpu_hosts", lambda: hosts)
    assert processes.find_cluster(TPU) == cluster


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        # Tasks that see all devices of the host take one each, as JAX has it.
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        # One task on each host, or devices of its own.
        (SLURM | {"SLURM_STEP_NUM_NODES": "4"}, []),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, []),
        (SLURM | {"SLURM_GPUS_PER_TASK": "2"}, []),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        ({}, []),
    ],
)
def test_a_process_takes_the_devices_that_are_its_own(environment, devices):
    assert processes._own_devices(environment) == devices


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"coordinator": "a:1"}, "--num_processes and --process_index are missing"),
        ({"coordinator": "a:1", "count": 2}, "--process_index is missing"),
        ({"count": 2, "index": 0}, "--coordinator is missing"),
        ({"coordinator": "a", "count": 2, "index": 0}, "must be HOST:PORT"),
        ({"mode": "on"}, "pass --coordinator=HOST:PORT"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "cannot find each other"),
    ],
)
def test_what_cannot_work_is_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        processes.initialize(**given)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="another port in --coordinator"):
            processes.initialize(coordinator=address, count=2, index=0)


def test_a_coordinator_of_the_environment_needs_the_rest(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    with pytest.raises(UserError, match="--num_processes and --process_index"):
        processes.initialize()
    assert processes.initialize("off") == ""


def test_a_process_alone_waits_for_nobody():
    assert processes.initialize() == ""
    assert processes.is_main()
    processes.barrier("alone")
    assert processes.agree(True)
    assert not processes.agree(False)
    with pytest.raises(UserError, match="mine"), processes.together():
        raise UserError("mine")
    with pytest.raises(SystemExit, match="error: left"):
        processes.leave("error: left")


@pytest.mark.slow
def test_two_processes_agree_and_neither_waits_for_one_that_left():
    address = free_address()
    started = [start(PROGRAM, address, str(index)) for index in range(2)]
    ended = [process.communicate(timeout=120) for process in started]
    for index, (output, errors) in enumerate(ended):
        lines = [line for line in output.splitlines() if "[Gloo]" not in line]
        told, answers, failure = json.loads(lines[-1])
        assert told == f"process {index} of 2"
        assert answers == [True, False, index == 0, [20, 10], []]
        assert failure == FAILURES[index]
        assert lines[:-1] == ["said once"][index:]
        assert started[index].returncode == 1, errors
    assert "error: the other one left" in ended[0][1]
    assert "error: left" in ended[1][1]


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer_is_one_sentence():
    process = start(LONELY, free_address())
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip().endswith("--distributed=off")
    assert "did not answer in 1 s" in errors
