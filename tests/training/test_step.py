"""The compiled step: parts, skipped steps, the average of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import FLOAT32, relative_error

from configs import scenes
from implicit_slots.models.build import build, split_model
from implicit_slots.models.slate import SLATE
from implicit_slots.training import penalties
from implicit_slots.training.nonfinite import explain
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import initial_state
from implicit_slots.training.step import build_steps, in_parts

DECAY = 0.75
STOP = 3


@pytest.fixture(scope="module")
def compiled():
    """A step with an average and a plateau, its first state, and its checks."""
    config = scenes.get_config("tokens-smoke")
    config.optimizer.update(ema_decay=DECAY, schedule="plateau", warmup_steps=0)
    config.nonfinite.stop_after = STOP
    graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype),
        shapes,
    )
    optimizer = build_optimizer(config.optimizer, params, num_steps=20)
    state = initial_state(params, optimizer, config.optimizer)
    steps = build_steps(graphdef, optimizer, config)
    # It gives its state up: each call gets a copy.
    return lambda s, b: steps.train(jax.tree.map(jnp.copy, s), b), state, steps.checks


def batch(seed=0, bad=False):
    image = np.random.default_rng(seed).uniform(size=(8, 16, 16, 3)).astype("f4")
    if bad:
        image[3, 2, 1, 0] = np.nan
    return {"image": image}


def same(one, other):
    return all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.slow
def test_the_average_follows_the_parameters(compiled):
    train, state, _ = compiled
    assert same(state.ema, state.params) and state.evaluated is state.ema
    want = jax.tree.map(np.float64, state.params)
    for seed in range(3):
        state, _ = train(state, batch(seed))
        want = jax.tree.map(
            lambda old, new: DECAY * old + (1 - DECAY) * np.float64(new),
            want,
            state.params,
        )
    for got, wanted in zip(
        jax.tree.leaves(state.ema), jax.tree.leaves(want), strict=True
    ):
        assert relative_error(got, wanted) < FLOAT32
    assert not same(state.ema, state.params)


@pytest.mark.slow
def test_rates_are_multiplied_by_the_plateaus_scale(compiled):
    train, state, _ = compiled
    halved = state._replace(plateau=state.plateau._replace(scale=jnp.float32(0.5)))
    whole, half = (train(s, batch())[0].params for s in (state, halved))
    for before, one, other in zip(
        *map(jax.tree.leaves, (state.params, whole, half)), strict=True
    ):
        np.testing.assert_allclose(
            2 * (other - before), one - before, rtol=1e-3, atol=1e-6
        )


def test_a_bad_step_changes_nothing_and_is_counted(compiled):
    train, state, checks = compiled
    state, _ = train(state, batch(1))
    after, logged = train(state, batch(bad=True))
    for name in ("params", "opt_state", "ema", "plateau"):
        assert same(getattr(after, name), getattr(state, name))
    assert after.step == 2
    assert after.faults == (1, 1, 2, 0)
    assert explain(after.faults, checks) == (
        "step 2 was skipped: the loss mse was not finite"
    )
    # It does not spoil the means.
    assert logged.loss.count == 0 and logged.temperature.count == 1
    again, logged = train(after, batch(2))
    assert again.faults == (1, 0, 2, 0) and again.step == 3
    assert not same(again.params, after.params) and logged.loss.count == 1


def test_bad_steps_in_a_row_stop_at_exactly_that_step(compiled):
    """Whatever comes after, and whenever the loop looks."""
    train, state, _ = compiled
    for seed in range(STOP):
        state, _ = train(state, batch(seed, bad=True))
    assert state.faults == (STOP, STOP, STOP, 0) and state.step == STOP
    for seed in range(2):
        later, logged = train(state, batch(seed))
        assert same(later, state) and logged.loss.count == 0


def test_a_loss_that_fails_is_named_before_the_gradients(compiled):
    train, state, checks = compiled
    params = dict(state.params)
    params["slot_attention"] = jax.tree.map(
        lambda leaf: leaf * jnp.nan, params["slot_attention"]
    )
    after, _ = train(state._replace(params=params), batch())
    assert checks[int(after.faults.check)] == "the loss cross_entropy"


@pytest.mark.slow
def test_the_group_whose_gradient_fails_first_is_named(monkeypatch):
    """All losses are finite, and the backward pass through the masks is not."""

    def root_of_nothing(output):
        return jnp.sqrt(0 * output.attention.sum(axis=(1, 2, 3)))

    monkeypatch.setitem(penalties.PENALTIES, "attention_entropy", root_of_nothing)
    config = scenes.get_config("tokens-smoke")
    config.penalty.attention_entropy = 1.0
    graphdef, params = split_model(build(config))
    optimizer = build_optimizer(config.optimizer, params, num_steps=20)
    state = initial_state(params, optimizer, config.optimizer)
    steps = build_steps(graphdef, optimizer, config)
    after, _ = steps.train(state, batch())
    assert after.faults.skipped == 1
    # The decoder comes before them in the backward pass, and its gradient is finite.
    assert steps.checks[int(after.faults.check)] == "the gradient of slot_attention"


@pytest.mark.slow
def test_a_frozen_dvae_keeps_every_bit_and_the_rest_learns():
    """From the step after `dvae_steps` on; the steps before are the plain ones."""
    config = scenes.get_config("tokens-smoke")
    graphdef, params = split_model(build(config))
    optimizer = build_optimizer(config.optimizer, params, num_steps=20)
    plain = build_steps(graphdef, optimizer, config)
    config.optimizer.dvae_steps = 2
    steps = build_steps(graphdef, optimizer, config)
    assert plain.at(3) is plain and steps.at(2) is steps
    assert steps.at(3) is steps.frozen
    state = wanted = initial_state(params, optimizer, config.optimizer)
    for step in (1, 2):
        state, _ = steps.at(step).train(jax.tree.map(jnp.copy, state), batch(step))
        wanted, _ = plain.train(jax.tree.map(jnp.copy, wanted), batch(step))
        assert same(state, wanted)
    before = jax.tree.map(jnp.copy, state)
    after, logged = steps.at(3).train(state, batch(3))
    assert same(after.params["dvae"], before.params["dvae"])
    assert logged.mse.compute() > 0 and after.faults.skipped == 0
    for part in ("embedding", "slot_attention", "decoder"):
        assert not same(after.params[part], before.params[part])


def test_every_group_of_parameters_is_checked(compiled):
    _, state, checks = compiled
    others = {"image_encoder", "target_positions"}
    assert set(SLATE.stages) == {*state.params, *others}
    assert checks[:2] == ("the loss mse", "the loss cross_entropy")
    # The backward pass begins at the output.
    assert checks[2] == "the gradient of out" and checks[-1] == "the gradient of dvae"


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_are_averaged_and_hold_every_example_once(parts):
    values = {"x": np.arange(24.0).reshape(8, 3).astype("f4")}
    key, other = jax.random.split(jax.random.key(5))

    def function(batch, keys):
        drawn = [jax.random.uniform(key) for key in keys if key is not None]
        return {"mean": batch["x"].mean(axis=0), "square": (batch["x"] ** 2).mean()}, (
            drawn
        )

    means, drawn = jax.jit(lambda v: in_parts(function, v, (key, None, other), parts))(
        values
    )
    np.testing.assert_allclose(means["mean"], values["x"].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(means["square"], (values["x"] ** 2).mean(), rtol=1e-6)
    for got, whole in zip(drawn, (key, other), strict=True):
        keys = [jax.random.fold_in(whole, n) for n in range(parts)]
        want = np.mean(
            [jax.random.uniform(k) for k in (keys if parts > 1 else [whole])]
        )
        np.testing.assert_allclose(got, want, rtol=1e-6)
