"""What people see of a run: a bar or plain lines, and how fast it goes."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

from implicit_slots.runtime.signals import silence

SHOWN = (
    *("loss", "mse", "cross_entropy", "fg_ari", "ari", "miou"),
    *("decoder_fg_ari", "decoder_ari", "decoder_miou", "ap_inf", "ap_0_5"),
)


class Progress:
    """The bar of a run on a terminal, plain lines elsewhere, nothing if silent.

    Its clock measures the step rate, without the time spent on anything but steps.

    Args:
      start: the step that the run begins with.
      end: its last step.
      waited: returns how long the devices waited for data so far, in seconds.
      silent: for all processes but one.

    Attributes:
      failure: why nothing can be shown any more: the terminal or reader is gone.
    """

    def __init__(
        self, start: int, end: int, waited: Callable[[], float], *, silent: bool
    ):
        self._end = end
        self._silent = silent
        self._waited_so_far = waited
        self.failure: OSError | None = None
        self._bar = tqdm(
            total=end,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=True if silent else None,
            file=sys.stderr,
        )
        self.restart(start)

    def restart(self, step: int) -> None:
        """Begins a new window of the clock after `step`."""
        self._began, self._step = time.perf_counter(), step
        self._waited = self._waited_so_far()

    def rate(self, step: int) -> dict[str, float]:
        """Names the speed of the window, if it has any steps; begins a new one."""
        steps, seconds = step - self._step, time.perf_counter() - self._began
        waited = self._waited_so_far() - self._waited
        self.restart(step)
        if not steps:
            return {}
        return {"steps_per_second": steps / seconds, "data_wait": waited / seconds}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes what happens in the context out of the window."""
        entered = time.perf_counter()
        yield
        self._began += time.perf_counter() - entered

    def say(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Shows a line of what was logged."""
        text = "  ".join(f"{n} {values[n]:.4g}" for n in SHOWN if n in values)
        if "steps_per_second" in values:
            rate, waited = values["steps_per_second"], values["data_wait"]
            waiting = f"{waited:.0%} of the time waiting for data"
            self._bar.set_postfix_str(waiting, refresh=False)
            if self._bar.disable:
                minutes = (self._end - step) / rate / 60
                text += f"  {rate:.1f} steps/s, {minutes:.1f} min left, {waiting}"
        width = len(str(self._end))
        self.write(f"step {step:>{width}}/{self._end}  {split:<10} {text}")

    def write(self, text: str) -> None:
        """Shows a line above the bar."""
        if not self._silent:
            with self._showing():
                self._bar.write(text)
                sys.stdout.flush()

    def advance(self) -> None:
        """Counts a step."""
        with self._showing():
            self._bar.update()

    @contextlib.contextmanager
    def _showing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # The run ends for it, but between two steps, and saves first.
            self.failure = error
            self._bar.disable = True
            silence([sys.stdout.fileno()])

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def bar(iterable: Any, **options: Any) -> Any:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(iterable, disable=None, leave=False, file=sys.stderr, **options)
