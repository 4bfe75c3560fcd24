"""Arguments before they are parsed, and those that are no flags."""

import pytest

from implicit_slots.runtime.flags import flag_value, nearest, refuse_rest, without

ARGUMENTS = ["main", "--workdir", "a", "--mode=train", "--workdir=b=c", "-seed", "1"]


def test_the_last_value_counts_and_may_be_the_next_argument():
    assert flag_value("workdir", ARGUMENTS) == "b=c"
    assert flag_value("workdir", ARGUMENTS[:4]) == "a"
    assert flag_value("seed", ARGUMENTS) == "1"
    assert flag_value("data", ARGUMENTS) is None
    assert flag_value("workdir", ["main", "--workdir"]) == ""


def test_a_flag_is_left_out_with_its_value():
    assert without("workdir", ARGUMENTS) == ["main", "--mode=train", "-seed", "1"]
    assert without("seed", ["--seed"]) == []


def test_the_rest_of_a_value_with_a_space_is_refused(capsys):
    """It would train on the folder "my"."""
    refuse_rest(["main"])
    with pytest.raises(SystemExit) as end:
        refuse_rest(["main", "images"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: 'images' is no flag; put quotes")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.solvr.max_steps", ["model.solver.max_steps"]),
        ("model.solver.maxsteps", ["model.solver.max_steps"]),
        ("modl.seed", ["model.seed"]),
        ("sed", ["seed"]),
        ("seed.x", ["seed"]),
        # A section was left out, or is another.
        ("max_steps", ["model.solver.max_steps", "model.adjoint.solver.max_steps"]),
        ("optimizer.batch_size", ["batch_size"]),
        ("zzz", []),
    ],
)
def test_the_nearest_key_is_named(key, meant):
    known = ("seed", "batch_size", "model.seed", "model.adjoint.solver.max_steps")
    assert nearest(key, (*known, "model.solver.max_steps")) == meant
