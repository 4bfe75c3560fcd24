"""Fig. 7: does implicit slot attention predict objects' properties better?

Claim: trained implicitly the set predictor has the higher average precision, and more
    iterations keep helping it.
Question: at which number of iterations, and at which distance threshold?
Rule: average precision within 1 (images show about 6 of CLEVR's units) of implicit
    against vanilla with three iterations, and of implicit with three against one,
    higher: a difference of 0.05 of the median, and its whole interval, decide; of seven
    against three 0.02. At the cpu and gpu scales vanilla starts from learned slots.
Cost: cpu 12 runs of five minutes on a core, with one iteration and three; gpu 18 (not
    measured); paper 24 of 150k steps.
"""

import numpy as np

from experiments.studies import drawing, scales, study
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule
from implicit_slots.evaluation.metrics.average_precision import THRESHOLDS

METRICS = tuple(f"ap_{name}" for name in THRESHOLDS)
DECIDES = "ap_1"


def arms(scale: str) -> list[Arm]:
    """Each gradient with one iteration, three and seven; cpu: one and three."""
    base = scales.prediction(scale)
    bases = {"vanilla": scales.vanilla_of(base), "implicit": base}
    counts = {"smoke": (3,), "cpu": (1, 3)}.get(scale, (1, 3, 7))
    return [
        scales.arm(one, f"{name}@{count}", {"model.solver.max_steps": count})
        for name, one in bases.items()
        for count in counts
    ]


def draw(table: study.Table):
    """Precision over the threshold, along training, and by arm."""

    def thresholds(axis):
        for place, arm in enumerate(table.arms()):
            found = [list(table.last(arm, metric).values()) for metric in METRICS]
            middle = [np.nanmedian(values) if values else np.nan for values in found]
            axis.plot(range(len(METRICS)), middle, label=arm, **drawing.style(place))
        axis.set_xticks(range(len(METRICS)), ["∞", "1", "0.5", "0.25", "0.125"])
        axis.set(xlabel="distance threshold", ylabel="average precision", ylim=(0, 1))

    return drawing.panels(
        thresholds,
        drawing.along(table, DECIDES, "average precision within 1", split="validation"),
        drawing.by_arm(table, DECIDES, "average precision within 1"),
    )


STUDY = study.Study(
    name="fig7_properties",
    title="Properties of objects (Fig. 7)",
    doc=str(__doc__),
    arms=arms,
    metrics=(*METRICS, "huber", "fg_ari", "forward_residual"),
    summary=(*METRICS, "huber"),
    rules=(
        Rule(
            "implicit predicts better",
            DECIDES,
            "implicit@3",
            "vanilla@3",
            "higher",
            by="difference",
            better="higher",
        ),
        Rule(
            "more iterations help implicit",
            DECIDES,
            "implicit@3",
            "implicit@1",
            "higher",
            by="difference",
            better="higher",
        ),
        Rule(
            "more than three help further",
            DECIDES,
            "implicit@7",
            "implicit@3",
            "higher",
            0.02,
            by="difference",
            better="higher",
        ),
    ),
    draw=draw,
)

if __name__ == "__main__":
    study.main(STUDY)
