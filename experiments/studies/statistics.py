"""From runs to a verdict: paired effects over seeds, rules that were written before.

A run that diverged is never left out: it is worse than every run that did not, and
equal to another one that diverged.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


class Rule(NamedTuple):
    """A claim, and what decides it.

    Arm `a` is compared with arm `b` seed by seed: by the ratio a/b, or the difference
    a − b. The claim holds if the whole bootstrap interval of the median lies on the
    claimed side and the median at least `least` beyond; the opposite holds likewise;
    all else is undecided. Of "similar" the whole interval has to lie within `least`.

    Attributes:
      claim: a sentence.
      metric: what is compared.
      a: name of an arm.
      b: name of another one.
      expected: how a compares with b if the claim is right.
      least: how much of an effect counts: 0.05 is 5 % of a ratio, or 0.05 of a
        difference.
      by: how two runs are compared.
      better: which values are good ones, so that a diverged run has a bad one.
      ranks_diverged: whether a diverged run decides as the worst one; else, where it
        says nothing of what is claimed, one leaves the rule undecided.
    """

    claim: str
    metric: str
    a: str
    b: str
    expected: Literal["lower", "higher", "similar"]
    least: float = 0.05
    by: Literal["ratio", "difference"] = "ratio"
    better: Literal["lower", "higher"] = "lower"
    ranks_diverged: bool = True


def score_rule(
    claim: str,
    metric: str,
    a: str,
    b: str,
    least: float = 0.05,
    expected: Literal["lower", "higher", "similar"] = "higher",
) -> Rule:
    """Returns a rule about a score in [0, 1]: more is better, differences count."""
    return Rule(claim, metric, a, b, expected, least, "difference", "higher")


class Effect(NamedTuple):
    """How one arm compares with another.

    Attributes:
      median: over pairs; infinite where runs diverged.
      low: lower end of the bootstrap interval.
      high: upper end.
      pairs: how many.
      diverged: how many runs of a and of b diverged.
    """

    median: float
    low: float
    high: float
    pairs: int
    diverged: tuple[int, int]


def paired_effect(
    a: Mapping[int, float], b: Mapping[int, float], rule: Rule
) -> Effect | None:
    """Compares two arms over the seeds that both have; None without any.

    The interval is the percentile bootstrap of the median over pairs, with a fixed
    seed. Of three pairs it is nearly always the range, and holds the true median less
    often than its level says: read it as a range.

    Args:
      a: a value for each seed; NaN if the run diverged.
      b: the same.
      rule: how they are compared.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    effects = np.array([_compare(a[seed], b[seed], rule) for seed in seeds])
    draws = np.random.default_rng(0).integers(len(seeds), size=(RESAMPLES, len(seeds)))
    medians = np.median(effects[draws], axis=1)
    # Infinite effects have an order, but cannot be interpolated.
    low, high = (
        float(np.quantile(medians, (1 + sign * LEVEL) / 2, method="nearest"))
        for sign in (-1, 1)
    )
    median = float(np.median(effects))
    lost = [sum(math.isnan(arm[seed]) for seed in seeds) for arm in (a, b)]
    return Effect(median, low, high, len(seeds), (lost[0], lost[1]))


def _compare(a: float, b: float, rule: Rule) -> float:
    """The effect of one pair; larger is a larger value of a."""
    bad = math.inf if rule.better == "lower" else -math.inf
    a, b = (bad if math.isnan(value) else value for value in (a, b))
    nothing = 1.0 if rule.by == "ratio" else 0.0
    if a == b:
        return nothing
    if math.isinf(a) or math.isinf(b):
        worse = math.inf if (a > b) else -math.inf
        return worse if rule.by == "difference" else max(worse, 0.0)
    return a / b if rule.by == "ratio" else a - b


def judge(effect: Effect | None, rule: Rule) -> str:
    """Returns "holds", "opposite", "undecided" or "not measured"."""
    if effect is None:
        return "not measured"
    if effect.pairs < 2 or (any(effect.diverged) and not rule.ranks_diverged):
        return "undecided"
    nothing = 1.0 if rule.by == "ratio" else 0.0
    if rule.expected == "similar":
        if max(abs(effect.low - nothing), abs(effect.high - nothing)) <= rule.least:
            return "holds"
        beyond = effect.low > nothing + rule.least or effect.high < nothing - rule.least
        return "opposite" if beyond else "undecided"
    sign = 1 if rule.expected == "higher" else -1
    for side, word in ((sign, "holds"), (-sign, "opposite")):
        ends = [side * (end - nothing) for end in (effect.low, effect.high)]
        if min(ends) > 0 and side * (effect.median - nothing) >= rule.least:
            return word
    return "undecided"


def sentence(effect: Effect | None, rule: Rule) -> str:
    """Returns the verdict on a rule as a sentence, with its numbers."""
    verdict = judge(effect, rule)
    if effect is None:
        return f"{rule.claim}: **{verdict}**."
    sign = "×" if rule.by == "ratio" else ""
    numbers = (
        f"{rule.metric} of {rule.a} against {rule.b}: {sign}{_number(effect.median)} "
        f"[{_number(effect.low)}, {_number(effect.high)}] over {effect.pairs} "
        f"{'pair' if effect.pairs == 1 else 'pairs'}"
    )
    if any(effect.diverged):
        numbers += f"; diverged: {effect.diverged[0]} and {effect.diverged[1]}"
    return f"{rule.claim}: **{verdict}** ({numbers})."


def _number(value: float) -> str:
    return "∞" if value == math.inf else "−∞" if value == -math.inf else f"{value:.3g}"
