"""Slot attention against NumPy float64, and its laws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from reference import FLOAT32, relative_error

from implicit_slots.fixed_point import GMRES, Implicit, Neumann, Picard, Unrolled
from implicit_slots.models.build import split_model
from implicit_slots.models.slot_attention import SlotAttention, StepFunction

pytestmark = pytest.mark.usefixtures("strict_promotion")

BATCH, INPUTS, FEATURES, SLOTS, SIZE = 2, 9, 6, 4, 8


def build(*, steps=3, adjoint=None, heads=1, seed=0, **changes):
    return SlotAttention(
        FEATURES,
        **{
            "num_slots": SLOTS,
            "slot_size": SIZE,
            "mlp_size": 12,
            "num_heads": heads,
            "solver": Picard(max_steps=steps),
            "adjoint": adjoint or Unrolled(),
            "rngs": nnx.Rngs(seed),
        }
        | changes,
    )


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(BATCH, INPUTS, FEATURES)), jnp.float32),
        jnp.asarray(rng.normal(size=(BATCH, SLOTS, SIZE)), jnp.float32),
    )


def run(model, *arguments):
    """Returns model(*arguments), compiled: op by op the tests would take minutes."""
    graphdef, params = split_model(model)
    return jax.jit(lambda params, *a: nnx.merge(graphdef, params)(*a))(
        params, *arguments
    )


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("adjoint", [Unrolled(), Neumann()])
def test_equals_numpy(arrays, heads, adjoint):
    inputs, slots = arrays
    model = build(heads=heads, adjoint=adjoint)
    params = jax.tree.map(np.float64, split_model(model)[1])
    output = run(model, inputs, slots)
    for i in range(BATCH):
        want = reference.slot_attention(
            np.float64(inputs[i]),
            np.float64(slots[i]),
            params,
            # An implicit adjoint applies the step once more than the solver.
            iterations=3 if adjoint == Unrolled() else 4,
            heads=heads,
        )
        assert relative_error(output.slots[i], want[0]) < FLOAT32
        assert relative_error(output.attention[i], want[1]) < FLOAT32


def test_attention_is_shared_out_among_the_slots(arrays):
    output = run(build(heads=2), *arrays)
    assert output.attention.shape == (BATCH, SLOTS, INPUTS)
    assert np.allclose(output.attention.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("adjoint", [Unrolled(), Neumann()])
def test_permuting_initial_slots_permutes_the_result(arrays, adjoint):
    inputs, slots = arrays
    model = build(adjoint=adjoint)
    order = np.array([2, 0, 3, 1])
    plain, permuted = run(model, inputs, slots), run(model, inputs, slots[:, order])
    assert relative_error(permuted.slots, plain.slots[:, order]) < FLOAT32
    assert relative_error(permuted.attention, plain.attention[:, order]) < FLOAT32


def test_permuting_inputs_changes_no_slot(arrays):
    inputs, slots = arrays
    model = build()
    order = np.random.default_rng(1).permutation(INPUTS)
    want = run(model, inputs, slots).slots
    assert relative_error(run(model, inputs[:, order], slots).slots, want) < FLOAT32


def test_one_more_step_at_the_fixed_point_moves_nothing(arrays):
    inputs, slots = arrays
    model = build(steps=1000, seed=1)
    # An untrained step need not contract: its residual MLP can push slots on and on.
    model.step.mlp.leave.kernel[...] *= 0.1
    found = run(model, inputs, slots)
    assert np.all(found.stats.residual < 1e-5)
    model.solver = Picard(max_steps=1)
    assert relative_error(run(model, inputs, found.slots).slots, found.slots) < FLOAT32


def test_a_damped_update_reads_by_the_sum_and_one(arrays):
    """Against NumPy; a slot that sees next to nothing is moved by next to nothing."""
    inputs, slots = arrays
    model = build(steps=1, normalizer="damped")
    params = jax.tree.map(np.float64, split_model(model)[1])
    want = reference.slot_attention(
        np.float64(inputs[0]),
        np.float64(slots[0]),
        params,
        iterations=1,
        heads=1,
        damping=1.0,
    )
    assert relative_error(run(model, inputs, slots).slots[0], want[0]) < FLOAT32
    plain = run(build(steps=1), inputs, slots)
    assert relative_error(plain.slots[0], want[0]) > 1e-3


@pytest.mark.parametrize(
    "adjoint", [Unrolled(), Neumann(terms=2), Implicit(solver=GMRES(max_steps=24))]
)
def test_options_go_with_every_kind_of_backward_pass(arrays, adjoint):
    """Unrolled gradients of many steps are those of the fixed point."""
    inputs, _ = arrays

    def gradient(adjoint):
        model = build(steps=60, adjoint=adjoint, normalizer="damped", key_size=4)
        model.step.mlp.leave.kernel[...] *= 0.1  # A step that contracts.
        return loss_gradient(model, inputs)["step"]

    exact, found = gradient(Unrolled()), gradient(adjoint)
    # Two terms are an approximation: their direction is right.
    limit = FLOAT32 * 100 if not isinstance(adjoint, Neumann) else 0.5
    # At the fixed point these slots are equal: attention is even, whatever the keys.
    for name in ("project_v", "gru"):
        for want, got in zip(
            *map(jax.tree.leaves, (exact[name], found[name])), strict=True
        ):
            assert relative_error(got, want) < limit, name


def test_each_slot_has_a_gaussian_of_its_own():
    model = build(initial_slots="gaussians")
    assert model.slot_mean.shape == model.slot_log_scale.shape == (1, SLOTS, SIZE)
    drawn = np.asarray(model.initial(20_000, jax.random.key(0)))
    # Five standard errors of 20,000 draws.
    scale = np.exp(np.asarray(model.slot_log_scale[0]))
    error = np.abs(drawn.mean(axis=0) - np.asarray(model.slot_mean[0])) / scale
    assert error.max() < 5 / np.sqrt(20_000)
    np.testing.assert_allclose(drawn.std(axis=0), scale, rtol=0.05)


def loss_gradient(model, inputs):
    graphdef, params = split_model(model)

    def loss(params):
        model = nnx.merge(graphdef, params)
        slots = model.initial(BATCH, jax.random.key(0))
        return jnp.sum(jnp.sin(model(inputs, slots).slots))

    return jax.jit(jax.grad(loss))(params)


def test_gaussian_initial_slots_get_no_implicit_gradient(arrays):
    implicit = loss_gradient(build(adjoint=Neumann()), arrays[0])
    assert not np.any(implicit["slot_mean"]) and not np.any(implicit["slot_log_scale"])
    assert np.any(implicit["step"]["gru"]["input"]["kernel"])
    assert np.any(implicit["step"]["project_k"]["kernel"])
    assert np.any(loss_gradient(build(), arrays[0])["slot_mean"])


def test_learned_slots_are_trained_straight_through(arrays):
    model = build(adjoint=Neumann(), initial_slots="learned", straight_through=True)
    slots = model.initial(BATCH, jax.random.key(0))
    output = run(model, arrays[0], slots)
    gradient = loss_gradient(model, arrays[0])["slot_vectors"]
    # The gradient of Σ sin(value) with respect to the value itself.
    assert relative_error(gradient, jnp.cos(output.slots).sum(axis=0)) < FLOAT32
    plain = build(adjoint=Neumann(), initial_slots="learned", straight_through=True)
    plain.straight_through = False
    assert relative_error(output.slots, run(plain, arrays[0], slots).slots) < 1e-7


def test_initial_slots():
    gaussian = build()
    # PyTorch's Xavier bound for a [1, 1, D] tensor.
    for values in (gaussian.slot_mean[...], gaussian.slot_log_scale[...]):
        assert values.shape == (1, 1, SIZE)
        assert np.abs(values).max() <= np.sqrt(3 / SIZE)
        assert values.std() > 0.1
    drawn = gaussian.initial(500, jax.random.key(1))
    assert drawn.shape == (500, SLOTS, SIZE)
    assert np.allclose(drawn.mean(axis=(0, 1)), gaussian.slot_mean[0, 0], atol=0.2)
    scale = np.exp(gaussian.slot_log_scale[0, 0])
    assert np.allclose(drawn.std(axis=(0, 1)), scale, rtol=0.15)
    learned = build(initial_slots="learned")
    assert np.array_equal(
        learned.initial(2, jax.random.key(1))[1], learned.slot_vectors[...]
    )


def test_noise_on_learned_slots_is_proportional_and_gets_no_gradient():
    learned = build(initial_slots="learned")
    vectors = np.asarray(learned.slot_vectors[...])
    drawn = learned.initial(20_000, jax.random.key(1), noise=0.5)
    # Five standard errors of 20,000 draws.
    error = np.abs(np.mean(drawn, axis=0) - vectors) / (0.5 * np.abs(vectors))
    assert error.max() < 5 / np.sqrt(20_000)
    np.testing.assert_allclose(np.std(drawn, axis=0), 0.5 * abs(vectors), rtol=0.05)
    none = learned.initial(2, jax.random.key(1), noise=0.0)
    assert np.array_equal(none, learned.initial(2))
    with pytest.raises(ValueError, match="pass a key"):
        learned.initial(2, noise=0.5)
    graphdef, params = split_model(learned)

    def total(params):
        slots = nnx.merge(graphdef, params).initial(3, jax.random.key(1), noise=0.5)
        return jnp.sum(slots)

    assert np.array_equal(
        jax.grad(total)(params)["slot_vectors"], np.full_like(vectors, 3)
    )


def test_predicted_slots_read_the_inputs_and_are_trained_straight_through(arrays):
    model = build(adjoint=Neumann(), initial_slots="predicted", straight_through=True)
    graphdef, params = split_model(model)
    inputs = arrays[0]

    def start(params, inputs):
        return nnx.merge(graphdef, params).start(inputs)

    def loss(params, inputs):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(inputs).slots))

    found = np.asarray(jax.jit(start)(params, inputs))
    assert found.shape == (len(inputs), SLOTS, SIZE)
    # The order of the inputs does not matter; what they are does.
    turned = jax.jit(start)(params, inputs[:, ::-1])
    assert relative_error(turned, found) < FLOAT32
    assert not np.allclose(jax.jit(start)(params, inputs + inputs[:, :1]), found)
    gradient = jax.jit(jax.grad(loss))(params, inputs)
    for part in ("preheat", "slot_vectors"):
        assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient[part]))
    with pytest.raises(ValueError, match="straight_through=True"):
        build(adjoint=Neumann(), initial_slots="predicted")


def test_a_key_draws_the_initial_slots(arrays):
    model, key = build(), jax.random.key(3)
    drawn = jax.jit(lambda inputs: model(inputs, key=key).slots)(arrays[0])
    given = run(model, arrays[0], model.initial(BATCH, key)).slots
    assert relative_error(drawn, given) < FLOAT32
    with pytest.raises(ValueError, match="pass a key, or the slots"):
        model(arrays[0])
    learned = build(initial_slots="learned")
    assert learned(arrays[0]).slots.shape == (BATCH, SLOTS, SIZE)


def test_attention_gain_enlarges_the_initial_queries_and_keys_alone():
    _, plain = split_model(build())
    _, sharp = split_model(build(attention_gain=3.0))
    ratios = jax.tree.map(
        lambda a, b: jnp.max(jnp.abs(a)) / jnp.max(jnp.abs(b)), sharp, plain
    )
    enlarged = {
        jax.tree_util.keystr(path)
        for path, ratio in jax.tree_util.tree_leaves_with_path(ratios)
        if ratio > 1.01
    }
    assert {"project_q", "project_k"} == {
        name
        for name in ("project_q", "project_k", "project_v", "gru")
        if any(name in p for p in enlarged)
    }
    assert len(enlarged) == 2


def test_attention_gain_parts_the_slots_of_an_untrained_step(arrays):
    inputs, slots = arrays

    def spread(gain):
        after = run(build(steps=7, attention_gain=gain), inputs, slots).slots
        return float(jnp.mean(jnp.std(after, axis=1)))

    assert spread(3.0) > 1.2 * spread(1.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
        ({"heads": 3}, "slot_size must be a multiple of the slot heads, got 8 and 3"),
        ({"initial_slots": "zeros"}, "initial_slots must be"),
        ({"attention_gain": 0.0}, "attention_gain must be positive"),
        (
            {"initial_slots": "learned", "adjoint": Neumann()},
            "learned initial slots get no gradient",
        ),
    ],
)
def test_misuse_is_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**changes)


def test_step_function_closes_over_no_array():
    model = build()
    first, second = (StepFunction(nnx.split(model.step)[0]) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert dataclasses.is_dataclass(first)
