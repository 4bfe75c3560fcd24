"""Layers as the papers define them, initialised as their PyTorch code does."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from implicit_slots.models import noise

# PyTorch's default for LayerNorm and group_norm; Flax's is 1e-6.
NORM_EPSILON = 1e-5

# PyTorch's kaiming_uniform_(nonlinearity="relu"): bound √(6 / fan_in).
kaiming_uniform = nnx.initializers.variance_scaling(2.0, "fan_in", "uniform")


def xavier_uniform(gain: float = 1.0) -> nnx.Initializer:
    """PyTorch's `xavier_uniform_`: bound gain · √(6 / (fan_in + fan_out))."""
    return nnx.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


class Linear(nnx.Linear):
    """A dense layer, computed as one product of two matrices."""

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        """Maps each vector of the last axis."""
        # XLA's CPU compiler transposes a cotangent of more than two axes in memory
        # before the product that gives the kernel's gradient.
        rows = super().__call__(x.reshape(-1, x.shape[-1]))
        return rows.reshape(*x.shape[:-1], -1)


def linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    kernel_init: nnx.Initializer | None = None,
    rngs: nnx.Rngs,
) -> Linear:
    """A dense layer: Xavier-uniform unless told otherwise, bias zero."""
    return Linear(
        in_features,
        out_features,
        use_bias=bias,
        kernel_init=kernel_init or xavier_uniform(),
        rngs=rngs,
    )


class LayerNorm(nnx.Module):
    """Layer normalisation with PyTorch's ε and a two-pass variance.

    As `nnx.LayerNorm(use_fast_variance=False)`, written so that scale and bias are
    broadcast inside the pass that uses them; XLA's CPU compiler stores them otherwise.

    Args:
      features: width of the last axis, each with a scale and a bias.
    """

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        """Normalises each vector of the last axis."""
        return _affine(_standardise(x, (-1,)), self.scale[...], self.bias[...])


class OneGroupNorm(nnx.Module):
    """Group normalisation with a single group: over rows, columns and channels.

    Args:
      features: channels, each with a scale and a bias.
    """

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(
        self, x: Float[Array, "batch height width dim"]
    ) -> Float[Array, "batch height width dim"]:
        """Normalises each image on its own."""
        return _affine(_standardise(x, (1, 2, 3)), self.scale[...], self.bias[...])


def _standardise(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    centred = x - x.mean(axis=axes, keepdims=True)
    variance = jnp.square(centred).mean(axis=axes, keepdims=True)
    return centred * jax.lax.rsqrt(variance + NORM_EPSILON)


def _affine(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    shape = (1,) * (x.ndim - 1) + scale.shape
    return x * scale.reshape(shape) + bias.reshape(shape)


def dropout(
    x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "..."]:
    """Zeroes entries with probability `rate`, scales the rest; off without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(noise.keep_mask(key, rate, x.shape), x / (1 - rate), 0)


class MLP(nnx.Module):
    """Two dense layers with a ReLU between; the first one Kaiming-uniform.

    Args:
      features: width of the input and of the output.
      hidden: width between.
      gain: of the second layer's Xavier-uniform initialiser.
      rngs: source of the initial parameters.
    """

    def __init__(
        self, features: int, hidden: int, *, gain: float = 1.0, rngs: nnx.Rngs
    ):
        self.enter = linear(features, hidden, kernel_init=kaiming_uniform, rngs=rngs)
        self.leave = linear(
            hidden, features, kernel_init=xavier_uniform(gain), rngs=rngs
        )

    def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        """Maps each vector of the last axis."""
        return self.leave(nnx.relu(self.enter(x)))


class GRUCell(nnx.Module):
    """A gated recurrent unit in PyTorch's convention.

    Gates are stacked in the order reset, update, new; there are two biases, and the
    reset gate is applied after the recurrent product:
    n = tanh(W_in x + b_in + r · (W_hn h + b_hn)).

    Args:
      features: width of the input and of the state.
      rngs: source of the initial parameters.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        # PyTorch computes fans on the stacked [3·D, D] matrices, and draws the
        # recurrent one as a single orthogonal [3·D, D] matrix: its columns are
        # orthonormal, so in our transposed layout the rows are.
        self.input = linear(features, 3 * features, rngs=rngs)
        self.recurrent = linear(
            features,
            3 * features,
            kernel_init=nnx.initializers.orthogonal(),
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "... dim"], h: Float[Array, "... dim"]
    ) -> Float[Array, "... dim"]:
        """Returns the next state from the input `x` and the state `h`."""
        x_reset, x_update, x_new = jnp.split(self.input(x), 3, axis=-1)
        h_reset, h_update, h_new = jnp.split(self.recurrent(h), 3, axis=-1)
        reset = nnx.sigmoid(x_reset + h_reset)
        update = nnx.sigmoid(x_update + h_update)
        new = jnp.tanh(x_new + reset * h_new)
        return (1 - update) * new + update * h
