"""A profile of some steps: a trace with named phases, and the memory of the device.

In: `profile.steps`, and what the run does. Out: `profile/` in the run folder, which TensorBoard and Perfetto read
(docs/trackers.md). Only the first process of a run is traced. Nothing is computed otherwise than without a profile.
"""

import contextlib
import pathlib
from collections.abc import Callable

import jax

from rl.config.sections import ProfileSection
from rl.devices import hosts
from rl.devices.libtpu import asks_libtpu

FOLDER = "profile"  # in the run folder
_STEP = "step"  # the name that tools look for


class Profile:
    """Traces the steps from `section.steps[0]` to `section.steps[1]`, counted from 1.

    Args:
      total_steps: of the run.

    Raises:
      ValueError: the run has fewer steps, or libtpu is loaded although there is no TPU.
    """

    def __init__(self, section: ProfileSection, total_steps: int, say: Callable[[str], None]):
        self._first, self._last = section.steps or (0, 0)
        if self._last > total_steps:
            raise ValueError(
                f"profile.steps must be steps of the run, which has {total_steps}, got {section.steps}; name "
                "earlier ones"
            )
        if self._last and asks_libtpu() and jax.default_backend() != "tpu":  # it would end the process with jax 0.10
            raise ValueError(
                f"profile.steps must be [] while jax loads libtpu on a machine without a TPU, got {section.steps}; set "
                f"the environment variable JAX_PLATFORMS={_platforms()}, or uninstall libtpu"
            )
        self._memory, self._say = section.memory, say
        self._folder: pathlib.Path | None = None
        self._step: contextlib.AbstractContextManager | None = None

    def start(self, steps_done: int) -> None:
        """To be called when a run starts after so many steps: says where that is too late for all of the profile."""
        if 0 < self._last <= steps_done:
            self._say(
                f"no profile is made: the run goes on after step {steps_done}, and profile.steps names "
                f"[{self._first}, {self._last}]; name later ones"
            )

    def begin(self, folder: pathlib.Path, step: int) -> None:
        """To be called when step number `step` begins. folder: of the run."""
        if not self._first <= step <= self._last or not hosts.is_first():
            return
        if self._folder is None:
            self._folder = folder / FOLDER
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # each Python call would be an event: large, slow, and read by nobody
            jax.profiler.start_trace(self._folder, profiler_options=options)
        self._step = jax.profiler.StepTraceAnnotation(_STEP, step_num=step)
        self._step.__enter__()

    def end(self, step: int) -> None:
        """To be called when the step has ended."""
        if self._folder is None:
            return
        self._end_step()
        if self._memory:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.save_device_memory_profile(str(self._folder / f"memory_step_{step}.prof"))
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Writes what was traced. A second call does nothing."""
        if self._folder is not None:
            self._end_step()
            folder, self._folder = self._folder, None
            jax.profiler.stop_trace()
            self._say(f"the profile is in {folder}; docs/trackers.md says how to read it")

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None


def _platforms() -> str:
    """What JAX_PLATFORMS would be for the devices in use."""
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    return platform if platform == "cpu" else f"{platform},cpu"


def annotated(phase: str) -> contextlib.AbstractContextManager:
    """A context that names a phase in a trace; outside of a trace it costs a microsecond."""
    return jax.profiler.TraceAnnotation(phase)
