"""torchdeq, as a library of `peers`. PyTorch is imported where it is used."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.peer_maps import Map, tree, vector
from experiments.benchmarks.peers import MAX_PRODUCTS, MAX_STEPS, Found, Program


class TorchDEQ:
    """torchdeq: in PyTorch, run eagerly, differentiated by the theorem (`ift`)."""

    name = "torchdeq"
    loosest = 1.0
    forwards: tuple[str, ...] = ("fixed_point_iter", "anderson", "broyden")
    backwards: tuple[str, ...] = forwards

    def __init__(self):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(len(os.sched_getaffinity(0)))

    def forward(self, problem: Map, forward: str, tolerance: float) -> Program:
        """Returns the forward pass, of as many steps at most as it takes."""
        return self._program(problem, forward, tolerance, None, 1e-3)

    def both(
        self, problem: Map, forward: str, tolerance: float, backward: str, linear: float
    ) -> Program:
        """Returns the gradient by parameters and inputs."""
        return self._program(problem, forward, tolerance, backward, linear)

    def _program(self, problem, forward, tolerance, backward, linear) -> Program:
        import torch  # pyright: ignore[reportMissingImports]
        from torchdeq import get_deq  # pyright: ignore[reportMissingImports]

        def tensor(leaf):
            return torch.tensor(np.asarray(leaf), requires_grad=backward is not None)

        params = jax.tree.map(tensor, tree(problem.params))
        x = tensor(problem.x)
        z0, g = (torch.tensor(np.asarray(leaf)) for leaf in (problem.z0, problem.g))
        count = 0

        def f(z):
            nonlocal count
            count += 1
            return problem.torch(params, x, z)

        def build(forward_steps: int, backward_steps: int):
            deq = get_deq(
                ift=backward is not None,
                f_solver=forward,
                b_solver=backward or forward,
                f_tol=tolerance,
                b_tol=linear,
                f_stop_mode="rel",
                b_stop_mode="rel",
                f_max_iter=forward_steps,
                b_max_iter=backward_steps,
            )
            return deq.train(backward is not None)

        def run(deq) -> tuple[Any, Any]:
            if backward is None:
                with torch.no_grad():
                    return deq(f, z0)[0][-1], None
            leaves = [*jax.tree.leaves(params), x]
            z = deq(f, z0)[0][-1]
            return z.detach(), torch.autograd.grad((z * g).sum(), leaves)

        # Broyden's method sets memory aside for every step that it may take.
        deq = build(MAX_STEPS, MAX_PRODUCTS)
        run(deq)
        deq = build(count + 2, MAX_PRODUCTS)

        def read() -> Found:
            nonlocal count
            count = 0
            z, gradients = run(deq)
            if gradients is None:
                return Found(z.numpy(), count)
            *by_params, _ = (part.numpy() for part in gradients)
            return Found(z.numpy(), count, vector(by_params))

        memory = _torch_peak(lambda: run(deq)) if backward else None
        return Program(lambda: run(deq), read, memory)


def _torch_peak(call: Callable[[], Any]) -> int | None:
    """The most bytes that PyTorch's allocator had given out during a call."""
    from torch.profiler import ProfilerActivity, profile  # pyright: ignore

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()
    sizes = [e.nbytes() for e in sorted(events, key=_start) if e.name() == "[memory]"]
    return int(np.cumsum(sizes).max()) if sizes else None


def _start(event: Any) -> int:
    return event.start_ns()
