"""What `import implicit_slots` offers, and what it costs."""

import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import typing

import jax.numpy as jnp
import pytest

import implicit_slots


def run(*lines):
    """Runs lines in a fresh interpreter."""
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_is_imported_alone():
    core = importlib.import_module("implicit_slots.fixed_point").__all__
    heavy = "jax", "numpy", "flax", "optax", "orbax", "grain", "clu", "ml_collections"
    run(
        "import sys, implicit_slots",
        f"heavy = {set(heavy)}",
        "dir(implicit_slots), implicit_slots.__version__",
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)",
        "assert not [n for n in sys.modules if n.startswith('implicit_slots.')]",
        f"from implicit_slots import {', '.join(core)}",
        "assert 'jax' in sys.modules",
        "heavy -= {'jax', 'numpy'}",
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)",
    )


def test_every_name_is_there():
    for name in implicit_slots.__all__:
        assert name in dir(implicit_slots)
        assert getattr(implicit_slots, name) is not None
    assert implicit_slots.__version__ == importlib.metadata.version("implicit_slots")
    with pytest.raises(AttributeError, match="no attribute 'Slots'"):
        _ = typing.cast(typing.Any, implicit_slots).Slots
    with pytest.raises(ImportError):
        exec("from implicit_slots import Slots")


def test_the_solver_core_is_all_there():
    core = sys.modules["implicit_slots.fixed_point"]
    assert set(core.__all__) <= set(implicit_slots.__all__)


WAYS = (
    "from implicit_slots import fixed_point",
    "import implicit_slots.fixed_point",
    "from implicit_slots.fixed_point import Picard, api",
    "import implicit_slots.fixed_point.solvers",
    "from implicit_slots import SlotAttention",
)


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize("first", range(len(WAYS)))
def test_the_function_and_the_subpackage_share_a_name(first, turn):
    run(
        *(WAYS[first:] + WAYS[:first])[::turn],
        "import implicit_slots, implicit_slots.fixed_point as module",
        "from implicit_slots import fixed_point",
        "from implicit_slots.fixed_point import fixed_point as function",
        "assert fixed_point is module is implicit_slots.fixed_point",
        "assert module.Picard is implicit_slots.Picard",
        "assert callable(fixed_point) and type(fixed_point).__call__ is function",
    )


def test_the_name_is_called_like_the_function():
    from implicit_slots import fixed_point
    from implicit_slots.fixed_point.api import fixed_point as function

    assert inspect.signature(fixed_point) == inspect.signature(function)
    solution = fixed_point(lambda p, x, z: p * z + x, 0.5, jnp.ones(2), jnp.zeros(2))
    assert jnp.allclose(solution.value, 2)
