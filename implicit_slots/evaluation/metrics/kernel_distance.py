"""How far one set of images is from another: the kernel distance of their features."""

import numpy as np
from jaxtyping import Float

# Of Bińkowski et al. (2018), and of the public implementations.
SUBSET = 1000
SUBSETS = 100
DEGREE = 3


def kernel_distance(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    *,
    subset: int = SUBSET,
    subsets: int = SUBSETS,
) -> float:
    """Squared maximum mean discrepancy with the kernel (xᵀy / d + 1)³, unbiased.

    Of Inception features (`inception.py`) it is the KID of Bińkowski et al. (2018),
    "Demystifying MMD GANs", section 4. Unlike the Fréchet distance it is not biased by
    few examples. It is the mean over random subsets, drawn without replacement; the
    same ones each time. Sets that are not larger than a subset are compared whole.

    On the host in float64.

    Args:
      a: features of one set, an example per row.
      b: the same features of the other set.
      subset: examples of each set in a subset; no more than the smaller set has.
      subsets: how many subsets.

    Returns:
      Without a unit. 0 on average for sets of one distribution, hence at times below;
      NaN if a feature is not finite.

    Raises:
      ValueError: if a set or a subset has fewer than two examples.
    """
    size = min(subset, len(a), len(b))
    if size < 2:
        raise ValueError(
            "a kernel distance needs at least 2 examples in each set and subset, got "
            f"{len(a)}, {len(b)} and {subset}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    a, b = a.astype(np.float64), b.astype(np.float64)
    if size == len(a) == len(b):
        return _discrepancy(a, b)
    rng = np.random.default_rng(0)
    return float(
        np.mean(
            [
                _discrepancy(
                    a[rng.choice(len(a), size, replace=False)],
                    b[rng.choice(len(b), size, replace=False)],
                )
                for _ in range(subsets)
            ]
        )
    )


def _discrepancy(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate from equally many examples: no pair of one with itself."""
    count = len(a)

    def within(x):
        kernel = _kernel(x, x)
        return (kernel.sum() - np.trace(kernel)) / (count * (count - 1))

    return float(within(a) + within(b) - 2 * _kernel(a, b).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** DEGREE
