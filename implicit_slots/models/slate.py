"""SLATE: discrete VAE, slot attention over its tokens, autoregressive decoder.

Singh, Deng, Ahn 2022 (arXiv 2110.11405), as in the official code. Its loss is a sum
over pixels and tokens, not a mean: see `Output`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from implicit_slots.fixed_point import BackwardStats, Picard
from implicit_slots.models import layers, noise
from implicit_slots.models.dvae import DVAE, STRIDE, gumbel_softmax, most_probable
from implicit_slots.models.images import squared_error
from implicit_slots.models.outputs import Encoded, Output, Reading, Reconstruction
from implicit_slots.models.slot_attention import Problem, SlotAttention, SlotsOutput
from implicit_slots.models.transformer import TransformerDecoder
from implicit_slots.runtime.errors import InvalidValue

# The token that begins every sequence; image tokens are shifted by one.
BOS = 0
GENERATION_STAGES = 4  # see `SLATE.generate`


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
      slots: makes slot attention from (width, rngs=…); for other slots
        `functools.partial(SlotAttention, num_slots=5, slot_size=64)`.
      initial_positions: how the learned position embedding begins. "normal" is the
        published truncated normal, independent at every position; "smooth" gives
        neighbours similar vectors, see `layers.smooth_positions`.
      position_scale: standard deviation of the initial position embedding (1 as
        published; of the normal before its truncation).
      rngs: source of the initial parameters.
    """

    # Its parameters' top-level names in the order in which a pass uses them.
    stages = (
        "dvae",
        "embedding",
        "positions",
        "encoder_norm",
        "encoder_mlp",
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
        self.encoder_norm = layers.LayerNorm(width)
        self.encoder_mlp = layers.MLP(width, width, rngs=rngs)
        self.slot_attention = slots(width, rngs=rngs)
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

        # A second, independent sample; the transformer never trains the dVAE.
        targets = noise.categorical(key_hard, jax.lax.stop_gradient(token_logits))
        targets = targets.reshape(len(image), -1)
        embedded = layers.dropout(
            self.embed(with_bos(targets)),
            self.dropout,
            None if deterministic else key_embed,
        )
        slots = self.attend(
            embedded[:, 1:], key_slots, probe=probe, coupling_key=coupling_key
        )
        logits = self.decode(
            embedded[:, :-1], slots.slots, key=None if deterministic else key_decoder
        )
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        losses = {"mse": mse, "cross_entropy": cross_entropy.sum(axis=1)}
        return Output(
            losses,
            self._on_grid(slots.attention),
            slots.stats,
            reconstruction,
            coupling=slots.coupling,
        )

    def embed(
        self, tokens: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens dim"]:
        """Embeds a sequence that begins with BOS, with its positions."""
        return self.embedding(tokens) + self.positions[None, : tokens.shape[1]]

    def attend(
        self,
        embedded: Float[Array, "batch tokens dim"],
        key: Key[Array, ""],
        *,
        probe: BackwardStats | None = None,
        coupling_key: Key[Array, ""] | None = None,
    ) -> SlotsOutput:
        """Returns the slots of embedded image tokens (without BOS)."""
        inputs = self.encoder_mlp(self.encoder_norm(embedded))
        return self.slot_attention(
            inputs, key=key, probe=probe, coupling_key=coupling_key
        )

    def backward_probe(self, batch: int) -> BackwardStats | None:
        """See `SlotAttention`."""
        return self.slot_attention.backward_probe(batch)

    def slot_problem(
        self, image: Float[Array, "batch height width 3"], key: Key[Array, ""]
    ) -> Problem:
        """Returns the fixed-point problem that images in [0, 1] pose slot attention.

        From their most probable tokens, without dropout; the key draws initial slots.
        """
        _, embedded = self._tokens(image)
        return self.slot_attention.problem(
            self.encoder_mlp(self.encoder_norm(embedded)),
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
        """Generates image token ids from slots alone, one by one.

        Each block keeps the keys and values of the tokens so far, so a token costs one
        token's work. To be called under `jax.jit`: called without, it is compiled
        again each time.

        Args:
          slots: of each image.
          present: which of them the decoder sees, at least one; all if not given.
          key: draws the tokens; without one each is the most probable.
          temperature: divides the logits before a token is drawn (1 if not given);
            above zero, which is checked of Python's numbers alone.
          top_k: draw among this many of the most probable tokens; ties with the last
            of them are let in.

        Raises:
          ValueError: if `top_k` is not between one and the size of the vocabulary, if
            the temperature is not above zero, or if one is given without a key.
        """
        vocab_size = self.dvae.vocab_size
        if top_k is not None and not 1 <= top_k <= vocab_size:
            raise InvalidValue(f"top_k must be between 1 and {vocab_size}, got {top_k}")
        if key is None and not (top_k is None and temperature is None):
            raise InvalidValue("temperature and top_k are for drawing: give a key too")
        temperature = 1.0 if temperature is None else temperature
        if isinstance(temperature, int | float) and temperature <= 0:
            raise InvalidValue(f"temperature must be above 0, got {temperature}")

        def choose(logits, position):
            if key is None:
                return most_probable(logits)
            if top_k is not None:
                least = jax.lax.top_k(logits, top_k)[0][:, -1:]
                logits = jnp.where(logits < least, -jnp.inf, logits)
            key_token = jax.random.fold_in(key, position)
            return noise.categorical(key_token, logits / temperature)

        def extend(carry, position):
            token, memory = carry
            embedded = self.embedding(token) + self.positions[position][None]
            features, memory = self.decoder.extend(embedded, memory, position)
            chosen = choose(self.out(features), position)
            return (chosen + 1, memory), chosen

        # The memory grows in stages: a token then reads what it masks away as little
        # as possible, which is worth a fifth of the time.
        length = self.side**2
        stages = min(GENERATION_STAGES, length)
        ends = [length * (stage + 1) // stages for stage in range(stages)]
        first = jnp.full(len(slots), BOS, jnp.int32)
        carry = first, self.decoder.start(self.slot_projection(slots), present)
        generated = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            token, memory = carry
            carry = token, self.decoder.make_room(memory, end)
            carry, ids = jax.lax.scan(extend, carry, jnp.arange(start, end))
            generated.append(ids)
        tokens = jnp.concatenate(generated).T
        return tokens.reshape(len(slots), self.side, self.side)

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
        slots = self.attend(embedded, key)
        return Encoded(ids, slots.slots, self._on_grid(slots.attention), slots.stats)

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
            cross_entropy.reshape(tokens.shape), self._on_grid(shares.swapaxes(1, 2))
        )

    def _on_grid(self, attention: jax.Array) -> jax.Array:
        return attention.reshape(*attention.shape[:2], self.side, self.side)


def with_bos(ids: Int[Array, "batch tokens"]) -> Int[Array, "batch longer"]:
    """Shifts image token ids by one and puts BOS before them."""
    return jnp.pad(ids + 1, ((0, 0), (1, 0)), constant_values=BOS)
