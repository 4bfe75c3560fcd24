"""Fig. 11: how many terms of the Neumann series should the backward pass take?

Claim: one term is largely best, and most orders still beat vanilla at equal forward
    iterations; the paper blames the cost of back-propagating through more iterations.
Question: with one stored linearisation more terms cost one product each. Is it cost,
    then (compare at equal time), or bias (cosine to the exact gradient), or the
    conditioning of the system that one comes nearer to (norm of the gradient against
    the exact one's, ρ(J))?
Rule: cross-entropy after equal steps, and after equal time (the fastest run's), of k
    terms and of the exact gradient against one term, and of 8 terms against vanilla:
    5 % of the ratio's median, and its whole interval, decide; steps per second: 10 %.
    Added after the runs with 2, 3, 4 and 8 terms, of which those with an odd number
    alone had settled, and before those with 5 and 6: the residual of 6 terms against 5.
    At an eigenvalue λ of J the series sums to (1 − λᵏ)/(1 − λ),
    which for even k vanishes at λ = −1 and is negative beyond: nothing, or the wrong
    sign, holds an oscillation back. Added after all of these, before its runs: the
    exact gradient at lower rates against one term.
Cost: cpu 30 runs of two minutes on a core, four and a half with the exact gradient, and
    a minute of comparisons with it for three of them; gpu 21 (not measured); paper 28
    of 250k steps.
"""

from collections.abc import Iterator

import numpy as np

from experiments.studies import drawing, scales, study
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule
from experiments.studies.table import Measurement, Table

# Solved directly: in training GMRES with 60 products fails for nearly every image.
EXACT = {"model.adjoint.name": "implicit", "model.adjoint.solver.name": "dense"}
# At the paper's size each image's J would have 2,304² entries.
NEARLY_EXACT = {"model.adjoint.name": "implicit", "model.adjoint.solver.max_steps": 200}
TERMS = (2, 3, 4, 5, 6, 8)
ONE, EIGHT = "1 term", "8 terms"
SLOWER = "exact, lower rates"
RESIDUAL = "forward_residual"
LOSS, SAME_TIME = "cross_entropy", "cross_entropy at equal time"


def arms(scale: str) -> list[Arm]:
    """One to eight terms, the exact gradient, and vanilla."""
    base, gradients = scales.slate(scale), scales.gradients(scale)
    implicit = gradients["implicit"]
    more = [
        scales.arm(base, f"{k} terms", implicit | {"model.adjoint.terms": k})
        for k in TERMS
        if scale != "smoke"
    ]
    exact = {"exact": implicit | (NEARLY_EXACT if scale == "paper" else EXACT)}
    if scale in scales.BEST:
        exact[SLOWER] = exact["exact"] | scales.rates(base, 1.0)
    return [
        scales.arm(base, ONE, implicit, ["gradients"]),
        *more,
        *(scales.arm(base, name, how) for name, how in exact.items()),
        scales.arm(base, "vanilla", gradients["vanilla"]),
    ]


def at_equal_time(table: Table) -> Iterator[Measurement]:
    """Cross-entropy when the fastest run of the seed has ended, by interpolation."""
    ends: dict[int, float] = {}
    clocks: dict[tuple[str, int], float] = {}
    for arm in table.arms():
        for seed, (steps, rate) in table.curves(arm, "steps_per_second").items():
            if seed in lost(table, arm):
                continue
            clocks[arm, seed] = float(np.median(rate))
            took = float(steps[-1]) / clocks[arm, seed]
            ends[seed] = min(ends[seed], took) if seed in ends else took
    for arm in table.arms():
        curves = table.curves(arm, LOSS, "validation")
        for seed, (steps, values) in curves.items():
            if (arm, seed) not in clocks:
                continue
            step = ends[seed] * clocks[arm, seed]
            value = float(np.interp(step, steps, values))
            yield Measurement(arm, seed, int(step), "derived", SAME_TIME, value)


def lost(table: Table, arm: str) -> set[int]:
    """Seeds whose runs diverged: they ended early, and are no measure of speed."""
    return {one.seed for one in table.runs(arm) if one.diverged}


def quality(quantity: str, label: str) -> drawing.Panel:
    """How near gradients are to the exact one, on the runs with one term."""
    gradients = ("1 terms", "2 terms", "4 terms", "8 terms", "gmres", "unrolled")

    def panel(axis, table: Table) -> None:
        for place, gradient in enumerate(gradients):
            curves = table.curves(ONE, f"{quantity}: {gradient}").values()
            name = ONE if gradient == "1 terms" else gradient
            axis.plot(*drawing.middle(curves), label=name, **drawing.style(place))
        axis.set(xlabel="training step", ylabel=label, title="trained with 1 term")

    return panel


STUDY = study.Study(
    name="fig11_neumann_terms",
    title="Terms of the Neumann series (Fig. 11)",
    doc=str(__doc__),
    arms=arms,
    metrics=(
        *(LOSS, "steps_per_second", "spectral_*", RESIDUAL),
        *("cosine: *", "ratio: *", "relative_error: *", "backward_*", "slot_mse"),
    ),
    summary=(
        *(LOSS, SAME_TIME, "slot_mse", "steps_per_second"),
        *("spectral_radius", RESIDUAL),
    ),
    rules=(
        *(
            Rule(f"one term is better than {other}", LOSS, other, ONE, "higher")
            for other in ("2 terms", "3 terms", "4 terms", EIGHT, "exact", SLOWER)
        ),
        Rule("the same at equal time for 8 terms", SAME_TIME, EIGHT, ONE, "higher"),
        Rule("6 terms do not settle", RESIDUAL, "6 terms", "5 terms", "higher", 0.2),
        Rule("8 terms beat vanilla", LOSS, EIGHT, "vanilla", "lower"),
        Rule(
            *("8 terms cost time", "steps_per_second", EIGHT, ONE, "lower", 0.1),
            better="higher",
            ranks_diverged=False,
        ),
    ),
    # By arm, then the gradients' quality along training.
    panels=(
        drawing.by_arm(LOSS, "cross-entropy, nats", title="same steps"),
        drawing.by_arm(SAME_TIME, "cross-entropy, nats", title="same time"),
        drawing.by_arm("steps_per_second", "training steps per second"),
        quality("cosine", "cosine to the exact gradient"),
        quality("ratio", "norm / norm of the exact gradient"),
        drawing.along("spectral_radius", "ρ(J)", "validation"),
    ),
    derive=at_equal_time,
)

if __name__ == "__main__":
    study.main(STUDY)
