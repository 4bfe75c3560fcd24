"""The Inception-v3 whose features FID compares, in JAX.

FID (Heusel et al., 2017) is defined by one set of weights: TensorFlow's graph of
2015-12-05, of the network of Szegedy et al. (2016, "Rethinking the Inception
Architecture for Computer Vision"). It differs from Inception-v3 elsewhere: average
pooling leaves the border out of its mean, the last block pools by the maximum, images
are resized as TensorFlow 1 did it, and it has 1008 classes. Its weights are known as
`pt_inception-2015-12-05-6726825d.pth`, to which the public PyTorch implementations of
FID converted them. Nothing here downloads it.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.weights import find_module, read_weights

_CLASSES = 1008
_SIDE = 299
# Names by which the network is found in a module that holds it.
_ENDS = ("Conv2d_1a_3x3.conv.weight", "fc.weight")
_EPSILON = 1e-3  # of batch normalisation
_WANTED = (
    "FID needs the weights of Inception-v3 of 2015-12-05, the file "
    "pt_inception-2015-12-05-6726825d.pth that pytorch-fid and torch-fidelity publish"
)


class Convolution(NamedTuple):
    """A convolution with the batch normalisation that follows it folded in."""

    kernel: Float[Array | np.ndarray, "rows columns inputs outputs"]
    bias: Float[Array | np.ndarray, " outputs"]


Params = Mapping[str, Convolution]


def load(path: pathlib.Path) -> dict[str, Convolution]:
    """Reads the weights of FID's Inception-v3.

    Args:
      path: `pt_inception-2015-12-05-6726825d.pth` of PyTorch, or its state dictionary
        saved again as `.safetensors` or `.npz`, which are read without PyTorch.

    Returns:
      The parameters that `features` takes, by the name of the layer.

    Raises:
      UserError: if the file cannot be read or holds another network, torchvision's
        Inception-v3 included.
    """
    try:
        state = find_module(read_weights(path), _ENDS)
    except UserError as error:
        raise UserError(f"{error} ({_WANTED})") from error
    suffix = ".conv.weight"
    image = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), jnp.float32)
    try:
        # torchvision's network differs in no other shape.
        if len(state["fc.weight"]) != _CLASSES:
            raise ValueError(f"{len(state['fc.weight'])} classes")
        params = {
            name.removesuffix(suffix): _folded(state, name.removesuffix(suffix))
            for name in state
            if name.endswith(suffix)
        }
        jax.eval_shape(features, params, image)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds another network: {_WANTED}") from error
    return params


def _folded(state: Mapping[str, np.ndarray], name: str) -> Convolution:
    def norm(entry: str) -> np.ndarray:
        return state[f"{name}.bn.{entry}"].astype(np.float64)

    scale = norm("weight") / np.sqrt(norm("running_var") + _EPSILON)
    kernel = state[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale
    bias = norm("bias") - norm("running_mean") * scale
    return Convolution(kernel.astype(np.float32), bias.astype(np.float32))


def features(
    params: Params, images: Float[Array, "batch height width 3"]
) -> Float[Array, "batch 2048"]:
    """The features of which FID compares the distributions.

    Args:
      params: From `load`.
      images: Levels in [0, 1] of any size. They are rounded to 8 bits first, as FID
        is defined on such images.

    Returns:
      The outputs of the last pooling, at least 0, in float32.
    """
    levels = jnp.round(255 * jnp.clip(images.astype(jnp.float32), 0, 1))
    x = (resize(levels, _SIDE) - 128) / 128

    def conv(name: str, x: Array, stride: int = 1, padding: str = "SAME") -> Array:
        return _convolve(params[name], x, stride, padding)

    x = conv("Conv2d_1a_3x3", x, 2, "VALID")
    x = conv("Conv2d_2a_3x3", x, 1, "VALID")
    x = _reduce(conv("Conv2d_2b_3x3", x))
    x = conv("Conv2d_3b_1x1", x)
    x = _reduce(conv("Conv2d_4a_3x3", x, 1, "VALID"))

    def chain(block: str, layers: str, x: Array, last_stride: int = 1) -> Array:
        *names, last = [f"{block}.branch{layer}" for layer in layers.split()]
        for name in names:
            x = conv(name, x)
        return conv(last, x, last_stride, "SAME" if last_stride == 1 else "VALID")

    def fork(block: str, layers: str, ends: str, x: Array) -> Array:
        x = chain(block, layers, x)
        return _join([chain(block, end, x) for end in ends.split()])

    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = _join(
            [
                chain(block, "1x1", x),
                chain(block, "5x5_1 5x5_2", x),
                chain(block, "3x3dbl_1 3x3dbl_2 3x3dbl_3", x),
                chain(block, "_pool", _mean(x)),
            ]
        )
    x = _join(
        [
            chain("Mixed_6a", "3x3", x, last_stride=2),
            chain("Mixed_6a", "3x3dbl_1 3x3dbl_2 3x3dbl_3", x, last_stride=2),
            _reduce(x),
        ]
    )
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        doubled = "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5"
        x = _join(
            [
                chain(block, "1x1", x),
                chain(block, "7x7_1 7x7_2 7x7_3", x),
                chain(block, doubled, x),
                chain(block, "_pool", _mean(x)),
            ]
        )
    x = _join(
        [
            chain("Mixed_7a", "3x3_1 3x3_2", x, last_stride=2),
            chain("Mixed_7a", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4", x, last_stride=2),
            _reduce(x),
        ]
    )
    for block, pool in (("Mixed_7b", _mean), ("Mixed_7c", _largest)):
        x = _join(
            [
                chain(block, "1x1", x),
                fork(block, "3x3_1", "3x3_2a 3x3_2b", x),
                fork(block, "3x3dbl_1 3x3dbl_2", "3x3dbl_3a 3x3dbl_3b", x),
                chain(block, "_pool", pool(x)),
            ]
        )
    return x.mean(axis=(1, 2))


def resize(
    images: Float[Array, "batch height width channels"], side: int
) -> Float[Array, "batch {side} {side} channels"]:
    """TensorFlow 1's bilinear resize, which puts pixel (0, 0) on pixel (0, 0).

    Each pixel stands for its upper left corner and not for its centre, so that the
    picture is shifted by up to half a pixel; the last rows repeat the border. There
    is no smoothing before an image is made smaller.
    """
    for axis, shape in ((2, (1, 1, side, 1)), (1, (1, side, 1, 1))):
        length = images.shape[axis]
        place = np.arange(side, dtype=np.float32) * np.float32(length / side)
        before = place.astype(np.int32)
        after = np.minimum(before + 1, length - 1)
        weight = (place - before.astype(np.float32)).reshape(shape)
        start = jnp.take(images, before, axis)
        images = start + (jnp.take(images, after, axis) - start) * weight
    return images


def _convolve(layer: Convolution, x: Array, stride: int, padding: str) -> Array:
    x = lax.conv_general_dilated(
        x,
        jnp.asarray(layer.kernel),
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        # Features of float32 also on accelerators that would round to fewer bits.
        precision=lax.Precision.HIGHEST,
    )
    return nnx.relu(x + layer.bias)


def _join(branches: Sequence[Array]) -> Array:
    return jnp.concatenate(branches, axis=-1)


def _reduce(x: Array) -> Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


def _largest(x: Array) -> Array:
    return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def _mean(x: Array) -> Array:
    return nnx.avg_pool(
        x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False
    )
