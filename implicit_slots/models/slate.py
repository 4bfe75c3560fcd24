"""SLATE: discrete VAE, slot attention over its tokens, autoregressive decoder.

Singh, Deng, Ahn 2022 (arXiv 2110.11405), as in the official code. Its loss is a sum
over pixels and tokens, not a mean: see `Output`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from implicit_slots.fixed_point import BackwardStats, Picard
from implicit_slots.models import generation, layers, noise
from implicit_slots.models.dvae import DVAE, STRIDE, gumbel_softmax
from implicit_slots.models.generation import BOS
from implicit_slots.models.image_encoder import ImageEncoder, on_grid
from implicit_slots.models.images import squared_error
from implicit_slots.models.outputs import Encoded, Output, Reading, Reconstruction
from implicit_slots.models.slot_attention import Problem, SlotAttention
from implicit_slots.models.transformer import TransformerDecoder
from implicit_slots.runtime.errors import InvalidValue

# What slot attention reads.
INPUTS = ("tokens", "image")


class SLATE(nnx.Module):
    """The whole model, for square images of one resolution.

    The defaults are those of Singh et al. 2022 for ShapeStacks (from memory), with the
    slots and iterations of Chang et al. 2022.

    Args:
      resolution: image side in pixels, divisible by four; 96 as published.
      vocab_size: number of dVAE tokens.
      dvae_features: channels of the dVAE's hidden layers.
      width: features of a token in slot encoder and decoder.
      num_blocks: decoder blocks.
      num_heads: decoder attention heads.
      dropout: rate in the decoder and on the embedded tokens.
      attention_dropout: rate on the decoder's attention weights.
      attention: how the decoder's self-attention is computed, "xla" or "cudnn"; see
        `MultiHeadAttention`.
      remat: recompute decoder blocks in the backward pass; see `TransformerDecoder`.
      hard: reconstruct from straight-through one-hot instead of relaxed tokens.
      slots: makes slot attention from (width, rngs=…), with positions apart also from
        key_size=…; for other slots
        `functools.partial(SlotAttention, num_slots=5, slot_size=64)`.
      initial_positions: how the learned position embedding begins. "normal" is the
        published truncated normal, independent at every position; "smooth" gives
        neighbours similar vectors, see `layers.smooth_positions`.
      position_scale: standard deviation of the initial position embedding (1 as
        published; of the normal before its truncation), and Xavier's gain of that of
        the image's encoder.
      inputs: what slot attention reads. "tokens", as published, are the embedded tokens
        of the dVAE; "image" are a convolutional encoder's features of the pixels, as in
        STEVE (Singh, Wu, Ahn 2022), and the dVAE makes the decoder's targets alone.
      encoder_features: channels of that encoder.
      encoder_strides: of its convolutions.
      encoder_positions: "added" or "apart", see `ImageEncoder`.
      drop_tokens: in training, the decoder's input tokens of an image are dropped at a
        rate drawn uniformly from 0 to this, so that it needs the slots. A dropped token
        leaves its position.
      rngs: source of the initial parameters.
    """

    # Its parameters' top-level names in the order in which a pass uses them; a model
    # has the image's encoder or the tokens'.
    stages = (
        "dvae",
        "embedding",
        "positions",
        "encoder_norm",
        "encoder_mlp",
        "image_encoder",
        "slot_attention",
        "slot_projection",
        "decoder",
        "out",
    )
    losses = ("mse", "cross_entropy")
    reads = ("image",)
    annealed = ("temperature",)

    def __init__(
        self,
        resolution: int,
        *,
        vocab_size: int = 4096,
        dvae_features: int = 64,
        width: int = 192,
        num_blocks: int = 8,
        num_heads: int = 8,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        attention: str = "xla",
        remat: bool = False,
        hard: bool = False,
        slots: Callable[..., SlotAttention] = partial(
            SlotAttention,
            num_slots=12,
            slot_size=192,
            mlp_size=192,
            solver=Picard(max_steps=7),
        ),
        initial_positions: str = "normal",
        position_scale: float = 1.0,
        inputs: str = "tokens",
        encoder_features: int = 64,
        encoder_strides: Sequence[int] = (2, 1),
        encoder_positions: str = "added",
        drop_tokens: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if resolution < STRIDE or resolution % STRIDE:
            raise InvalidValue(
                f"the image size must be divisible by {STRIDE}, got {resolution}"
            )
        self.side = resolution // STRIDE
        self.dropout = dropout
        self.hard = hard
        self.dvae = DVAE(vocab_size, features=dvae_features, rngs=rngs)
        self.embedding = nnx.Embed(
            vocab_size + 1,
            width,
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        draw = nnx.initializers.truncated_normal(position_scale)
        self.positions = nnx.Param(draw(rngs.params(), (1 + self.side**2, width)))
        if initial_positions == "smooth":
            grid = position_scale * layers.smooth_positions(
                rngs.params(), self.side, width
            )
            self.positions[...] = self.positions[...].at[1:].set(grid)
        elif initial_positions != "normal":
            raise InvalidValue(
                'initial_positions must be "normal" or "smooth", got '
                f"{initial_positions!r}"
            )
        if inputs not in INPUTS:
            raise InvalidValue(f"inputs must be one of {INPUTS}, got {inputs!r}")
        if not 0 <= drop_tokens <= 1:
            raise InvalidValue(f"drop_tokens must be in [0, 1], got {drop_tokens}")
        self.drop_tokens = drop_tokens
        self.reads_image = inputs == "image"
        self.slots_side, read = self.side, width
        if self.reads_image:
            self.image_encoder = encoder = ImageEncoder(
                resolution,
                encoder_features,
                encoder_strides,
                positions=encoder_positions,
                position_scale=position_scale,
                rngs=rngs,
            )
            self.slots_side, read = encoder.side, encoder.size
            if encoder.key_size != encoder.size:
                slots = partial(slots, key_size=encoder.key_size)
        else:
            self.encoder_norm = layers.LayerNorm(width)
            self.encoder_mlp = layers.MLP(width, width, rngs=rngs)
        self.slot_attention = slots(read, rngs=rngs)
        self.slot_projection = layers.Linear(
            self.slot_attention.slot_size, width, bias=False, rngs=rngs
        )
        self.decoder = TransformerDecoder(
            num_blocks,
            width,
            num_heads,
            dropout=dropout,
            attention_dropout=attention_dropout,
            attention=attention,
            remat=remat,
            rngs=rngs,
        )
        self.out = layers.Linear(
            width, vocab_size, bias=False, full_output=True, rngs=rngs
        )

    def __call__(
        self,
        batch: Mapping[str, Any],
        *,
        temperature: Float[Array, ""] | float,
        key: Key[Array, ""],
        deterministic: bool = False,
        frozen: bool = False,
        probe: BackwardStats | None = None,
        coupling_key: Key[Array, ""] | None = None,
    ) -> Output:
        """Returns the losses of a batch with images in [0, 1].

        They are "mse", the dVAE's squared error summed over pixels and channels, and
        "cross_entropy", the decoder's, summed over the tokens, in nats.

        Args:
          batch: of which `image` is read.
          temperature: of the Gumbel-softmax.
          key: for Gumbel noise, initial slots and dropout.
          deterministic: no dropout; the other noise stays.
          frozen: the dVAE gets no gradient, and the targets are its most probable
            tokens instead of drawn ones.
          probe: see `SlotAttention`.
          coupling_key: the same.
        """
        image = batch["image"]
        key_relaxed, key_hard, key_slots, key_embed, key_decoder = jax.random.split(
            key, 5
        )
        token_logits = self.dvae.encode(image)
        relaxed = gumbel_softmax(token_logits, temperature, key_relaxed, hard=self.hard)
        reconstruction = self.dvae.decode(relaxed)
        mse = squared_error(image, reconstruction)
        if frozen:
            mse = jax.lax.stop_gradient(mse)
            targets = token_logits.argmax(axis=-1)
        else:
            # A second, independent sample; the transformer never trains the dVAE.
            targets = noise.categorical(key_hard, jax.lax.stop_gradient(token_logits))
        targets = targets.reshape(len(image), -1)
        embedded = layers.dropout(
            self.embed(with_bos(targets)),
            self.dropout,
            None if deterministic else key_embed,
        )
        slots = self.slot_attention(
            self.slot_inputs(image, embedded[:, 1:]),
            key=key_slots,
            probe=probe,
            coupling_key=coupling_key,
        )
        shown = embedded[:, :-1]
        if self.drop_tokens and not deterministic:
            shown = self._dropped(shown, jax.random.fold_in(key, 5))
        logits = self.decode(
            shown, slots.slots, key=None if deterministic else key_decoder
        )
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        losses = {"mse": mse, "cross_entropy": cross_entropy.sum(axis=1)}
        return Output(
            losses,
            on_grid(slots.attention, self.slots_side),
            slots.stats,
            reconstruction,
            coupling=slots.coupling,
        )

    def embed(
        self, tokens: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens dim"]:
        """Embeds a sequence that begins with BOS, with its positions."""
        return self.embedding(tokens) + self.positions[None, : tokens.shape[1]]

    def slot_inputs(
        self,
        image: Float[Array, "batch height width 3"],
        embedded: Float[Array, "batch tokens dim"],
    ) -> Float[Array, "batch inputs features"]:
        """Returns what slot attention reads of images or their embedded tokens."""
        if self.reads_image:
            return self.image_encoder(image)
        return self.encoder_mlp(self.encoder_norm(embedded))

    def _dropped(self, embedded: jax.Array, key: Key[Array, ""]) -> jax.Array:
        """Leaves of some tokens only the position, never of BOS, which comes first."""
        key_rate, key_token = jax.random.split(key)
        batch, length = embedded.shape[:2]
        rate = self.drop_tokens * jax.random.uniform(key_rate, (batch, 1))
        drop = jax.random.uniform(key_token, (batch, length)) < rate
        drop = drop.at[:, 0].set(False)
        positions = self.positions[None, :length].astype(embedded.dtype)
        return jnp.where(drop[..., None], positions, embedded)

    def backward_probe(self, batch: int) -> BackwardStats | None:
        """See `SlotAttention`."""
        return self.slot_attention.backward_probe(batch)

    def slot_problem(
        self, image: Float[Array, "batch height width 3"], key: Key[Array, ""]
    ) -> Problem:
        """Returns the fixed-point problem that images in [0, 1] pose slot attention.

        Without noise in the tokens and without dropout; the key draws initial slots.
        """
        return self.slot_attention.problem(
            self.slot_inputs(image, self._tokens(image)[1]),
            self.slot_attention.initial(len(image), key),
        )

    def _tokens(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The most probable tokens of images, and their embeddings."""
        ids = self.dvae.encode(image).argmax(axis=-1)
        return ids, self.embed(with_bos(ids.reshape(len(image), -1)))[:, 1:]

    def decode(
        self,
        embedded: Float[Array, "batch tokens dim"],
        slots: Float[Array, "batch slots slot_dim"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch tokens vocab"]:
        """Returns logits of the token that follows each token."""
        return self.out(self.decoder(embedded, self.slot_projection(slots), key=key))

    def generate(
        self,
        slots: Float[Array, "batch slots slot_dim"],
        *,
        present: Bool[Array, "batch slots"] | None = None,
        key: Key[Array, ""] | None = None,
        temperature: Float[Array, ""] | float | None = None,
        top_k: int | None = None,
    ) -> Int[Array, "batch rows columns"]:
        """Generates image token ids from slots alone; see `generation.generate`."""
        return generation.generate(
            self, slots, present, key=key, temperature=temperature, top_k=top_k
        )

    def reconstruct(
        self, image: Float[Array, "batch height width 3"], *, key: Key[Array, ""]
    ) -> Reconstruction:
        """Reconstructs images in [0, 1] through the dVAE and through the slots.

        The key draws the initial slots.
        """
        encoded = self.encode(image, key=key)
        assert encoded.tokens is not None
        return Reconstruction(
            self.picture(encoded.tokens), self.render(encoded.slots), encoded.attention
        )

    def encode(
        self, image: Float[Array, "batch height width 3"], *, key: Key[Array, ""]
    ) -> Encoded:
        """Takes images in [0, 1] apart: tokens without noise, slots; no dropout.

        The key draws the initial slots.
        """
        ids, embedded = self._tokens(image)
        slots = self.slot_attention(self.slot_inputs(image, embedded), key=key)
        attention = on_grid(slots.attention, self.slots_side)
        return Encoded(ids, slots.slots, attention, slots.stats)

    def picture(
        self, tokens: Int[Array, "batch rows columns"]
    ) -> Float[Array, "batch height width 3"]:
        """Returns the dVAE's image of tokens, in [0, 1]."""
        return jnp.clip(self.dvae.decode_ids(tokens), 0, 1)

    def render(
        self,
        slots: Float[Array, "batch slots slot_dim"],
        *,
        present: Bool[Array, "batch slots"] | None = None,
    ) -> Float[Array, "batch height width 3"]:
        """Returns the image that the decoder makes of slots alone, in [0, 1].

        Args:
          slots: of each image.
          present: which of them the decoder sees, at least one; all if not given.
        """
        return self.picture(self.generate(slots, present=present))

    def read(
        self,
        tokens: Int[Array, "batch rows columns"],
        slots: Float[Array, "batch slots slot_dim"],
        *,
        present: Bool[Array, "batch slots"] | None = None,
    ) -> Reading:
        """Predicts each token from those before it and the slots; no dropout.

        Args:
          tokens: of an image.
          slots: of each image.
          present: which of them the decoder sees, at least one; all if not given.
        """
        targets = tokens.reshape(len(tokens), -1)
        features, shares = self.decoder.watch(
            self.embed(with_bos(targets))[:, :-1], self.slot_projection(slots), present
        )
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(
            self.out(features), targets
        )
        return Reading(
            cross_entropy.reshape(tokens.shape),
            on_grid(shares.swapaxes(1, 2), self.side),
        )


def with_bos(ids: Int[Array, "batch tokens"]) -> Int[Array, "batch longer"]:
    """Shifts image token ids by one and puts BOS before them."""
    return jnp.pad(ids + 1, ((0, 0), (1, 0)), constant_values=BOS)
