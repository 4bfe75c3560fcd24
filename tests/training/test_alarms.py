"""When alarms go off, once, and the same after a resume as without one."""

import functools
import json
import math
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from implicit_slots.runtime.errors import UserError
from implicit_slots.training.alarms import FEWEST, WINDOW, Alarms

LIMITS = {
    "gradient_growth": 100.0,
    "spectral_norm": 100.0,
    "mask_similarity": 0.9,
    "largest_slot": 0.95,
    "attention_entropy": 0.98,
    "backward_failed": 0.5,
}
COLLAPSES = ("mask_similarity", "largest_slot", "attention_entropy")
FAILED = "backward_failed"
NAN, INF = math.nan, math.inf


def section(**changes):
    return ConfigDict({"enabled": True, "patience": 3, **LIMITS, **changes})


def alarms(history=(), **changes):
    return Alarms(section(**changes), history)


def fired(watch, split, name, values):
    """The indices of the values at which the alarm goes off."""
    checks = [watch.check(step, split, {name: v}) for step, v in enumerate(values)]
    assert all(len(sentences) <= 1 for sentences in checks)
    return [step for step, sentences in enumerate(checks) if sentences]


def test_gradients_are_compared_with_the_median_of_those_before():
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 300.0, 351.0]
    # Medians 3 and 3.5: 300 is not above a hundred times the first, 351 is above 350.
    assert fired(alarms(), "train", "grad_norm_l2", values) == [6]


def test_gradients_need_a_few_values_first():
    few, enough = [1.0] * (FEWEST - 1), [1.0] * FEWEST
    assert fired(alarms(), "train", "grad_norm_l2", [*few, 1e6]) == []
    assert fired(alarms(), "train", "grad_norm_l2", [*enough, 1e6]) == [FEWEST]


def test_old_gradients_are_forgotten():
    values = [1.0] * 100 + [50.0] * WINDOW + [4_999.0, 5_001.0]
    assert fired(alarms(), "train", "grad_norm_l2", values) == [100 + WINDOW + 1]


def test_gradients_that_are_not_finite_are_passed_over():
    values = [1.0] * (FEWEST - 1) + [NAN, INF, NAN, 1e6]
    assert fired(alarms(), "train", "grad_norm_l2", values) == []
    values = [1.0] * FEWEST + [NAN] * WINDOW + [99.0, 1e6]
    assert fired(alarms(), "train", "grad_norm_l2", values) == [len(values) - 1]


def test_one_large_spectral_norm_is_enough():
    values = [5.0, 100.0, 101.0, 200.0, NAN, 200.0, 100.0, 101.0]
    assert fired(alarms(), "validation", "spectral_norm", values) == [2, 7]


@pytest.mark.parametrize("name", [*COLLAPSES, FAILED])
@pytest.mark.parametrize("patience", [1, 3])
def test_what_lasts_needs_patience_and_is_reported_once(name, patience):
    limit = LIMITS[name]
    values = [0.99] * (patience - 1) + [limit] + [0.99] * 7 + [0.1] + [0.99] * 5
    expected = [2 * patience - 1, patience + 8 + patience - 1]
    watch = alarms(patience=patience)
    split = "train" if name == FAILED else "validation"
    assert fired(watch, split, name, values) == expected


def test_what_is_not_measured_neither_counts_nor_interrupts():
    watch = alarms()
    values = [0.99, NAN, 0.99, NAN]
    assert fired(watch, "validation", "largest_slot", values) == []
    assert watch.check(4, "validation", {"loss": 1.0}) == []
    assert watch.check(5, "train", {"largest_slot": 0.1}) == []
    assert len(watch.check(6, "validation", {"largest_slot": 0.99})) == 1


def test_alarms_do_not_mix():
    watch = alarms(patience=1)
    values = dict.fromkeys(COLLAPSES, 0.99) | {"spectral_norm": 101.0}
    assert len(watch.check(1, "validation", values)) == 4
    values["largest_slot"] = 0.1
    assert watch.check(2, "validation", values) == []
    values["largest_slot"] = 0.99
    (sentence,) = watch.check(3, "validation", values)
    assert "largest_slot" in sentence


def test_a_sentence_says_value_limit_and_since_when():
    watch = alarms()
    for step in (500, 1000):
        watch.check(step, "validation", {"largest_slot": 0.96})
    (sentence,) = watch.check(1500, "validation", {"largest_slot": 0.971})
    seen = ("0.971", "0.95", "step 500", "step 1500", "3 times")
    assert all(text in sentence for text in seen)
    for step in range(FEWEST):
        watch.check(step, "train", {"grad_norm_l2": 2.0})
    (sentence,) = watch.check(FEWEST, "train", {"grad_norm_l2": 512.0})
    assert all(text in sentence for text in ("512", "100 times 2", "median"))


def everything():
    """A sentence of each alarm."""
    watch = alarms(patience=1)
    for step in range(FEWEST):
        watch.check(step, "train", {"grad_norm_l2": 1.0})
    values = dict.fromkeys(COLLAPSES, 0.99) | {"spectral_norm": 101.0}
    trained = {"grad_norm_l2": 101.0, FAILED: 1.0}
    return watch.check(9, "train", trained) + watch.check(9, "validation", values)


def test_every_key_that_a_sentence_names_exists():
    sentences = everything()
    assert len(sentences) == len(LIMITS)
    config = base.get_config("test", base.scenes())
    for sentence in sentences:
        keys = re.findall(r"--config\.([a-z_.]*[a-z])", sentence)
        assert keys
        for key in keys:
            functools.reduce(getattr, key.split("."), config)


def logged(rng):
    """Lines as a run logs them, of values that cross every limit now and then."""
    lines = []
    for step in range(1, 201):
        gradient = rng.choice(
            [1.0, 2.0, 500.0, NAN, INF], p=[0.5, 0.3, 0.1, 0.05, 0.05]
        )
        failed = float(rng.choice([0.0, 0.9, NAN], p=[0.3, 0.6, 0.1]))
        lines.append((step, "train", {"grad_norm_l2": float(gradient), FAILED: failed}))
        if step % 2 == 0:
            values = {
                n: float(rng.choice([0.5, 0.99, NAN], p=[0.3, 0.6, 0.1]))
                for n in COLLAPSES
            }
            lines.append((step, "validation", values))
        if step % 3 == 0:
            norm = float(rng.choice([5.0, 200.0]))
            lines.append((step, "validation", {"spectral_norm": norm}))
    return lines


def line_of(step, split, values):
    """A line of metrics.jsonl, read back: what is not finite is null."""
    written = {n: v if math.isfinite(v) else None for n, v in values.items()}
    return json.loads(json.dumps({"step": step, "split": split, **written}))


def test_a_resumed_run_raises_what_an_uninterrupted_one_does():
    lines = logged(np.random.default_rng(0))
    history = [line_of(*line) for line in lines]
    watch = alarms()
    whole = [watch.check(*line) for line in lines]
    for name in ("grad_norm_l2", "spectral_norm", *COLLAPSES, FAILED):
        count = json.dumps(whole).count(f" {name} is ")
        assert count > 1, f"the test shows nothing of {name}"
    for cut in range(0, len(lines), 7):
        resumed = alarms(history[:cut])
        assert [resumed.check(*line) for line in lines[cut:]] == whole[cut:]


@pytest.mark.parametrize("key", LIMITS)
def test_infinity_switches_one_alarm_off(key):
    lines = logged(np.random.default_rng(1))
    watch, without = alarms(), alarms(**{key: INF})
    name = "grad_norm_l2" if key == "gradient_growth" else key
    for line in lines:
        sentences = watch.check(*line)
        kept = [s for s in sentences if f" {name} is " not in s]
        assert without.check(*line) == kept


def test_disabled_alarms_say_nothing():
    watch = alarms(enabled=False)
    assert not any(watch.check(*line) for line in logged(np.random.default_rng(2)))


def test_patience_below_one_is_refused():
    with pytest.raises(UserError, match="patience must be at least 1, got 0"):
        alarms(patience=0)
