"""What a configuration may add to the loss, against plain differentiation."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import FLOAT32, relative_error

from configs import autoencoder_scenes, scenes, set_prediction_scenes
from implicit_slots.models import slot_attention
from implicit_slots.models.build import build, split_model
from implicit_slots.models.set_prediction import CLASSES, encode_objects, set_distance
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.prng import Purpose, purpose_key
from implicit_slots.runtime.workdir import CONFIG_FILE
from implicit_slots.training import penalties
from implicit_slots.training.checks import check, check_same_run
from implicit_slots.training.nonfinite import explain
from implicit_slots.training.optimizer import build_optimizer
from implicit_slots.training.state import initial_state
from implicit_slots.training.step import build_steps

BATCH = 4
ENTROPY, COUPLING = "penalty_attention_entropy", "penalty_slot_coupling"
MODULES = (autoencoder_scenes, set_prediction_scenes, scenes)


def smoke(module, **weights):
    config = module.get_config("smoke")
    config.batch_size = BATCH
    config.model.solver.max_steps = 2
    # What the paper's vanilla slot attention is, differentiated as it stands.
    config.model.adjoint.name = (
        "unrolled" if module is autoencoder_scenes else "neumann"
    )
    config.penalty.update(weights)
    return config


def prepared(config, *, traced=False) -> Any:
    """The structure of a model, its first state or that's shapes, and its steps."""
    graphdef, shapes = split_model(nnx.eval_shape(lambda: build(config)))
    optimizer = build_optimizer(config.optimizer, shapes, num_steps=20)

    def first():
        params = split_model(build(config))[1]
        return initial_state(params, optimizer, config.optimizer)

    state = jax.eval_shape(first) if traced else jax.jit(first)()
    return graphdef, state, build_steps(graphdef, optimizer, config)


def batch_for(config):
    rng = np.random.default_rng(0)
    batch: dict[str, Any] = {"image": rng.uniform(size=(BATCH, 16, 16, 3)).astype("f4")}
    if config.model.name == "set_prediction":
        shape = BATCH, config.data.max_objects
        batch["objects"] = {
            "present": rng.uniform(size=shape) < 0.7,
            "position": rng.uniform(-3, 3, size=(*shape, 3)).astype("f4"),
            **{name: rng.integers(size, size=shape) for name, size in CLASSES.items()},
        }
    return batch


def locatello_by_hand(model, batch, keys):
    """Loss and penalties of the two models of Locatello et al., step by step.

    The penalty on the coupling is that of the whole Jacobian.
    """
    f, params, x, z = model.slot_problem(batch["image"], keys[0])
    f = replace(f, attention=True)
    attention = None
    for _ in range(model.slot_attention.solver.max_steps):
        z, attention = f(params, x, z)
    if hasattr(model, "predict"):
        # One-term gradients are those of one more step from a constant.
        z, attention = f(params, x, jax.lax.stop_gradient(z))
        target = encode_objects(batch["objects"], z.shape[1])
        loss = set_distance(model.predict(z), target).mean()
    else:
        loss = jnp.mean((2 * (batch["image"] - model.mix(z).image)) ** 2)
    assert attention is not None
    entropy = -jnp.sum(attention * jnp.log(attention)) / attention[:, 0].size

    constant = jax.lax.stop_gradient(z)
    batch_size, slots, size = z.shape
    jacobian = jax.vmap(
        jax.jacfwd(lambda z, x: f(params, x[None], z[None])[0][0]), in_axes=(0, 0)
    )(constant, x)
    key_block, key_direction = jax.random.split(jax.random.split(keys[1], 1)[0])
    block = jax.random.randint(key_block, (batch_size, 1, 1), 0, slots).ravel()
    direction = jax.random.normal(key_direction, (batch_size, 1, size))[:, 0]
    coupling = jnp.float32(0)
    for i, k in enumerate(block):
        seen = jnp.einsum("d,dle->le", direction[i], jacobian[i, k])
        others = jnp.arange(slots) != k
        coupling += slots * jnp.sum(seen**2 * others[:, None]) / (slots * size)
    return loss, entropy, coupling / batch_size


@pytest.mark.slow
@pytest.mark.parametrize("module", [autoencoder_scenes, set_prediction_scenes])
def test_the_gradient_is_that_of_the_loss_and_the_penalties(module):
    # Large, so that each matters beside the loss.
    config = smoke(module, attention_entropy=10.0, slot_coupling=30.0)
    graphdef, state, steps = prepared(config)
    keys = [purpose_key(config.seed, p, 0) for p in (Purpose.TRAIN, Purpose.PENALTY)]
    batch = jax.tree.map(jnp.asarray, batch_for(config))

    def total(params, weights):
        parts = locatello_by_hand(nnx.merge(graphdef, params), batch, keys)
        return sum(w * part for w, part in zip(weights, parts, strict=True)), parts

    differentiated = jax.jit(jax.grad(total, has_aux=True))
    want, parts = differentiated(state.params, (1.0, 10.0, 30.0))
    got, losses, _ = steps.examine(state, batch)
    assert relative_error(losses["loss"], parts[0]) < FLOAT32
    assert relative_error(losses[ENTROPY], parts[1]) < FLOAT32
    assert relative_error(losses[COUPLING], parts[2]) < FLOAT32

    def flat(tree):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    # Over all parameters: some have next to no gradient.
    assert relative_error(flat(got), flat(want)) < 10 * FLOAT32
    for weights in ((0.0, 10.0, 30.0), (1.0, 0.0, 30.0), (1.0, 10.0, 0.0)):
        other, _ = differentiated(state.params, weights)
        assert relative_error(flat(other), flat(want)) > 1e-3


@pytest.mark.parametrize("module", MODULES)
def test_without_weights_nothing_is_computed(module, monkeypatch):
    """So that the program is the one that it was before there were penalties."""

    def refuse(*_):
        raise AssertionError("measured for nothing")

    monkeypatch.setattr(slot_attention, "coupling_norm", refuse)
    monkeypatch.setattr(penalties, "attention_entropy", refuse)
    config = smoke(module)
    _, state, steps = prepared(config, traced=True)
    _, losses, logged = steps.examine.trace(state, batch_for(config)).out_info
    assert not any(name.startswith("penalty") for name in (*losses, *logged))
    assert not any("penalty" in name for name in steps.checks)


@pytest.mark.parametrize(
    ("module", "weights", "names"),
    [
        (autoencoder_scenes, {"attention_entropy": 0.1}, {ENTROPY}),
        (set_prediction_scenes, {"slot_coupling": 0.1}, {COUPLING}),
        (scenes, {"attention_entropy": 0.1, "slot_coupling": 0.1}, {ENTROPY, COUPLING}),
    ],
)
def test_models_take_each_penalty_with_and_without_the_other(module, weights, names):
    config = smoke(module, **weights)
    _, state, steps = prepared(config, traced=True)
    _, losses, _ = steps.examine.trace(state, batch_for(config)).out_info
    assert {name for name in losses if name.startswith("penalty")} == names


@pytest.mark.slow
def test_a_penalty_that_is_not_finite_skips_the_step(monkeypatch):
    """Also where the gradient is finite. It is logged, and `loss` is without it."""
    monkeypatch.setattr(
        slot_attention, "coupling_norm", lambda *_: jnp.full(BATCH // 2, jnp.inf)
    )
    config = smoke(set_prediction_scenes, slot_coupling=1.0)
    config.accumulate = 2
    _, state, steps = prepared(config)
    before = jax.tree.map(np.asarray, state.params)
    after, logged = steps.train(state, batch_for(config))
    assert explain(after.faults, steps.checks) == (
        "step 1 was skipped: the loss penalty_slot_coupling was not finite"
    )
    assert logged.loss.count == 0 and {COUPLING, "loss"} <= logged.compute().keys()
    for one, other in zip(*map(jax.tree.leaves, (before, after.params)), strict=True):
        assert np.array_equal(one, other)


def test_the_entropy_of_even_and_of_the_sharpest_masks():
    even = jnp.full((1, 4, 2, 2), 0.25)
    assert relative_error(penalties.attention_entropy(even), [np.log(4)]) < FLOAT32
    # One slot's logit is so much larger that the others' shares are exactly 0.
    logits = jnp.zeros((1, 4, 2, 2)).at[:, 0].set(200)

    @jax.jit
    @jax.value_and_grad
    def total(logits):
        return penalties.attention_entropy(jax.nn.softmax(logits, axis=1)).sum()

    entropy, gradient = total(logits)
    assert entropy == 0 and np.all(gradient == 0)


def test_a_configuration_of_an_older_version_has_no_penalties(tmp_path):
    """It is evaluated and goes on, but not with a penalty that it did not have."""

    def now(**weights):
        config = smoke(autoencoder_scenes, **weights)
        config.model.attention_gain = 1.0
        return config

    older = now()
    with older.unlocked():
        del older.penalty
        del older.model.attention_gain
    assert penalties.weights(older) == {}
    check(older, "train")
    (tmp_path / CONFIG_FILE).write_text(older.to_json())
    check_same_run(older, tmp_path)
    check_same_run(now(), tmp_path)
    with pytest.raises(UserError, match=r"its penalty\.slot_coupling is 0\.0, this"):
        check_same_run(now(slot_coupling=0.1), tmp_path)
    sharper = now()
    sharper.model.attention_gain = 2.0
    with pytest.raises(UserError, match=r"its model\.attention_gain is 1\.0, this"):
        check_same_run(sharper, tmp_path)
    # And the other way around.
    config = now(attention_entropy=0.1)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(json.loads(config.to_json())))
    with pytest.raises(UserError, match=r"attention_entropy is 0\.1, this .* is 0\.0"):
        check_same_run(older, tmp_path)
