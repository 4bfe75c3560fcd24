"""`fixed_point`: solve z = f(params, x, z), differentiate as the adjoint says."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from implicit_slots.fixed_point import vectors
from implicit_slots.fixed_point.adjoints import (
    Adjoint,
    BackwardStats,
    Implicit,
    Linearised,
    Truncated,
    Unrolled,
)
from implicit_slots.fixed_point.implicit_jvp import ImplicitJVP, solution
from implicit_slots.fixed_point.iteration import Solved, Solver
from implicit_slots.fixed_point.linear import Affine
from implicit_slots.fixed_point.program import Program, trace
from implicit_slots.fixed_point.solvers import Anderson, Broyden


class Stats(NamedTuple):
    """What the forward solve did, one entry per example. Carries no gradient.

    Attributes:
      steps: evaluations of f by the solver, without the adjoint's own.
      residual: ‖f(z) − z‖ / ‖f(z)‖ of the last application made, over all leaves.
      converged: whether that application met the solver's tolerances; with an
        implicit adjoint, whether the solver's result does.
      stagnated: the solver gave up because the residual no longer fell.
      diverged: f returned something that is not finite.
      trace: residual of each of the solver's evaluations, infinite after an example
        stopped; None unless the solver has `trace=True`.
    """

    steps: Int[Array, " batch"]
    residual: Float[Array, " batch"]
    converged: Bool[Array, " batch"]
    stagnated: Bool[Array, " batch"]
    diverged: Bool[Array, " batch"]
    trace: Float[Array, "batch max_steps"] | None


class Solution(NamedTuple):
    """A fixed point.

    Attributes:
      value: pytree like z0.
      aux: f's auxiliary output at the last application, or None.
      stats: see `Stats`.
    """

    value: PyTree
    aux: Any
    stats: Stats


def fixed_point(
    f: Callable[[PyTree, PyTree, PyTree], Any],
    params: PyTree,
    x: PyTree,
    z0: PyTree,
    *,
    solver: Solver = Anderson(max_steps=50, rtol=1e-5),
    adjoint: Adjoint = Implicit(),
    has_aux: bool = False,
    probe: BackwardStats | None = None,
    u0: PyTree | None = None,
    matmul_precision: str | None = "highest",
) -> Solution:
    """Solves z = f(params, x, z) from `z0`, differentiably.

    The defaults aim at an exact solution and an exact gradient, because a wrong one is
    hard to see. Anderson's method goes on until the relative residual is below 1e-5 or
    50 evaluations were made; `stats` say which, for each example. The gradient is that
    of the implicit function theorem, for which GMRES makes 20 products with the
    Jacobian. The paper's slot attention is cheaper and biased: `Picard(max_steps=7)`
    with `Neumann(terms=1)`.

    With an implicit adjoint the solver's result z_T is a constant, f is applied to it
    once more and `value` is f(params, x, z_T): the paper's one extra line. The
    gradient with respect to `z0` is then exactly zero, by the implicit function
    theorem: z* does not depend on where the iteration began. `Truncated` applies f
    `steps` times more. `Unrolled` differentiates the solver's applications themselves
    and returns z_T, so for equal `max_steps` it applies f once less.

    Args:
      f: (params, x, z) -> z, or -> (z, aux) with `has_aux`. It must return z in the
        shapes and dtypes it got and treat the examples of the batch independently. What
        it closes over is an input like the others, traced or not, and has a gradient.
        Outside of jit it is traced at every call, and compiled anew if it is a new
        function object, cannot be hashed, or computes something else than before.
      params: pytree that is shared by the batch.
      x: pytree of inputs.
      z0: pytree of floating-point arrays to start from; each leaf has a leading batch
        axis. A good guess, such as an earlier solution, saves steps.
      solver: how to iterate; see above.
      adjoint: how to differentiate; see above.
      has_aux: whether f returns an auxiliary output. Losses may depend on it.
      probe: from `backward_probe(batch)`, with `Implicit` and `Adaptive`: its gradient
        is what the backward solve did.
      u0: pytree like z0, with `Implicit`: where its linear solve begins, per example
        where that is nearer than one term. Its gradient is the u that was found, the
        start of the next call on the same batch; zeros will do for the first.
      matmul_precision: of the products in f, forward and backward, as
        `jax.default_matmul_precision` takes it; products with a precision of their own
        keep it. None: what the caller has set, which by default is TF32 on NVIDIA's
        GPUs and one pass of bfloat16 on TPUs.

    Returns:
      The fixed point, the auxiliary output of the last application, the statistics.

    Raises:
      ValueError: at trace time, if f changes the structure, a shape or a dtype of z,
        a leaf of z0 lacks the batch axis or is no floating-point array, the solver
        cannot be unrolled, the adjoint has nothing that a probe could tell, the probe
        is of another batch, there is no such precision, or u0 is not like z0 or for
        another adjoint than `Implicit`.
      TypeError: if anything but `ImplicitJVP`, `Unrolled` and `Truncated` is
        differentiated twice or in forward mode.
    """
    check_pair(solver, adjoint)
    if probe is not None and not adjoint.measures:
        raise ValueError(
            f"{type(adjoint).__name__} says nothing of its backward pass, so there is "
            "nothing to probe: leave probe=None, or take Implicit or Adaptive"
        )
    if u0 is not None and (not isinstance(adjoint, Implicit) or not adjoint.measures):
        raise ValueError(
            "u0 is where the linear solve of Implicit begins: leave u0=None with "
            f"{type(adjoint).__name__}"
        )
    z0, u0 = jax.tree.map(jnp.asarray, (z0, u0))
    _check_start(z0, probe)
    want, got = vectors.shapes(z0), vectors.shapes(u0)
    if u0 is not None and want != got:
        raise ValueError(f"u0 must be like z0, which is {want}, but it is {got}")
    with _precision(matmul_precision):
        program, closed_over, z0 = trace(f, params, x, z0, has_aux=has_aux)
    place = vectors.place_of(z0)
    for told in (probe, u0):  # by their gradients, of each example
        if told is not None and vectors.place_of(told).varying != place.varying:
            raise ValueError(
                "inside jax.shard_map the probe and u0 must be split over the devices "
                "as z0 is: pass them in, and split them by in_specs"
            )
    probe, u0 = vectors.placed((probe, u0), place)
    solve = _compiled(program, solver, adjoint)
    return Solution(*solve((closed_over, params), x, z0, probe, u0))


def check_pair(solver: Any, adjoint: Any) -> None:
    """Refuses what is no solver or no adjoint, and pairs that do not go together.

    Raises:
      ValueError: for these, and for Broyden with `Unrolled`.
    """
    if not isinstance(solver, Solver):
        raise ValueError(
            f"solver must be Picard(…), Anderson(…) or Broyden(…), got {solver!r}"
        )
    if not isinstance(adjoint, Adjoint):
        raise ValueError(
            "adjoint must be Unrolled(), Truncated(…), Neumann(…), Phantom(…), "
            f"Adaptive(…), Implicit(…) or ImplicitJVP(…), got {adjoint!r}"
        )
    if isinstance(adjoint, Unrolled) and isinstance(solver, Broyden):
        raise ValueError(
            "Broyden cannot be unrolled: its updates are not meant to be "
            "differentiated. Take an implicit adjoint, or Picard or Anderson"
        )


def _check_start(z0: PyTree, probe: BackwardStats | None) -> None:
    batch = vectors.batch_size(z0)
    leaves = jax.tree.leaves(z0)
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise ValueError(
            "every leaf of z0 must be a floating-point array, got dtypes "
            f"{[str(leaf.dtype) for leaf in leaves]}"
        )
    if probe is not None and any(leaf.shape != (batch,) for leaf in probe):
        raise ValueError(f"the probe must be backward_probe({batch}), got {probe}")


def _precision(name: str | None) -> contextlib.AbstractContextManager:
    if name is None:
        return contextlib.nullcontext()
    try:
        return jax.default_matmul_precision(name)
    except ValueError as error:
        raise ValueError(f"no such matmul_precision: {error}") from error


# Compiled here, so that also a call outside of jit compiles once and not every time; a
# few at a time, so that what is no longer called is let go.
@functools.lru_cache(maxsize=32)
def _compiled(f: Program, solver: Solver, adjoint: Adjoint) -> Callable:
    return jax.jit(functools.partial(_solve, f, solver, adjoint))


def _solve(
    f: Program, solver: Solver, adjoint: Adjoint, params, x, z0, probe, u0
) -> tuple[Any, Any, Stats]:
    if isinstance(adjoint, Unrolled):
        return _unrolled(f, solver, adjoint, params, x, z0)
    if isinstance(adjoint, Truncated):
        return _truncated(f, solver, adjoint, params, x, z0)
    if isinstance(adjoint, ImplicitJVP):
        value, aux, solved = solution(f, solver, adjoint, params, x, z0)
        return value, aux, _implicit_statistics(solver, solved, value)
    return _implicit(f, solver, adjoint, params, x, z0, probe, u0)


def _statistics(solver: Solver, solved: Solved, z, fz) -> Stats:
    """Completes the solver's own with the residual of the last application, at `z`."""
    z, fz = jax.lax.stop_gradient((z, fz))
    error, size = vectors.residual_norms(z, fz)
    return Stats(
        steps=solved.steps,
        residual=vectors.relative(error, size),
        converged=solver.met(error, size),
        stagnated=solved.stagnated,
        diverged=solved.diverged | ~jnp.isfinite(error) | ~jnp.isfinite(size),
        trace=solved.trace,
    )


def _implicit_statistics(solver: Solver, solved: Solved, value) -> Stats:
    stats = _statistics(solver, solved, solved.z, value)
    # It is the solver's own result that this application was made at.
    return stats._replace(converged=stats.converged | solved.converged)


def _unrolled(f, solver: Solver, adjoint: Unrolled, params, x, z0):
    def step(state):
        fz, aux = f(params, x, state.z)
        following = solver.step(state, fz)
        return following, aux, fz

    in_segments = adjoint.remat == "sqrt"
    if adjoint.remat and not in_segments:
        step = jax.checkpoint(step)
    # The last application stands outside: it alone keeps its auxiliary output.
    state = _repeat(
        lambda state: step(state)[0],
        solver.init(z0),
        solver.max_steps - 1,
        in_segments=in_segments,
    )
    last, aux, fz = step(state)
    return last.z, aux, _statistics(solver, solver.finish(last), state.z, fz)


def _truncated(f, solver: Solver, adjoint: Truncated, params, x, z0):
    constant = jax.lax.stop_gradient((params, x, z0))
    solved = solver.solve(lambda z: f(*constant[:2], z)[0], constant[2])

    def step(z):
        fz, aux = f(params, x, z)
        if adjoint.damping == 1:
            return fz, aux, fz
        moved = jax.tree.map(lambda a, b: a + adjoint.damping * (b - a), z, fz)
        return moved, aux, fz

    in_segments = adjoint.remat == "sqrt"
    if adjoint.remat and not in_segments:
        step = jax.checkpoint(step)
    z = _repeat(
        lambda z: step(z)[0],
        solved.z,
        adjoint.steps - 1,
        in_segments=in_segments,
    )
    value, aux, fz = step(z)
    return value, aux, _statistics(solver, solved, z, fz)


def _repeat(step, state, times: int, *, in_segments: bool):
    """Applies `step` so often; `in_segments` stores the states √times steps apart."""

    def run(state, times):
        return jax.lax.scan(lambda s, _: (step(s), None), state, length=times)[0]

    if not in_segments or times < 4:
        return run(state, times)
    length = math.isqrt(times)
    segment = jax.checkpoint(functools.partial(run, times=length))
    state, _ = jax.lax.scan(
        lambda state, _: (segment(state), None), state, length=times // length
    )
    return jax.checkpoint(functools.partial(run, times=times % length))(state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _implicit(f, solver, adjoint: Linearised, params, x, z0, probe, u0) -> Any:
    return _implicit_forward(f, solver, adjoint, params, x, z0, probe, u0)[0]


def _implicit_forward(f, solver, adjoint, params, x, z0, probe, u0):
    constant = _differentiated_once((params, x, z0))
    solved = solver.solve(lambda z: f(*constant[:2], z)[0], constant[2])
    # The linearisation at z_T is all that the backward pass needs: memory is that of
    # one application, however many the solver made.
    (value, aux), pull_back = jax.vjp(f, params, x, solved.z)
    stats = _implicit_statistics(solver, solved, value)
    return (value, aux, stats), (pull_back, solved.z, probe, u0)


def _implicit_backward(f, solver, adjoint: Linearised, residuals, cotangents):
    pull_back, z, probe, u0 = residuals
    g, aux_cotangent, _ = cotangents
    no_aux = jax.tree.map(_zeros_like, aux_cotangent)
    # All arithmetic on cotangents is done on vectors in float32 or wider.
    start, unravel = vectors.ravel(g)

    def pulled(u, aux):
        return vectors.ravel(pull_back((unravel(u), aux))[2])[0]

    def right():
        if not jax.tree.leaves(aux_cotangent):
            return start
        return start + pulled(jnp.zeros_like(start), aux_cotangent)

    phi = Affine(
        apply=lambda u: start + pulled(u, aux_cotangent),
        transpose=lambda w: pulled(w, no_aux),
        right=right,
        eps=max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(g)),
    )
    if isinstance(adjoint, Implicit) and u0 is not None:
        u, stats = adjoint.cotangent(phi, start, vectors.ravel(u0)[0])
    else:
        u, stats = adjoint.cotangent(phi, start)
    params_cotangent, x_cotangent, _ = pull_back((unravel(u), aux_cotangent))
    return (
        params_cotangent,
        x_cotangent,
        jax.tree.map(jnp.zeros_like, z),
        # Counts may be constants.
        None if probe is None else vectors.placed(stats, vectors.place_of(probe)),
        None if u0 is None else unravel(u),
    )


@jax.custom_jvp
def _differentiated_once(tree: PyTree) -> PyTree:
    """Lets no second derivative through: it would miss how z_T moves."""
    return tree


@_differentiated_once.defjvp
def _refuse_second_derivatives(primals, tangents):
    raise TypeError(
        "this adjoint has first derivatives only: the second would miss how the "
        "solution moves. Take adjoint=ImplicitJVP() or Unrolled()"
    )


def _zeros_like(cotangent):
    # Integer outputs have cotangents of dtype float0, which jax.numpy rejects.
    if cotangent.dtype == jax.dtypes.float0:
        return cotangent
    return jnp.zeros_like(cotangent)


_implicit.defvjp(_implicit_forward, _implicit_backward)
