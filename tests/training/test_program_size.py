"""How large the train step's program is: ceilings, with some room for other versions.

Without a GPU: XLA's program for the CPU, and what JAX hands to a GPU's compiler. What
such compilers make of the published sizes: experiments/benchmarks.
"""

import re

import pytest

from configs import scenes
from implicit_slots.runtime.devices import traced_for
from implicit_slots.runtime.topologies import devices_of
from implicit_slots.training import plan
from implicit_slots.training.parts import build_parts

pytestmark = pytest.mark.slow

BATCH, HEADS, VOCABULARY, TOKENS, BLOCKS = 4, 2, 40, 81, 1


def small():
    """SLATE as published, small; no two of its sizes are the same."""
    config = scenes.get_config("tokens-smoke")
    config.batch_size = BATCH
    config.data.resolution = 4 * int(TOKENS**0.5)
    config.model.update(
        vocab_size=VOCABULARY,
        num_heads=HEADS,
        num_blocks=BLOCKS,
        dropout=0.1,
        attention_dropout=0.1,
    )
    return config


def test_a_cpus_program():
    made = plan.make(small(), devices_of("here"))
    # Of JAX 0.10.1: 5,993 kernels, 26.6 MB, 2.1 MB.
    assert made.launched < 6_800
    assert made.moved < 30e6
    assert made.holds["temporaries"] < 2.5e6


def test_a_gpus_program():
    """Neither attention's weights nor float32 logits are arrays of it."""
    config = small()
    config.precision = "bfloat16"
    parts = build_parts(config, "plan")
    given = parts.state_shapes(), plan.train_batch(config, parts.mesh)
    with traced_for("gpu"):
        traced = parts.steps.train.trace(*given)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    arrays = set(re.findall(r"tensor<([\dx]+x\w+)>", program))
    images = f"{BATCH}x{TOKENS}"
    # Of all queries, and of the last group of causal ones.
    matrix = rf"x({TOKENS}|{TOKENS - 3 * TOKENS // 4})x{TOKENS}x"
    assert not {array for array in arrays if re.search(matrix, array)}
    assert f"{images}x{VOCABULARY}xf32" not in arrays
    # The same search finds those that are there.
    assert f"{images}x{config.model.width}xf32" in arrays
    operations = re.findall(r"= \"?stablehlo\.(\w+)", program)
    # Of JAX 0.10.1: 117 and 9,726.
    assert operations.count("dot_general") < 130
    assert len(operations) < 11_000
