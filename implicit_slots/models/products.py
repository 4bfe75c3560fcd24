"""Products in bfloat16, of activations and with parameters."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from implicit_slots.models.kernels.split import over_batch
from implicit_slots.runtime.devices import platform


def product(
    indices: str, one: Float[Array, "..."], other: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns an einsum of two arrays of one dtype, in float32 at the least."""
    if one.dtype.itemsize >= 4:
        return jnp.einsum(indices, one, other)
    if platform() == "cpu":
        # Not every shape has such a product of bfloat16 there. Those of the same
        # numbers as float32 are equal: float32 holds a product of two exactly.
        full = one.astype(jnp.float32), other.astype(jnp.float32)
        return jnp.einsum(indices, *full)
    return _half_product(indices, one, other)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _half_product(indices, one, other):
    return jnp.einsum(indices, one, other, preferred_element_type=jnp.float32)


@_half_product.defjvp
def _half_product_jvp(indices, primals, tangents):
    # The derivative of a product with a float32 result multiplies float32 by bfloat16,
    # at half the speed. This one rounds the cotangent first, as PyTorch does.
    (one, other), (d_one, d_other) = primals, tangents
    tangent = jnp.einsum(indices, d_one, other) + jnp.einsum(indices, one, d_other)
    return _half_product(indices, one, other), tangent.astype(jnp.float32)


def row_major(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x, and has XLA's GPU compiler store it and its gradient row by row.

    Left alone that compiler stores kernels' gradients column by column, and then copies
    what it makes of them, parameters and moments, once more.
    """
    if platform() != "gpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@jax.custom_vjp
def examples_apart(
    x: Float[Array, "batch rows columns"],
) -> Float[Array, "batch rows columns"]:
    """Returns x, and has XLA's GPU compiler store each example's part by itself.

    Left alone that compiler lays out what is added to a broadcast array with the batch
    innermost, for the sake of the sum over the batch that is its gradient.
    """
    if platform() != "gpu":
        return x
    return over_batch(row_major, "b r c -> b r c")(x)


def _apart_forward(x):
    return examples_apart(x), None


def _apart_backward(_, cotangent):
    return (examples_apart(cotangent),)


examples_apart.defvjp(_apart_forward, _apart_backward)


# A batch is split over devices, and the gradient of a kernel is summed over them right
# after the product that makes it. So that product has the kernel's dtype; the
# derivative of a cast would come after the sum.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_kernel(function, gradient, x, kernel):
    """Returns function(x, kernel in x's dtype), and gradient(x, cotangent) to it."""
    del gradient
    return function(x, kernel.astype(x.dtype))


def _with_kernel_forward(function, gradient, x, kernel):
    return _with_kernel(function, gradient, x, kernel), (x, kernel)


def _with_kernel_backward(function, gradient, factors, cotangent):
    x, kernel = factors
    _, back = jax.vjp(lambda x: function(x, kernel.astype(x.dtype)), x)
    found = gradient(x, cotangent.astype(x.dtype))
    return (*back(cotangent), row_major(found.astype(kernel.dtype)))


_with_kernel.defvjp(_with_kernel_forward, _with_kernel_backward)


def dense(
    x: Float[Array, "*grid inputs"],
    kernel: Float[Array, "inputs outputs"],
    *,
    full: bool = False,
) -> Float[Array, "*grid outputs"]:
    """Returns their product; the kernel's gradient has its dtype all through.

    Args:
      x: float32, or bfloat16, which is then multiplied.
      kernel: float32.
      full: whether the result is float32 whatever x is.
    """
    if x.dtype == kernel.dtype:
        # Not `_with_kernel`: the fixed point's step is also differentiated forward, and
        # backward in the precision that surrounds it.
        return x @ row_major(kernel)
    grid = "abcd"[: x.ndim - 1]
    whole = functools.partial(product, f"{grid}i,io->{grid}o")
    gradient = functools.partial(product, f"{grid}i,{grid}o->io")
    return _with_kernel(whole if full else jnp.matmul, gradient, x, kernel)


def convolve(
    x: Float[Array, "batch height width inputs"],
    kernel: Float[Array, "side side inputs outputs"],
    stride: int,
    padding: str,
) -> Float[Array, "batch rows columns outputs"]:
    """Returns a convolution; the kernel's gradient has its dtype all through.

    Args:
      x: float32, or bfloat16, which is then multiplied.
      kernel: float32.
      stride: of the convolution.
      padding: "SAME" or "VALID".
    """

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def gradient(x, cotangent):
        # The input convolved with the cotangent, whose cells lie `stride` apart: the
        # examples are features, the kernel's cells are the outputs'.
        sizes, cells = x.shape[1:3], cotangent.shape[1:3]
        sides, strides = kernel.shape[:2], (stride, stride)
        pads = jax.lax.padtype_to_pads(sizes, sides, strides, padding)
        pads = [
            (low, side + stride * (cell - 1) - size - low)
            for size, cell, side, (low, _) in zip(
                sizes, cells, sides, pads, strict=True
            )
        ]
        return jax.lax.conv_general_dilated(
            x,
            cotangent,
            (1, 1),
            pads,
            rhs_dilation=strides,
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            preferred_element_type=kernel.dtype,
        )

    if x.dtype == kernel.dtype:
        return convolution(x, kernel)
    return _with_kernel(convolution, gradient, x, kernel)


def add_bias(
    x: Float[Array, "*grid features"], bias: Float[Array, " features"]
) -> Float[Array, "*grid features"]:
    """Adds to the last axis in the bias's dtype, as its gradient is summed."""
    full = x.astype(bias.dtype) + bias[(None,) * (x.ndim - 1)]
    return full.astype(x.dtype)


@jax.custom_jvp
def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns max(x, 0).

    As `jax.nn.relu`; its derivative looks at the result, which is kept for the next
    layer in any case, instead of at x.
    """
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
    y = relu(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)
