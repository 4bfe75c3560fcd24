"""Fig. 8: are the masks of an implicitly trained autoencoder as good as vanilla's?

Claim: the decoder's masks are as intuitive as those of vanilla slot attention.
Question: are they in foreground ARI, and does it hold for attention's masks too? How
    much of what is missing is the start's fault: what if the best of several initial
    slots, by the error of the reconstruction, is taken?
Rule: foreground ARI of the decoder's masks of implicit against vanilla: "similar"
    within 0.05, the whole interval; attention's likewise. Starts are shown, not judged.
    At the cpu, folder and gpu scales each gradient has the settings that
    configs/README.md found for it: vanilla a third of implicit's rate.
Cost: cpu 6 runs of eight minutes on a core and one of starts each; gpu 6 (not
    measured); paper 8 of 500k steps.
"""

from experiments.studies import drawing, scales, study
from experiments.studies.probes import STARTS
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule


def arms(scale: str) -> list[Arm]:
    """Both gradients."""
    base = scales.discovery(scale)
    return [
        scales.arm(scales.vanilla_of(base), "vanilla", {}, ["pictures", "starts"]),
        scales.arm(base, "implicit", {}, ["pictures", "starts"]),
    ]


def draw(table: study.Table):
    """Masks and loss along training, and masks over the number of starts."""
    return drawing.panels(
        drawing.along(
            table, "decoder_fg_ari", "foreground ARI, decoder", split="validation"
        ),
        drawing.along(table, "fg_ari", "foreground ARI, attention", split="validation"),
        drawing.along(
            table, "reconstruction", "mean squared error", split="validation", log=True
        ),
        drawing.over_counts(
            table,
            "decoder/fg_ari",
            STARTS,
            ("initial slots tried for each image", "foreground ARI, decoder"),
        ),
    )


STUDY = study.Study(
    name="fig8_discovery",
    title="Object discovery (Fig. 8)",
    doc=str(__doc__),
    arms=arms,
    metrics=(
        *("decoder_fg_ari", "fg_ari", "reconstruction", "forward_residual"),
        *("decoder/fg_ari@*", "attention/fg_ari@*"),
    ),
    summary=(
        *("decoder_fg_ari", "fg_ari", "reconstruction"),
        *(f"decoder/fg_ari@{count}" for count in STARTS),
    ),
    rules=tuple(
        Rule(
            f"{of}'s masks are as good",
            metric,
            "implicit",
            "vanilla",
            "similar",
            by="difference",
            better="higher",
        )
        for of, metric in (("the decoder", "decoder_fg_ari"), ("attention", "fg_ari"))
    ),
    draw=draw,
    more={
        "fig8_masks": lambda table: drawing.montage(
            table, table.arms(), kind="decoder", rows=3
        )
    },
)

if __name__ == "__main__":
    study.main(STUDY)
