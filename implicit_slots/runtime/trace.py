"""A window of steps recorded by JAX's profiler, for TensorBoard or Perfetto."""

import pathlib

import jax
from jaxtyping import PyTree

from implicit_slots.runtime import processes
from implicit_slots.runtime.config import Config

PROFILE_FOLDER = "profile"


class Trace:
    """Records the configured steps to the workdir's profile/, in one process.

    Args:
      workdir: the run's directory.
      config: the section `profile`.
    """

    def __init__(self, workdir: pathlib.Path, config: Config):
        self._folder = workdir / PROFILE_FOLDER
        self._first = config.start
        self._last = config.start + config.steps - 1
        self._recording = False

    def before(self, step: int) -> None:
        """Begins to record if this step is the first of the window."""
        if step == self._first and processes.is_main():
            jax.profiler.start_trace(self._folder)
            self._recording = True

    def after(self, step: int, result: PyTree) -> None:
        """Writes the recording once the last step of the window has its result."""
        if self._recording and step == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what was recorded so far."""
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
