"""The optimiser against NumPy float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32, relative_error

from configs import base
from implicit_slots.models import annealing
from implicit_slots.models.annealing import cosine
from implicit_slots.training.optimizer import (
    build_optimizer,
    build_plateau,
    clip_by_max_norm,
    learning_rates,
)


def section(**changes):
    config = base.get_config("test", base.scenes()).optimizer
    config.update(changes)
    return config


def clipped_by(limit, gradient) -> Any:
    transformation = clip_by_max_norm(limit)
    return transformation.update(gradient, transformation.init(gradient))[0]


def test_clipping_scales_the_whole_gradient_by_its_largest_entry():
    gradient = {"a": jnp.array([0.5, -4.0]), "b": jnp.array([[1.0]])}
    clipped = clipped_by(1.0, gradient)
    for name, leaf in gradient.items():
        want = np.float64(leaf) * 1.0 / (4.0 + 1e-6)
        assert relative_error(clipped[name], want) < FLOAT32


def test_small_gradients_are_not_touched():
    gradient = {"a": jnp.array([0.5, -4.0])}
    clipped = clipped_by(5.0, gradient)
    assert np.array_equal(clipped["a"], gradient["a"])


def official_factor(losses, patience=4):
    """The rates' factor after these validations, as official SLATE's train.py."""
    best, stagnation, factor = np.inf, 0, 1.0
    for loss in losses:
        if loss < best:
            stagnation, best = 0, loss
        else:
            stagnation += 1
            if stagnation >= patience:
                factor, stagnation = factor / 2, 0
    return factor


def test_rates_are_halved_when_official_slate_halves_them():
    plateau: Any = build_plateau(section(schedule="plateau"))
    state = plateau.init({"a": jnp.ones(1)})
    rng = np.random.default_rng(0)
    # Falls, stagnates, falls by the least that float32 tells apart, repeats itself.
    losses = list(np.r_[200 - np.arange(6), rng.normal(200, 3, 30)].astype("f4"))
    losses += [np.float32(150), np.nextafter(np.float32(150), np.float32(0))]
    losses += [losses[-1]] * 9 + [np.float32(np.nan)] * 5
    factors = []
    for number, loss in enumerate(losses, 1):
        _, state = plateau.update({}, state, value=loss)
        factors.append(float(state.scale))
        assert factors[-1] == official_factor(losses[:number])
    assert len(set(factors)) > 5
    assert build_plateau(section(schedule="constant")) is None


DECAYS = {
    "constant": lambda step: 1,
    "plateau": lambda step: 1,  # Its factor is in the state; see below.
    "cosine": lambda step: 0.5 * (1 + np.cos(np.pi * step / 10)),
    "half_life": lambda step: 0.5 ** (step / 3),
}
CLIPPINGS = {
    "max_norm": lambda gradient: max(np.abs(g).max() for g in gradient.values()) + 1e-6,
    "l2": lambda gradient: np.sqrt(sum((g**2).sum() for g in gradient.values())),
    "none": lambda gradient: 0,
}


@pytest.mark.parametrize(
    ("schedule", "clip", "warmup"),
    [
        ("constant", "max_norm", 4),
        ("cosine", "l2", 4),
        ("half_life", "none", 4),
        ("plateau", "max_norm", 0),
    ],
)
def test_updates_are_adams_with_a_rate_for_each_group(schedule, clip, warmup):
    config = section(
        learning_rate=0.2,
        dvae_learning_rate=0.05,
        warmup_steps=warmup,
        clip=clip,
        clip_limit=1.5,
        schedule=schedule,
        half_life=3.0,
    )
    params = {"dvae": jnp.array([1.0, 2.0]), "decoder": jnp.array([3.0])}
    optimizer = build_optimizer(config, params, num_steps=10)
    state = optimizer.init(params)
    moments: dict[str, Any] = {name: (0.0, 0.0) for name in params}
    rng = np.random.default_rng(0)
    for step in range(8):
        gradient = {k: 3 * rng.normal(size=v.shape) for k, v in params.items()}
        updates: Any
        updates, state = optimizer.update(
            {k: jnp.asarray(g, jnp.float32) for k, g in gradient.items()}, state
        )
        norm = CLIPPINGS[clip](gradient)
        decay = DECAYS[schedule](step)
        warm = min(1, (step + 1) / warmup) if warmup else 1
        rates = {"dvae": 0.05 * decay, "decoder": 0.2 * decay * warm}
        for name, g in gradient.items():
            g = g * (min(1, 1.5 / norm) if norm else 1)
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            moments[name] = m, v
            logged = "dvae_learning_rate" if name == "dvae" else "learning_rate"
            assert learning_rates(config, params, step, 10)[logged] == pytest.approx(
                rates[name]
            )
            unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            want = -rates[name] * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
            assert relative_error(updates[name], want) < 1e-4


def test_temperature_falls_by_a_cosine_and_stays():
    config = base.get_config("test", base.scenes()).temperature
    assert float(cosine(config, 0)) == pytest.approx(1.0)
    assert float(cosine(config, 15_000)) == pytest.approx(0.55)
    assert float(cosine(config, 10_000)) == pytest.approx(
        0.55 + 0.45 * np.cos(np.pi / 3)
    )
    for step in (30_000, 10**6):
        assert float(cosine(config, step)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schedule": "warm"}, r"optimizer\.schedule must be one of"),
        ({"clip": "hard"}, r"optimizer\.clip must be one of"),
        ({"clip_limit": 0.0}, r"optimizer\.clip_limit must be positive"),
        ({"half_life": 0.0}, r"optimizer\.half_life must be positive"),
        ({"ema_decay": 1.0}, r"optimizer\.ema_decay must be in \[0, 1\)"),
        ({"plateau_patience": 0}, r"optimizer\.plateau_patience must be at least 1"),
        ({"plateau_factor": 1.0}, r"optimizer\.plateau_factor must be in \(0, 1\)"),
    ],
)
def test_what_cannot_be_is_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_optimizer(section(**changes), {"a": jnp.ones(1)}, num_steps=1)


def test_encoder_and_slots_have_a_rate_of_their_own_where_it_is_given():
    params = {
        name: {"a": jnp.ones(2)}
        for name in ("dvae", "image_encoder", "slot_attention", "decoder")
    }
    rates = {"learning_rate": 0.1, "dvae_learning_rate": 0.2}
    settings = {"warmup_steps": 0, "schedule": "constant", "clip": "none", **rates}

    def first_update(**changes):
        optimizer = build_optimizer(section(**settings, **changes), params, num_steps=9)
        updates: Any = optimizer.update(params, optimizer.init(params), params)[0]
        return {name: -float(leaf["a"][0]) for name, leaf in updates.items()}

    # Adam's first update is the rate.
    alike = first_update()
    assert alike["image_encoder"] == alike["decoder"] == pytest.approx(0.1, rel=1e-4)
    apart = first_update(slots_learning_rate=0.05)
    assert (
        apart["image_encoder"]
        == apart["slot_attention"]
        == pytest.approx(0.05, rel=1e-4)
    )
    assert (apart["decoder"], apart["dvae"]) == pytest.approx((0.1, 0.2), rel=1e-4)
    with pytest.raises(ValueError, match="slots_learning_rate must not be negative"):
        first_update(slots_learning_rate=-1.0)
    named = learning_rates(section(**settings, slots_learning_rate=0.05), params, 0, 9)
    assert named == pytest.approx({**rates, "slots_learning_rate": 0.05})


def test_what_changes_with_the_step_is_there_where_it_is_asked_for():
    config = base.get_config("test", base.scenes())
    assert annealing.names(config) == ("temperature",)
    config.initial_noise.update(start=1.0, end=0.25, steps=10)
    assert annealing.names(config) == ("temperature", "initial_noise")
    values = [float(annealing.annealed(config, s)["initial_noise"]) for s in (0, 5, 99)]
    assert values == pytest.approx([1.0, 0.625, 0.25])
    # Configurations of older versions have no such section.
    del config.initial_noise
    assert annealing.names(config) == ("temperature",)
    config.model.tokenizer = "patches"
    assert annealing.names(config) == ()


def test_a_codebook_is_not_trained_and_has_no_moments():
    params = {"dvae": {"codes": jnp.ones((3, 2))}, "decoder": {"a": jnp.ones(2)}}
    optimizer = build_optimizer(section(clip="none"), params, num_steps=9)
    state = optimizer.init(params)
    updates: Any = optimizer.update(params, state, params)[0]
    assert not np.any(updates["dvae"]["codes"]) and np.any(updates["decoder"]["a"])
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert (3, 2) not in shapes and (2,) in shapes
    assert "dvae_learning_rate" not in learning_rates(section(), params, 0, 9)
