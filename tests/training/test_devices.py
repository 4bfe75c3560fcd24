"""One run, whatever it runs on: devices, processes, shardings."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from configs import scenes
from implicit_slots.runtime import devices as mesh_devices
from implicit_slots.runtime.metric_writers import read_metrics
from implicit_slots.training import plan
from implicit_slots.training.parts import build_parts
from implicit_slots.training.pretrained import load
from implicit_slots.training.run import run

pytestmark = pytest.mark.slow  # several real processes

HERE = pathlib.Path(__file__).parent
# Relative, of losses: sums over the batch are added up in another order.
TOLERANCE = 1e-5


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(devices):
    flags = os.environ["XLA_FLAGS"]
    flags += f" --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join(str(HERE.parents[n]) for n in (0, 1))
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": path,
    }


def steps_on_devices(count, devices, layouts):
    """What each process of steps_on_devices.py found."""
    port = free_port()
    started = [
        subprocess.Popen(
            [
                *[sys.executable, HERE / "steps_on_devices.py"],
                *[str(number) for number in (index, count, port)],
                *layouts,
            ],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    found = []
    for process in started:
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
        found.append(json.loads(output.splitlines()[-1]))
    return found


@pytest.fixture(scope="module")
def single():
    whole = [f"{devices}/replicated/1" for devices in (1, 2, 4, 8)]
    layouts = [*whole, "4/fsdp/1", "1/replicated/2", "4/fsdp/2"]
    (found,) = steps_on_devices(1, 8, layouts)
    return found


def assert_same_losses(found, wanted):
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=TOLERANCE)


@pytest.mark.parametrize(
    "layout", ["2/replicated/1", "4/replicated/1", "8/replicated/1", "4/fsdp/1"]
)
def test_losses_do_not_depend_on_the_devices(single, layout):
    assert_same_losses(single[layout], single["1/replicated/1"])


def test_losses_of_parts_do_not_depend_on_the_devices(single):
    assert_same_losses(single["4/fsdp/2"], single["1/replicated/2"])
    other = np.subtract(
        single["1/replicated/2"]["losses"], single["2/replicated/1"]["losses"]
    )
    assert np.abs(other).min() > 0.02  # Parts have noise of their own.


def test_fully_sharded_arrays_are_split(single):
    assert single["8/replicated/1"]["split"] == 0
    assert single["4/fsdp/1"]["split"] > 50


def test_a_step_sends_the_gradient_and_gathered_parameters_alone(single):
    """In units of the parameters' bytes; no activation goes from device to device.

    A ring of n devices sends 2·(n − 1)/n for the sum of the gradient, and half of that
    to gather the parameters.
    """
    assert single["1/replicated/1"]["sent"] == 0
    for devices in (2, 4, 8):
        ring = 2 * (devices - 1) / devices
        sent = single[f"{devices}/replicated/1"]["sent"]
        # 2,880 numbers more: the dVAE's last kernel is summed as it is used, sixteen
        # times its size.
        assert sent == pytest.approx(ring, rel=0.035)
    assert 1.5 * 0.7 < single["4/fsdp/1"]["sent"] < 1.5 * 1.5 * 1.035


def partitioned_in_bfloat16(folder: str) -> None:
    """What a process with two devices does: writes the program of a step by layout."""
    mesh_devices.SMALLEST_SPLIT = 64
    for layout in ("replicated", "fsdp"):
        config = scenes.get_config("tokens-smoke")
        config.update(precision="bfloat16", sharding=layout, batch_size=4)
        parts = build_parts(config, "plan")
        given = parts.state_shapes(), plan.train_batch(config, parts.mesh)
        # As XLA splits it, before a CPU's compiler makes float32 of all sums.
        wanted = {"xla_dump_hlo_pass_re": "^spmd-partitioning$"}
        written = {"xla_dump_to": f"{folder}/{layout}"} | wanted
        parts.steps.train.trace(*given).lower().compile(written)


def test_gradients_are_summed_over_devices_in_float32(tmp_path):
    call = f"import test_devices as t; t.partitioned_in_bfloat16({str(tmp_path)!r})"
    around = environment(2)
    around["PYTHONPATH"] += f"{os.pathsep}{HERE}"
    subprocess.run([sys.executable, "-c", call], env=around, check=True)
    for layout in ("replicated", "fsdp"):
        (file,) = (tmp_path / layout).glob("*.after_spmd-partitioning.*")
        program = file.read_text()
        assert "bf16" in program
        sums = re.findall(r" = (.*) (?:all-reduce|reduce-scatter)\(", program)
        sums = re.findall(r"\b([a-z]+\d+)\[", " ".join(sums))
        assert len(sums) > 100 and set(sums) == {"f32"}


def lowered_for_gpus() -> None:
    """What a process with two devices does: hands a step to a GPU's compiler."""
    config = scenes.get_config("tokens-smoke")
    config.update(precision="bfloat16", batch_size=4)
    config.model.update(dropout=0.1, attention_dropout=0.1)
    parts = build_parts(config, "plan")
    given = parts.state_shapes(), plan.train_batch(config, parts.mesh)
    with mesh_devices.traced_for("gpu"):
        traced = parts.steps.train.trace(*given)
    print(traced.lower(lowering_platforms=("cuda",)).as_text())


def test_kernels_are_split_over_gpus():
    """XLA takes the rules by which they are."""
    around = environment(2)
    around["PYTHONPATH"] += f"{os.pathsep}{HERE}"
    call = "import test_devices as t; t.lowered_for_gpus()"
    command = [sys.executable, "-c", call]
    done = subprocess.run(
        command, env=around, check=True, stdout=subprocess.PIPE, text=True
    )
    rules = re.findall(r"op_sharding_rule<\(\[i, .*? need_replication=", done.stdout)
    # Attention twice, cross-entropy and relaxed tokens, there and back.
    assert len(rules) >= 8


def test_four_processes_train_as_one(single):
    """And all of them know the same."""
    found = steps_on_devices(4, 1, ["4/replicated/1"])
    assert all(process == found[0] for process in found)
    assert_same_losses(found[0]["4/replicated/1"], single["1/replicated/1"])


def two_processes(*arguments, devices=1, each=lambda index: []):
    """Starts a run of two processes; `each` gives arguments of one alone."""
    port = free_port()
    return [
        subprocess.Popen(
            [
                *[sys.executable, "-m", "implicit_slots.main", *arguments],
                *each(index),
                *[f"--coordinator=localhost:{port}", "--num_processes=2"],
                f"--process_index={index}",
            ],
            cwd=HERE.parents[1],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


@pytest.fixture(scope="module")
def preempted(tmp_path_factory):
    """The workdir of two processes, of which one was told to stop; what they said."""
    workdir = tmp_path_factory.mktemp("runs") / "preempted"
    processes = two_processes(
        *["--config=configs/scenes.py:tokens-smoke", "--config.data.cache="],
        *["--config.sharding=fsdp", f"--workdir={workdir}"],
        devices=2,
    )
    first = []
    output = processes[0].stdout
    assert output is not None
    for line in output:
        first.append(line)
        if line.startswith("first step done"):
            # The next thing is to draw, and to compile that takes long enough.
            processes[1].send_signal(signal.SIGTERM)
            break
    said = [process.communicate(timeout=400) for process in processes]
    codes = [process.returncode for process in processes]
    return workdir, codes, "".join(first) + said[0][0], said


def test_sigterm_to_one_process_saves_and_ends_all(preempted):
    workdir, codes, _, said = preempted
    assert codes == [75, 75], said
    (step,) = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
    assert 1 <= step < 20
    assert f"told to stop: saved at step {step}; the same command" in said[0][1]


def test_one_process_writes(preempted):
    workdir, _, first, said = preempted
    assert "4 cpu device(s) of 2 processes" in first
    assert "parameters" not in said[1][0] and "step" not in said[1][0]
    assert (workdir / "parameters.txt").read_text().count("| Name") == 1


def test_another_number_of_devices_goes_on(preempted, smoke_run):
    """Two processes of two devices began; one device ends as if it had done it all."""
    workdir = preempted[0]
    config = scenes.get_config("tokens-smoke")
    config.data.cache = ""
    with contextlib.chdir(HERE.parents[1]):
        summary = run(config, workdir)
    reference, wanted = smoke_run
    for ours, theirs in zip(
        read_metrics(workdir), read_metrics(reference), strict=True
    ):
        assert (ours["step"], ours["split"]) == (theirs["step"], theirs["split"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)
    for name in ("validation/loss", "validation/mse", "validation/cross_entropy"):
        assert summary[name] == pytest.approx(wanted[name], rel=TOLERANCE)


def test_different_commands_are_refused(tmp_path):
    """They would wait for each other, or train something else."""
    processes = two_processes(
        *["--config=configs/scenes.py:smoke", f"--workdir={tmp_path / 'run'}"],
        each=lambda index: [f"--config.seed={index}"],
    )
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 1
        assert "error: the processes of this run have different" in errors
    assert not (tmp_path / "run").exists()


def test_two_processes_have_the_codes_of_one(tmp_path):
    changes = {"num_steps": 2, "validate_every": 2, "draw_every": 2}
    changes |= {"log_every": 2, "checkpoint_every": 2}
    processes = two_processes(
        *["--config=configs/scenes.py:smoke", "--config.data.cache="],
        *[f"--config.{name}={value}" for name, value in changes.items()],
        f"--workdir={tmp_path / 'both'}",
    )
    said = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    config = scenes.get_config("smoke")
    config.data.cache = ""
    config.update(changes)
    run(config, tmp_path / "alone")
    with contextlib.chdir(HERE.parents[1]):
        both, alone = (
            np.asarray(load(tmp_path / name)[1].dvae.codes[...])
            for name in ("both", "alone")
        )
    assert np.array_equal(both, alone)
