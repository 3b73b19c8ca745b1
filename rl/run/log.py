"""The messages and measurements of a run, step by step: `RunLog`.

In: messages, warnings, and one mapping of metrics for each step. Out: lines on the console, `metrics.jsonl` and
`samples.jsonl` in the run folder, seconds of each phase and compilations of a step. `RunLog` holds the parts
(`rl.run.console`, `rl.run.metrics`) together while a run goes on. It also takes the request to stop (Ctrl-C, SIGTERM),
and answers it on the console.
"""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rl.devices import hosts
from rl.run.console import Console
from rl.run.interrupt import StopRequest
from rl.run.metrics import CompileCounter, MetricsWriter, Stopwatch, peak_memory_bytes


class RunLog(Console):
    """The console of a run of `total_steps` steps. Inside `recording` it also writes metrics and samples.

    Only the first process of a run prints and writes.

    Attributes:
      stopwatch: seconds of each phase in the step so far.
    """

    def __init__(self, total_steps: int, steps_key: str = "grpo.steps"):
        super().__init__(total_steps, hosts.console_stream())
        self._steps_key = steps_key  # of the configuration
        self.stopwatch = Stopwatch()
        self._writer: MetricsWriter | None = None
        self._compiles: CompileCounter | None = None
        self._stop: StopRequest | None = None

    @contextlib.contextmanager
    def recording(self, folder: pathlib.Path, first_step: int) -> Iterator[None]:
        """A context in which steps are written, compilations counted, and requests to stop taken.

        Args:
          folder: the run folder.
          first_step: the number of steps that are done. Lines of later steps, which are run again, are dropped.

        Raises:
          ValueError: see `MetricsWriter`.
        """
        first_line = first_step + 1 if first_step else 0  # a new run may begin with a line for step 0
        with (
            MetricsWriter(folder if hosts.is_first() else None, first_line) as self._writer,
            CompileCounter() as self._compiles,
            StopRequest(self.stopping) as self._stop,
        ):
            self.stopwatch = Stopwatch()
            yield

    def timer(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """Counts the time inside the block to `phase`."""
        return self.stopwatch.timer(phase)

    def _lap(self, num_tokens: int) -> dict[str, float]:
        """Metrics of the step that ends now: seconds, tokens per second in its phases, compilations, peak memory."""
        assert self._compiles is not None, "outside of `recording`"
        seconds = self.stopwatch.lap()
        phases = ("rollout", "train", "step") if "seconds/rollout" in seconds else ("train",)
        speeds = {f"tokens_per_second/{phase}": num_tokens / seconds[f"seconds/{phase}"] for phase in phases}
        counts = {"compiles": self._compiles.lap(), "peak_memory_gb": peak_memory_bytes() / 1e9}
        return {**seconds, **speeds, **counts}

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any],
        num_tokens: int,
        samples: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Ends the step: writes its line, with its times and memory, and its samples, and shows the line.

        Args:
          step: how many steps are done.
          num_tokens: completion tokens of the step.
        """
        self._line({"step": step, **metrics, **self._lap(num_tokens)}, samples)

    def baseline(self, metrics: Mapping[str, Any]) -> None:
        """The same for what was measured before the first step; nothing where that is nothing."""
        if metrics:
            self._line({"step": 0, **metrics})
            self.stopwatch.lap()  # the seconds of the first step begin here

    def _line(self, metrics: Mapping[str, Any], samples: Iterable[Mapping[str, Any]] = ()) -> None:
        assert self._writer is not None, "outside of `recording`"
        self._writer.write(metrics)
        if samples := list(samples):
            self._writer.write_samples(metrics["step"], samples)
        self.step_line(metrics)

    def resumed(self, step: int) -> None:
        """Says that the run goes on after `step` steps, or that these were all it is to have."""
        if step < self._total_steps:
            self.message(f"resumed at step {step} of {self._total_steps}")
        else:
            self.message(self.nothing_left(step))

    def nothing_left(self, step: int) -> str:
        """What is said of a run that has had its steps already, and `step` of them."""
        return (
            f"the run has {step} steps already and {self._steps_key} is {self._total_steps}: nothing is left to do; "
            f"raise {self._steps_key} to go on, or name another output_dir"
        )

    def saved(self, step: int, path: pathlib.Path) -> None:
        """To be called last, when everything is on disk: says where a run that stopped early can be gone on with."""
        if step < self._total_steps:
            self.message(f"saved step {step} of {self._total_steps} in {path}; the same command goes on")

    def messages(self, texts: Iterable[str]) -> None:
        """Prints each text on lines of its own."""
        for text in texts:
            self.message(text)

    def warnings(self, texts: Iterable[str]) -> None:
        """Prints `warning: text` for each."""
        for text in texts:
            self.warning(text)

    def stop_is_requested(self) -> bool:
        """Whether one of the processes was asked to stop. All of them must ask at the same step."""
        assert self._stop is not None, "outside of `recording`"
        return hosts.any_process(self._stop.requested)
