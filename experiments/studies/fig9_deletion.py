"""Fig. 9: what happens to a render as its slots are deleted one at a time, and why?

Claim: with many slots left a deletion removes just that object, for vanilla and
    implicit SLATE; with one to three left implicit's renders are less coherent: its
    slots depend on each other more. Why is open.
Question: which explanation survives? (1) Implicit slots tell more of each other
    (`predictability`: R² of a slot from the others). (2) They are coupled more through
    the map's Jacobian (`jacobian_coupling`: share off the slots' own blocks). (3) It is
    just another stage of training: the difference goes at matched cross-entropy. (4) It
    is the ground's slot that is gone (`ground.py`; its rules were added after the runs
    had been looked at, before any of its numbers was).
Rule: implicit against vanilla, at matched steps and at matched cross-entropy: the
    share of a deletion's change that spills outside the object, with all slots and down
    to a single one, and predictability; coupling at matched steps alone: a difference
    of 0.05 (predictability, coupling 0.02) of the median, and its whole interval,
    decide. Of the error against the true deletion with one slot left: how many times as
    large it is without the ground's slot as with it, and what it is with it, 5 % of the
    ratio's median and its whole interval. Matched cross-entropy: the values,
    interpolated between checkpoints, where each run of a pair first reaches the higher
    of the two final cross-entropies, if both do so after their first checkpoint. A
    diverged run leaves a rule undecided.
Cost: cpu 6 runs of three and a half minutes on a core and about three of deletions
    each; gpu 6 (not measured); paper 8 of 250k steps.
"""

from collections.abc import Iterator

import numpy as np

from experiments.studies import drawing, scales, study
from experiments.studies.ground import ERROR, GONE, KEPT
from experiments.studies.runs import Arm
from experiments.studies.statistics import Rule
from experiments.studies.table import Measurement, Table

ROWS = 3  # images of each arm in the pictures
SPILL, LEFT_SPILL = "spill_share", "one_left/spill_share"
MATCHED = " at matched cross-entropy"
GROUND_KEPT, GROUND_GONE = f"{KEPT}/{ERROR}@1", f"{GONE}/{ERROR}@1"
GROWTH = "error with one slot left, ground gone / kept"
AT_CROSS_ENTROPY = (SPILL, LEFT_SPILL, "counterfactual_error", "predictability")


def arms(scale: str) -> list[Arm]:
    """Both gradients."""
    probes = ("deletion", "masks", "fixed_points", "slots_left", "ground")
    return scales.slates(scale, *probes)


def matched(table: Table) -> Iterator[Measurement]:
    """Each metric where a run has reached the cross-entropy that both reach."""
    found = {arm: table.curves(arm, "cross_entropy", "probe") for arm in table.arms()}
    for seed in set.intersection(*(set(curves) for curves in found.values())):
        level = max(float(curves[seed][1][-1]) for curves in found.values())
        for arm, curves in found.items():
            steps, values = curves[seed]
            if level > values[0]:
                continue  # Reached before anything was measured.
            reached = np.minimum.accumulate(values)[::-1], steps[::-1]
            step = float(np.interp(level, *reached))
            for metric in AT_CROSS_ENTROPY:
                curve = table.curves(arm, metric, "probe").get(seed)
                if curve is not None:
                    value = float(np.interp(step, *curve))
                    yield Measurement(
                        arm, seed, int(step), "derived", metric + MATCHED, value
                    )


def derived(table: Table) -> Iterator[Measurement]:
    """What is matched, and how much the error grows with the ground's slot gone."""
    yield from matched(table)
    for arm in table.arms():
        kept = table.last(arm, GROUND_KEPT)
        for seed, gone in table.last(arm, GROUND_GONE).items():
            if kept.get(seed):
                yield Measurement(arm, seed, 0, "derived", GROWTH, gone / kept[seed])


def by_left(metric: str, label: str) -> drawing.Panel:
    """A metric over the number of slots that are left."""
    panel = drawing.over(drawing.at(metric, range(1, 33)), ("slots left", label))

    def draw(axis, table: Table) -> None:
        panel(axis, table)
        axis.invert_xaxis()
        axis.xaxis.get_major_locator().set_params(integer=True)

    return draw


def pictures(table: Table):
    """Images of the first seed, and their renders as slots go one by one."""
    found = {
        arm: drawing.arrays_of(table.runs(arm)[0], "slots_left") for arm in table.arms()
    }
    found = {arm: arrays for arm, arrays in found.items() if arrays}
    columns = max((len(arrays) for arrays in found.values()), default=1)
    rows = [(arm, row) for arm in found for row in range(ROWS)] or [("", 0)]
    figure, axes = drawing.blank(len(rows), columns, (1.1 * columns, 1.2 * len(rows)))
    for line, (arm, row) in zip(axes, rows, strict=True):
        for axis, (name, images) in zip(line, found.get(arm, {}).items(), strict=False):
            axis.imshow(np.clip(images[row], 0, 1))
            title = arm if name == "image" else f"{name.partition('/')[2]} left"
            axis.set_title(title if row == 0 else "", fontsize=8)
    return figure


def _rule(claim: str, metric: str, least: float) -> Rule:
    return Rule(
        *(claim, metric, "implicit", "vanilla", "higher", least, "difference"),
        ranks_diverged=False,
    )


STUDY = study.Study(
    name="fig9_deletion",
    title="Slots deleted one at a time (Fig. 9)",
    doc=str(__doc__),
    arms=arms,
    metrics=(
        *("cross_entropy", "spill*", "one_left/*", "counterfactual_error*"),
        *("scene_spill", "predictability", "shuffled/predictability"),
        *("jacobian_coupling", "inverse_coupling", f"{KEPT}/*", f"{GONE}/*"),
    ),
    summary=(
        *("cross_entropy", SPILL, LEFT_SPILL, LEFT_SPILL + MATCHED),
        *("predictability", "jacobian_coupling", "inverse_coupling"),
        *(GROUND_KEPT, GROUND_GONE),
    ),
    rules=(
        _rule("implicit's deletions spill more", SPILL, 0.05),
        _rule("down to a single slot they do", LEFT_SPILL, 0.05),
        _rule("also at matched cross-entropy", LEFT_SPILL + MATCHED, 0.05),
        _rule("with all slots too", SPILL + MATCHED, 0.05),
        _rule("implicit's slots tell more of each other", "predictability", 0.02),
        _rule("and at matched cross-entropy", "predictability" + MATCHED, 0.02),
        _rule("they are coupled more through J", "jacobian_coupling", 0.02),
        _rule("they need the ground's slot more", GROWTH, 0.05)._replace(by="ratio"),
        _rule("with it kept their error is lower", GROUND_KEPT, 0.05)._replace(
            by="ratio", expected="lower"
        ),
    ),
    panels=(
        by_left(SPILL, "share of the change that spills"),
        by_left("counterfactual_error", "error against the true deletion"),
        drawing.scatter(
            "cross_entropy",
            LEFT_SPILL,
            ("cross-entropy, nats", "spill share, one slot left"),
        ),
        drawing.along("predictability", "R² of a slot from the others"),
        drawing.by_arm("jacobian_coupling", "‖J off the blocks‖² / ‖J‖²"),
        drawing.by_arm(LEFT_SPILL + MATCHED, "spill share, one left, matched"),
        by_left(f"{KEPT}/{ERROR}", "error, the ground's slot kept"),
        by_left(f"{GONE}/{ERROR}", "error, the ground's slot gone"),
    ),
    more={"fig9_pictures": pictures},
    derive=derived,
)

if __name__ == "__main__":
    study.main(STUDY)
