"""Figs. 12 and 13 over a long run: does vanilla's Jacobian explode without clipping?

Claim: without gradient clipping vanilla's Jacobian norm explodes in the course of
    training and its masks degenerate; implicit's does not. Explosions come late, which
    a short run with a falling rate does not show.
Question: do they come in 20,000 steps at a constant rate, and what prevents them: the
    paper's cure (the implicit gradient), clipping, or a smaller rate?
Rule: without clipping, at a constant rate: vanilla's σ_max(J) at the end against
    implicit's, and against vanilla's with clipping: 20 % of the ratio's median, and its
    whole interval, decide. Vanilla's foreground ARI of attention against implicit's,
    and its own best along the run against its last: 0.05. Runs that diverge are worst.
Cost: cpu 12 runs of five minutes on a core.
"""

from collections.abc import Iterator
from typing import Any

from experiments.studies import drawing, scales, study
from experiments.studies.drawing import along
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule, score_rule
from experiments.studies.table import Measurement, Table

STEPS = {"paper": 250_000, "gpu": 60_000}
FEWER = 20_000
NO_CLIPPING = {"optimizer.clip": "none"}
VANILLA, IMPLICIT = "vanilla", "implicit"
CLIPPED, SLOWER = "vanilla, clipped", "vanilla, half the rates"
FALLEN = "fg_ari, last - best"


def arms(scale: str) -> list[Arm]:
    """Both gradients without clipping, vanilla with it and at half its rates."""
    base, gradients = scales.slate(scale), scales.gradients(scale)
    steps = STEPS.get(scale, FEWER)
    long = {"num_steps": steps, "draw_every": steps, "optimizer.schedule": "constant"}
    if scale not in STEPS:
        long |= {"validate_every": 1_000, "diagnostics.every": 1_000}
    factors = scales.BEST.get(scale, (1.0, 1.0))
    tried: dict[str, dict[str, Any]] = {
        VANILLA: gradients["vanilla"] | NO_CLIPPING,
        IMPLICIT: gradients["implicit"] | NO_CLIPPING,
        CLIPPED: gradients["vanilla"],
        SLOWER: gradients["vanilla"] | scales.rates(base, factors[0] / 2) | NO_CLIPPING,
    }
    if scale == "smoke":  # As fig5_tricks has them.
        tried, long = {name: tried[name] for name in (VANILLA, IMPLICIT)}, {}
    return [scales.arm(base, name, how | long) for name, how in tried.items()]


def fallen(table: Table) -> Iterator[Measurement]:
    """How far below its best a run ends."""
    for arm in table.arms():
        for seed, (steps, values) in table.curves(arm, "fg_ari", "validation").items():
            value = float(values[-1] - values.max())
            yield Measurement(arm, seed, int(steps[-1]), "derived", FALLEN, value)


NORM = "spectral_norm"

STUDY = study.Study(
    name="fig12_long",
    title="Without clipping over a long run (Figs. 12, 13)",
    doc=str(__doc__),
    arms=arms,
    metrics=(
        *("cross_entropy", "grad_norm_l2", "spectral_*", "forward_residual"),
        *("skipped",),
    ),
    summary=("cross_entropy", NORM, "spectral_radius", "forward_residual", FALLEN),
    rules=(
        Rule("vanilla's J is larger", NORM, VANILLA, IMPLICIT, "higher", 0.2),
        Rule("clipping prevents it", NORM, VANILLA, CLIPPED, "higher", 0.2),
        Rule("a smaller rate prevents it", NORM, VANILLA, SLOWER, "higher", 0.2),
        score_rule("implicit's masks end better", "fg_ari", IMPLICIT, VANILLA),
        score_rule("implicit's fall less", FALLEN, IMPLICIT, VANILLA),
    ),
    panels=(
        along(NORM, "σ_max(J)", "validation", yscale="log"),
        along("grad_norm_l2", "gradient norm", "train", yscale="log"),
        along("cross_entropy", "cross-entropy, nats per image", "validation"),
        *drawing.of_masks(
            lambda name, label: along(name, f"{label}, attention", "validation")
        ),
    ),
    derive=fallen,
)

if __name__ == "__main__":
    study.main(STUDY)
