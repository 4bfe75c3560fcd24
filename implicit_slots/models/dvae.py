"""The discrete VAE of SLATE: images to tokens of a small vocabulary, and back."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from implicit_slots.models import kernels as pallas
from implicit_slots.models import layers, noise, products
from implicit_slots.runtime.errors import InvalidValue

# Pixels per token along each side: fixed by the architecture.
STRIDE = 4


class Block(nnx.Module):
    """Convolution without bias, then group norm with one group, then ReLU.

    A 1x1 convolution is a dense layer, which is what runs fastest.

    Args:
      in_features: channels that come in.
      out_features: channels that go out.
      kernel_size: 1 or 3 (padded to keep the size).
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_size: int = 1,
        rngs: nnx.Rngs,
    ):
        init = layers.kaiming_uniform
        if kernel_size == 1:
            self.convolution = layers.Linear(
                in_features, out_features, bias=False, kernel_init=init, rngs=rngs
            )
        else:
            self.convolution = layers.Conv(
                in_features,
                out_features,
                (kernel_size, kernel_size),
                padding="SAME",
                use_bias=False,
                kernel_init=init,
                rngs=rngs,
            )
        self.norm = layers.OneGroupNorm(out_features)

    def __call__(
        self, x: Float[Array, "batch height width in_features"]
    ) -> Float[Array, "batch height width out_features"]:
        """Maps a grid of features to a grid of the same size."""
        return products.relu(self.norm(self.convolution(x)))

    def of_ids(
        self, ids: Int[Array, "batch height width"]
    ) -> Float[Array, "batch height width out_features"]:
        """Maps one-hot features, given by their ids; for 1x1 convolutions."""
        # The product with a one-hot vector is a row of the kernel.
        kernel = self.convolution.kernel[...]
        rows = kernel.astype(self.convolution.dtype or kernel.dtype)[ids]
        return products.relu(self.norm(rows))


class ToPixels(layers.Linear):
    """`pixel_shuffle` and a dense layer, in the other order.

    The layer maps each of the four pixels of a cell in its place, and what moves are
    the few channels that come out: sixty-four of them were copied several times.
    """

    def __call__(
        self, x: Float[Array, "batch height width features"]
    ) -> Float[Array, "batch double_height double_width outputs"]:
        """Maps groups of four channels to 2x2 pixels."""
        assert self.bias is not None
        cell = jnp.eye(4)
        return pixel_shuffle(
            self.affine(
                x, jnp.kron(self.kernel[...], cell), jnp.repeat(self.bias[...], 4)
            )
        )


class DVAE(nnx.Module):
    """Encoder to log-probabilities over the vocabulary, decoder from (relaxed) tokens.

    Args:
      vocab_size: number of tokens.
      features: channels of every hidden layer.
      rngs: source of the initial parameters.
    """

    def __init__(self, vocab_size: int, *, features: int, rngs: nnx.Rngs):
        self.vocab_size = vocab_size
        self.encoder = nnx.Sequential(
            # The 4x4 convolution of stride 4, as a dense layer on patches.
            Block(STRIDE * STRIDE * 3, features, rngs=rngs),
            *[Block(features, features, rngs=rngs) for _ in range(6)],
            layers.Linear(features, vocab_size, full_output=True, rngs=rngs),
        )
        self.decoder = nnx.Sequential(
            Block(vocab_size, features, rngs=rngs),
            *self._upsample(features, rngs),
            *self._upsample(features, rngs)[:-1],
            unchanged,  # In its place, so that parameters keep their names.
            ToPixels(features, 3, full_output=True, rngs=rngs),
        )

    @staticmethod
    def _upsample(features: int, rngs: nnx.Rngs) -> list:
        return [
            Block(features, features, kernel_size=3, rngs=rngs),
            Block(features, features, rngs=rngs),
            Block(features, features, rngs=rngs),
            Block(features, 4 * features, rngs=rngs),
            pixel_shuffle,
        ]

    def encode(
        self, image: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch rows columns vocab"]:
        """Returns logits of each token, one token per 4x4 pixels.

        Their log-softmax is what official SLATE calls the encoding. Neither argmax,
        nor samples, nor a Gumbel-softmax see the difference, so it is left out.

        Raises:
          ValueError: if the image size is not divisible by four.
        """
        return self.encoder(patches(image))

    def decode(
        self, tokens: Float[Array, "batch rows columns vocab"]
    ) -> Float[Array, "batch height width 3"]:
        """Returns the image of one-hot or relaxed tokens; not clipped to [0, 1]."""
        return self.decoder(tokens)

    def relax(
        self,
        image: Float[Array, "batch height width 3"],
        temperature: Float[Array, ""] | float,
        key: Key[Array, ""],
        key_tokens: Key[Array, ""],
    ) -> tuple[Float[Array, "batch height width 3"], Int[Array, "batch rows columns"]]:
        """Returns the image of relaxed tokens, and tokens drawn independently.

        As `encode`, `gumbel_softmax` and `decode`, in a kernel that stores nothing that
        has an entry for each token of the vocabulary.

        Args:
          image: in [0, 1].
          temperature: of the relaxation.
          key: of its Gumbel noise.
          key_tokens: of the drawn tokens, which are others than
            `noise.categorical` draws of it.
        """
        from implicit_slots.models.kernels import relaxed_tokens

        *below, to_logits = self.encoder.layers
        first, *above = self.decoder.layers
        assert isinstance(to_logits, layers.Linear) and isinstance(first, Block)
        assert to_logits.bias is not None
        features: jax.Array = nnx.Sequential(*below)(patches(image))
        batch, rows, columns, _ = features.shape
        of_tokens = first.convolution.kernel[...]
        read, tokens = relaxed_tokens.relax(  # pyright: ignore
            features.reshape(batch, rows * columns, -1).astype(
                to_logits.dtype or of_tokens.dtype
            ),
            to_logits.kernel[...],
            to_logits.bias[...],
            of_tokens,
            jnp.asarray(temperature, jnp.float32),
            jnp.stack([noise.seeds(key), noise.seeds(key_tokens)]),
            pallas.interpreted(),
        )
        read = read.reshape(batch, rows, columns, -1)
        return (
            nnx.Sequential(*above)(products.relu(first.norm(read))),
            tokens.reshape(batch, rows, columns),
        )

    def decode_ids(
        self, ids: Int[Array, "batch rows columns"]
    ) -> Float[Array, "batch height width 3"]:
        """Returns the image of token ids in 0 … vocab − 1."""
        first, *rest = self.decoder.layers
        assert isinstance(first, Block)
        return nnx.Sequential(*rest)(first.of_ids(ids))


def unchanged(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Returns x."""
    return x


def patches(
    image: Float[Array, "batch height width channels"],
) -> Float[Array, "batch rows columns patch"]:
    """Returns the non-overlapping 4x4 patches, flattened as (row, column, channel)."""
    batch, height, width, channels = image.shape
    if height % STRIDE or width % STRIDE:
        raise InvalidValue(
            f"the image size must be divisible by {STRIDE}, got {height}x{width}"
        )
    grid = image.reshape(
        batch, height // STRIDE, STRIDE, width // STRIDE, STRIDE, channels
    )
    return grid.swapaxes(2, 3).reshape(
        batch, height // STRIDE, width // STRIDE, STRIDE * STRIDE * channels
    )


def pixel_shuffle(
    x: Float[Array, "batch height width features"],
) -> Float[Array, "batch double_height double_width quarter"]:
    """Moves groups of four channels into 2x2 pixels, in PyTorch's channel order."""
    batch, height, width, features = x.shape
    # PyTorch's input channel is c·4 + row·2 + column.
    x = x.reshape(batch, height, width, features // 4, 2, 2)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, 2 * height, 2 * width, features // 4)


def gumbel_softmax(
    logits: Float[Array, "*grid vocab"],
    temperature: Float[Array, ""] | float,
    key: noise.Seed,
    *,
    hard: bool = False,
) -> Float[Array, "*grid vocab"]:
    """Returns softmax((log p + g) / τ) for Gumbel noise g.

    With `hard` the value is one-hot and the gradient that of the soft sample
    (straight-through).
    """
    noisy = logits + noise.gumbel(key, logits.shape)
    soft = nnx.softmax(noisy / temperature, axis=-1)
    if not hard:
        return soft
    one_hot = nnx.one_hot(soft.argmax(axis=-1), soft.shape[-1], dtype=soft.dtype)
    return soft + jax.lax.stop_gradient(one_hot - soft)


def most_probable(logits: Float[Array, "*grid vocab"]) -> Int[Array, "*grid"]:
    """Returns the index of the largest logit, the first of equals.

    As `argmax`, which XLA's CPU compiler does not vectorise: three times faster there.
    """
    indices = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(largest, indices, logits.shape[-1] - 1).min(axis=-1)
