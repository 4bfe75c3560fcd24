"""Alarms: sentences that say when a run goes wrong, and what usually helps.

What is known of how slot attention fails: gradients and the step's Jacobian explode
under back-propagation through the iterations without clipping or warm-up, and stay
bounded under the implicit gradient (Chang et al. 2022, arXiv 2207.00787, Figs. 5, 12
and 13); slots that divide every image alike, or leave it to one of them, or never part.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError

# Of the gradient's norm: logged values whose median is what is usual, and how many of
# them there must be before it means anything.
WINDOW = 20
FEWEST = 5

_STEADIER = (
    "clip gradients (--config.optimizer.clip=max_norm), warm up longer "
    "(--config.optimizer.warmup_steps), lower --config.optimizer.learning_rate, or "
    "train with the one-term implicit gradient instead of :vanilla "
    "(--config.model.adjoint.name=neumann)"
)


@dataclasses.dataclass(frozen=True)
class _Alarm:
    """A logged value that should stay below a limit.

    Attributes:
      value: its name in metrics.jsonl.
      split: under which it is logged.
      key: of the limit, in the section `alarms`.
      waits: whether it needs `patience` values in a row above the limit.
      problem: what being above the limit means.
      remedy: what usually helps.
    """

    value: str
    split: str
    key: str
    waits: bool
    problem: str
    remedy: str


_ALARMS = (
    _Alarm(
        "grad_norm_l2",
        "train",
        "gradient_growth",
        False,
        "the gradient explodes",
        _STEADIER,
    ),
    _Alarm(
        "spectral_norm",
        "validation",
        "spectral_norm",
        False,
        "the Jacobian of the slot attention step explodes",
        _STEADIER,
    ),
    _Alarm(
        "mask_similarity",
        "validation",
        "mask_similarity",
        True,
        "slots divide every image alike, by position and not by what is seen",
        "a smaller --config.model.position_scale, or a smaller "
        "--config.model.num_slots",
    ),
    _Alarm(
        "largest_slot",
        "validation",
        "largest_slot",
        True,
        "one slot takes almost the whole image",
        "a lower --config.optimizer.learning_rate, a longer "
        "--config.optimizer.warmup_steps, --config.model.initial_positions=smooth, or "
        "more of --config.model.num_slots or --config.model.solver.max_steps",
    ),
    _Alarm(
        "attention_entropy",
        "validation",
        "attention_entropy",
        True,
        "attention is spread evenly over the slots",
        "patience, for slots part late in many runs (a short run needs more "
        "--config.num_steps); then --config.model.attention_gain=3 (for the two models "
        "of Locatello et al.), a higher --config.optimizer.learning_rate, or "
        "--config.model.straight_through=True, without which implicit gradients leave "
        "the initial slots untrained",
    ),
    _Alarm(
        "backward_failed",
        "train",
        "backward_failed",
        True,
        "the backward solve misses its tolerance, and the gradient is what it reached",
        "more of --config.model.adjoint.solver.max_steps, a larger "
        "--config.model.adjoint.solver.rtol, or "
        "--config.model.adjoint.solver.rtol=0, which asks for no tolerance",
    ),
)


class Alarms:
    """Watches what a run logs.

    A value that is missing or not finite is passed over, as if nothing had been logged:
    metrics.jsonl does not tell infinity from NaN, and a resumed run must know what an
    uninterrupted one does.

    Args:
      config: the section `alarms`; see configs/base.py.
      history: the lines of metrics.jsonl up to the step that the run starts from.

    Raises:
      UserError: if the patience is below one.
    """

    def __init__(self, config: Config, history: Sequence[Mapping[str, Any]]):
        if config.patience < 1:
            raise UserError(
                f"config.alarms.patience must be at least 1, got {config.patience}; "
                "config.alarms.enabled=False switches all alarms off"
            )
        self._config = config
        self._gradients: collections.deque[float] = collections.deque(maxlen=WINDOW)
        # By the name of a value: since which step it is above its limit, and for how
        # many values.
        self._above: dict[str, tuple[int, int]] = {}
        for line in history:
            self.check(line["step"], line["split"], line)

    def check(self, step: int, split: str, values: Mapping[str, Any]) -> list[str]:
        """Returns a sentence for each alarm that goes off now.

        One that stays on is not repeated until a value was within its limit again.

        Args:
          step: the step at which the values are logged.
          split: under which they are logged: "train" or "validation".
          values: what is logged.
        """
        if not self._config.enabled:
            return []
        sentences = []
        for alarm in _ALARMS:
            value = values.get(alarm.value)
            if split != alarm.split or value is None or not math.isfinite(value):
                continue
            limit, described = self._limit(alarm)
            if alarm.value == "grad_norm_l2":
                self._gradients.append(value)
            if not value > limit:
                self._above.pop(alarm.value, None)
                continue
            since, count = self._above.get(alarm.value, (step, 0))
            count += 1
            self._above[alarm.value] = (since, count)
            if count == (self._config.patience if alarm.waits else 1):
                duration = f" since step {since}, {count} times in a row" * (count > 1)
                sentences.append(
                    f"{alarm.problem}: at step {step} {alarm.value} is {value:.3g}, "
                    f"above {described}{duration}. What usually helps: {alarm.remedy}."
                )
        return sentences

    def _limit(self, alarm: _Alarm) -> tuple[float, str]:
        """The limit of a value that is about to be logged, and how it came about."""
        limit = self._config[alarm.key]
        if alarm.key != "gradient_growth":
            return limit, f"its limit {limit:g}"
        if len(self._gradients) < FEWEST:
            return math.inf, ""
        usual = statistics.median(self._gradients)
        return limit * usual, (
            f"{limit:g} times {usual:.3g}, the median of the last "
            f"{len(self._gradients)} logged values"
        )
