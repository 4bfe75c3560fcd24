"""Starts: is the best of several initial slots known by its residual alone?

Claim: at test time more iterations and more starts help, and the residual, which
    needs neither labels nor a decoder, tells which start is best (Equilibrium
    Reasoners 2026).
Question: is it so for slots, against choosing by what the decoder loses? What do more
    iterations than in training give instead?
Rule: for each gradient, attention's foreground ARI of the best of ten starts by the
    residual, and by the loss, against the first start, after the trained number of
    iterations; of the best of ten by the residual against by the loss; and of one start
    after 50 iterations against seven: a difference of 0.02 of the median, and its whole
    interval, decide. What choosing by the truth gives, the most there is, is shown.
Cost: cpu no runs but those of Fig. 3, and two minutes of measurements for each.
"""

from collections.abc import Iterator

from experiments.studies import drawing, scales, study
from experiments.studies.drawing import MASKS
from experiments.studies.probes import BREADTHS, DEPTHS
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule, score_rule
from experiments.studies.table import Measurement, Table

TRAINED, MOST = 7, DEPTHS[-1]
MANY = BREADTHS[-1]


def arms(scale: str) -> list[Arm]:
    """Both gradients."""
    return scales.slates(scale, "breadth")


def case(gradient: str, count: int, rule: str, depth: int) -> str:
    """What is compared: one run's slots, chosen in some way."""
    chosen = "first start" if count == 1 else f"best of {count} by the {rule}"
    return f"{gradient}, {chosen}, {depth} iterations"


def choices(table: Table) -> Iterator[Measurement]:
    """Each choice as an arm of its own, so that rules can compare them."""
    for row in table.rows:
        score, by, choice = row.metric.partition(" by ")
        if by:
            rule, _, counted = choice.partition(" of ")
            count, depth = map(int, counted.split("@"))
            if count > 1 or rule == "truth":
                arm = case(row.arm, count, rule, depth)
                yield row._replace(arm=arm, split="derived", metric=f"chosen {score}")


def rules() -> Iterator[Rule]:
    """What decides."""
    for name in ("implicit", "vanilla"):
        first = case(name, 1, "", TRAINED)
        by_residual, by_loss = (
            case(name, MANY, rule, TRAINED) for rule in ("residual", "loss")
        )
        for claim, a, b in (
            ("the residual tells better starts", by_residual, first),
            ("the loss does", by_loss, first),
            ("the residual tells them as well as the loss", by_residual, by_loss),
            ("more iterations help", case(name, 1, "", MOST), first),
        ):
            expected = "similar" if "as well" in claim else "higher"
            yield score_rule(f"{name}: {claim}", "chosen fg_ari", a, b, 0.02, expected)


def over_depth(rule: str, count: int, score: str, label: str) -> drawing.Panel:
    """A score over the number of iterations."""
    metrics = {depth: f"{score} by {rule} of {count}@{depth}" for depth in DEPTHS}
    title = "first start" if count == 1 else f"best of {count} by the {rule}"
    return drawing.over(
        metrics, ("iterations", f"{label}, attention"), title=title, xscale="log"
    )


STUDY = study.Study(
    name="starts",
    title="Which start is best",
    doc=str(__doc__),
    arms=arms,
    metrics=("* by * of *",),
    summary=tuple(
        f"fg_ari by {rule} of {count}@{depth}"
        for depth in (TRAINED, MOST)
        for rule, count in (
            ("truth", 1),
            *((rule, MANY) for rule in ("residual", "loss", "truth")),
        )
    ),
    rules=tuple(rules()),
    panels=tuple(
        over_depth(rule, count, score, label)
        for rule, count in (("truth", 1), ("residual", MANY), ("loss", MANY))
        for score, label in MASKS.items()
    ),
    derive=choices,
)

if __name__ == "__main__":
    study.main(STUDY)
