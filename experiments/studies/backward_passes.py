"""Backward passes: what does each of them give, in each model, and what does it cost?

Claim: one-step gradients are the field's habit (BO-QSA, VQ-VFM-OCL, SmoothSA), and
    nobody has measured what they give up against better or costlier ones.
Question: is a gradient that is nearer to the exact one, or one that looks further back,
    worth its time and memory? Does a start that is trained straight-through help?
Rule: each backward pass against one term, in foreground ARI of attention after the same
    steps and after the same time: a difference of 0.05 of the median, and its whole
    interval, decide. In cross-entropy 5 % of the ratio; a set predictor is judged by
    average precision within 1. Time is the step's by that of one term on the same
    machine in turns; after the same time means the fastest pass's time for all steps.
    Diverged runs count as worst. Unrolled and truncated have the settings that were
    found for vanilla (the set predictor's start is a trained one, by truncated
    straight through), all others implicit's.
Cost: cpu 36 runs of SLATE, two minutes on a core each with their measurements; 36 of
    the autoencoder and 36 of the set predictor; --arms='SLATE*' makes those of SLATE
    alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments.studies import drawing, scales, study
from experiments.studies.drawing import MASKS
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule, score_rule
from experiments.studies.table import Measurement, Table


def adjoint(name: str, **values: object) -> dict[str, object]:
    """Keys of a backward pass."""
    return {"model.adjoint.name": name} | {
        f"model.adjoint.{key}": value for key, value in values.items()
    }


def gmres(products: int) -> dict[str, object]:
    """Keys of GMRES with so many products and no tolerance."""
    return adjoint("implicit") | {
        "model.adjoint.solver.name": "gmres",
        "model.adjoint.solver.max_steps": products,
        "model.adjoint.solver.rtol": 0.0,
    }


ONE = "1 term"
THROUGH_ITERATIONS: Mapping[str, Mapping[str, object]] = {
    "unrolled": adjoint("unrolled"),
    "truncated 1": adjoint("truncated", steps=1),
    "truncated 3": adjoint("truncated", steps=3),
}
AT_THE_END: Mapping[str, Mapping[str, object]] = {
    ONE: {},
    **{f"{terms} terms": {"model.adjoint.terms": terms} for terms in (2, 4, 8)},
    "phantom 5": adjoint("phantom", steps=5, damping=0.5),
    "GMRES 8": gmres(8),
    "GMRES 16": gmres(16),
    "adaptive": adjoint("adaptive"),
    # BO-QSA's: one term, and the start gets the slots' gradient.
    "1 term, trained start": {
        "model.initial_slots": "learned",
        "model.straight_through": True,
    },
}
PASSES = tuple((*THROUGH_ITERATIONS, *AT_THE_END))
SLATE, AUTOENCODER, SET_PREDICTOR = "SLATE", "autoencoder", "set predictor"
FG_ARI, AP = "fg_ari", "ap_1"
AT_TIME = " at equal time"
IN_TIME = ("cross_entropy", *MASKS, AP)
PROBES = ("own_gradient", "cost")


def arms(scale: str) -> list[Arm]:
    """Each model with each backward pass."""
    gradients = scales.gradients(scale)
    of_slate = [
        scales.arm(scales.slate(scale), f"{SLATE}: {name}", {**rates, **how}, PROBES)
        for rates, passes in (
            (gradients["vanilla"], THROUGH_ITERATIONS),
            (gradients["implicit"], AT_THE_END),
        )
        for name, how in passes.items()
    ]
    others = []
    if scale not in ("codes", "tokens", "folder"):
        others = [
            scales.arm(one, f"{title}: {key}", {**start(title, key), **how}, PROBES)
            for title, base in (
                (AUTOENCODER, scales.shorter("autoencoder", scale)),
                (SET_PREDICTOR, scales.shorter("set_prediction", scale)),
            )
            for one, passes in (
                (scales.vanilla_of(base), THROUGH_ITERATIONS),
                (base, AT_THE_END),
            )
            for key, how in passes.items()
        ]
    everything = [*of_slate, *others]
    if scale != "smoke":
        return everything
    # Those that other studies make anyway.
    return [one for one in of_slate if one.name.endswith(("unrolled", ONE))]


def start(model: str, name: str) -> dict[str, object]:
    """What lets the set predictor's start learn where not all iterations are undone."""
    trained = model == SET_PREDICTOR and name.startswith("truncated")
    return {"model.straight_through": True} if trained else {}


def in_time(table: Table) -> Iterator[Measurement]:
    """Scores when the fastest backward pass of the model has made all its steps."""
    models = {arm: arm.partition(": ")[0] for arm in table.arms()}
    ratios = {
        arm: drawing.median(table.last(arm, "time_ratio").values())
        for arm in table.arms()
    }
    for arm, model in models.items():
        fastest = np.nanmin([ratios[one] for one in models if models[one] == model])
        for metric in IN_TIME:
            for seed, (steps, values) in table.curves(
                arm, metric, "validation"
            ).items():
                step = float(steps[-1]) * fastest / ratios[arm]
                if np.isfinite(step):
                    value = float(np.interp(step, steps, values))
                    yield Measurement(
                        arm, seed, int(step), "derived", metric + AT_TIME, value
                    )


def rules() -> Iterator[Rule]:
    """What decides about each backward pass, model by model."""
    for name in PASSES:
        if name == ONE:
            continue
        for model in (SLATE, AUTOENCODER, SET_PREDICTOR):
            metric = AP if model == SET_PREDICTOR else FG_ARI
            pair = (f"{model}: {name}", f"{model}: {ONE}")
            yield score_rule(f"{name} is better than one term", metric, *pair)
            yield score_rule("in the same time too", metric + AT_TIME, *pair)
            if model == SLATE:
                yield Rule("its loss is lower", "cross_entropy", *pair, "lower")


def panel(model: str, metric: str, label: str, **settings: Any) -> drawing.Panel:
    """Last values of a model's arms."""
    return drawing.by_arm(
        metric, label, beginning=f"{model}: ", title=model, **settings
    )


def along(metric: str, label: str, **settings: Any) -> drawing.Panel:
    """A metric of SLATE's arms along training."""
    return drawing.along(metric, label, "probe", beginning=f"{SLATE}: ", **settings)


STUDY = study.Study(
    name="backward_passes",
    title="Backward passes",
    doc=str(__doc__),
    arms=arms,
    metrics=(
        *("cross_entropy", "reconstruction", AP, "huber", "forward_residual"),
        *("own_*", "time_ratio", "step_ms", "step_mb", "backward_failed"),
    ),
    summary=(
        *("cross_entropy", AP, FG_ARI + AT_TIME, "own_cosine", "own_ratio"),
        *("own_residual", "own_spectral_radius", "time_ratio", "step_mb"),
    ),
    rules=tuple(rules()),
    panels=(
        *drawing.of_masks(
            lambda name, label: panel(SLATE, name, f"{label}, attention")
        ),
        panel(SLATE, "cross_entropy", "cross-entropy, nats"),
        panel(SLATE, "time_ratio", "time of a step / one term's"),
        panel(SLATE, "own_spectral_radius", "ρ(J)"),
        along("own_cosine", "cosine to the exact gradient", ylim=(-0.1, 1.05)),
        along("own_residual", "‖f(z)−z‖ / ‖f(z)‖", yscale="log"),
        *drawing.of_masks(
            lambda name, label: panel(
                AUTOENCODER, f"decoder_{name}", f"{label}, decoder"
            )
        ),
        panel(SET_PREDICTOR, AP, "average precision within 1"),
    ),
    derive=in_time,
)

if __name__ == "__main__":
    study.main(STUDY)
