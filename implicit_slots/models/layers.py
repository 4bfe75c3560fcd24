"""Layers as the papers define them, initialised as their PyTorch code does."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from implicit_slots.models import noise
from implicit_slots.models.products import add_bias, convolve, dense, relu
from implicit_slots.runtime.devices import platform
from implicit_slots.runtime.errors import InvalidValue

# PyTorch's default for LayerNorm and group_norm; Flax's is 1e-6.
NORM_EPSILON = 1e-5

POSITION_KINDS = ("normal", "smooth")
# What products are made in; None: as their parameters are.
PRECISIONS = {"float32": None, "bfloat16": jnp.bfloat16}

# PyTorch's kaiming_uniform_(nonlinearity="relu"): bound √(6 / fan_in).
kaiming_uniform = nnx.initializers.variance_scaling(2.0, "fan_in", "uniform")


def xavier_uniform(gain: float = 1.0) -> nnx.Initializer:
    """PyTorch's `xavier_uniform_`: bound gain · √(6 / (fan_in + fan_out))."""
    return nnx.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


class Linear(nnx.Module):
    """A dense layer, computed as one product of two matrices.

    Args:
      in_features: width of the input.
      out_features: width of the output.
      bias: whether to add one; it begins at zero.
      kernel_init: Xavier-uniform unless told otherwise.
      full_output: return float32 whatever the precision: for logits and images.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        kernel_init: nnx.Initializer | None = None,
        full_output: bool = False,
        rngs: nnx.Rngs,
    ):
        init = kernel_init or xavier_uniform()
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None
        self.full_output = full_output
        self.dtype = None  # the parameters'; see `set_precision`

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        """Maps each vector of the last axis."""
        return self.affine(
            x, self.kernel[...], None if self.bias is None else self.bias[...]
        )

    def affine(
        self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None
    ) -> jax.Array:
        """Maps each vector by these parameters, in this layer's precision."""
        grid = x.shape[:-1]
        x = x.astype(self.dtype or kernel.dtype)
        if platform() != "tpu":
            # XLA's CPU compiler transposes a cotangent of more than two axes in memory
            # before the product that gives the kernel's gradient. Its TPU compiler has
            # tokens innermost, an image's own, and would lay them out anew.
            x = x.reshape(-1, x.shape[-1])
        y = dense(x, kernel, full=self.full_output)
        if bias is not None:
            y = add_bias(y, bias)
        return y.reshape(*grid, kernel.shape[1])


def set_precision(model: nnx.Module, precision: str) -> None:
    """Sets what a model multiplies in: every dense layer, convolution and attention.

    Parameters stay float32, and so do residual streams, norms' and softmaxes'
    statistics, slots, logits, images and losses.

    Args:
      model: changed in place.
      precision: "float32" or "bfloat16".

    Raises:
      ValueError: if there is no such precision.
    """
    if precision not in PRECISIONS:
        raise InvalidValue(
            f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
        )
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear | Conv | TransposedConv):
            module.dtype = PRECISIONS[precision]


def split_key(key: Key[Array, ""] | None, count: int) -> list[Key[Array, ""] | None]:
    """Returns `count` keys; no keys of no key."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class Conv(nnx.Conv):
    """Flax's convolution, with one stride for both axes and a padding by its name.

    In bfloat16 the gradients of its parameters are float32 all through.
    """

    def __call__(
        self, inputs: Float[Array, "batch height width features"], out_sharding=None
    ) -> Float[Array, "batch rows columns outputs"]:
        """Maps a grid of features to a grid."""
        if self.dtype is None:
            return super().__call__(inputs, out_sharding)
        x = inputs.astype(self.dtype)
        stride, padding = self.strides, self.padding
        assert isinstance(stride, int) and isinstance(padding, str)
        x = convolve(x, self.kernel[...], stride, padding)
        return x if self.bias is None else add_bias(x, self.bias[...])


class TransposedConv(nnx.Module):
    """A transposed convolution that enlarges a grid by its stride, "same" padding.

    Computed as a convolution of the small grid that makes all stride² pixels of a cell
    at once: XLA's CPU compiler would convolve a grid of zeros between the cells.

    Args:
      in_features: channels that come in.
      out_features: channels that go out.
      kernel: its side, an odd number.
      stride: by how much the grid grows.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel: int,
        stride: int,
        rngs: nnx.Rngs,
    ):
        if stride < 1 or kernel % 2 == 0:
            raise InvalidValue(
                "a transposed convolution needs a stride of at least 1 and an odd "
                f"kernel, got {stride} and {kernel}"
            )
        shape = (kernel, kernel, in_features, out_features)
        self.kernel = nnx.Param(xavier_uniform()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.stride = stride
        self.dtype = None  # the parameters'; see `set_precision`

    def __call__(
        self, x: Float[Array, "batch rows columns inputs"]
    ) -> Float[Array, "batch height width outputs"]:
        """Maps a grid of features to one of `stride` times as many rows and columns."""
        kernel, stride = self.kernel[...], self.stride
        x = x.astype(self.dtype or kernel.dtype)
        # Output pixel i reads, through tap t, the input at (i + t - pad) / stride
        # if that is whole. With i = stride·j + phase: at j + offset.
        side, inputs, outputs = kernel.shape[0], *kernel.shape[2:]
        # As Keras and Flax pad.
        pad = side - 1 if stride >= side else -(-(side + stride - 2) // 2)
        reach = max(pad, side - 2 - pad + stride) // stride
        taps = [
            [
                tap if 0 <= tap < side else None
                for phase in range(stride)
                for tap in [stride * offset + pad - phase]
            ]
            for offset in range(-reach, reach + 1)
        ]
        padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
        index = jnp.array([[side if t is None else t for t in row] for row in taps])
        # [offset, phase] of rows, then of columns.
        gathered = padded[index[:, :, None, None], index[None, None]]
        gathered = gathered.transpose(0, 2, 4, 1, 3, 5)
        small = gathered.reshape(
            len(taps), len(taps), inputs, stride * stride * outputs
        )
        made = convolve(x, small, 1, "SAME")
        batch, rows, columns, _ = made.shape
        made = made.reshape(batch, rows, columns, stride, stride, outputs)
        made = made.transpose(0, 1, 3, 2, 4, 5)
        made = made.reshape(batch, rows * stride, columns * stride, outputs)
        return add_bias(made, self.bias[...])


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
        return _normalise(x, (-1,), self.scale[...], self.bias[...])


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
        return _normalise(x, (1, 2, 3), self.scale[...], self.bias[...])


def _normalise(
    x: jax.Array, axes: tuple[int, ...], scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """Computes in the parameters' precision, returns the input's."""
    full = x.astype(scale.dtype)
    centred = full - full.mean(axis=axes, keepdims=True)
    variance = jnp.square(centred).mean(axis=axes, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + NORM_EPSILON)
    shape = (1,) * (x.ndim - 1) + scale.shape
    return (normed * scale.reshape(shape) + bias.reshape(shape)).astype(x.dtype)


def dropout(
    x: Float[Array, "..."], rate: float, key: noise.Seed | None
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
        self.enter = Linear(features, hidden, kernel_init=kaiming_uniform, rngs=rngs)
        self.leave = Linear(
            hidden, features, kernel_init=xavier_uniform(gain), rngs=rngs
        )

    def __call__(self, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
        """Maps each vector of the last axis."""
        return self.leave(relu(self.enter(x))).astype(x.dtype)


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
        self.input = Linear(features, 3 * features, rngs=rngs)
        self.recurrent = Linear(
            features,
            3 * features,
            kernel_init=nnx.initializers.orthogonal(),
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "... dim"], h: Float[Array, "... dim"]
    ) -> Float[Array, "... dim"]:
        """Returns the next state from the input `x` and the state `h`."""
        of_input, of_state = (
            y.astype(h.dtype) for y in (self.input(x), self.recurrent(h))
        )
        x_reset, x_update, x_new = jnp.split(of_input, 3, axis=-1)
        h_reset, h_update, h_new = jnp.split(of_state, 3, axis=-1)
        reset = nnx.sigmoid(x_reset + h_reset)
        update = nnx.sigmoid(x_update + h_update)
        new = jnp.tanh(x_new + reset * h_new)
        return (1 - update) * new + update * h


def smooth_positions(
    key: Key[Array, ""], side: int, width: int
) -> Float[Array, "tokens {width}"]:
    """Draws position vectors of a square grid that vary slowly over it.

    Each feature is a random mixture, of unit variance, of the products of the four
    lowest cosines of the row and of the column (the constant left out). With the
    published independent vectors, slot attention first has to learn which positions
    are neighbours; with these it clusters neighbours from the first step.
    """
    centres = (jnp.arange(side, dtype=jnp.float32) + 0.5) / side
    frequencies = jnp.arange(4, dtype=jnp.float32)
    cosines = jnp.cos(jnp.pi * frequencies[:, None] * centres[None, :])
    basis = jnp.einsum("ir,jc->rcij", cosines, cosines).reshape(side * side, -1)[:, 1:]
    spread = basis.std(axis=0, keepdims=True)
    # On the smallest grids the highest cosines are constant: they tell nothing apart.
    basis = jnp.where(spread > 1e-3, basis / jnp.maximum(spread, 1e-3), 0)
    mixture = jax.random.normal(key, (basis.shape[1], width))
    return basis @ mixture / basis.shape[1] ** 0.5


def token_positions(
    kind: str, scale: float, side: int, width: int, *, rngs: nnx.Rngs
) -> Float[Array, "positions {width}"]:
    """Draws SLATE's position vectors: of BOS, then of a square grid of tokens.

    Args:
      kind: "normal", truncated, independent at every position; or "smooth", the grid's
        by `smooth_positions`.
      scale: standard deviation; of the normal before its truncation.
      side: of the grid.
      width: of a vector.
      rngs: source of both.
    """
    if kind not in POSITION_KINDS:
        raise InvalidValue(
            f"initial_positions must be one of {', '.join(POSITION_KINDS)}, got "
            f"{kind!r}"
        )
    draw = nnx.initializers.truncated_normal(scale)
    positions = draw(rngs.params(), (1 + side**2, width))
    if kind == "smooth":
        grid = scale * smooth_positions(rngs.params(), side, width)
        return positions.at[1:].set(grid)
    return positions
