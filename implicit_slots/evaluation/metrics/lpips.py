"""LPIPS, the perceptual distance of Zhang et al. (2018), in JAX.

"The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1 of
their `lpips` package, with AlexNet (as its authors report) or VGG16 (as it is trained
with). Two images are compared by a network's activations, normalised at each position,
whose squared differences are weighted by channel. The weights are those of one module
of that package; nothing here downloads them.
"""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.weights import find_module, read_weights

# The smallest image of which AlexNet's and VGG16's last layer sees a position.
SMALLEST = 32
# The mean and deviation of ImageNet, of levels in [-1, 1].
_SHIFT = np.asarray([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.asarray([0.458, 0.448, 0.450], np.float32)
_EPSILON = 1e-10
_WANTED = (
    "LPIPS needs the weights of the lpips package: import lpips, torch; torch.save("
    "lpips.LPIPS(net='alex').state_dict(), 'lpips.pt')"
)


class Layer(NamedTuple):
    """A convolution, the pooling before it, and what weighs its output's channels.

    Outputs with a `lin` are compared; `lin` and `name` are the package's names.
    """

    name: str
    outputs: int
    window: int
    stride: int = 1
    padding: int = 1
    pool: int = 0
    lin: str = ""


def _vgg() -> tuple[Layer, ...]:
    layers, place = [], 0
    for block, (count, width) in enumerate(
        ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), start=1
    ):
        for i in range(count):
            pool = 2 if block > 1 and i == 0 else 0
            place += pool > 0  # a place of its own
            lin = f"lin{block - 1}" if i == count - 1 else ""
            name = f"net.slice{block}.{place}"
            layers.append(Layer(name, width, 3, pool=pool, lin=lin))
            place += 2  # the convolution, and its ReLU
    return tuple(layers)


NETWORKS: Mapping[str, tuple[Layer, ...]] = {
    "AlexNet": (
        Layer("net.slice1.0", 64, 11, stride=4, padding=2, lin="lin0"),
        Layer("net.slice2.3", 192, 5, padding=2, pool=3, lin="lin1"),
        Layer("net.slice3.6", 384, 3, pool=3, lin="lin2"),
        Layer("net.slice4.8", 256, 3, lin="lin3"),
        Layer("net.slice5.10", 256, 3, lin="lin4"),
    ),
    "VGG16": _vgg(),
}


def shapes(network: str) -> dict[str, tuple[int, ...]]:
    """Returns what a state dictionary of `lpips.LPIPS` must hold, by name."""
    found, inputs = {}, 3
    for layer in NETWORKS[network]:
        window = (layer.window, layer.window)
        found[f"{layer.name}.weight"] = (layer.outputs, inputs, *window)
        found[f"{layer.name}.bias"] = (layer.outputs,)
        inputs = layer.outputs
        if layer.lin:
            found[f"{layer.lin}.model.1.weight"] = (1, inputs, 1, 1)
    return found


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the weights.

    Args:
      path: `lpips.LPIPS(net=…).state_dict()` for "alex" or "vgg", saved by PyTorch, or
        its tensors saved again as `.safetensors` or `.npz`, which are read without it.

    Returns:
      The parameters that `distance` takes.

    Raises:
      UserError: if the file cannot be read or holds another network.
    """
    try:
        state = find_module(read_weights(path), shapes("AlexNet"))
    except UserError as error:
        raise UserError(f"{error} ({_WANTED})") from error
    for network in NETWORKS:
        wanted = shapes(network)
        if wanted == {name: state[name].shape for name in wanted if name in state}:
            return {name: state[name].astype(np.float32) for name in wanted}
    raise UserError(f"{path} holds another network: {_WANTED}")


def distance(
    params: Mapping[str, Array | np.ndarray],
    image: Float[Array, "batch height width 3"],
    other: Float[Array, "batch height width 3"],
) -> Float[Array, " batch"]:
    """The distance of each image from its other.

    Args:
      params: From `load`.
      image: Levels in [0, 1], at their own size, which is not changed.
      other: As many images of the same size.

    Returns:
      Numbers from 0, smaller is better, in float32; NaN for images of less than 32
      pixels a side, which the networks do not take.
    """
    if min(image.shape[1:3]) < SMALLEST:
        return jnp.full(len(image), jnp.nan, jnp.float32)
    layers = NETWORKS["AlexNet" if "net.slice5.10.weight" in params else "VGG16"]
    x = jnp.concatenate([image, other]).astype(jnp.float32)
    x = (2 * x - 1 - _SHIFT) / _SCALE
    total = jnp.zeros(len(image), jnp.float32)
    for layer in layers:
        if layer.pool:
            x = nnx.max_pool(x, (layer.pool, layer.pool), strides=(2, 2))
        x = lax.conv_general_dilated(
            x,
            jnp.asarray(params[f"{layer.name}.weight"]),
            window_strides=(layer.stride, layer.stride),
            padding=((layer.padding, layer.padding),) * 2,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            # Float32 also on accelerators that would round to fewer bits.
            precision=lax.Precision.HIGHEST,
        )
        x = nnx.relu(x + params[f"{layer.name}.bias"])
        if layer.lin:
            norm = jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True))
            ours, others = jnp.split(x / (norm + _EPSILON), 2)
            weight = jnp.asarray(params[f"{layer.lin}.model.1.weight"]).reshape(-1)
            apart = (jnp.square(ours - others) * weight).sum(axis=-1)
            total += apart.mean(axis=(1, 2))
    return total


def distances(
    params: Mapping[str, Array | np.ndarray],
    image: Float[Array, "batch height width 3"],
    renders: Mapping[str, Float[Array, "batch height width 3"]],
) -> dict[str, Float[Array, " batch"]]:
    """`distance` of images from each of their renders, as NAME/lpips."""
    return {
        f"{name}/lpips": distance(params, image, other)
        for name, other in renders.items()
    }
