"""The benchmarks run, and what they count and write is what they say."""

import functools
import json
import math
import os

import jax
import pytest
from flax import nnx

from experiments.benchmarks import (
    accelerator_programs,
    harness,
    memory,
    sampling,
    train_step,
    train_step_floor,
)
from experiments.benchmarks.contestants import Bench, Contestant, alternate, compete
from experiments.benchmarks.harness import CONFIGURATIONS
from implicit_slots.models.build import build, split_model
from implicit_slots.runtime.errors import UserError
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import initial_state
from implicit_slots.training.step import build_steps


def written(out, capsys, name: str | None = "tiny"):
    """The numbers of OUT.json; OUT.md was printed."""
    table = (out.parent / f"{out.name}.md").read_text()
    assert table in capsys.readouterr().out
    numbers = json.loads((out.parent / f"{out.name}.json").read_text())
    assert numbers["versions"]["jax"] == jax.__version__
    assert numbers["hardware"]["cores"] >= 1 and numbers["hardware"]["cpu"]
    return numbers["results"][name] if name else numbers["results"], table


@pytest.mark.slow
def test_train_step(tmp_path, capsys):
    out = tmp_path / "v1.5"
    sizes = "--configurations=tiny --adjoints=implicit --rounds=2 --steps=3".split()
    train_step.main([f"--out={out}", *sizes], isolate=False)
    result, table = written(out, capsys)
    ours = result["contestants"]["ours, implicit"]
    assert [len(turn) for turn in ours["seconds"]["turns"]] == [3, 3]
    low, high = ours["seconds"]["quartiles"]
    assert 0 < low <= ours["seconds"]["median"] <= high
    assert f"| {harness.rounded(1e3 * ours['seconds']['median'])} (" in table
    # The share of the floor: no step is faster.
    assert 0 < ours["floor_seconds"] < ours["seconds"]["median"]
    assert ours["facts"]["xla"]["temporary_bytes"] > 0
    assert ours["ratios"] == {}


@pytest.mark.slow
def test_sampling(tmp_path, capsys):
    sizes = "--configurations=tiny --batch=3 --rounds=2 --steps=2".split()
    sampling.main([f"--out={tmp_path / 's'}", *sizes], isolate=False)
    result, table = written(tmp_path / "s", capsys)
    assert "batch 3" in result["sizes"]
    assert len(result["contestants"]) == 2
    for name, values in result["contestants"].items():
        tokens = values["tokens_per_second"] * values["seconds"]["median"]
        assert tokens == pytest.approx(3 * 16)
        assert f"| {name} |" in table


@pytest.mark.slow
def test_accelerator_programs(tmp_path, capsys, monkeypatch):
    """One that cannot be compiled costs its row alone."""
    made = accelerator_programs.train_step

    def train_step(config, topology):
        if config.precision == "float32":
            raise ValueError("too large\nfor these devices")
        return made(config, topology)

    monkeypatch.setattr(accelerator_programs, "train_step", train_step)
    names = "h100", "h100-float32", "generation-h100"
    accelerator_programs.main(
        [f"--out={tmp_path / 'a'}", f"--programs={','.join(names)}", "--tiny"],
        isolate=False,
    )
    results, table = written(tmp_path / "a", capsys, None)
    assert list(results) == list(names)
    assert results["h100-float32"] == {"error": "too large"}
    assert "| h100-float32 | too large |" in table
    step, tokens = results["h100"], results["generation-h100"]
    for found in (step, tokens):
        assert found["topology"] == "here" and found["devices"] == 1
        assert f"| {found['kernels']:,} |" in table
        assert sum(moved for _, moved in found["largest"]) < found["bytes"]
        assert 0 < found["memory"] and 0 < found["flops"]
    # The tokens of a 16x16 image; no token is made without reading all weights.
    assert tokens["tokens"] == 16
    assert tokens["bytes"] / tokens["tokens"] > tokens["weights"] > tokens["cache"]


@pytest.mark.slow
def test_memory(tmp_path, capsys):
    sizes = "--configurations=tiny --iterations=15,3".split()
    adjoints = "neumann 1", "unrolled"
    memory.main(
        [f"--out={tmp_path / 'm'}", f"--adjoints={';'.join(adjoints)}", *sizes],
        isolate=False,
    )
    result, table = written(tmp_path / "m", capsys)
    assert (tmp_path / "m.png").stat().st_size > 3_000
    rows = {(row["adjoint"], row["iterations"]): row for row in result["rows"]}
    assert list(rows) == [(name, count) for name in adjoints for count in (3, 15)]
    # Under the iterations in order.
    assert "temporary MB, at iterations | 3 | 15 |" in table
    few, many = (rows["neumann 1", count]["temporary_bytes"] for count in (3, 15))
    assert many < 1.5 * few
    few, many = (rows["unrolled", count]["temporary_bytes"] for count in (3, 15))
    assert many > 2 * few


@pytest.mark.parametrize("adjoint", memory.ADJOINTS)
def test_every_adjoint_of_the_memory_table_can_be_built(adjoint):
    def build():
        return memory.build_slots(CONFIGURATIONS["tiny"], adjoint, 5, "float32")

    slots = nnx.eval_shape(build)
    assert slots.solver.max_steps == 5 and slots.num_slots == 3


@pytest.mark.slow
def test_flops_are_those_of_the_traced_step():
    configuration = CONFIGURATIONS["b"]
    traced, counted = {}, {}
    for adjoint in train_step.ADJOINTS:
        config = harness.build_config(configuration, adjoint=adjoint)
        graphdef, params = split_model(nnx.eval_shape(lambda c=config: build(c)))
        optimizer = build_optimizer(
            config.optimizer, params, num_steps=config.num_steps
        )
        train = build_steps(graphdef, optimizer, config).train
        state = jax.eval_shape(
            functools.partial(
                initial_state, optimizer=optimizer, config=config.optimizer
            ),
            params,
        )
        image = jax.ShapeDtypeStruct((16, 64, 64, 3), "uint8")
        program = train.trace(state, {"image": image}).jaxpr
        traced[adjoint] = 2 * multiply_adds(program.jaxpr)
        counted[adjoint] = train_step_floor.count_flops(configuration, adjoint)
        assert counted[adjoint] == pytest.approx(traced[adjoint], rel=0.05)
    # Three iterations forward and back, against four and one.
    difference = counted["vanilla"] - counted["implicit"]
    assert difference == pytest.approx(traced["vanilla"] - traced["implicit"], rel=0.2)


def test_floor():
    configuration, parameters = CONFIGURATIONS["paper"], 10_000_000
    slow, fast = (
        train_step_floor.least_bytes(configuration, parameters, precision)
        for precision in harness.PRECISIONS
    )
    assert 44 * parameters < fast < slow
    h200 = {"device": "NVIDIA H200"}
    floor = train_step_floor.floor_seconds
    # By arithmetic, by bandwidth, by a measured product, unknown.
    assert floor(494e9, 0, h200, "float32") == pytest.approx(1e-3)
    assert floor(989e9, 0, h200, "bfloat16") == pytest.approx(1e-3)
    assert floor(1, 4.8e9, h200, "float32") == pytest.approx(1e-3)
    assert floor(5, 1, {"device": "cpu", "matmul_flops": 10.0}, "float32") == 0.5
    assert floor(1, 1, {"device": "abacus"}, "float32") is None


def multiply_adds(jaxpr) -> int:
    """Of every product in a program, loops of known length included."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(equation.params):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * multiply_adds(inner)
        size = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "dot_general":
            left = equation.invars[0].aval.shape
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += size * math.prod(left[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            total += size * math.prod(kernel) // kernel[outputs]
    return total


def build_counting(limit: int) -> Bench:
    """Counts its steps, and ends its process after the limit."""
    if limit < 1:
        raise UserError("the limit must be at least 1")
    steps = []

    def step():
        steps.append(0)
        if len(steps) > limit:
            os._exit(1)

    facts = {"process": os.getpid(), **os.environ}
    return Bench(step, lambda _: None, facts, lambda: len(steps), chained=False)


@pytest.mark.slow
def test_contestants_have_processes_of_their_own():
    ours = Contestant("ours", build_counting, 2, steps=1)
    assert ours.facts["process"] != os.getpid()
    assert ours.facts["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    turns = alternate([ours], rounds=2, pause=0)
    assert [len(turn) for turn in turns["ours"]] == [1, 1]
    with pytest.raises(UserError, match="the process of 'ours' died"):
        ours.turn()


def test_turns_alternate_and_are_compared_within_a_round():
    order = []

    def build(name, chained):
        return Bench(lambda: order.append(name), str, {}, lambda: None, chained)

    pair = [
        Contestant(name, build, name, chained, steps=2, isolate=False)
        for name, chained in (("one", False), ("two", True))
    ]
    turns = alternate(pair, rounds=2, pause=0)
    assert order == ["one"] * 2 + ["two"] * 4 + ["one"] * 2
    # Chained steps are timed together.
    assert [len(turn) for turn in turns["one"] + turns["two"]] == [2, 2, 1, 1]
    assert [contestant.close() for contestant in pair] == [None, None]

    ratio = harness.ratio([[1, 2, 9], [4]], [[4], [8, 16, 16]])
    assert ratio == {"median": 0.375, "low": 0.25, "high": 0.5}
    spread = harness.spread([[1, 2], [3]])
    assert spread["median"] == 2 and spread["quartiles"] == [1.5, 2.5]


@pytest.mark.parametrize("script", [train_step, sampling, memory])
def test_what_is_missing_is_one_sentence(script, tmp_path):
    with pytest.raises(UserError, match=r"holds no slate\.py; check out"):
        script.main([f"--official={tmp_path}"])
    with pytest.raises(UserError, match="--configurations must be some of a, b, c,"):
        script.main(["--configurations=a,z"])


def test_different_devices_are_not_compared():
    def build(platform):
        facts = {"platform": platform}
        return Bench(lambda: None, str, facts, lambda: None, chained=False)

    pair = [
        Contestant(name, build, name, steps=1, isolate=False) for name in ("cpu", "gpu")
    ]
    with pytest.raises(UserError, match="different devices: cpu on cpu, gpu on gpu"):
        compete(pair, rounds=1)
