"""Fig. 8: are the masks of an implicitly trained autoencoder as good as vanilla's?

Claim: the decoder's masks are as intuitive as those of vanilla slot attention.
Question: are they in foreground ARI, and does it hold for attention's masks too? How
    much of what is missing is the start's fault: what if the best of several initial
    slots, by the error of the reconstruction, is taken?
Rule: foreground ARI of the decoder's masks of implicit against vanilla: "similar"
    within 0.05, the whole interval; attention's likewise. Starts are shown, not judged.
    At the cpu, folder and gpu scales each gradient has the settings that were found for
    it (results/notes/locatello.md): vanilla a third of implicit's rate.
Cost: cpu 6 runs of eight minutes on a core and one of starts each; gpu 6 (not
    measured); paper 8 of 500k steps.
"""

from typing import Any

from experiments.studies import drawing, scales, study
from experiments.studies.drawing import MASKS, along, of_masks
from experiments.studies.probes import STARTS
from experiments.studies.runs import Arm
from experiments.studies.statistics import score_rule

PAIR: Any = ("implicit", "vanilla", 0.05, "similar")


def arms(scale: str) -> list[Arm]:
    """Both gradients."""
    base = scales.locatello("autoencoder", scale)
    return [
        scales.arm(scales.vanilla_of(base), "vanilla", {}, ["pictures", "starts"]),
        scales.arm(base, "implicit", {}, ["pictures", "starts"]),
    ]


STUDY = study.Study(
    name="fig8_discovery",
    title="Object discovery (Fig. 8)",
    doc=str(__doc__),
    arms=arms,
    metrics=(
        *("reconstruction", "forward_residual"),
        *("decoder/*@*", "attention/*@*"),
    ),
    summary=(
        "reconstruction",
        *(f"decoder/{name}@{count}" for count in STARTS for name in MASKS),
    ),
    rules=(
        score_rule("the decoder's masks are as good", "decoder_fg_ari", *PAIR),
        score_rule("attention's masks are as good", "fg_ari", *PAIR),
    ),
    # Along training, and over the number of starts.
    panels=(
        *of_masks(
            lambda name, label: along(
                f"decoder_{name}", f"{label}, decoder", "validation"
            )
        ),
        *of_masks(lambda name, label: along(name, f"{label}, attention", "validation")),
        *of_masks(
            lambda name, label: drawing.over(
                drawing.at(f"decoder/{name}", STARTS),
                ("initial slots tried for each image", f"{label}, decoder"),
            )
        ),
        along("reconstruction", "mean squared error", "validation", yscale="log"),
    ),
    more={
        "fig8_masks": lambda table: drawing.montage(
            table, table.arms(), kind="decoder", rows=3
        )
    },
)

if __name__ == "__main__":
    study.main(STUDY)
