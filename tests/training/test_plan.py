"""`--mode=plan`: what it says is what the program and the run have."""

import importlib.util

import jax
import numpy as np
import pytest

from configs import scenes, set_prediction_scenes
from implicit_slots.models.build import model_class
from implicit_slots.runtime import topologies
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.programs import Kernel
from implicit_slots.runtime.topologies import Chip, Topology, devices_of
from implicit_slots.training import plan
from implicit_slots.training.parts import build_parts
from implicit_slots.training.precompile import batch_shapes


@pytest.mark.parametrize("file", [scenes, set_prediction_scenes])
def test_a_planned_batch_is_that_of_the_data(file):
    """Shapes, types and places of all that the model reads."""
    config = file.get_config("smoke")
    config.data.cache = ""
    parts = build_parts(config, "train")
    assert parts.train is not None
    real = batch_shapes(parts.train, config.batch_size, parts.mesh)
    planned = plan.train_batch(config, parts.mesh)
    assert set(planned) == set(model_class(config.model.name).reads)
    for name, shapes in planned.items():
        there = real[name]
        if isinstance(there, dict):
            there = {key: there[key] for key in shapes}
        assert shapes == there


@pytest.fixture(scope="module")
def planned():
    config = scenes.get_config("smoke")
    return plan.make(config, devices_of("here"))


def test_what_it_holds_is_what_a_step_takes(planned):
    """Parameters, two moments for each that is trained, and a batch."""
    four = 4 * planned.parameters
    assert planned.holds["parameters"] == four
    codebook = 4 * (16 * 48 + 16)
    assert planned.holds["optimiser"] == pytest.approx(2 * (four - codebook), rel=0.01)
    config = planned.config
    assert planned.holds["batch"] == config.batch_size * config.data.resolution**2 * 3
    assert planned.holds["temporaries"] > 0
    assert planned.memory == sum(planned.holds.values())
    assert planned.launched > 100 and planned.moved > planned.holds["parameters"]


def test_it_is_said_in_lines_with_what_a_chip_allows(planned):
    chip = Chip(memory=1e9, bandwidth=1e9, bfloat16=1e9, float32=1e9)
    there = planned._replace(
        topology=planned.topology._replace(name="chip", chip=chip),
        kernels=[Kernel("a/add", "models/x.py:1 f", "fusion", 1_500_000, 3_000_000, 2)],
    )
    text = plan.describe(there)
    assert "scenes-smoke on chip: 1 cpu device(s), 8 image(s) each" in text
    assert "of 1 GB (0%): fits" in text
    assert "2 kernels that read and write 3 MB: at least 3 ms" in text
    assert "6 million cycles" in text
    assert "3 MB  models/x.py:1 f" in text
    small = chip._replace(memory=planned.memory / 4)
    text = plan.describe(there._replace(topology=there.topology._replace(chip=small)))
    ways = "--config.precision=bfloat16, --config.model.remat=True"
    # Four times the memory, of which nine tenths may be filled.
    assert f"not fit: try {ways}, --config.accumulate=8, or more devices" in text
    both = planned.topology._replace(devices=2 * planned.topology.devices)
    assert "--config.sharding=fsdp, or more" in plan.advice(planned.config, both)


def test_batches_that_divide():
    config = scenes.get_config("smoke")
    config.batch_size = 50
    config.accumulate = 2
    assert plan.fitting_batches(config, 4) == [40, 48, 56, 64]
    with pytest.raises(UserError, match="batch_size to a positive multiple of 8"):
        plan.make(
            config, Topology("four", np.tile(jax.devices(), 4).tolist(), None, "")
        )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("v5", "there is no topology 'v5'; --topology is one of v5e, v5p"),
        ("v5e", "lacks the slice's shape, 2 numbers such as v5e:2x4"),
        ("v5e:16", "lacks the slice's shape"),
        ("v5e:4x4x4", "lacks the slice's shape, 2 numbers such as v5e:2x4"),
        ("v5p:2x2", "lacks the slice's shape, 3 numbers such as v5p:2x2x1"),
        ("h100:many", "must end in a number of GPUs, such as h100:8"),
        ("h100:0", "must end in a number of GPUs"),
    ],
)
def test_a_name_that_is_none_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        devices_of(name)
    assert sentence in str(error.value)
    with pytest.raises(UserError, match="--slices must be positive, got 0"):
        devices_of("v5e:2x4", slices=0)
    with pytest.raises(UserError, match="--slices is for devices elsewhere"):
        devices_of("here", slices=2)


@pytest.mark.parametrize(
    ("name", "extra"), [("v5e:2x4", "tpu"), ("h100", "cuda"), ("a100:8", "cuda")]
)
def test_a_compiler_that_is_not_there_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"pip install 'implicit_slots\[{extra}\]'"):
        devices_of(name)


def test_what_must_be_set_before_jax_starts_is_set(monkeypatch):
    alone = "ALLOW_MULTIPLE_LIBTPU_LOAD"
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", alone):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv(alone)
    topologies.prepare("here")
    assert topologies.os.environ["JAX_PLATFORMS"] == ""
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    topologies.prepare("h100")
    assert topologies.os.environ["JAX_PLATFORMS"] == "cpu"
    assert jax.config.jax_platforms == "cpu"  # pyright: ignore
    assert topologies.os.environ["XLA_FLAGS"].startswith("--xla_dump_to=x --xla_gpu")
    assert topologies.os.environ[alone] == "1"


def test_too_little_memory_says_what_to_set(tmp_path):
    config = scenes.get_config()
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 GB\nmore")
    assert plan.out_of_memory(error, config, tmp_path) == (
        "there is not enough memory (RESOURCE_EXHAUSTED: Out of memory: 9 GB); try "
        "--config.precision=bfloat16, --config.model.remat=True, "
        "--config.accumulate=2, or more devices, or a smaller "
        "--config.batch_size; --mode=plan says what a step needs before it runs; "
        "another batch_size or accumulate takes another --workdir, all else resumes "
        f"{tmp_path}"
    )
    config.precision, config.model.remat, config.accumulate = "bfloat16", True, 4
    said = plan.out_of_memory(MemoryError(), config, tmp_path)
    start = "there is not enough memory (MemoryError); try --config.accumulate=8, or m"
    assert said.startswith(start)
