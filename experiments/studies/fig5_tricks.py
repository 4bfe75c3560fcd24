"""Figs. 5, 6a, 12 and 13: what do clipping, warm-up and decay do for each gradient?

Claim: without gradient clipping or without warm-up vanilla's Jacobian norm explodes and
    its masks get noisy, then degenerate; implicit training stays stable without either,
    and its gradient norm stays small without clipping.
Question: which of the tricks does which gradient need, and do Jacobian and gradient
    explode together?
Rule: for clipping and for warm-up, without it: vanilla's σ_max(J) at the end against
    vanilla's with all tricks and against implicit's (20 % of the ratio's median), and
    implicit's cross-entropy against its own with all tricks ("similar" within 5 %) and
    against vanilla's (5 %); the whole interval decides. Runs that diverge count as
    worst. Decay, all tricks at once and the gradient's norm are shown, not judged.
Cost: cpu 30 runs of two minutes on a core; gpu 30 (not measured); paper 40 runs of
    250k steps.
"""

from typing import Any

from experiments.studies import drawing, scales, study
from experiments.studies.drawing import along
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule

NO_CLIPPING = {"optimizer.clip": "none"}
NO_WARMUP = {"optimizer.warmup_steps": 0}
NO_DECAY = {"optimizer.schedule": "constant"}
WITHOUT = {
    "": {},
    ", no clipping": NO_CLIPPING,
    ", no warm-up": NO_WARMUP,
    ", no decay": NO_DECAY,
    ", none of them": {**NO_CLIPPING, **NO_WARMUP, **NO_DECAY},
}
# Where not all are affordable.
TRIED_AT = {"smoke": ("", ", no clipping")}
SHOWN = ("vanilla, no clipping", "implicit, no clipping")


def arms(scale: str) -> list[Arm]:
    """Both gradients with all tricks, without one, without any."""
    base = scales.slate(scale)
    left_out = {key: WITHOUT[key] for key in TRIED_AT.get(scale, tuple(WITHOUT))}
    return [
        scales.arm(
            base,
            f"{name}{suffix}",
            {**gradient, **changes},
            ["pictures"] if "clipping" in suffix else [],
        )
        for name, gradient in scales.gradients(scale).items()
        for suffix, changes in left_out.items()
    ]


def panels_of(name: str) -> tuple[drawing.Panel, ...]:
    """The Jacobian's norm, the gradient's and the loss with one gradient."""
    common: dict[str, Any] = {"beginning": name, "title": name}
    nats = "cross-entropy, nats per image"
    return (
        along("spectral_norm", "σ_max(J)", "validation", yscale="log", **common),
        along("grad_norm_l2", "gradient norm", "train", yscale="log", **common),
        along("cross_entropy", nats, "validation", **common),
    )


def rules_of(trick: str) -> tuple[Rule, ...]:
    """What decides about one trick."""
    vanilla, implicit = f"vanilla, no {trick}", f"implicit, no {trick}"
    norm, loss = "spectral_norm", "cross_entropy"
    grows = f"vanilla's J grows without {trick}"
    larger = f"without {trick} vanilla's J is larger"
    spared = f"implicit does not need {trick}"
    lower = f"without {trick} implicit has the lower cross-entropy"
    return (
        Rule(grows, norm, vanilla, "vanilla", "higher", 0.2),
        Rule(spared, loss, implicit, "implicit", "similar"),
        Rule(larger, norm, vanilla, implicit, "higher", 0.2),
        Rule(lower, loss, implicit, vanilla, "lower"),
    )


STUDY = study.Study(
    name="fig5_tricks",
    title="Clipping, warm-up, decay (Figs. 5, 6a, 12, 13)",
    doc=str(__doc__),
    arms=arms,
    metrics=(
        *("cross_entropy", "grad_norm_l2", "grad_norm_inf", "spectral_*", "skipped"),
        *("forward_residual", "slot_mse"),
    ),
    summary=("cross_entropy", "slot_mse", "spectral_norm", "spectral_radius"),
    rules=tuple(rule for trick in ("clipping", "warm-up") for rule in rules_of(trick)),
    panels=(*panels_of("vanilla"), *panels_of("implicit")),
    more={"fig12_pictures": lambda table: drawing.montage(table, SHOWN)},
)

if __name__ == "__main__":
    study.main(STUDY)
