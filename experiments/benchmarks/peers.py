"""Libraries that `solver_peers` compares: ours, jaxopt and optimistix.

Each is used as its documentation shows. jaxopt and optimistix solve one example, so
they are mapped over the batch (`jax.vmap`) where there is more than one.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.peer_maps import Map, vector
from implicit_slots import (
    GMRES,
    Adaptive,
    Anderson,
    BiCGSTAB,
    Broyden,
    Dense,
    Implicit,
    Picard,
    fixed_point,
)

MAX_STEPS = 1000  # of every solver, forward
MAX_PRODUCTS = 100  # with the Jacobian, of every linear solver
DEPTH = 5  # of Anderson's method
OURS = "implicit_slots"


class Found(NamedTuple):
    """What a call returns.

    Attributes:
      z: the solution.
      steps: of the slowest example, as the library counts them.
      gradient: of Σ ⟨g, z⟩ by the parameters, as `peer_maps.vector` orders it; None
        of a forward pass.
    """

    z: np.ndarray
    steps: int
    gradient: np.ndarray | None = None


class Program(NamedTuple):
    """A pass, compiled and ready to be timed.

    Attributes:
      call: runs it and waits for it.
      read: runs it and returns what it found.
      memory: peak bytes beside inputs and outputs, as far as they are known.
    """

    call: Callable[[], Any]
    read: Callable[[], Found]
    memory: int | None


class Library(Protocol):
    """What the benchmark asks of a library.

    Attributes:
      name: its own.
      loosest: how many times the wanted residual its tolerance may be, if it measures
        otherwise; where the search for it begins.
      forwards: names of its forward solvers.
      backwards: names of the linear solvers of its backward pass.
    """

    name: str
    loosest: float
    forwards: tuple[str, ...]
    backwards: tuple[str, ...]

    def forward(self, problem: Map, forward: str, tolerance: float) -> Program:
        """Returns the forward pass."""
        ...

    def both(
        self, problem: Map, forward: str, tolerance: float, backward: str, linear: float
    ) -> Program:
        """Returns forward and backward pass, with the linear solver's tolerance."""
        ...


# Solves: (params, x, z0) -> (z, steps).
Solve = Callable[[Any, Any, Any], tuple[Any, Any]]


class InJax:
    """A library in JAX, by a function that builds its solve.

    Args:
      name: of the library.
      solve: from (map, forward, tolerance, backward, linear tolerance).
      forwards: see `Library`.
      backwards: the same.
      loosest: the same. If it is not 1 the forward tolerance is an input of the
        compiled program, and the search compiles once.
    """

    def __init__(
        self,
        name: str,
        solve: Callable[[Map, str, float, str, float], Solve],
        forwards: tuple[str, ...],
        backwards: tuple[str, ...],
        loosest: float = 1.0,
    ):
        self.name, self.forwards, self.backwards = name, forwards, backwards
        self.solve, self.loosest = solve, loosest
        self._compiled: dict[str, tuple[Map, tuple[Callable, int]]] = {}

    def forward(self, problem: Map, forward: str, tolerance: float) -> Program:
        """Returns the forward pass, compiled."""
        traced = self.loosest != 1
        known, program = self._compiled.get(forward, (None, None))
        if program is None or known is not problem or not traced:

            def solve(params, x, z0, asked):
                wanted = asked if traced else tolerance
                how = wanted, self.backwards[0], 1e-3
                return self.solve(problem, forward, *how)(params, x, z0)

            program = _compile(solve, *problem[2:5], jnp.float32(tolerance))
            self._compiled[forward] = problem, program
        compiled, memory = program
        arguments = *problem[2:5], jnp.float32(tolerance)

        def read() -> Found:
            z, steps = compiled(*arguments)
            return Found(np.asarray(z), int(steps))

        return Program(
            lambda: jax.block_until_ready(compiled(*arguments)), read, memory
        )

    def both(
        self, problem: Map, forward: str, tolerance: float, backward: str, linear: float
    ) -> Program:
        """Returns the gradient by parameters and inputs, compiled."""
        solve = self.solve(problem, forward, tolerance, backward, linear)

        def loss(params, x, z0):
            z, steps = solve(params, x, z0)
            return jnp.sum(z * problem.g), (z, steps)

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        arguments = problem[2:5]
        compiled, memory = _compile(gradient, *arguments)

        def read() -> Found:
            (params, _), (z, steps) = compiled(*arguments)
            return Found(np.asarray(z), int(steps), vector(params))

        return Program(
            lambda: jax.block_until_ready(compiled(*arguments)), read, memory
        )


def _compile(function: Callable, *arguments: Any) -> tuple[Callable, int]:
    """Returns the program, and the bytes of its temporary buffers."""
    compiled = jax.jit(function).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    return compiled, memory.temp_size_in_bytes


def _mapped(one: Callable, problem: Map) -> Solve:
    """Maps (params, x, z0) -> (z, steps) of one example over the batch."""

    def solve(params, x, z0):
        if len(problem.z0) == 1:
            z, steps = one(params, x[0], z0[0])
            return z[None], steps
        z, steps = jax.vmap(one, in_axes=(None, 0, 0))(params, x, z0)
        return z, jnp.max(steps)

    return solve


def _ours(
    problem: Map, forward: str, tolerance: float, backward: str, linear: float
) -> Solve:
    solvers = {
        "Picard": lambda **how: Picard(**how),
        "Anderson": lambda **how: Anderson(depth=DEPTH, **how),
        "Broyden": lambda **how: Broyden(memory=20, **how),
    }
    adjoints = {
        "GMRES": lambda: Implicit(solver=GMRES(max_steps=MAX_PRODUCTS, rtol=linear)),
        "BiCGSTAB": lambda: Implicit(
            solver=BiCGSTAB(max_steps=MAX_PRODUCTS, rtol=linear)
        ),
        "Neumann": lambda: Adaptive(max_terms=MAX_STEPS, rtol=linear),
        "dense": lambda: Implicit(solver=Dense()),
    }
    solver = solvers[forward](max_steps=MAX_STEPS, rtol=tolerance)
    adjoint = adjoints[backward]()

    def solve(params, x, z0):
        found = fixed_point(problem.f, params, x, z0, solver=solver, adjoint=adjoint)
        return found.value, jnp.max(found.stats.steps)

    return solve


def _jaxopt(
    problem: Map, forward: str, tolerance: float, backward: str, linear: float
) -> Solve:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is no longer maintained
        import jaxopt
        from jaxopt import linear_solve as linear_solvers
    linear_solve = {
        "GMRES": functools.partial(
            linear_solvers.solve_gmres, tol=linear, maxiter=MAX_PRODUCTS // 20
        ),
        "BiCGSTAB": functools.partial(
            linear_solvers.solve_bicgstab, tol=linear, maxiter=MAX_PRODUCTS
        ),
        "normal CG": functools.partial(
            linear_solvers.solve_normal_cg, tol=linear, maxiter=MAX_PRODUCTS
        ),
    }
    how = {
        "maxiter": MAX_STEPS,
        # Theirs is absolute.
        "tol": tolerance * _size(problem),
        "implicit_diff_solve": linear_solve[backward],
    }

    def f(z, params, x):
        return problem.single(params, x, z)

    solver = {
        "fixed point": lambda: jaxopt.FixedPointIteration(f, **how),
        "Anderson": lambda: jaxopt.AndersonAcceleration(f, history_size=DEPTH, **how),
    }[forward]()

    def one(params, x, z0):
        found = solver.run(z0, params, x)
        return found.params, found.state.iter_num

    return _mapped(one, problem)


def _optimistix(
    problem: Map, forward: str, tolerance: float, backward: str, linear: float
) -> Solve:
    import lineax
    import optimistix

    kind = {
        "fixed point": optimistix.FixedPointIteration,
        "Newton": optimistix.Newton,
        "Chord": optimistix.Chord,
    }[forward]
    solver = kind(rtol=tolerance, atol=tolerance)
    how = {"rtol": linear, "atol": linear, "max_steps": MAX_PRODUCTS}
    adjoint = optimistix.ImplicitAdjoint(
        {
            "dense": lambda: lineax.AutoLinearSolver(well_posed=None),
            # Not its BiCGStab, which raises a breakdown on every one of the maps.
            "GMRES": lambda: lineax.GMRES(**how),
        }[backward]()
    )

    def f(z, given):
        params, x = given
        return problem.single(params, x, z)

    def one(params, x, z0):
        found = optimistix.fixed_point(
            f,
            solver,
            z0,
            (params, x),
            max_steps=MAX_STEPS,
            adjoint=adjoint,
            throw=False,
        )
        return found.value, found.stats["num_steps"]

    return _mapped(one, problem)


def _size(problem: Map) -> float:
    """The smallest ‖z‖ of a solution, roughly: what absolute tolerances stand on."""
    with jax.ensure_compile_time_eval():  # while a program is traced
        solver = Broyden(max_steps=30)
        found = solver.solve(
            lambda z: problem.f(problem.params, problem.x, z), problem.z0
        )
        return float(jnp.linalg.norm(found.z.reshape(len(found.z), -1), axis=1).min())


ours = functools.partial(
    InJax,
    OURS,
    _ours,
    ("Picard", "Anderson", "Broyden"),
    ("GMRES", "BiCGSTAB", "Neumann", "dense"),
)
jaxopt = functools.partial(
    InJax,
    "jaxopt",
    _jaxopt,
    ("fixed point", "Anderson"),
    ("GMRES", "BiCGSTAB", "normal CG"),
    loosest=2.0,
)
optimistix = functools.partial(
    InJax,
    "optimistix",
    _optimistix,
    ("fixed point", "Newton", "Chord"),
    ("dense", "GMRES"),
    loosest=8.0,
)
