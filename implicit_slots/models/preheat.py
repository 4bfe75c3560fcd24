"""Initial slots predicted from the inputs, as in SmoothSA (Zhao et al. 2025)."""

from flax import nnx
from jaxtyping import Array, Float

from implicit_slots.models import layers, products


class Preheat(nnx.Module):
    """Each slot's own vector reads the inputs once; a residual MLP follows.

    Slots do not compete here, as they do in slot attention.

    Args:
      input_size: width of an input.
      slot_size: width of a slot.
      mlp_size: hidden width of the MLP.
      rngs: source of the initial parameters.
    """

    def __init__(
        self, input_size: int, slot_size: int, mlp_size: int, *, rngs: nnx.Rngs
    ):
        self.project_q, self.project_k, self.project_v = (
            layers.Linear(size, slot_size, bias=False, rngs=rngs)
            for size in (slot_size, input_size, input_size)
        )
        self.norm_inputs = layers.LayerNorm(input_size)
        self.norm_mlp = layers.LayerNorm(slot_size)
        self.mlp = layers.MLP(slot_size, mlp_size, rngs=rngs)

    def __call__(
        self,
        inputs: Float[Array, "batch inputs features"],
        slots: Float[Array, "batch slots dim"],
    ) -> Float[Array, "batch slots dim"]:
        """Returns the slots with what they read of the inputs added."""
        inputs = self.norm_inputs(inputs)
        queries, keys = self.project_q(slots), self.project_k(inputs)
        logits = products.product("bkd,bnd->bkn", queries, keys)
        shares = nnx.softmax(logits * slots.shape[-1] ** -0.5, axis=-1)
        values = self.project_v(inputs)
        read = products.product("bkn,bnd->bkd", shares.astype(values.dtype), values)
        slots = slots + read.astype(slots.dtype)
        return slots + self.mlp(self.norm_mlp(slots))
