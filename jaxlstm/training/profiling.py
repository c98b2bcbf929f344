"""A profile of some steps of a run, by JAX's profiler."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxlstm.errors import first_line

FIRST_STEP = 3  # the steps before it are compiled or wait for compilation


class StepProfiler:
    """Profiles a number of steps, for TensorBoard and ui.perfetto.dev.

    Args:
      folder: folder of the profile.
      num_steps: number of steps, from the third step of the process on; None for no profile.
    """

    def __init__(self, folder: Path, num_steps: int | None) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.running = False

    def before_step(self, step: int) -> None:
        """Starts or stops the profile before a step, counted from 1 in each process.

        Raises:
          OSError: if the profile cannot be written.
        """
        if self.num_steps is None:
            return
        if step == FIRST_STEP:
            with self._named_errors():
                jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.running = True
        elif step == FIRST_STEP + self.num_steps:
            self.stop()

    def stop(self) -> None:
        """Writes the profile, if one is running.

        Raises:
          OSError: if it cannot be written.
        """
        if self.running:
            self.running = False
            with self._named_errors():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turns the errors of JAX's profiler into one line."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            raise OSError(f"--profile cannot write to {self.folder}: {first_line(error)}") from None
