"""Slot attention as a fixed point: the step is the map f, the module solves it.

Locatello et al. 2020 (arXiv 2006.15055), with heads as in official SLATE;
differentiated as in Chang, Griffiths, Levine 2022 (arXiv 2207.00787).
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from implicit_slots.fixed_point import (
    Adjoint,
    BackwardStats,
    Neumann,
    Picard,
    Solver,
    Unrolled,
    backward_probe,
    check_pair,
    coupling_norm,
    fixed_point,
)
from implicit_slots.models import layers, products
from implicit_slots.models.outputs import SlotsOutput
from implicit_slots.models.preheat import Preheat
from implicit_slots.runtime.errors import InvalidValue

NORMALIZERS = ("mean", "damped")
# Those that no key draws.
LEARNED = ("learned", "predicted")
INITIAL_SLOTS = ("gaussian", "gaussians", *LEARNED)


class SlotAttentionStep(nnx.Module):
    """One iteration: the map f whose fixed point the slots are.

    Args:
      input_size: width of an input.
      slot_size: width of a slot.
      mlp_size: hidden width of the residual MLP.
      num_heads: attention heads; must divide `slot_size`.
      epsilon: added to the attention before it is normalised over the inputs.
      attention_gain: Xavier's gain of the initial queries' and keys' projections; the
        logits begin its square times as large.
      normalizer: one of `NORMALIZERS`, see `SlotAttention`.
      key_size: how many of an input's first features are compared with slots; all if
        not given. The others are only read.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        input_size: int,
        slot_size: int,
        mlp_size: int,
        *,
        num_heads: int,
        epsilon: float,
        attention_gain: float,
        normalizer: str = "mean",
        key_size: int | None = None,
        rngs: nnx.Rngs,
    ):
        if normalizer not in NORMALIZERS:
            raise InvalidValue(
                f"normalizer must be one of {NORMALIZERS}, got {normalizer!r}"
            )
        self.num_heads = num_heads
        self.epsilon = epsilon
        # Added to the sum over the inputs.
        self.damping = 1.0 if normalizer == "damped" else 0.0
        self.norm_slots = layers.LayerNorm(slot_size)
        sharp = layers.xavier_uniform(attention_gain)
        self.project_q = layers.Linear(
            slot_size, slot_size, bias=False, kernel_init=sharp, rngs=rngs
        )
        self.key_size = input_size if key_size is None else key_size
        self.project_k = layers.Linear(
            self.key_size, slot_size, bias=False, kernel_init=sharp, rngs=rngs
        )
        self.project_v = layers.Linear(input_size, slot_size, bias=False, rngs=rngs)
        self.gru = layers.GRUCell(slot_size, rngs=rngs)
        self.norm_mlp = layers.LayerNorm(slot_size)
        self.mlp = layers.MLP(slot_size, mlp_size, rngs=rngs)

    def __call__(
        self,
        inputs: Float[Array, "batch inputs features"],
        slots: Float[Array, "batch slots dim"],
    ) -> tuple[Float[Array, "batch slots dim"], Float[Array, "batch slots inputs"]]:
        """Returns the next slots and the attention that made them.

        The attention is summed over the heads: over slots it sums to one.
        """
        queries = self._split_heads(self.project_q(self.norm_slots(slots)))
        # x · (W_kᵀ q) and (weightsᵀ x) · W_v: there are hundreds of inputs and a few
        # slots, so what belongs to the slots is projected, not every input. Forward
        # and backward together take half to three quarters of the time (1 head).
        seen_from_inputs = products.product(
            "bkhd,ihd->bkhi", queries, self._kernel(self.project_k)
        )
        logits = products.product(
            "bni,bkhi->bnhk",
            inputs[..., : self.key_size],
            seen_from_inputs * queries.shape[-1] ** -0.5,
        )
        # Softmax over slots x heads jointly, as official SLATE; SAVi does it per head.
        joint = nnx.softmax(logits.reshape(*logits.shape[:2], -1), axis=-1)
        attention = joint.reshape(logits.shape)
        weights = attention + self.epsilon
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / (total + self.damping if self.damping else total)
        read = products.product("bnhk,bni->bkhi", weights, inputs)
        updates = products.product("bkhi,ihd->bkhd", read, self._kernel(self.project_v))
        slots = self.gru(updates.reshape(slots.shape), slots)
        slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, attention.sum(axis=2).swapaxes(1, 2)

    def _kernel(self, layer: layers.Linear) -> jax.Array:
        return self._split_heads(layer.kernel[...])

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


@dataclass(frozen=True)
class StepFunction:
    """`SlotAttentionStep` as a pure f(params, x, z) for `fixed_point`.

    It compares by the module's structure and holds no array, so nothing traced is
    closed over.

    Attributes:
      graphdef: of the step.
      attention: return (slots, attention), not the slots alone.
    """

    graphdef: nnx.GraphDef
    attention: bool = True

    def __call__(self, params: PyTree, x: PyTree, slots: jax.Array) -> Any:
        """Applies the step with `params` to the inputs `x`."""
        # Float32 on every device, also where J is looked at and nothing iterated.
        with jax.default_matmul_precision("highest"):
            slots, attention = nnx.merge(self.graphdef, params)(x, slots)
        return (slots, attention) if self.attention else slots


class Problem(NamedTuple):
    """A fixed-point problem as the solver core takes it: z = f(params, x, z) from z0.

    Attributes:
      f: the step, without the attention.
      params: of the step.
      x: normalised inputs.
      z0: initial slots.
    """

    f: StepFunction
    params: PyTree
    x: PyTree
    z0: Float[Array, "batch slots dim"]


class SlotAttention(nnx.Module):
    """Initial slots, then the fixed point of `SlotAttentionStep`.

    ```python
    slots = SlotAttention(64, num_slots=7, slot_size=64, rngs=nnx.Rngs(0))
    output = slots(features, key=key)  # features: [batch, inputs, 64]
    output.slots, output.attention
    ```

    The defaults are Locatello et al. 2020's, with the gradient of Chang et al. 2022.

    Args:
      input_size: width of an input.
      num_slots: how many slots.
      slot_size: width of a slot.
      mlp_size: hidden width of the step's MLP.
      num_heads: attention heads; must divide `slot_size`.
      epsilon: see `SlotAttentionStep`.
      attention_gain: the same. With 1 the attention of some runs of the autoencoder
        stays even for thousands of steps; with 3 it did not in three seeds.
      normalizer: "mean" divides the attention of a slot by its sum over the inputs, as
        published; "damped" by its sum and 1, so that a slot that sees little changes
        little (Jia et al. 2023, BO-QSA).
      key_size: see `SlotAttentionStep`.
      initial_slots: "gaussian" draws each slot from one Gaussian whose mean and
        log-scale are parameters; "gaussians" from a Gaussian of its own; "learned"
        starts each slot from its own vector; "predicted" lets that vector read the
        inputs first, see `Preheat`.
      straight_through: add z0 − stop_gradient(z0) to the result, so that the initial
        slots' parameters are trained (Jia et al. 2023, BO-QSA). Implicit adjoints
        give z0 exactly no gradient otherwise; with an unrolled one it changes nothing.
      solver: how to iterate.
      adjoint: how to differentiate.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        input_size: int,
        *,
        num_slots: int = 7,
        slot_size: int = 64,
        mlp_size: int = 128,
        num_heads: int = 1,
        epsilon: float = 1e-8,
        initial_slots: str = "gaussian",
        straight_through: bool = False,
        normalizer: str = "mean",
        key_size: int | None = None,
        attention_gain: float = 1.0,
        solver: Solver = Picard(max_steps=3),
        adjoint: Adjoint = Neumann(terms=1),
        rngs: nnx.Rngs,
    ):
        if num_slots < 1:
            raise InvalidValue(f"num_slots must be at least 1, got {num_slots}")
        if num_heads < 1 or slot_size % num_heads:
            raise InvalidValue(
                f"slot_size must be a multiple of the slot heads, got {slot_size} "
                f"and {num_heads}"
            )
        if attention_gain <= 0:
            raise InvalidValue(f"attention_gain must be positive, got {attention_gain}")
        try:
            check_pair(solver, adjoint)
        except ValueError as error:
            raise InvalidValue(str(error)) from error
        implicit = not isinstance(adjoint, Unrolled)
        trained = initial_slots in LEARNED
        if trained and implicit and not straight_through:
            raise InvalidValue(
                f"{initial_slots} initial slots get no gradient from an implicit "
                "adjoint: set straight_through=True"
            )
        self.num_slots = num_slots
        self.slot_size = slot_size
        # An unrolled gradient reaches the initial slots without.
        self.straight_through = straight_through and implicit
        self.solver = solver
        self.adjoint = adjoint
        self.norm_inputs = layers.LayerNorm(input_size)
        self.step = SlotAttentionStep(
            input_size,
            slot_size,
            mlp_size,
            num_heads=num_heads,
            epsilon=epsilon,
            attention_gain=attention_gain,
            normalizer=normalizer,
            key_size=key_size,
            rngs=rngs,
        )
        if initial_slots in ("gaussian", "gaussians"):
            # PyTorch's Xavier bound for a [1, 1, D] tensor is √(6 / (D + D)).
            bound = (3 / slot_size) ** 0.5
            draw = nnx.initializers.uniform(2 * bound)
            shape = (1, num_slots if initial_slots == "gaussians" else 1, slot_size)
            self.slot_mean = nnx.Param(draw(rngs.params(), shape) - bound)
            self.slot_log_scale = nnx.Param(draw(rngs.params(), shape) - bound)
        elif trained:
            vectors = layers.xavier_uniform()(rngs.params(), (num_slots, slot_size))
            self.slot_vectors = nnx.Param(vectors)
        else:
            raise InvalidValue(
                f"initial_slots must be one of {INITIAL_SLOTS}, got {initial_slots!r}"
            )
        predicted = initial_slots == "predicted"
        sizes = input_size, slot_size, mlp_size
        self.preheat = Preheat(*sizes, rngs=rngs) if predicted else None

    def initial(
        self,
        batch: int,
        key: Key[Array, ""] | None = None,
        *,
        noise: Float[Array, ""] | float | None = None,
    ) -> Float[Array, "batch slots dim"]:
        """Returns z0, of predicted slots what reads the inputs; see `start`.

        Args:
          batch: how many images.
          key: draws Gaussian slots and noise.
          noise: on learned slots, times each entry, which gets no gradient of it
            (Jia et al. 2023, BO-QSA).

        Raises:
          ValueError: if something is to be drawn and there is no key.
        """
        if hasattr(self, "slot_vectors"):
            vectors = self.slot_vectors[...]
            slots = jnp.broadcast_to(vectors, (batch, *vectors.shape))
            if noise is None:
                return slots
            if key is None:
                raise InvalidValue("noise on the initial slots is drawn: pass a key")
            drawn = noise * jax.random.normal(key, slots.shape)
            return slots + drawn * jax.lax.stop_gradient(slots)
        if key is None:
            raise InvalidValue(
                "the initial slots are drawn: pass a key, or the slots to start from"
            )
        mean, log_scale = self.slot_mean[...], self.slot_log_scale[...]
        noise = jax.random.normal(key, (batch, self.num_slots, mean.shape[-1]))
        return mean + jnp.exp(log_scale) * noise

    def start(
        self,
        inputs: Float[Array, "batch inputs features"],
        key: Key[Array, ""] | None = None,
        *,
        noise: Float[Array, ""] | float | None = None,
    ) -> Float[Array, "batch slots dim"]:
        """Returns z0 of a batch of inputs; the arguments are those of `initial`."""
        slots = self.initial(len(inputs), key, noise=noise)
        return slots if self.preheat is None else self.preheat(inputs, slots)

    def __call__(
        self,
        inputs: Float[Array, "batch inputs features"],
        slots: Float[Array, "batch slots dim"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
        noise: Float[Array, ""] | float | None = None,
        probe: BackwardStats | None = None,
        coupling_key: Key[Array, ""] | None = None,
    ) -> SlotsOutput:
        """Returns the slots of a batch of inputs.

        Args:
          inputs: what is attended to.
          slots: where the iteration starts; `self.start(inputs, key)` if not given.
          key: draws the initial slots, see `initial`; not read if they are given.
          noise: the same.
          probe: from `self.backward_probe`; its gradient is what the backward solve
            did.
          coupling_key: draws the sample of `SlotsOutput.coupling`; none is measured
            without.

        Raises:
          ValueError: if initial slots are to be drawn without a key.
        """
        if slots is None:
            slots = self.start(inputs, key, noise=noise)
        problem = self.problem(inputs, slots)
        solution = fixed_point(
            replace(problem.f, attention=True),
            problem.params,
            problem.x,
            problem.z0,
            solver=self.solver,
            adjoint=self.adjoint,
            has_aux=True,
            probe=probe,
        )
        value = solution.value
        if self.straight_through:
            value = value + (slots - jax.lax.stop_gradient(slots))
        coupling = None
        if coupling_key is not None:
            constant = jax.lax.stop_gradient(solution.value)
            coupling = coupling_norm(*problem._replace(z0=constant), coupling_key)
            coupling = coupling / constant[0].size
        return SlotsOutput(value, solution.aux, solution.stats, coupling)

    def problem(
        self,
        inputs: Float[Array, "batch inputs features"],
        slots: Float[Array, "batch slots dim"],
    ) -> Problem:
        """Returns what is solved: for the solver core's diagnostics, or your own."""
        inputs = self.norm_inputs(inputs.astype(slots.dtype))
        graphdef, params = nnx.split(self.step)
        return Problem(StepFunction(graphdef, attention=False), params, inputs, slots)

    def backward_probe(self, batch: int) -> BackwardStats | None:
        """Returns a probe for this adjoint; None if it solves no linear system."""
        return backward_probe(batch) if self.adjoint.measures else None
