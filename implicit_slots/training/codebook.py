"""The patch tokenizer's codes, found in training images before the first step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from implicit_slots.data.registry import Source
from implicit_slots.models.dvae import patches
from implicit_slots.models.images import as_float
from implicit_slots.models.patch_tokenizer import PATCH, fit
from implicit_slots.runtime.prng import Purpose, purpose_key
from implicit_slots.training.state import TrainState

POINTS = 20_000  # patches to cluster, at the least
POINTS_OF_A_CODE = 8
IMAGES_AT_ONCE = 64


def with_codebook(state: TrainState, train: Source, seed: int) -> TrainState:
    """Returns the state before the first update with codes in the place of random ones.

    Process 0's codes are everybody's. A model without a `PatchTokenizer` stays as is.

    Args:
      state: of any model.
      train: the training images.
      seed: of the run.
    """
    if "codes" not in state.params.get("dvae", {}):
        return state
    vocab_size = len(state.params["dvae"]["shares"])
    points = draw_patches(train, max(POINTS, POINTS_OF_A_CODE * vocab_size), seed)
    # On a CPU, whose sums are the same every time; a GPU's scatter is not.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        key = purpose_key(seed, Purpose.CODEBOOK, 0)
        found = jax.jit(fit, static_argnums=1)(jnp.asarray(points), vocab_size, key)
    found: Any = jax.tree.map(np.asarray, found)
    if jax.process_count() > 1:
        # Not every process need be on the same kind of CPU.
        found = multihost_utils.broadcast_one_to_all(found)
    values = found._asdict()

    def replaced(params):
        placed = {
            name: jax.device_put(value, params["dvae"][name].sharding)
            for name, value in values.items()
        }
        return params | {"dvae": params["dvae"] | placed}

    ema = replaced(state.ema) if state.ema else state.ema
    return state._replace(params=replaced(state.params), ema=ema)


def draw_patches(train: Source, count: int, seed: int) -> np.ndarray:
    """Draws patches of training images, with values in [0, 1]; fewer if there are."""
    # NumPy's own stream, which no key of the run meets.
    generator = np.random.default_rng(seed)
    side = train.example()["image"].shape[0]
    in_image = side**2 * 3 // PATCH
    # Many images: one that is unlike the others must not be half of the patches.
    num_images = min(len(train), max(count // in_image, 1) * 2)
    chosen = np.sort(generator.choice(len(train), num_images, replace=False))
    parts = np.array_split(chosen, -(-num_images // IMAGES_AT_ONCE))
    images = np.concatenate([train.once(part)["image"] for part in parts])
    # One program: each operation by itself would be one.
    cut = jax.jit(lambda image: patches(as_float(image)))
    points = np.asarray(cut(images)).reshape(-1, PATCH)
    return points[generator.permutation(len(points))[:count]]
