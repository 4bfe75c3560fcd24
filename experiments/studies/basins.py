"""Basins: does an image have one fixed point, and does it matter how long one iterates?

Claim: implicit differentiation takes slots for a fixed point; the paper does not ask
    how many an image has, nor where more iterations than in training lead.
Question: how many distinct fixed points does an image have from random initial slots,
    how many starts never settle, and does what training left survive 1 … 100 iterations
    at test time (path independence)?
Rule: implicit against vanilla: share of starts that settle nowhere, agreement of masks
    from different starts (a difference of 0.05), and cross-entropy after 100 iterations
    over that after the trained number (5 %): the median and its whole interval decide.
Cost: cpu 6 runs of three and a half minutes on a core and two more of iterations each;
    gpu 6 (not measured); paper 8 of 250k steps.
"""

import json
from collections.abc import Iterator

from experiments.studies import drawing, scales, study
from experiments.studies.drawing import at, by_arm
from experiments.studies.probes import ITERATIONS
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule, score_rule
from experiments.studies.table import Measurement, Table
from implicit_slots.runtime.workdir import CONFIG_FILE

GROWTH = "cross_entropy, most / trained iterations"
AT, COUNTS = "iterations at test time", sorted({*ITERATIONS, 7})


def arms(scale: str) -> list[Arm]:
    """Both gradients."""
    return scales.slates(scale, "fixed_points", "iterations")


def growth(table: Table) -> Iterator[Measurement]:
    """Cross-entropy after the most iterations over that after the trained ones."""
    for arm in table.arms():
        for one in table.runs(arm):
            counted = {
                int(row.metric.partition("@")[2]): row
                for row in table.rows
                if (row.arm, row.seed) == (arm, one.seed)
                and row.metric.startswith("cross_entropy@")
            }
            if counted:
                config = json.loads((one.workdir / CONFIG_FILE).read_text())
                most = counted[max(counted)]
                then = counted[config["model"]["solver"]["max_steps"]].value
                yield most._replace(
                    split="derived", metric=GROWTH, value=most.value / then
                )


STUDY = study.Study(
    name="basins",
    title="Basins and path independence",
    doc=str(__doc__),
    arms=arms,
    metrics=(
        *("fixed_points", "largest_basin", "unconverged", "mask_agreement"),
        *("residual*", "mask_flips", "spectral_radius", "cross_entropy*"),
        *("attention/*@*", "decoder/*@*"),
    ),
    summary=(
        *("fixed_points", "largest_basin", "unconverged", "mask_agreement"),
        *(GROWTH, "residual_last"),
    ),
    rules=(
        Rule(
            "fewer of implicit's starts settle nowhere",
            *("unconverged", "implicit", "vanilla", "lower", 0.05, "difference"),
        ),
        score_rule(
            "its starts agree more on masks", "mask_agreement", "implicit", "vanilla"
        ),
        Rule("it bears 100 iterations better", GROWTH, "implicit", "vanilla", "lower"),
    ),
    panels=(
        drawing.over(
            at("cross_entropy", COUNTS), (AT, "cross-entropy, nats"), xscale="log"
        ),
        drawing.over(
            at("residual", range(1, 101)),
            (AT, "‖f(z)−z‖ / ‖f(z)‖"),
            xscale="log",
            yscale="log",
        ),
        by_arm("fixed_points", "distinct fixed points of an image"),
        by_arm("unconverged", "starts that settle nowhere"),
        by_arm("mask_agreement", "ARI of masks between starts"),
        *drawing.of_masks(
            lambda name, label: drawing.over(
                at(f"attention/{name}", COUNTS),
                (AT, f"{label}, attention"),
                xscale="log",
            )
        ),
    ),
    derive=growth,
)

if __name__ == "__main__":
    study.main(STUDY)
