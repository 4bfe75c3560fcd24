"""How far one set of images is from another: Fréchet distances of their features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# Channels of the random network's layers, each of which halves the resolution.
_WIDTHS = (32, 32, 64, 128)


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Squared Fréchet (2-Wasserstein) distance of Gaussians fitted to two sets.

    |μa − μb|² + tr Σa + tr Σb − 2 tr (Σa Σb)^½ with the sample means and (unbiased)
    covariances, on the host in float64. Of Inception features (`inception.py`) it is
    the FID of Heusel et al. (2017), "GANs Trained by a Two Time-Scale Update Rule
    Converge to a Local Nash Equilibrium".

    No matrix square root is taken, so singular covariances (fewer examples than
    features, say) are as good as others. Let A and B be the centred sets over the
    root of n − 1 and m − 1: Σa = AᵀA, Σb = BᵀB, tr (Σa Σb)^½ is the sum of the
    singular values of A Bᵀ, and the part of the covariances is the smallest
    ‖A − Q B‖² of any orthogonal Q. That is how it is computed, for it never is
    negative.

    Args:
      a: Features of one set, an example per row.
      b: The same features of the other set.

    Returns:
      From 0 (the same mean and covariance), in squared units of the features; NaN if
      a feature is not finite. It is biased upwards, the more the fewer examples:
      compare numbers of equally many examples only.

    Raises:
      ValueError: if a set has fewer than two examples.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(
            "a Fréchet distance needs at least 2 examples in each set, got "
            f"{len(a)} and {len(b)}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    a, b = a.astype(np.float64), b.astype(np.float64)
    root_a, root_b = _root_of_covariance(a), _root_of_covariance(b)
    # Rows of zeros change no covariance and give both roots the same shape.
    rows = max(len(root_a), len(root_b))
    root_a, root_b = (
        np.pad(root, ((0, rows - len(root)), (0, 0))) for root in (root_a, root_b)
    )
    left, _, right = np.linalg.svd(root_a @ root_b.T)
    means = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    return float(means + np.sum((root_a - left @ (right @ root_b)) ** 2))


def _root_of_covariance(features: np.ndarray) -> np.ndarray:
    """A matrix R with RᵀR = Σ, of no more rows than examples or features."""
    centred = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))


def random_features(
    images: Float[Array, "batch height width 3"],
) -> Float[Array, "batch 256"]:
    """Features of a convolution network with fixed random weights; not those of FID.

    The substitute where the weights of Inception-v3 are not at hand. Random
    embeddings tell sets of images apart and know nothing of ImageNet (Naeem et al.,
    2020, "Reliable Fidelity and Diversity Metrics for Generative Models"). Their
    Fréchet distance is named `frechet_random`, has a scale of its own and is to be
    compared between images of one resolution only.

    Four 3 × 3 convolutions with stride 2 and ReLU; the features are the means over
    positions of the channels of all four. The weights are the same on every machine.

    Args:
      images: Levels in [0, 1], of any size; with a side of less than 16 pixels the
        last layers see little but the border.

    Returns:
      The features, of size one, in float32.
    """
    x = 2 * images.astype(jnp.float32) - 1
    means = []
    for kernel in _random_kernels():
        x = lax.conv_general_dilated(
            x,
            jnp.asarray(kernel),
            window_strides=(2, 2),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            # The same numbers on accelerators that would round to fewer bits.
            precision=lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x)
        means.append(x.mean(axis=(1, 2)))
    return jnp.concatenate(means, axis=1)


@functools.cache
def _random_kernels() -> tuple[np.ndarray, ...]:
    """He et al.'s (2015) normal weights, from a generator that is never another."""
    kernels = []
    with jax.ensure_compile_time_eval():
        key = jax.random.key(0, impl="threefry2x32")
        inputs = 3
        for layer, outputs in enumerate(_WIDTHS):
            shape = (3, 3, inputs, outputs)
            of_layer = jax.random.fold_in(key, layer)
            kernel = jax.random.normal(of_layer, shape, jnp.float32)
            kernels.append(np.asarray(kernel * (2 / (9 * inputs)) ** 0.5))
            inputs = outputs
    return tuple(kernels)
