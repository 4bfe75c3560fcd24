"""What is computed in which precision, and what is computed again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from reference import FLOAT32, relative_error
from small_slate import RESOLUTION, Compiled, section

from implicit_slots.models import layers, products
from implicit_slots.models.build import build_model, split_model
from implicit_slots.models.layers import set_precision
from implicit_slots.runtime.devices import traced_for

pytestmark = pytest.mark.usefixtures("strict_promotion")


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(size=(2, RESOLUTION, RESOLUTION, 3)), jnp.float32)


def build(precision="float32", **changes):
    config = section(**{"dropout": 0.0, "attention_dropout": 0.0} | changes)
    return Compiled(
        build_model(config, resolution=RESOLUTION, seed=0, precision=precision)
    )


def loss(model, image):
    output = model({"image": image}, temperature=0.5, key=jax.random.key(0))
    return sum(loss.mean() for loss in output.losses.values()), output


def training(compiled):
    """(params, image) -> ((loss, output), gradient)."""
    merge = compiled.merge
    return jax.value_and_grad(lambda p, x: loss(merge(p), x), has_aux=True)


@pytest.fixture(scope="module")
def results(image):
    return {
        name: jax.jit(training(compiled))(compiled.params, image)
        for name, compiled in {
            "float32": build(),
            "bfloat16": build("bfloat16"),
            "remat": build(remat=True),
        }.items()
    }


@pytest.mark.slow
def test_bfloat16_computes_the_same_to_its_precision(results):
    (want, one), gradient = results["float32"]
    (got, other), half = results["bfloat16"]
    assert abs(got - want) < 0.01 * want and got != want
    assert relative_error(other.reconstruction, one.reconstruction) < 0.02
    for part in gradient:
        ours, theirs = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree[part])])
            for tree in (half, gradient)
        )
        assert relative_error(ours, theirs) < 0.1, part


def test_what_stays_float32(results):
    """Parameters' gradients, losses, images, attention, the solver's residual."""
    value, gradient = results["bfloat16"]
    found = {leaf.dtype for leaf in jax.tree.leaves((value, gradient))}
    assert jnp.dtype("bfloat16") not in found and jnp.dtype("float32") in found


def operations(jaxpr):
    """Every operation of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from operations(inner)


def test_products_are_made_in_bfloat16_but_for_the_fixed_point(image):
    compiled = build("bfloat16", kernels="xla")
    # A CPU multiplies some bfloat16 numbers as float32.
    with traced_for("gpu"):
        program = jax.make_jaxpr(training(compiled))(compiled.params, image)
    products, exponentials = set(), set()
    for operation in operations(program.jaxpr):
        dtypes = {var.aval.dtype.name for var in operation.invars}
        if operation.primitive.name in ("dot_general", "conv_general_dilated"):
            products |= {(name, operation.params["precision"]) for name in dtypes}
        elif operation.primitive.name in ("exp", "log", "tanh", "logistic"):
            exponentials |= dtypes
    # Neither TF32 nor a pass of bfloat16, forward or backward.
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert products == {("bfloat16", None), ("float32", highest)}
    assert exponentials == {"float32"}


def test_slots_are_the_same_whatever_the_precision():
    inputs, slots = jnp.cos(jnp.arange(64.0)).reshape(2, 4, 8), jnp.ones((2, 2, 6))
    full, half = (
        compiled(lambda m, *given: m.slot_attention(*given).slots, inputs, slots)
        for compiled in (build(), build("bfloat16"))
    )
    np.testing.assert_array_equal(half, full)


@pytest.mark.slow
def test_generation_runs_in_bfloat16():
    compiled = build("bfloat16")
    slots = jnp.ones((2, 3, 6))
    assert compiled(lambda m, s: m.generate(s), slots).shape == (2, 4, 4)


@pytest.mark.slow
def test_recomputed_blocks_change_nothing(results):
    (want, _), gradient = results["float32"]
    (got, _), again = results["remat"]
    assert abs(got - want) < FLOAT32 * want
    for ours, theirs in zip(
        jax.tree.leaves(again), jax.tree.leaves(gradient), strict=True
    ):
        assert np.abs(ours - theirs).max() <= FLOAT32 * np.abs(theirs).max() + 1e-6


@pytest.mark.slow
def test_recomputed_blocks_are_not_kept_for_the_backward_pass():
    size = {"num_blocks": 4, "width": 64, "num_heads": 4, "vocab_size": 8}

    def kept(remat):
        config = section(**size, remat=remat)
        model: Any = nnx.eval_shape(lambda: build_model(config, resolution=32, seed=0))
        compiled = Compiled(model)

        def pullback(params, image):
            return jax.vjp(lambda p: loss(compiled.merge(p), image)[0], params)[1]

        shapes = jax.eval_shape(pullback, compiled.params, jnp.zeros((4, 32, 32, 3)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    assert kept(True) < 0.6 * kept(False)


def test_no_such_precision_is_a_sentence():
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16"):
        set_precision(build().model, "float16")


def test_float32_is_differentiated_forward_on_every_platform():
    """As the fixed point's step is."""
    x, kernel = jnp.ones((3, 2)), jnp.ones((2, 4))
    for kind in ("cpu", "gpu", "tpu"):
        with traced_for(kind):
            lowered = jax.jit(
                lambda k: jax.jvp(lambda k: products.dense(x, k), (k,), (k,))
            ).lower(kernel)
        assert [out.shape for out in lowered.out_info] == [(3, 4)] * 2


def test_gradients_of_parameters_are_summed_in_float32():
    """257 has nine bits; bfloat16 has eight."""
    rngs = nnx.Rngs(0)
    model = nnx.List(
        [
            layers.Linear(1, 1, rngs=rngs),
            layers.Linear(1, 1, full_output=True, rngs=rngs),
            layers.Conv(1, 1, (1, 1), rngs=rngs),
            layers.TransposedConv(1, 1, kernel=1, stride=1, rngs=rngs),
        ]
    )
    set_precision(model, "bfloat16")
    graphdef, params = split_model(model)

    def loss(params):
        outputs = [
            layer(jnp.ones((257, 1, 1, 1))) for layer in nnx.merge(graphdef, params)
        ]
        assert [x.dtype.name for x in outputs] == [
            "bfloat16",
            "float32",
            *["bfloat16"] * 2,
        ]
        return sum(x.astype(jnp.float32).sum() for x in outputs)

    # Without what XLA may do better of its own accord.
    exact: Any = {"xla_allow_excess_precision": False}
    gradient = jax.jit(jax.grad(loss)).lower(params).compile(exact)
    found = jax.tree.leaves(gradient(params))
    assert [(leaf.dtype.name, leaf.item()) for leaf in found] == [("float32", 257)] * 8


@pytest.mark.parametrize(
    ("side", "stride", "padding"),
    [(3, 1, "SAME"), (4, 3, "SAME"), (3, 4, "VALID")],
)
def test_a_convolutions_gradients_are_those_of_float32(side, stride, padding):
    """At a size that leaves cells over, with numbers that bfloat16 holds."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)

    x, kernel = draw(2, 13, 10, 3), draw(side, side, 3, 2)

    def convolved(x, kernel):
        return products.convolve(x, kernel, stride, padding)

    out, back = jax.vjp(convolved, x, kernel)
    half, back_half = jax.vjp(convolved, x.astype(jnp.bfloat16), kernel)
    cotangent = draw(*out.shape)
    want = back(cotangent)
    got = back_half(cotangent.astype(jnp.bfloat16))
    assert [leaf.dtype.name for leaf in got] == ["bfloat16", "float32"]
    np.testing.assert_array_equal(half, out.astype(jnp.bfloat16))
    np.testing.assert_array_equal(got[0], want[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(got[1], want[1])
