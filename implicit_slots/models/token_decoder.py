"""From slots to tokens and images: what SLATE's decoder is asked for."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from implicit_slots.models import generation
from implicit_slots.models import kernels as pallas
from implicit_slots.models.generation import BOS
from implicit_slots.models.image_encoder import on_grid
from implicit_slots.models.outputs import Reading
from implicit_slots.models.patch_tokenizer import PatchTokenizer
from implicit_slots.models.products import examples_apart

# Of a code that nothing was nearest to: one of the patches that `codebook` clusters.
SMALLEST_SHARE = 5e-5


class TokenDecoder(nnx.Module):
    """SLATE's second half. It has no parameters of its own; `SLATE` makes them."""

    # The dVAE, or what stands in its place; the token embedding; the last layer.
    dvae: Any
    embedding: Any
    positions: Any
    slot_projection: Any
    decoder: Any
    out: Any
    side: int
    # With random order: which token each input asks for.
    target_positions: Any
    drop_tokens: float
    token_weighting: float
    kernels: str

    def embed(
        self, tokens: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens dim"]:
        """Embeds a sequence that begins with BOS, with its positions."""
        embedded = self.embedding(tokens) + self.positions[None, : tokens.shape[1]]
        return examples_apart(embedded)

    def dropped(self, embedded: jax.Array, key: Key[Array, ""]) -> jax.Array:
        """Leaves of some tokens only the position, never of BOS, which comes first."""
        key_rate, key_token = jax.random.split(key)
        batch, length = embedded.shape[:2]
        rate = self.drop_tokens * jax.random.uniform(key_rate, (batch, 1))
        drop = jax.random.uniform(key_token, (batch, length)) < rate
        drop = drop.at[:, 0].set(False)
        positions = self.positions[None, :length].astype(embedded.dtype)
        return jnp.where(drop[..., None], positions, embedded)

    def decode(
        self,
        embedded: Float[Array, "batch tokens dim"],
        slots: Float[Array, "batch slots slot_dim"],
        *,
        key: Key[Array, ""] | None = None,
        weighted: bool = False,
        order: Int[Array, " tokens"] | None = None,
    ) -> Float[Array, "batch tokens vocab"]:
        """Returns logits of the token that follows each token.

        Args:
          embedded: tokens, BOS first, in the order in which they are read.
          slots: of each image.
          key: for dropout.
          weighted: see `token_logits`.
          order: places of the tokens that are asked for; row by row if not given.
        """
        features = self.features(embedded, slots, key=key, order=order)
        return self.token_logits(features, weighted=weighted)

    def features(
        self,
        embedded: Float[Array, "batch tokens dim"],
        slots: Float[Array, "batch slots slot_dim"],
        *,
        key: Key[Array, ""] | None = None,
        order: Int[Array, " tokens"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Returns what `decode` makes its logits of; the arguments are its own."""
        read = self.asking(embedded, order)
        return self.decoder(read, self.slot_projection(slots), key=key)

    def watch(
        self,
        embedded: Float[Array, "batch tokens dim"],
        slots: Float[Array, "batch slots slot_dim"],
        present: Bool[Array, "batch slots"] | None = None,
    ) -> tuple[
        Float[Array, "batch tokens dim"], Float[Array, "batch slots rows columns"]
    ]:
        """Returns the decoder's features without dropout, and its masks.

        Args:
          embedded: all tokens of images, BOS first and the last one left out.
          slots: of each image.
          present: which of them the decoder sees, at least one; all if not given.
        """
        features, shares = self.decoder.watch(
            self.asking(embedded), self.slot_projection(slots), present
        )
        masks = on_grid(shares.swapaxes(1, 2), self.side)
        return features, masks

    def asking(
        self,
        embedded: Float[Array, "batch tokens dim"],
        order: Int[Array, " tokens"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Returns the decoder's inputs, each with the place of the token it asks for.

        A model that reads rows alone knows it from where an input stands.
        """
        if self.target_positions is None:
            return embedded
        places = self.target_positions[...]
        length = embedded.shape[1]
        places = places[:length] if order is None else places[order]
        return embedded + places[None].astype(embedded.dtype)

    def reordered(
        self, embedded: Float[Array, "batch longer dim"], order: Int[Array, " tokens"]
    ) -> Float[Array, "batch tokens dim"]:
        """Returns BOS and the tokens in an order, the last one left out.

        Args:
          embedded: BOS and all tokens row by row, each with the place after its own.
          order: places of the tokens.
        """
        return jnp.concatenate([embedded[:, :1], embedded[:, 1 + order[:-1]]], axis=1)

    def token_logits(
        self, features: Float[Array, "*batch dim"], *, weighted: bool = False
    ) -> Float[Array, "*batch vocab"]:
        """Returns the logits of tokens.

        Args:
          features: the decoder's.
          weighted: as `token_weighting` trains them; else corrected for it.
        """
        logits = self.out(features)
        if self.token_weighting and not weighted:
            added = jnp.log(self.weights())
            logits = logits - jnp.expand_dims(added, range(logits.ndim - 1))
        return logits

    def cross_entropy(
        self,
        features: Float[Array, "batch tokens dim"],
        targets: Int[Array, "batch tokens"],
        *,
        weighted: bool = False,
    ) -> Float[Array, "batch tokens"]:
        """Returns the cross-entropy of tokens, in nats; arguments of `token_logits`."""
        corrected = self.token_weighting and not weighted
        if pallas.use(self.kernels) and not corrected:
            from implicit_slots.models.kernels import cross_entropy as fused

            kernel = self.out.kernel[...]
            features = features.astype(self.out.dtype or kernel.dtype)
            return fused.cross_entropy(features, kernel, targets, pallas.interpreted())
        return optax.softmax_cross_entropy_with_integer_labels(
            self.token_logits(features, weighted=weighted), targets
        )

    def weights(self) -> Float[Array, " vocab"]:
        """Of the tokens, in the cross-entropy; over all of them their mean is one."""
        assert isinstance(self.dvae, PatchTokenizer)
        shares = jax.lax.stop_gradient(self.dvae.shares[...])
        weights = jnp.maximum(shares, SMALLEST_SHARE) ** -self.token_weighting
        return weights / (shares * weights).sum()

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

    def picture(
        self, tokens: Int[Array, "batch rows columns"]
    ) -> Float[Array, "batch height width 3"]:
        """Returns the image that tokens stand for, in [0, 1]."""
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
        features, masks = self.watch(
            self.embed(with_bos(targets))[:, :-1], slots, present
        )
        cross_entropy = self.cross_entropy(features, targets)
        return Reading(cross_entropy.reshape(tokens.shape), masks)


def with_bos(ids: Int[Array, "batch tokens"]) -> Int[Array, "batch longer"]:
    """Shifts image token ids by one and puts BOS before them."""
    return jnp.pad(ids + 1, ((0, 0), (1, 0)), constant_values=BOS)
