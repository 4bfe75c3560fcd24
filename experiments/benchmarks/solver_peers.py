"""Our solver core beside jaxopt, optimistix and torchdeq, at equal accuracy.

    pip install -e '.[experiments]' jaxopt optimistix torch torchdeq
    python -m experiments.benchmarks.solver_peers

Five to ten minutes on two cores. The same maps, in one process: four affine ones, a
deep-equilibrium classifier of digits, slot attention trained to find clusters; one
example, and a batch. Every solver of every library gets the loosest tolerance by which
every example's residual ‖f(z) − z‖ / ‖f(z)‖ is at most --residual, and every linear
solver of its backward pass the loosest by which the parameter gradient is within
--error of the exact one (Newton's method and a dense solve in float64). What meets them
takes turns, the libraries in alternating order; a time is the median over all rounds.
Of each library the fastest forward pass is shown, and with it the fastest gradient by
parameters and inputs. Memory is XLA's account of temporary buffers, of torchdeq the
peak of what PyTorch's allocator gave out in the call. Writes OUT.md, .json and .png.
"""

import functools
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.benchmarks import harness, peer_maps, peers
from experiments.benchmarks.harness import markdown, positive, rounded
from experiments.benchmarks.peer_maps import Exact, Map
from experiments.benchmarks.peers import OURS, Library, Program
from experiments.benchmarks.torch_peer import TorchDEQ
from implicit_slots.runtime import compiling
from implicit_slots.runtime.allocator import keep_freed_memory
from implicit_slots.runtime.errors import UserError

LIBRARIES: dict[str, Callable[[], Library]] = {
    OURS: peers.ours,
    "jaxopt": peers.jaxopt,
    "optimistix": peers.optimistix,
    "torchdeq": TorchDEQ,
}
# Each a tenth or a half of the one before, until what is wanted is met.
LINEAR = (1e-2, 1e-3, 1e-4, 1e-5)
HALVINGS = 6
# Of one turn: so long, but no fewer nor more calls than these.
TURN, FEWEST, MOST = 0.03, 2, 30
# Slower than so many times its library's fastest: out of the race.
HOPELESS = 3.0
PAUSE = 0.05  # for a thread pool that waits by spinning, between libraries
OTHER = 1e-2  # what is further from the exact solution found another


class Runner(NamedTuple):
    """A pass that met what is wanted, or did not.

    Attributes:
      row: library, solvers, tolerances, what was found, why it does not take part.
      program: what is timed.
      once: seconds of one call.
    """

    row: dict[str, Any]
    program: Program | None
    once: float = np.inf


def installed() -> list[str]:
    """The libraries that can be imported here, ours first."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name)]


def attempt(row: dict[str, Any], build: Callable, tolerances, judge) -> Runner:
    """Loosens and tightens a tolerance: the first that is judged good enough.

    Args:
      row: what is known of the contestant.
      build: tolerance -> program.
      tolerances: to try in this order.
      judge: what a program found -> (what to write down, whether it is good enough).
    """
    said: dict[str, Any] = {}
    for tolerance in tolerances:
        try:
            program = build(tolerance)
            said, good = judge(program.read())
        except jax.errors.JaxRuntimeError as error:  # lineax's solvers raise there
            lines = [line for line in str(error).splitlines() if "Error: " in line]
            return Runner(row | {"out": lines[-1] if lines else "failed"}, None)
        if good:
            begin = time.perf_counter()
            program.call()
            once = time.perf_counter() - begin
            found = {"tolerance": tolerance, "bytes": program.memory, **said}
            return Runner(row | found, program, once)
    return Runner(row | said | {"out": "not as accurate as wanted"}, None)


def race(runners: list[Runner], rounds: int) -> list[dict[str, Any]]:
    """Lets all that are good enough take turns; returns their rows, with seconds."""
    fastest: dict[str, float] = {}
    for runner in runners:
        name = runner.row["library"]
        fastest[name] = min(fastest.get(name, np.inf), runner.once)
    racing = [
        i
        for i, r in enumerate(runners)
        if r.program and r.once <= HOPELESS * fastest[r.row["library"]]
    ]
    turns: dict[int, list[list[float]]] = {i: [] for i in racing}
    for number in range(rounds):
        before = ""
        # There and back again: a drift favours nobody.
        for i in racing[:: -1 if number % 2 else 1]:
            row, program, once = runners[i]
            assert program
            if row["library"] != before:
                before = row["library"]
                time.sleep(PAUSE)
            seconds = []
            for _ in range(int(np.clip(TURN / once, FEWEST, MOST))):
                begin = time.perf_counter()
                program.call()
                seconds.append(time.perf_counter() - begin)
            turns[i].append(seconds)
    rows = []
    for i, runner in enumerate(runners):
        row = dict(runner.row)
        if i in turns:
            row["seconds"] = harness.spread(turns[i])
            row["seconds"]["turns"] = [statistics.median(turn) for turn in turns[i]]
        elif runner.program:
            row |= {"out": "slower than its library's others", "once": runner.once}
        rows.append(row)
    return rows


def best(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By library, the fastest row; no library of which nothing was good enough."""
    chosen: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row["library"]
        if "seconds" in row and (
            name not in chosen
            or row["seconds"]["median"] < chosen[name]["seconds"]["median"]
        ):
            chosen[name] = row
    return chosen


def forward_pass(problem: Map, libraries: list[Library], flags) -> list[dict[str, Any]]:
    """Every forward solver, raced."""

    def judge(found):
        residual = float(problem.residual(found.z).max())
        return {"steps": found.steps, "residual": residual}, residual <= flags.residual

    runners = []
    for library in libraries:
        tolerances = [flags.residual * library.loosest / 2**k for k in range(HALVINGS)]
        for name in library.forwards:
            row = {"library": library.name, "forward": name}

            def build(tolerance, library=library, name=name):
                return library.forward(problem, name, tolerance)

            runners.append(attempt(row, build, tolerances, judge))
            say(runners[-1])
    return race(runners, flags.rounds)


def both_passes(
    problem: Map,
    exact: Exact,
    libraries: list[Library],
    chosen: dict[str, dict[str, Any]],
    flags,
) -> list[dict[str, Any]]:
    """Every linear solver behind its library's fastest forward solver, raced."""
    known: dict[str, Exact] = {}  # by library: its solution is that of one solver

    def judge(found, name):
        there = exact
        if away(found.z, exact.z).max() > OTHER:
            if name not in known:
                known[name] = peer_maps.exact(problem, found.z)
            there = known[name]
        error = np.linalg.norm(found.gradient - there.params)
        error = float(error / np.linalg.norm(there.params))
        others = int((away(found.z, exact.z) > OTHER).sum())
        return {"error": error, "elsewhere": others}, error <= flags.error

    runners = []
    for library in libraries:
        if library.name not in chosen:
            continue
        forward = chosen[library.name]["forward"]
        tolerance = chosen[library.name]["tolerance"]
        for name in library.backwards:
            row = {"library": library.name, "forward": forward, "backward": name}

            def build(linear, library=library, name=name, how=(forward, tolerance)):
                return library.both(problem, how[0], how[1], name, linear)

            judged = functools.partial(judge, name=library.name)
            runners.append(attempt(row, build, LINEAR, judged))
            say(runners[-1])
    return race(runners, flags.rounds)


def away(z: np.ndarray, other: np.ndarray) -> np.ndarray:
    """‖z − other‖ / ‖other‖ of each example."""
    flat = [np.reshape(v, (len(v), -1)).astype(np.float64) for v in (z, other)]
    return np.linalg.norm(flat[0] - flat[1], axis=1) / np.linalg.norm(flat[1], axis=1)


def say(runner: Runner) -> None:
    """Tells on stderr how far the measurement is."""
    words = [
        str(runner.row[k])
        for k in ("library", "forward", "backward")
        if k in runner.row
    ]
    end = runner.row.get("out", f"{1e3 * runner.once:.3g} ms")
    print("  ", ", ".join(words), end, file=sys.stderr, flush=True)


def measure(name: str, batch: int, libraries: list[Library], flags) -> dict[str, Any]:
    """Both races on one map."""
    print(f"{name}, batch {batch}", file=sys.stderr, flush=True)
    problem = peer_maps.build(name, batch)
    forward = forward_pass(problem, libraries, flags)
    chosen = best(forward)
    if not chosen:
        raise UserError(f"no solver reaches --residual={flags.residual:g} on {name}")
    near = next(iter(chosen.values()))
    library = next(one for one in libraries if one.name == near["library"])
    found = library.forward(problem, near["forward"], near["tolerance"]).read()
    exact = peer_maps.exact(problem, found.z)
    both = both_passes(problem, exact, libraries, chosen, flags)
    result = {"map": name, "batch": batch, "radius": exact.radius}
    result |= {"entries": int(problem.z0[0].size), "forward": forward, "both": both}
    for key in ("forward", "both"):
        result[f"{key}_ratio"] = against(best(result[key]))
    return result


def against(chosen: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Our time by the fastest peer's, round by round; None without either."""
    rivals = {n: row["seconds"] for n, row in chosen.items() if n != OURS}
    if OURS not in chosen or not rivals:
        return None
    peer = min(rivals, key=lambda name: rivals[name]["median"])
    pairs = zip(chosen[OURS]["seconds"]["turns"], rivals[peer]["turns"], strict=True)
    return {"peer": peer, **harness.span([one / two for one, two in pairs])}


def table(results: list[dict[str, Any]]) -> str:
    """Ours by the fastest peer; then every library's best."""
    summary, rows = [], []
    for result in results:
        label = f"{result['map']}, batch {result['batch']}"
        ratios = [result["forward_ratio"], result["both_ratio"]]
        missed = "ours or every peer's is not as accurate"
        cells = [f"{harness.ranged(r)} {r['peer']}" if r else missed for r in ratios]
        summary.append([label, f"{result['radius']:.2f}", *cells])
        forward, both = best(result["forward"]), best(result["both"])
        for name, row in forward.items():
            cells = [row["forward"], f"{row['steps']}", f"{row['residual']:.0e}"]
            cells.append(rounded(1e3 * row["seconds"]["median"]))
            if name in both:
                row = both[name]
                cells += [row["backward"], rounded(1e3 * row["seconds"]["median"])]
                cells += [f"{row['error']:.0e}", f"{row['elsewhere'] or ''}"]
                cells.append(rounded((row["bytes"] or 0) / 2**20))
            rows.append([label, name, *cells, *[""] * (9 - len(cells))])
    head = [
        "map",
        "ρ(J)",
        "forward: ours by the fastest peer's (range)",
        "with gradient",
    ]
    columns = ["map", "library", "forward", "steps", "residual", "ms", "backward"]
    columns += ["ms, both", "gradient error", "other fixed points", "MB"]
    return markdown(head, summary) + "\n\n" + markdown(columns, rows)


def draw(results: list[dict[str, Any]], names: list[str]) -> Figure:
    """Each library's time by ours; above one it is slower."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    batches = sorted({result["batch"] for result in results})
    grid = figure.subplots(2, len(batches), sharey="row", squeeze=False)
    for key, row in zip(("forward", "both"), grid, strict=True):
        for batch, axis in zip(batches, row, strict=True):
            shown = [result for result in results if result["batch"] == batch]
            for i, name in enumerate(n for n in names if n != OURS):
                ratios = [relative(best(result[key]), name) for result in shown]
                places = np.arange(len(shown)) + 0.4 * (i + 0.5) / (len(names) - 1)
                axis.plot(places - 0.2, ratios, harness.MARKERS[i], label=name)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(yscale="log", title=f"{TITLES[key]}, batch {batch}")
            axis.set_xticks(
                range(len(shown)), [r["map"] for r in shown], rotation=20, ha="right"
            )
            axis.grid(alpha=0.3, axis="y")
        row[0].set_ylabel("its time by ours")
    grid[0][0].legend(frameon=False)
    return figure


TITLES = {"forward": "forward", "both": "forward and gradient"}


def relative(chosen: dict[str, dict[str, Any]], name: str) -> float:
    """A library's time by ours; NaN where one was not accurate enough."""
    if not {name, OURS} <= chosen.keys():
        return np.nan
    return chosen[name]["seconds"]["median"] / chosen[OURS]["seconds"]["median"]


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables and writes them, the picture and the numbers."""
    parser = harness.build_parser(__doc__, "solver_peers")
    parser.add_argument(
        "--maps", default=";".join(peer_maps.MAPS), help="by semicolons"
    )
    parser.add_argument("--batches", default="1,32", help="examples, by commas")
    parser.add_argument("--peers", default=",".join([*LIBRARIES][1:]), help="by commas")
    parser.add_argument("--residual", type=float, default=1e-5, help="forward")
    parser.add_argument("--error", type=float, default=1e-2, help="of the gradient")
    parser.add_argument("--rounds", type=positive, default=7, help="of the races")
    flags = parser.parse_args(arguments)
    maps = harness.choices("--maps", flags.maps, peer_maps.MAPS, between=";")
    names = [OURS, *harness.choices("--peers", flags.peers, LIBRARIES)]
    absent = [name for name in names if name not in installed()]
    if absent:
        raise UserError(
            f"not installed: {', '.join(absent)}; pip install {' '.join(absent)}, or "
            "name the others with --peers"
        )
    keep_freed_memory()
    compiling.enable_cache()
    libraries = [LIBRARIES[name]() for name in names]
    results = [
        measure(name, positive(batch), libraries, flags)
        for name in maps
        for batch in flags.batches.split(",")
    ]
    packages = [*names[1:], *(["torch"] if "torchdeq" in names else [])]
    versions = {name: importlib.metadata.version(name) for name in packages}
    facts = [harness.jax_facts(), {"versions": versions}]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = f"{said}\n\n{table(results)}"
    harness.write(flags, facts, results, text, draw(results, names))


if __name__ == "__main__":
    harness.script(main)
