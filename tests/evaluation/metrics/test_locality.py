"""Where attention lies, against loops over pixels, and the laws of its numbers."""

import jax
import numpy as np
import pytest
from reference import FLOAT32

from implicit_slots.evaluation.metrics.locality import locality

SIDE, MOST, SLOTS = 8, 3, 4


@pytest.fixture(scope="module")
def measured():
    return jax.jit(lambda a, t, s: locality(a, t, s, max_true=MOST))


@pytest.fixture(scope="module")
def scene():
    """Two objects with shadows; slots at home on them, on the ground, and idle."""
    true = np.zeros((2, SIDE, SIDE), np.int32)
    true[:, 1:4, 1:3] = 1
    true[0, 5:8, 4:7] = 3
    shadow = np.zeros_like(true)
    shadow[:, 3:5, 1:4] = 1  # partly under the object itself
    shadow[0, 6, 6:8] = 3
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 1, size=(2, SLOTS, SIDE, SIDE))
    weights[:, 2] += 4 * (true == 1)
    weights[:, 0] += 4 * (true == 3)
    weights[:, 1] += 1.0
    attention = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return attention, true, shadow


OWNERS = {1: 2, 3: 0}  # object -> slot


def by_hand(attention, true, shadow):
    totals: dict[str, list[float]] = {}
    for ident, slot in OWNERS.items():
        own = true == ident
        if not own.any():
            continue
        a = attention[slot].astype(np.float64)
        places = [(r, c) for r in range(SIDE) for c in range(SIDE)]
        centre = np.mean([p for p in places if own[p]], axis=0)
        squared = {p: ((np.array(p) - centre) ** 2).sum() for p in places}
        shaded = (shadow == ident) & (true == 0)
        lit = (true == 0) & ~shaded
        numbers = {
            "area_ratio": a.sum() ** 2 / (a**2).sum() / own.sum(),
            "spread_ratio": np.sqrt(
                sum(a[p] * squared[p] for p in places) / a.sum() + 1 / 6
            )
            / np.sqrt(np.mean([squared[p] for p in places if own[p]]) + 1 / 6),
            "on_object": a[own].sum() / a.sum(),
            "on_shadow": a[shaded].sum() / a.sum(),
            "elsewhere": a[~own & ~shaded].sum() / a.sum(),
            "shadow_contrast": a[shaded].mean() / a[lit].mean(),
        }
        for name, value in numbers.items():
            totals.setdefault(name, []).append(value)
    entropy = -(attention * np.log(attention)).sum(axis=0).mean()
    return {n: np.mean(v) for n, v in totals.items()} | {"token_entropy": entropy}


def test_numbers_equal_the_definitions(measured, scene):
    got = measured(*scene)
    for index in range(2):
        expected = by_hand(*(part[index] for part in scene))
        assert set(expected) == set(got)
        for name, value in expected.items():
            assert np.isclose(got[name][index], value, rtol=FLOAT32), name
    shares = got["on_object"] + got["on_shadow"] + got["elsewhere"]
    assert np.allclose(shares, 1, atol=FLOAT32)


def test_slots_in_another_order_have_the_same_numbers(measured, scene):
    attention, true, shadow = scene
    turned = measured(attention[:, ::-1], true, shadow)
    for name, values in measured(*scene).items():
        assert np.allclose(values, turned[name], rtol=FLOAT32), name


def test_the_true_mask_is_as_local_as_its_object(measured, scene):
    _, true, shadow = scene
    attention = np.moveaxis(np.eye(SLOTS, dtype=np.float32)[true], -1, 1)
    got = measured(attention, true, shadow)
    for name in ("area_ratio", "spread_ratio", "on_object"):
        assert np.allclose(got[name], 1, atol=FLOAT32), name
    for name in ("on_shadow", "elsewhere", "token_entropy"):
        assert np.allclose(got[name], 0, atol=FLOAT32), name
    assert np.isnan(got["shadow_contrast"]).all()  # no attention on the ground at all


def test_even_attention_has_no_preference(measured, scene):
    _, true, shadow = scene
    attention = np.full((2, SLOTS, SIDE, SIDE), 1 / SLOTS, np.float32)
    got = measured(attention, true, shadow)
    assert np.allclose(got["token_entropy"], np.log(SLOTS), atol=FLOAT32)
    assert np.allclose(got["shadow_contrast"], 1, atol=FLOAT32)
    assert np.isclose(got["area_ratio"][1], SIDE**2 / 6, rtol=FLOAT32)


def test_without_objects_or_shadows_numbers_are_not_there(measured, scene):
    attention, true, shadow = scene
    got = measured(attention, np.zeros_like(true), shadow)
    assert all(np.isnan(v).all() for n, v in got.items() if n != "token_entropy")
    dark = measured(attention, true, np.zeros_like(true))
    assert np.isnan(dark["shadow_contrast"]).all()
    assert np.allclose(dark["on_shadow"], 0)
    unknown = measured(attention, true, None)
    assert "on_shadow" not in unknown and "shadow_contrast" not in unknown


@pytest.mark.parametrize("fault", ["attention", "segmentation", "shadow"])
def test_what_cannot_be_measured_is_not_measured(measured, scene, fault):
    attention, true, shadow = (part.copy() for part in scene)
    if fault == "attention":
        attention[0, 0, 0, 0] = np.nan
    else:
        {"segmentation": true, "shadow": shadow}[fault][0, 0, 0] = MOST + 1
    for name, value in measured(attention, true, shadow).items():
        assert np.isnan(value[0]), name
        np.testing.assert_array_equal(value[1], measured(*scene)[name][1])
