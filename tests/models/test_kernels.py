"""Kernels, interpreted, beside the plain path; on a GPU as they run there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference import FLOAT32
from several_devices import run_on_devices
from small_slate import section

from implicit_slots.models import kernels as pallas
from implicit_slots.models import layers, noise
from implicit_slots.models.build import build_model
from implicit_slots.models.dvae import gumbel_softmax
from implicit_slots.models.kernels.add_norm import add_norm
from implicit_slots.models.kernels.attention import attend
from implicit_slots.models.kernels.cross_entropy import cross_entropy
from implicit_slots.models.kernels.relaxed_tokens import relax

# Relative, of values and gradients: float32 sums in another order; bfloat16 rounded
# at other places.
TOLERANCE = {jnp.float32: 5e-6, jnp.bfloat16: 1e-2}
INTERPRET = jax.default_backend() != "gpu"


def draw(count, *shapes):
    keys = jax.random.split(jax.random.key(count), len(shapes))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def close(found, wanted, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        distance = np.linalg.norm(one - other)
        assert distance <= tolerance * np.linalg.norm(other)


def both(kernel, plain, arguments, d_out):
    """Values and gradients of a kernel and of the plain path, in full float32."""

    def run(function):
        def pulled(*arguments):
            out, pull = jax.vjp(function, *arguments)
            like = jax.tree.map(lambda d, y: d.astype(y.dtype), d_out, out)
            return out, pull(like)

        with jax.default_matmul_precision("highest"):
            return jax.jit(pulled)(*arguments)

    return run(kernel), run(plain)


def plain_attention(q, k, v, words, rate):
    logits = jnp.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
    if q.shape == k.shape:
        seen = jnp.tri(q.shape[1], dtype=bool)[None, None]
        logits = jnp.where(seen, logits, -jnp.inf)
    weights = nnx.softmax(logits, axis=-1)
    if words is not None:
        rows, columns = words
        kept = noise.kept_of_grid(rows, columns, rate)
        weights = jnp.where(kept, weights / (1 - rate), 0)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize(
    ("target", "source", "dtype", "rate"),
    [
        (20, None, jnp.float32, 0.3),
        (18, 5, jnp.float32, 0.0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (130, None, jnp.float32, 0.3),
                (130, None, jnp.float32, 0.0),
                (100, 12, jnp.float32, 0.3),
                (576, None, jnp.bfloat16, 0.1),
            ]
        ),
    ],
)
def test_attention(target, source, dtype, rate):
    batch, heads, dim = 2, 3, 24
    sizes = target, source or target, source or target, target
    *qkv, d_read = draw(0, *((batch, n, heads, dim) for n in sizes))
    shape = batch, heads, target, source or target
    keys = jax.random.split(jax.random.key(1))
    words = noise.grid_words(keys[0], keys[1], shape) if rate else None

    def fused(*qkv):
        q, k, v = (x.astype(dtype) for x in qkv)
        if source is None:
            return attend(jnp.stack([q, k, v], 2), None, words, rate, INTERPRET)
        memory = jnp.stack([k, v], 2)
        return attend(q[:, :, None], memory, words, rate, INTERPRET)

    def plain(*qkv):
        q, k, v = (x.astype(dtype).astype(jnp.float32) for x in qkv)
        return plain_attention(q, k, v, words, rate)

    close(*both(fused, plain, qkv, d_read), TOLERANCE[dtype])


def test_attention_drops_the_same_weights():
    """With keys of zero and one-hot values what is read are the weights themselves."""
    length, rate = 16, 0.5
    q, k, _ = draw(0, *[(1, length, 1, length)] * 3)
    v = jnp.eye(length)[None, :, None]
    keys = jax.random.split(jax.random.key(0))
    rows, columns = noise.grid_words(keys[0], keys[1], (1, 1, length, length))
    packed = jnp.stack([q, 0 * k, v], 2)
    read = np.asarray(attend(packed, None, (rows, columns), rate, INTERPRET))
    kept = np.asarray(noise.kept_of_grid(rows, columns, rate))[0, 0]
    kept = kept & np.tri(length, dtype=bool)
    assert np.array_equal(read[0, :, 0] > 0, kept)
    assert 0.4 < kept.sum() / np.tri(length).sum() < 0.6


@pytest.mark.parametrize(
    ("tokens", "dim", "vocab", "dtype"),
    [
        (20, 24, 50, jnp.float32),
        pytest.param(130, 192, 300, jnp.float32, marks=pytest.mark.slow),
        pytest.param(70, 200, 512, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_cross_entropy(tokens, dim, vocab, dtype):
    x, kernel, d_loss = draw(0, (2, tokens, dim), (dim, vocab), (2, tokens))
    targets = jax.random.randint(jax.random.key(1), (2, tokens), 0, vocab)

    def fused(x, kernel):
        return cross_entropy(x.astype(dtype), kernel, targets, INTERPRET)

    def plain(x, kernel):
        x, kernel = (a.astype(dtype).astype(jnp.float32) for a in (x, kernel))
        logits = jax.nn.log_softmax(x @ kernel)
        return -jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]

    close(*both(fused, plain, (x, kernel), d_loss), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("tokens", "features", "vocab", "dtype"),
    [
        (20, 12, 50, jnp.float32),
        pytest.param(70, 64, 300, jnp.float32, marks=pytest.mark.slow),
        pytest.param(70, 64, 512, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_relaxed_tokens(tokens, features, vocab, dtype):
    """The same noise as the plain path's; tokens that are the Gumbel-max of another."""
    x, to_logits, bias, of_tokens, d_read = draw(
        0,
        (2, tokens, features),
        (features, vocab),
        (vocab,),
        (vocab, 10),
        (2, tokens, 10),
    )
    temperature, seeds = jnp.float32(0.7), noise.seeds(jax.random.key(1), 2)

    def logits(x, to_logits, bias):
        x, to_logits = (a.astype(dtype).astype(jnp.float32) for a in (x, to_logits))
        return x @ to_logits + bias[None, None]

    def fused(x, *weights):
        x = x.astype(dtype)
        return relax(x, *weights, temperature, seeds, INTERPRET)[0]  # pyright: ignore

    def plain(x, to_logits, bias, of_tokens):
        soft = gumbel_softmax(logits(x, to_logits, bias), temperature, seeds[0])
        return soft @ of_tokens.astype(dtype).astype(jnp.float32)

    arguments = x, to_logits, bias, of_tokens
    close(*both(fused, plain, arguments, d_read), TOLERANCE[dtype])
    with jax.default_matmul_precision("highest"):
        halves = x.astype(dtype), *arguments[1:]
        _, tokens = relax(*halves, temperature, seeds, INTERPRET)  # pyright: ignore
        noisy = logits(x, to_logits, bias)
    noisy += noise.gumbel(seeds[1], noisy.shape)
    assert np.array_equal(tokens, noisy.argmax(-1))


@pytest.mark.parametrize(
    ("tokens", "dim", "dtype", "rate"),
    [
        (20, 24, jnp.float32, 0.3),
        pytest.param(20, 24, jnp.float32, 0.0, marks=pytest.mark.slow),
        pytest.param(130, 192, jnp.float32, 0.1, marks=pytest.mark.slow),
        pytest.param(130, 192, jnp.bfloat16, 0.1, marks=pytest.mark.slow),
    ],
)
def test_add_norm(tokens, dim, dtype, rate):
    shape = 2, tokens, dim
    x, branch, scale, bias, *d_out = draw(0, shape, shape, (dim,), (dim,), shape, shape)
    seed = noise.seeds(jax.random.key(1)) if rate else None

    def fused(x, branch, scale, bias):
        branch = branch.astype(dtype)
        return add_norm(
            x, branch, seed, scale, bias, rate, layers.NORM_EPSILON, INTERPRET
        )

    def plain(x, branch, scale, bias):
        branch = branch.astype(dtype).astype(jnp.float32)
        total = x + layers.dropout(branch, rate, seed)
        norm = layers.LayerNorm(dim)
        norm.scale[...], norm.bias[...] = scale, bias
        return total, norm(total)

    close(*both(fused, plain, (x, branch, scale, bias), tuple(d_out)), TOLERANCE[dtype])


def on_two_devices():
    """What a process with two devices does: the noise of an image is its own."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x, branch, scale, bias = draw(0, (2, 20, 24), (2, 20, 24), (24,), (24,))
    to_logits, of_tokens = draw(1, (24, 50), (50, 10))
    seeds = noise.seeds(jax.random.key(1), 2)

    @jax.jit
    def run(x, branch):
        def made(x, branch):
            packed = jnp.stack([x, branch, x], 2).reshape(2, 20, 3, 3, 8)
            words = noise.grid_words(seeds[0], seeds[1], (2, 3, 20, 20))
            joined = add_norm(x, branch, seeds[0], scale, bias, 0.3, 1e-5, True)
            read = attend(packed, None, words, 0.3, True)
            of_image = x, to_logits, jnp.zeros(50), of_tokens, jnp.float32(0.7)
            relaxed, tokens = relax(*of_image, seeds, True)  # pyright: ignore
            losses = cross_entropy(x, to_logits, tokens, True)
            return joined, read, relaxed, losses

        out, pull = jax.vjp(made, x, branch)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    whole = run(x, branch)
    split = run(*jax.device_put((x, branch), rows))
    assert split[0][1].sharding.is_equivalent_to(rows, 4)
    for one, other in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_each_device_works_on_its_images():
    run_on_devices(2, "test_kernels", "on_two_devices")


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_slate_with_kernels_equals_slate_without(deterministic, monkeypatch):
    """Losses and gradients; both draw the same tokens when told to."""
    x = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
    monkeypatch.setattr(
        noise,
        "categorical",
        lambda key, logits: (logits + noise.gumbel(key, logits.shape)).argmax(-1),
    )

    def losses(kernels):
        model = build_model(section(kernels=kernels), resolution=16, seed=0)
        graphdef, params = nnx.split(model)

        def loss(params):
            output = nnx.merge(graphdef, params)(
                {"image": x},
                temperature=0.5,
                key=jax.random.key(1),
                deterministic=deterministic,
            )
            return sum(one.sum() for one in output.losses.values())

        with jax.default_matmul_precision("highest"):
            value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        # Together: some have a gradient of zero but for rounding.
        leaves = [leaf.reshape(-1) for leaf in jax.tree.leaves(gradient)]
        return value, jnp.concatenate(leaves)

    close(losses("pallas"), losses("xla"), FLOAT32)


def test_kernels_run_on_gpus_alone():
    assert not pallas.use("xla")
    assert pallas.use("pallas")
    assert pallas.use("auto") == (jax.default_backend() == "gpu")
    with pytest.raises(ValueError, match="kernels must be one of auto, xla, pallas"):
        build_model(section(kernels="cudnn"), resolution=16, seed=0)
