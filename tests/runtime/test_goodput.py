"""Where the time of a run goes: the parts add up, over all starts of a workdir."""

import json
import random
import threading

import jax
import numpy as np
import pytest

from implicit_slots.runtime import goodput
from implicit_slots.runtime.compiling import told_of_compiling
from implicit_slots.runtime.goodput import PARTS, Starts, WallTime


class Clock:
    """Seconds that a test makes pass, in fractions that sum without error."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        """Returns them."""
        return self.time


def test_the_parts_add_up_to_the_wall_time_whatever_happens():
    for seed in range(20):
        chance, clock = random.Random(seed), Clock()
        wall = WallTime(clock=clock)

        def happen(depth, chance=chance, clock=clock, wall=wall):
            for _ in range(4):
                clock.time += (passed := chance.randrange(64) / 8)
                match chance.randrange(4):
                    case 0:
                        wall.turn_to(chance.choice([*PARTS]))
                    case 1:
                        wall.move(passed, chance.choice([*PARTS]))
                    case 2 if depth:
                        with wall.part(chance.choice([*PARTS])):
                            happen(depth - 1)

        happen(3)
        assert wall.seconds.keys() == PARTS.keys()
        assert sum(wall.now().values()) == clock.time - wall.began


def test_a_moment_counts_as_the_innermost_part():
    clock = Clock()
    wall = WallTime(90.0, clock)
    clock.time += 1
    wall.turn_to("steps")
    clock.time += 8
    wall.move(3.0, "data_wait")
    with pytest.raises(KeyError), wall.part("validation"):
        clock.time += 16
        wall.compiled(5.0)
        with wall.part("checkpoints"):
            clock.time += 32
        raise KeyError
    clock.time += 64
    wall.turn_to("other")
    clock.time += 128
    assert {name: value for name, value in wall.now().items() if value} == {
        "start": 11,
        "steps": 5 + 64,
        "data_wait": 3,
        "validation": 11,
        "compile": 5,
        "checkpoints": 32,
        "other": 128,
    }


def start(workdir, after, step, parts, *, killed=False):
    """One start of a run: the steps that it made, and seconds of some parts."""
    clock = Clock()
    wall = WallTime(clock=clock)
    starts = Starts(workdir, wall, after, writes=True)
    for part, seconds in parts.items():
        wall.turn_to(part)
        clock.time += seconds
        starts.note(step)
    if not killed:
        starts.write()
    return starts


def test_all_starts_of_a_workdir_add_up_and_repeated_steps_are_known(tmp_path):
    assert start(tmp_path, 0, 150, {"start": 4, "steps": 30}, killed=True).furthest == 0
    # The checkpoint of step 100 is the last.
    second = start(tmp_path, 100, 160, {"start": 2, "repeated": 10, "steps": 2})
    assert second.furthest == 150
    third = start(tmp_path, 160, 200, {"start": 2, "steps": 8, "data_wait": 0.5})
    assert third.furthest == 160
    starts = goodput.read_starts(tmp_path)
    assert [(s["after"], s["step"]) for s in starts] == [
        (0, 150),
        (100, 160),
        (160, 200),
    ]
    assert goodput.repeated_steps(starts) == 50
    again = [{"after": 100, "step": 120}, {"after": 100, "step": 200}]
    assert goodput.repeated_steps([starts[0], *again]) == 20 + 50
    found = goodput.summarised(starts)
    assert {name: value for name, value in found["wall_time"].items() if value} == {
        "steps": 40,
        "start": 8,
        "repeated": 10,
        "data_wait": 0.5,
    }
    assert found["goodput"] == round(40 / 58.5, 4)
    assert goodput.sentence(starts) == (
        "time: 58 s in 3 starts, 50 steps made again: steps 68.4%, repeated 17.1%, "
        "start 13.7%, data wait 0.9%"
    )


def test_the_account_is_written_now_and_then_and_where_a_run_is_stopped(tmp_path):
    clock = Clock()
    starts = Starts(tmp_path, WallTime(clock=clock), 0, writes=True)
    clock.time += goodput.EVERY
    starts.note(1)
    assert goodput.read_starts(tmp_path) == []
    with pytest.raises(KeyError), starts:
        raise KeyError
    assert [s["step"] for s in goodput.read_starts(tmp_path)] == [1]
    clock.time += goodput.EVERY
    starts.note(2)
    clock.time += 1
    starts.note(3)
    starts.note(4)
    (written,) = goodput.read_starts(tmp_path)
    assert (written["step"], written["seconds"]["start"]) == (3, 2 * goodput.EVERY + 1)


def test_other_processes_and_accounts_that_cannot_be_read_stop_nothing(tmp_path):
    silent = Starts(tmp_path, WallTime(), 0, writes=False)
    silent.write()
    assert not (tmp_path / "goodput.json").exists()
    (tmp_path / "goodput.json").write_text("[{")
    assert start(tmp_path, 5, 6, {"steps": 1}).furthest == 0
    assert json.loads((tmp_path / "goodput.json").read_text())[0]["after"] == 5
    Starts(tmp_path / "gone", WallTime(), 0, writes=True).write()


def test_compiling_is_told_to_the_thread_that_waits_for_it():
    told = []

    def compiled(factor):
        jax.jit(lambda x: x * factor)(np.float32(1)).block_until_ready()

    with told_of_compiling(told.append):
        other = threading.Thread(target=compiled, args=(2,))
        other.start()
        other.join()
        assert told == []
        compiled(3)
        assert len(told) == 1 and 0 < told[0] < 60
    compiled(4)
    assert len(told) == 1
