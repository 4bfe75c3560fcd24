"""The TPU's kernels, interpreted, beside the plain path; they need no TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from several_devices import run_on_devices

from implicit_slots.models import kernels as pallas
from implicit_slots.models import noise
from implicit_slots.models.kernels import attention_tpu
from implicit_slots.models.kernels.split import on_each_device
from implicit_slots.runtime.devices import batch_over, build_mesh

RATE = 0.25


def problem(target, source, heads, head_dim, rate, dtype=jnp.float32):
    """Queries, keys, values, a cotangent, and the dropout's words."""
    keys = jax.random.split(jax.random.key(0), 6)
    lengths = (target, source, source, target)
    arrays = [
        jax.random.normal(key, (2, length, heads, head_dim), dtype)
        for key, length in zip(keys, lengths, strict=False)
    ]
    shape = (2, heads, target, source)
    return arrays, noise.grid_words(keys[4], keys[5], shape) if rate else None


def plain(q, k, v, words, rate, causal):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    if causal:
        seen = jnp.tri(*logits.shape[-2:], dtype=bool)
        logits = jnp.where(seen[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits)
    if words is not None:
        rows, columns = words
        kept = noise.kept_of_grid(rows, columns, rate)
        weights = jnp.where(kept, weights / (1 - rate), 0)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def both(arrays, words, rate, causal):
    """What attention returns and its derivatives, by the kernels and plainly."""
    *inputs, cotangent = arrays
    found = []
    fused = functools.partial(attention_tpu.attend, interpret=True)
    for attend in (fused, plain):

        @jax.jit
        def run(q, k, v, cotangent, attend=attend):
            read, back = jax.vjp(
                lambda q, k, v: attend(q, k, v, words, rate, causal), q, k, v
            )
            return read, *back(cotangent.astype(read.dtype))

        found.append(run(*inputs, cotangent))
    return zip(*found, strict=True)


@pytest.mark.parametrize(
    ("target", "source", "heads", "head_dim", "causal"),
    [
        (20, 20, 1, 4, True),
        pytest.param(5, 3, 2, 24, False, marks=pytest.mark.slow),
        pytest.param(130, 130, 2, 24, True, marks=pytest.mark.slow),
        pytest.param(257, 257, 3, 40, True, marks=pytest.mark.slow),
        pytest.param(130, 12, 8, 24, False, marks=pytest.mark.slow),
        pytest.param(130, 140, 2, 5, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("rate", [RATE, pytest.param(0.0, marks=pytest.mark.slow)])
def test_values_and_derivatives_are_the_plain_path_s(
    target, source, heads, head_dim, causal, rate
):
    arrays, words = problem(target, source, heads, head_dim, rate)
    for one, other in both(arrays, words, rate, causal):
        np.testing.assert_allclose(one, other, atol=3e-6, rtol=1e-5)


def test_the_dropout_s_mask_is_the_plain_path_s_bit_for_bit():
    # Values that are unit vectors: what is read are the weights themselves.
    (q, k, *_), words = problem(9, 9, 1, 9, RATE)
    assert words is not None
    v = jnp.broadcast_to(jnp.eye(9)[None, :, None], (2, 9, 1, 9))
    read = jnp.asarray(attention_tpu.attend(q, k, v, words, RATE, False, True))
    rows, columns = words
    kept = noise.kept_of_grid(rows, columns, RATE)[:, 0]
    assert (~kept).sum() > 20
    np.testing.assert_array_equal(read[:, :, 0] > 0, kept)


@pytest.mark.slow
def test_queries_see_no_later_key():
    (q, k, v, _), _ = problem(6, 6, 1, 4, 0.0)
    attend = functools.partial(
        attention_tpu.attend, words=None, rate=0.0, causal=True, interpret=True
    )
    same = attend(q, k.at[:, 4:].add(1.0), v.at[:, 4:].add(1.0))[:, :4]
    np.testing.assert_array_equal(same, attend(q, k, v)[:, :4])


@pytest.mark.slow
def test_bfloat16_is_multiplied_and_float32_is_summed():
    arrays, words = problem(20, 20, 2, 8, RATE, jnp.bfloat16)
    for one, other in both(arrays, words, RATE, True):
        assert one.dtype == jnp.bfloat16
        error = jnp.linalg.norm(one.astype(jnp.float32) - other.astype(jnp.float32))
        assert error < 0.01 * jnp.linalg.norm(other.astype(jnp.float32))


def test_kernels_run_on_tpus_where_the_batch_s_devices_are_known_and_divide_it():
    assert not pallas.use_on_tpus("auto", 4)
    with batch_over(build_mesh(1, devices=jax.devices()[:1])):
        assert pallas.use_on_tpus("auto", 4)
        assert not pallas.use_on_tpus("xla", 4)


def on_two_devices():
    """What a process with two devices does: each works on its images."""
    arrays, words = problem(20, 20, 2, 8, RATE)

    def run():
        return [one for one, _ in both(arrays, words, RATE, True)]

    with batch_over(build_mesh(2, devices=jax.devices())):
        split = run()
    for one, other in zip(split, run(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_each_device_works_on_its_images():
    run_on_devices(2, "test_kernels_tpu", "on_two_devices")


def test_a_function_of_the_batch_alone_is_run_whole_without_devices():
    assert on_each_device(lambda x, y: x + y, "b t, t -> b t")(1, 2) == 3
