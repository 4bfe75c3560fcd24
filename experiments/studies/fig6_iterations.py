"""Figs. 6b and 6c: how many iterations does each gradient bear?

Claim: implicit training does not care how many iterations are made; vanilla gets worse
    with more; vanilla with one iteration reconstructs twice as badly as implicit with
    seven.
Question: at how many iterations is each best, counted in applications of the step?
    (Implicit gradients apply it once more than the solver: seven iterations are eight
    applications, and vanilla's seven.)
Rule: cross-entropy at 15 against 3 iterations, for implicit "similar" within 5 %, for
    vanilla higher by 5 %; squared error through the slots of vanilla with one against
    implicit with seven, higher by 100 %.
Cost: cpu 24 runs of two to four minutes on a core; gpu 42 (not measured); paper 56.
"""

from typing import Any

from experiments.studies import drawing, scales, study
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule

COUNTS = {
    "smoke": (7,),
    "gpu": (1, 2, 3, 5, 7, 11, 15),
    "paper": (1, 2, 3, 5, 7, 11, 15),
}
FEW = (1, 3, 7, 15)

SPARED = "implicit does not care how many iterations are made"
WORSE = "vanilla gets worse with more"
TWICE = "vanilla with one iteration reconstructs twice as badly as implicit with 7"


def arms(scale: str) -> list[Arm]:
    """Each gradient with each number of iterations."""
    base = scales.slate(scale)
    return [
        scales.arm(
            base, f"{name}@{count}", {**changes, "model.solver.max_steps": count}
        )
        for name, changes in scales.gradients(scale).items()
        for count in COUNTS.get(scale, FEW)
    ]


def panel(metric: str, label: str, **settings: Any) -> drawing.Panel:
    """Final values over the number of iterations."""
    return drawing.over_arms(metric, ("iterations", label), **settings)


STUDY = study.Study(
    name="fig6_iterations",
    title="Iterations (Figs. 6b, 6c)",
    doc=str(__doc__),
    arms=arms,
    metrics=(
        *("cross_entropy", "slot_mse", "forward_residual", "spectral_*"),
        *("grad_norm_l2", "steps_per_second"),
    ),
    summary=("cross_entropy", "slot_mse", "forward_residual", "spectral_norm"),
    rules=(
        Rule(SPARED, "cross_entropy", "implicit@15", "implicit@3", "similar"),
        Rule(WORSE, "cross_entropy", "vanilla@15", "vanilla@3", "higher"),
        Rule(TWICE, "slot_mse", "vanilla@1", "implicit@7", "higher", 1.0),
    ),
    panels=(
        panel("cross_entropy", "cross-entropy, nats per image"),
        panel("slot_mse", "squared error through the slots"),
        panel("forward_residual", "‖f(z)−z‖ / ‖f(z)‖", yscale="log"),
        panel("spectral_norm", "σ_max(J)", yscale="log"),
        panel("steps_per_second", "training steps per second"),
        *drawing.of_masks(lambda name, label: panel(name, f"{label}, attention")),
    ),
)

if __name__ == "__main__":
    study.main(STUDY)
