"""The optimiser against NumPy float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32, relative_error

from configs import base
from implicit_slots.training.optimizer import (
    build_optimizer,
    clip_by_max_norm,
    temperature,
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


@pytest.mark.parametrize("limit", [float("inf"), 5.0])
def test_small_gradients_are_not_touched(limit):
    gradient = {"a": jnp.array([0.5, -4.0])}
    clipped = clipped_by(limit, gradient)
    assert np.array_equal(clipped["a"], gradient["a"])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_updates_are_adams_with_a_rate_for_each_group(schedule):
    config = section(
        learning_rate=0.2,
        dvae_learning_rate=0.05,
        warmup_steps=4,
        clip_max_norm=1.0,
        schedule=schedule,
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
        largest = max(np.abs(g).max() for g in gradient.values())
        decay = 0.5 * (1 + np.cos(np.pi * step / 10)) if schedule == "cosine" else 1
        rates = {"dvae": 0.05 * decay, "decoder": 0.2 * decay * min(1, (step + 1) / 4)}
        for name, g in gradient.items():
            g = g * min(1, 1 / (largest + 1e-6))
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            moments[name] = m, v
            unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            want = -rates[name] * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
            assert relative_error(updates[name], want) < 1e-4


def test_temperature_falls_by_a_cosine_and_stays():
    config = base.get_config("test", base.scenes()).temperature
    assert float(temperature(config, 0)) == pytest.approx(1.0)
    assert float(temperature(config, 15_000)) == pytest.approx(0.55)
    assert float(temperature(config, 10_000)) == pytest.approx(
        0.55 + 0.45 * np.cos(np.pi / 3)
    )
    for step in (30_000, 10**6):
        assert float(temperature(config, step)) == pytest.approx(0.1)


def test_unknown_schedule_is_a_sentence():
    with pytest.raises(ValueError, match=r"optimizer\.schedule must be one of"):
        build_optimizer(section(schedule="warm"), {"a": jnp.ones(1)}, num_steps=1)
