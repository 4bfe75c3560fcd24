"""SLATE: discrete VAE, slot attention over its tokens, autoregressive decoder.

Singh, Deng, Ahn 2022 (arXiv 2110.11405), as in the official code. Its loss is a sum
over pixels and tokens, not a mean: see `Output`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from implicit_slots.fixed_point import BackwardStats, Picard
from implicit_slots.models import kernels as pallas
from implicit_slots.models import layers, noise
from implicit_slots.models.dvae import DVAE, STRIDE, gumbel_softmax
from implicit_slots.models.image_encoder import KERNEL, ImageEncoder, on_grid
from implicit_slots.models.images import squared_error
from implicit_slots.models.outputs import Encoded, Output, Reconstruction
from implicit_slots.models.patch_tokenizer import PatchTokenizer
from implicit_slots.models.slot_attention import Problem, SlotAttention
from implicit_slots.models.token_decoder import TokenDecoder, with_bos
from implicit_slots.models.transformer import TransformerDecoder
from implicit_slots.runtime.errors import InvalidValue

# What slot attention reads, what makes tokens, in which order they are decoded.
INPUTS = ("tokens", "image")
TOKENIZERS = ("dvae", "patches")
ORDERS = ("raster", "random")


class SLATE(TokenDecoder):
    """The whole model, for square images of one resolution.

    The defaults are those of Singh et al. 2022 for ShapeStacks (from memory), with the
    slots and iterations of Chang et al. 2022.

    Args:
      resolution: image side in pixels, divisible by four; 96 as published.
      vocab_size: number of tokens.
      dvae_features: channels of the dVAE's hidden layers.
      width: features of a token in slot encoder and decoder.
      num_blocks: decoder blocks.
      num_heads: decoder attention heads.
      dropout: rate in the decoder and on the embedded tokens.
      attention_dropout: rate on the decoder's attention weights.
      kernels: "auto" uses kernels of our own on NVIDIA GPUs, for the decoder's
        attention and for what has an entry for each token of the vocabulary; "xla"
        nowhere, "pallas" everywhere. See `implicit_slots.models.kernels`.
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
      tokenizer: what makes the tokens. "dvae", as published, is trained beside the
        rest; "patches" is a codebook that is found before the first step, see
        `PatchTokenizer`, and stands in `dvae`.
      inputs: what slot attention reads. "tokens", as published, are the embedded
        tokens; "image" are a convolutional encoder's features of the pixels, as in
        STEVE (Singh, Wu, Ahn 2022), and tokens are the decoder's targets alone.
      encoder_features: channels of that encoder.
      encoder_strides: of its convolutions.
      encoder_kernels: of the same, their sides; one for all, or as many.
      encoder_padding: "zeros" or "edge", see `ImageEncoder`.
      encoder_positions: "added" or "apart", see `ImageEncoder`.
      decoder_order: "raster", as published, or "random": in training the decoder reads
        the tokens of each batch in another order, as SPOT does (Kakogeorgiou et al.
        2024), and learns a vector for each place that it asks for.
      drop_tokens: in training, the decoder's input tokens of an image are dropped at a
        rate drawn uniformly from 0 to this, so that it needs the slots. A dropped token
        leaves its position.
      token_weighting: in training, the decoder's cross-entropy of a token is weighted
        by its share of all tokens to the power of minus this; the mean weight is one.
        Else its logits are corrected for it. Needs the shares, which "patches" has.
      rngs: source of the initial parameters.
    """

    # Its parameters' top-level names in the order in which a pass uses them; a model
    # has the image's encoder or the tokens'.
    stages = (
        "dvae",
        "embedding",
        "positions",
        "target_positions",
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
        kernels: str = "auto",
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
        tokenizer: str = "dvae",
        inputs: str = "tokens",
        encoder_features: int = 64,
        encoder_strides: Sequence[int] = (2, 1),
        encoder_kernels: Sequence[int] = (KERNEL,),
        encoder_padding: str = "zeros",
        encoder_positions: str = "added",
        decoder_order: str = "raster",
        drop_tokens: float = 0.0,
        token_weighting: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if resolution < STRIDE or resolution % STRIDE:
            raise InvalidValue(
                f"the image size must be divisible by {STRIDE}, got {resolution}"
            )
        self.side = resolution // STRIDE
        self.dropout = dropout
        self.hard = hard
        self.kernels = kernels
        if tokenizer not in TOKENIZERS:
            raise InvalidValue(
                f"tokenizer must be one of {TOKENIZERS}, got {tokenizer!r}"
            )
        self.fixed_tokens = tokenizer == "patches"
        if not 0 <= token_weighting <= 1:
            raise InvalidValue(
                f"token_weighting must be in [0, 1], got {token_weighting}"
            )
        if token_weighting and not self.fixed_tokens:
            raise InvalidValue('token_weighting needs tokenizer="patches"')
        self.token_weighting = token_weighting
        if self.fixed_tokens:
            self.dvae = PatchTokenizer(vocab_size, rngs=rngs)
        else:
            self.dvae = DVAE(vocab_size, features=dvae_features, rngs=rngs)
        self.embedding = nnx.Embed(
            vocab_size + 1,
            width,
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.positions = nnx.Param(
            layers.token_positions(
                initial_positions, position_scale, self.side, width, rngs=rngs
            )
        )
        if decoder_order not in ORDERS:
            raise InvalidValue(
                f"decoder_order must be one of {ORDERS}, got {decoder_order!r}"
            )
        places = jnp.zeros((self.side**2, width))
        self.target_positions = nnx.Param(places) if decoder_order == "random" else None
        if inputs not in INPUTS:
            raise InvalidValue(f"inputs must be one of {INPUTS}, got {inputs!r}")
        if not 0 <= drop_tokens <= 1:
            raise InvalidValue(f"drop_tokens must be in [0, 1], got {drop_tokens}")
        self.drop_tokens = drop_tokens
        self.reads_image = inputs == "image"
        self.slots_side = self.side
        if self.reads_image:
            self.image_encoder = encoder = ImageEncoder(
                resolution,
                encoder_features,
                encoder_strides,
                kernels=encoder_kernels,
                padding=encoder_padding,
                positions=encoder_positions,
                position_scale=position_scale,
                rngs=rngs,
            )
            self.slots_side = encoder.side
            self.slot_attention = encoder.attended(slots, rngs=rngs)
        else:
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
            kernels=kernels,
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
        temperature: Float[Array, ""] | float | None = None,
        key: Key[Array, ""],
        deterministic: bool = False,
        frozen: bool = False,
        initial_noise: Float[Array, ""] | float | None = None,
        probe: BackwardStats | None = None,
        coupling_key: Key[Array, ""] | None = None,
    ) -> Output:
        """Returns the losses of a batch with images in [0, 1].

        They are "mse", the tokens' squared error summed over pixels and channels, and
        "cross_entropy", the decoder's, summed over the tokens, in nats.

        Args:
          batch: of which `image` is read.
          temperature: of the Gumbel-softmax; needed where there is a dVAE.
          key: for Gumbel noise, initial slots and dropout.
          deterministic: no dropout and no noise on learned initial slots; the other
            noise stays.
          frozen: the dVAE gets no gradient, and the targets are its most probable
            tokens instead of drawn ones.
          initial_noise: on learned initial slots, see `SlotAttention.initial`.
          probe: see `SlotAttention`.
          coupling_key: the same.
        """
        image = batch["image"]
        key_relaxed, key_hard, key_slots, key_embed, key_decoder = jax.random.split(
            key, 5
        )
        frozen = frozen or self.fixed_tokens
        if frozen or self.hard or not pallas.use(self.kernels):
            token_logits = self.dvae.encode(image)
            if frozen:
                targets = token_logits.argmax(axis=-1)
            else:
                # A second, independent sample; the transformer never trains the dVAE.
                still = jax.lax.stop_gradient(token_logits)
                targets = noise.categorical(key_hard, still)
            if self.fixed_tokens:
                reconstruction = self.dvae.decode_ids(targets)
            elif temperature is None:
                raise InvalidValue("a model with a dVAE needs a temperature")
            else:
                relaxed = gumbel_softmax(
                    token_logits, temperature, key_relaxed, hard=self.hard
                )
                reconstruction = self.dvae.decode(relaxed)
        elif temperature is None:
            raise InvalidValue("a model with a dVAE needs a temperature")
        else:
            reconstruction, targets = self.dvae.relax(
                image, temperature, key_relaxed, key_hard
            )
        mse = squared_error(image, reconstruction)
        if frozen:
            mse = jax.lax.stop_gradient(mse)
        targets = targets.reshape(len(image), -1)
        embedded = layers.dropout(
            self.embed(with_bos(targets)),
            self.dropout,
            None if deterministic else key_embed,
        )
        slots = self.slot_attention(
            self.slot_inputs(image, embedded[:, 1:]),
            key=key_slots,
            noise=None if deterministic else initial_noise,
            probe=probe,
            coupling_key=coupling_key,
        )
        shuffled = self.target_positions is not None and not deterministic
        shown = embedded if shuffled else embedded[:, :-1]
        if self.drop_tokens and not deterministic:
            shown = self.dropped(shown, jax.random.fold_in(key, 5))
        asked, order = targets, None
        if shuffled:
            order = jax.random.permutation(jax.random.fold_in(key, 6), self.side**2)
            shown, asked = self.reordered(shown, order), targets[:, order]
        masks = None
        if deterministic:
            features, masks = self.watch(shown, slots.slots)
        else:
            features = self.features(shown, slots.slots, key=key_decoder, order=order)
        cross_entropy = self.cross_entropy(features, asked, weighted=not deterministic)
        if self.token_weighting and not deterministic:
            cross_entropy = cross_entropy * self.weights()[asked]
        losses = {"mse": mse, "cross_entropy": cross_entropy.sum(axis=1)}
        return Output(
            losses,
            on_grid(slots.attention, self.slots_side),
            slots.stats,
            reconstruction,
            masks,
            coupling=slots.coupling,
            tokens=targets,
        )

    def slot_inputs(
        self,
        image: Float[Array, "batch height width 3"],
        embedded: Float[Array, "batch tokens dim"],
    ) -> Float[Array, "batch inputs features"]:
        """Returns what slot attention reads of images or their embedded tokens."""
        if self.reads_image:
            return self.image_encoder(image)
        return self.encoder_mlp(self.encoder_norm(embedded))

    def backward_probe(self, batch: int) -> BackwardStats | None:
        """See `SlotAttention`."""
        return self.slot_attention.backward_probe(batch)

    def slot_problem(
        self, image: Float[Array, "batch height width 3"], key: Key[Array, ""]
    ) -> Problem:
        """Returns the fixed-point problem that images in [0, 1] pose slot attention.

        Without noise in the tokens and without dropout; the key draws initial slots.
        """
        inputs = self.slot_inputs(image, self._tokens(image)[1])
        slots = self.slot_attention.start(inputs, key)
        return self.slot_attention.problem(inputs, slots)

    def _tokens(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The most probable tokens of images, and their embeddings."""
        ids = self.dvae.encode(image).argmax(axis=-1)
        return ids, self.embed(with_bos(ids.reshape(len(image), -1)))[:, 1:]

    def reconstruct(
        self, image: Float[Array, "batch height width 3"], *, key: Key[Array, ""]
    ) -> Reconstruction:
        """Reconstructs images in [0, 1] through their tokens and through the slots.

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
