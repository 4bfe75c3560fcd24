"""Tokens from slots, one by one: SLATE's decoder with a memory of what it has read."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from implicit_slots.models import noise
from implicit_slots.models.dvae import most_probable
from implicit_slots.runtime.errors import InvalidValue

# The token that begins every sequence; image tokens are shifted by one.
BOS = 0
STAGES = 4


def generate(
    model: Any,
    slots: Float[Array, "batch slots slot_dim"],
    present: Bool[Array, "batch slots"] | None = None,
    *,
    key: Key[Array, ""] | None = None,
    temperature: Float[Array, ""] | float | None = None,
    top_k: int | None = None,
) -> Int[Array, "batch rows columns"]:
    """Generates image token ids from slots alone, one by one.

    Each block keeps the keys and values of the tokens so far, so a token costs one
    token's work. To be called under `jax.jit`: called without, it is compiled
    again each time.

    Args:
      model: a `SLATE`.
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
    vocab_size = model.dvae.vocab_size
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
        embedded = model.embedding(token) + model.positions[position][None]
        if model.target_positions is not None:
            embedded = embedded + model.target_positions[position][None]
        features, memory = model.decoder.extend(embedded, memory, position)
        chosen = choose(model.token_logits(features), position)
        return (chosen + 1, memory), chosen

    # The memory grows in stages: a token then reads what it masks away as little
    # as possible, which is worth a fifth of the time.
    length = model.side**2
    stages = min(STAGES, length)
    ends = [length * (stage + 1) // stages for stage in range(stages)]
    first = jnp.full(len(slots), BOS, jnp.int32)
    carry = first, model.decoder.start(model.slot_projection(slots), present)
    generated = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        token, memory = carry
        carry = token, model.decoder.make_room(memory, end)
        carry, ids = jax.lax.scan(extend, carry, jnp.arange(start, end))
        generated.append(ids)
    tokens = jnp.concatenate(generated).T
    return tokens.reshape(len(slots), model.side, model.side)
