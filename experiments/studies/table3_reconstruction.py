"""Table 3: how well does the decoder render images from their slots alone?

Claim: trained implicitly, SLATE's autoregressive reconstruction has the lower squared
    error (CLEVR-Mirror 10.66 against 67.04, COCO 1659 against 1822, ShapeStacks 108.67
    against 312.14) and the lower FID (22.19 against 25.89, 127.79 against 147.48, 34.2
    against 34.76) after 250k steps at 96x96.
Question: is it so at equal steps on other data and at another size?
Rule: squared error through the slots (summed over an image) and Fréchet distance of
    implicit against vanilla: 5 % of the ratio's median, and its whole interval, decide.
    The distance is the FID where `--set evaluation.inception=FILE` names Inception's
    weights, and one of a fixed random network besides, which is no FID.
Cost: cpu 6 runs of three and a half minutes on a core; gpu 6 (not measured); paper 8
    of 250k steps.
"""

from typing import Any

from experiments.studies import drawing, scales, study
from experiments.studies.drawing import by_arm
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule

PAIR: Any = ("implicit", "vanilla", "lower")
SHOWN = ("slots/mse", "dvae/mse", "slots/psnr", "slots/frechet_random", "slots/fid")


def arms(scale: str) -> list[Arm]:
    """Both gradients."""
    return scales.slates(scale, "rendering", "pictures")


STUDY = study.Study(
    name="table3_reconstruction",
    title="Reconstruction through the slots (Table 3)",
    doc=str(__doc__),
    arms=arms,
    metrics=("slots/*", "dvae/*", "cross_entropy"),
    summary=SHOWN,
    rules=(
        Rule("implicit has the lower squared error", "slots/mse", *PAIR),
        Rule("implicit has the lower FID", "slots/fid", *PAIR),
        Rule("implicit is nearer by the random network", "slots/frechet_random", *PAIR),
    ),
    # Both errors, and what of them is the dVAE's.
    panels=(
        by_arm("slots/mse", "squared error through the slots"),
        by_arm("dvae/mse", "squared error of the dVAE alone"),
        by_arm("slots/frechet_random", "Fréchet distance, random network"),
    ),
    more={"table3_pictures": lambda table: drawing.montage(table, table.arms())},
)

if __name__ == "__main__":
    study.main(STUDY)
