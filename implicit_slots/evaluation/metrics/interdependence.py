"""Whether slots depend on each other: what one tells of the others, and their Jacobian.

Two views beside the deletion of slots (`deletion`): how far a slot can be predicted
from the others of its image, and how far a nudge of one slot moves the others in the
fixed point z = f(params, x, z).
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from implicit_slots.fixed_point.diagnostics import Map, dense_jacobian

# Strength of the penalty relative to the mean variance of a feature: from as good as
# none to so much that only the mean is predicted.
_RIDGES = 10.0 ** np.arange(-10, 5)

# Of I − J's solve: beyond it, float32 found no solution worth the name.
_RESIDUAL = 1e-2


def predictability(
    slots: Float[np.ndarray, "images slots dim"], folds: int = 5
) -> float:
    """How much of a slot is linear in the mean of the other slots of its image.

    Slots have no order, and the mean of the others is all that a linear predictor that
    respects this can use. One ridge regression for all slots, z_k from mean_{j≠k} z_j,
    fitted on some images and scored on others. There are few examples for the number of
    features, so the ridge matters: in each training set it is chosen by another
    cross-validation over its images, since slots of one image are not independent.

    Few images make it too low. In one draw of normal slots, 6 of 64 features with a
    true 0.417 gave 0.14 from 60 images, 0.40 from 256 and 0.41 from 1024; independent
    slots gave 0.000 from each.

    Compare with the same number for slots that share no image
    (`deletion.shuffle_slots`): it is not 0 where slots are told apart by their place,
    as with learned initial slots.

    Args:
      slots: of each image, converged.
      folds: parts of the images, each scored by a fit on the others; image i is in
        part i modulo `folds`.

    Returns:
      R² over all held-out slots and features, at most 1 (the others determine a slot);
      0 is the mean slot of the training images, and worse is below 0. NaN where all
      slots are equal to that mean.

    Raises:
      ValueError: fewer than three folds, fewer images than folds, or fewer than two
        slots.
    """
    images, count, dim = slots.shape
    if folds < 3 or images < folds or count < 2:
        raise ValueError(
            "needs at least three folds, as many images and two slots; got "
            f"{folds} folds, {images} images and {count} slots"
        )
    z = np.asarray(slots, np.float64)
    others = (z.sum(axis=1, keepdims=True) - z) / (count - 1)
    parts = [
        (others[first::folds].reshape(-1, dim), z[first::folds].reshape(-1, dim))
        for first in range(folds)
    ]
    residual = total = 0.0
    for held in range(folds):
        training = [part for place, part in enumerate(parts) if place != held]
        losses = np.zeros(len(_RIDGES))
        for inner in range(folds - 1):
            inputs, targets = training[inner]
            fitted = _fit(training[:inner] + training[inner + 1 :], _RIDGES)
            losses += [np.sum((predict(inputs) - targets) ** 2) for predict in fitted]
        best = _RIDGES[[np.argmin(losses)]]
        (predict,) = _fit(training, best)
        inputs, targets = parts[held]
        residual += np.sum((predict(inputs) - targets) ** 2)
        mean = np.mean(np.concatenate([target for _, target in training]), axis=0)
        total += np.sum((targets - mean) ** 2)
    return float(1 - residual / total) if total > 0 else float("nan")


class Coupling(NamedTuple):
    """How a nudge of one slot reaches the others, per image.

    A share is that of the squared Frobenius norm that lies outside the K diagonal
    blocks [D, D] of a matrix [K·D, K·D]: 0 where slots do not see each other; 1 − 1/K
    where all blocks are equally large; 1 at most.

    Attributes:
      jacobian: share of J = ∂f/∂z: one step of the iteration. NaN where J is 0.
      inverse: share of (I − J)⁻¹ − I = J + J² + …: if f is nudged by d, the fixed point
        moves by d and by this matrix times d, so it is what all steps do together. To
        first order in J the same as `jacobian`. NaN also where I − J is singular.
      jacobian_blocks: Frobenius norm of each block of J; row: the slot that moves,
        column: the slot that is nudged.
      inverse_blocks: the same of (I − J)⁻¹ − I.
    """

    jacobian: Float[Array, " batch"]
    inverse: Float[Array, " batch"]
    jacobian_blocks: Float[Array, "batch slots slots"]
    inverse_blocks: Float[Array, "batch slots slots"]


def coupling(
    f: Map, params: PyTree, x: PyTree, z: Float[Array, "batch slots dim"]
) -> Coupling:
    """Measures how slots are coupled through the map whose fixed point they are.

    Costs K·D products with J and a solve of that size per image, one image after
    another, since a matrix of 12 slots of 192 takes 21 MB.

    Args:
      f: (params, x, z) -> z.
      params: pytree that is shared by the batch.
      x: pytree of inputs, batch first.
      z: where J is taken; the fixed point, for the meaning above.
    """
    _, count, dim = z.shape

    def measure(example):
        x, z = jax.tree.map(lambda leaf: leaf[None], example)
        jacobian = dense_jacobian(f, params, x, z)[0].astype(jnp.float32)
        identity = jnp.eye(count * dim, dtype=jnp.float32)
        inverse = jnp.linalg.solve(identity - jacobian, jacobian)
        # LU of a singular matrix may end in huge numbers instead of none.
        product = jnp.matmul(jacobian, inverse, precision=jax.lax.Precision.HIGHEST)
        residual = jnp.linalg.norm(inverse - product - jacobian)
        solved = residual <= _RESIDUAL * jnp.linalg.norm(jacobian)
        blocks = _block_norms(jacobian, count)
        inverse_blocks = jnp.where(solved, _block_norms(inverse, count), jnp.nan)
        return Coupling(
            _off_diagonal(blocks), _off_diagonal(inverse_blocks), blocks, inverse_blocks
        )

    return jax.lax.map(measure, (x, z))


def _fit(parts: Iterable[tuple[np.ndarray, np.ndarray]], ridges: np.ndarray) -> list:
    """Ridge regressions with an intercept, one for each penalty, as functions."""
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - x_mean, y - y_mean
    values, vectors = np.linalg.eigh(x.T @ x)
    # Of rounding's negative eigenvalues; and without any variance the mean is left.
    values = np.maximum(values, 0)
    scale = np.mean(values) or 1.0
    rotated = vectors.T @ (x.T @ y)

    def predictor(ridge):
        weights = vectors @ (rotated / (values + ridge * scale)[:, None])
        return lambda inputs: y_mean + (inputs - x_mean) @ weights

    return [predictor(ridge) for ridge in ridges]


def _block_norms(
    matrix: Float[Array, "size size"], count: int
) -> Float[Array, "{count} {count}"]:
    """Frobenius norms of a matrix' blocks, slot by slot."""
    blocks = matrix.reshape(count, len(matrix) // count, count, -1)
    return jnp.sqrt(jnp.sum(blocks**2, axis=(1, 3)))


def _off_diagonal(norms: Float[Array, "slots slots"]) -> Float[Array, ""]:
    """Share of the squares that do not lie on the diagonal; NaN of nothing."""
    # As shares of the largest, whose square is in range.
    squares = (norms / norms.max()) ** 2
    return jnp.sum(squares * (1 - jnp.eye(len(norms)))) / jnp.sum(squares)
