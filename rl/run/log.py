"""The messages and measurements of a run, step by step: `RunLog`.

In: messages, warnings, and one mapping of metrics for each step. Out: lines on the console, `metrics.jsonl`,
`samples.jsonl` and `events.jsonl` in the run folder, steps for trackers, a profile, seconds of each phase and
compilations of a step. `RunLog` holds the parts (`rl.run.console`, `rl.run.metrics`, `rl.run.trackers`,
`rl.run.profiling`) together while a run goes on. It also takes the request to stop (Ctrl-C, SIGTERM), and answers it on
the console.
"""

import contextlib
import hashlib
import math
import numbers
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from rl.config.load import Config
from rl.config.sections import to_dict
from rl.devices import hosts
from rl.run.console import Console
from rl.run.environment import environment
from rl.run.histograms import histogram
from rl.run.interrupt import StopRequest
from rl.run.metrics import CompileCounter, MetricsWriter, Stopwatch, peak_memory_bytes, read_metrics
from rl.run.profiling import Profile, annotated
from rl.run.step_values import NO_VALUES, StepValues
from rl.run.trackers.contract import TrackedRun, TrackedStep
from rl.run.trackers.trackers import Trackers
from rl.run_folder.contents import CHANGED, IDENTITY, run_id


class RunLog(Console):
    """The console of a run. Inside `tracking` it also hands steps to trackers, inside `recording` it writes metrics and
    samples.

    Only the first process of a run prints, writes and tracks.

    Args:
      steps_key: the key that says how many steps the run has.

    Raises:
      ValueError: a tracker cannot work as it is named, or the steps of the profile are none of the run.

    Attributes:
      stopwatch: seconds of each phase in the step so far.
      changed: keys that are not as in the run's config.yml, with their values now, for events.jsonl.
    """

    def __init__(self, config: Config, steps_key: str = "grpo.steps"):
        section, _, name = steps_key.partition(".")
        total_steps = getattr(getattr(config, section), name)
        super().__init__(total_steps, hosts.console_stream(), config.logging.quiet)
        self._steps_key, self._config = steps_key, config
        self.stopwatch = Stopwatch(self._around_phase)
        self._profile = Profile(config.profile, total_steps, self.message)
        self._trackers = Trackers(config) if hosts.is_first() else None
        self._writer: MetricsWriter | None = None
        self._compiles: CompileCounter | None = None
        self._stop: StopRequest | None = None
        self._step = 0  # whose line was written last
        # Events wait for the first line of this process, so that a start that fails before it leaves no file.
        self._waiting: list[dict[str, Any]] | None = []
        self._path: pathlib.Path | None = None
        self.changed: Mapping[str, Any] = {}
        self._first = contextlib.ExitStack()  # what says that the start goes on, and then the first step

    def __enter__(self) -> Self:
        self._first.enter_context(self.alive("starting"))  # data, weights, rewards
        return self

    def close(self) -> None:
        """See `Console.close`."""
        self._first.close()
        super().close()

    @contextlib.contextmanager
    def tracking(self, folder: pathlib.Path, kind: str, is_resumed: bool) -> Iterator[None]:
        """A context in which steps go to the trackers. `ended`, or else its end, waits for them, for a limited time.

        Args:
          folder: the run folder, which holds run.json.
          kind: "grpo" or "sft".
          is_resumed: whether the folder held the run already.

        Raises:
          ValueError: a tracker of the user's cannot be made.
        """
        if not self._config.logging.trackers:
            yield
            return
        trackers = self._trackers

        def start() -> None:
            run = TrackedRun(_id_of(folder), folder.absolute().name, kind, folder, to_dict(self._config), is_resumed)
            if trackers is not None:
                trackers.start(run)

        hosts.from_first(start)
        is_failed, is_in_a_hurry = True, False
        try:
            yield
            is_failed = False
        except (KeyboardInterrupt, BrokenPipeError):
            is_in_a_hurry = True
            raise
        finally:
            self._end_trackers(is_failed, is_in_a_hurry)

    def _end_trackers(self, is_failed: bool, is_in_a_hurry: bool) -> None:
        """Ends them, and says what they say at their end. A second call does nothing."""
        if self._trackers is not None:
            self.warnings(self._trackers.end(is_failed, is_in_a_hurry, self.message))

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
        try:
            with (
                MetricsWriter(folder if hosts.is_first() else None, first_line) as self._writer,
                CompileCounter() as self._compiles,
                StopRequest(self.stopping) as self._stop,
                contextlib.closing(self._profile),
            ):
                self._step = first_step
                changed = {CHANGED: dict(self.changed)} if self.changed else {}
                self._waiting = [{"start": environment(), **changed}, *(self._waiting or ())]
                self._path = folder
                self._say_what_is_tracked_again(first_line)
                self.stopwatch = Stopwatch(self._around_phase)
                self.begin_steps(first_step)
                if first_step < self._total_steps:
                    self._profile.start(first_step)
                self._profile.begin(folder, first_step + 1)
                self._first.close()
                with self._first:
                    self._first.enter_context(self.alive("compiling and running the first step"))
                    yield
        finally:
            self._writer = None

    def _say_what_is_tracked_again(self, first_line: int) -> None:
        """Trackers keep what they got of steps that are run again; TensorBoard alone can be told to hide it."""
        assert self._writer is not None
        last = self._writer.last_dropped
        names = [name for name in self._trackers.labels if name != "tensorboard"] if self._trackers else []
        if names and last is not None and last >= first_line:
            steps = f"step {last} comes" if last == first_line else f"steps {first_line} to {last} come"
            self.message(f"{', '.join(names)}: {steps} again, for the run goes on from an earlier checkpoint")

    @contextlib.contextmanager
    def _around_phase(self, phase: str) -> Iterator[None]:
        is_long = phase == "eval" and self._waiting is None  # before the first line, all is said to go on
        life = self.alive("evaluating") if is_long else contextlib.nullcontext()
        with self._in_phase(phase), annotated(phase), life:
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
        values: StepValues = NO_VALUES,
    ) -> None:
        """Ends the step: writes its line, with its times and memory, and its samples, shows the line, and hands all to
        the trackers. Every `logging.table_every` steps it shows the group of `values`.

        Args:
          step: how many steps are done.
          num_tokens: completion tokens of the step.
          values: what is shown of the step beside its metrics; events.jsonl has their histograms.
        """
        assert self._path is not None, "outside of `recording`"
        self._profile.end(step)
        self._line({"step": step, **metrics, **self._lap(num_tokens)}, samples, values)
        if values.histograms:
            self._event({"histograms": {name: histogram(each) for name, each in values.histograms.items()}})
        self._profile.begin(self._path, step + 1)

    def baseline(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The same for an evaluation that is made when the run begins or goes on; nothing where that is nothing. After
        a step that was done before, the step's line gets it.
        """
        if not metrics:
            return
        if step == 0:
            self._line({"step": 0, **metrics})
        else:
            assert self._writer is not None, "outside of `recording`"
            self._writer.amend(step, metrics)
            self.step_line({"step": step, **metrics})
            if self._trackers and self._trackers.names:
                self._trackers.put(TrackedStep(step, _finite(metrics), {}, []))
        self.stopwatch.lap()  # the seconds of the next step begin here

    def evaluated(self, folder: pathlib.Path, step: int) -> dict[str, Any]:
        """What the line of a step has of its evaluation; empty without one."""

        def read() -> dict[str, Any]:
            line: dict[str, Any] = next((line for line in read_metrics(folder) if line["step"] == step), {})
            return {name: value for name, value in line.items() if name.startswith("eval/")}

        return hosts.from_first(read)

    def _line(
        self, metrics: Mapping[str, Any], samples: Iterable[Mapping[str, Any]] = (), values: StepValues = NO_VALUES
    ) -> None:
        assert self._writer is not None, "outside of `recording`"
        step, every = metrics["step"], self._config.logging.table_every
        has_table = bool(every) and (step == 1 or step % every == 0)
        metrics = {**metrics, **(self._trackers.metrics() if self._trackers else {})}
        self._first.close()
        self._writer.write(metrics)
        waiting, self._waiting = self._waiting, None
        for event in waiting or ():
            self._event(event)
        self._step = step
        if samples := list(samples):
            self._writer.write_samples(step, samples)
        if has_table and values.group is not None:
            self.show_group(step, values.group)
        self.step_line(metrics)
        if self._trackers and self._trackers.names:
            shown = samples if has_table else []
            self._trackers.put(TrackedStep(step, _finite(metrics), values.histograms, shown))
            self.messages(self._trackers.places())
            self.warnings(self._trackers.problems())

    def resumed(self, step: int, has_left: bool = False) -> None:
        """Says that the run goes on after `step` steps, or that these were all it is to have. has_left: an evaluation
        is still to be made.
        """
        if step < self._total_steps or has_left:
            self.message(f"resumed at step {step} of {self._total_steps}")
        else:
            self.last_word(self.nothing_left(step))

    def nothing_left(self, step: int) -> str:
        """What is said of a run that has had its steps already, and `step` of them."""
        return (
            f"the run has {step} steps already and {self._steps_key} is {self._total_steps}: nothing is left to do; "
            f"raise {self._steps_key} to go on, or name another output_dir"
        )

    def ended(self, step: int, path: pathlib.Path, what_next: str, why_early: str = "") -> None:
        """To be called last, when everything is on disk: where the run is, and what to do next. The live display ends,
        and the trackers before these last words.

        Args:
          what_next: with a run that has all its steps, or ended early.
          why_early: why a run ended before its last step, and was not asked to stop.
        """
        self.close()
        self._end_trackers(is_failed=False, is_in_a_hurry=False)
        if why_early:
            self.last_word(why_early)
            self.last_word(f"done: {path} has {step} steps; next: {what_next}")
        elif not step and self._total_steps:
            self.last_word(f"no step is done; its episodes are in the journal of {path}, and the same command goes on")
        elif step < self._total_steps:
            self.last_word(f"saved step {step} of {self._total_steps} in {path}; the same command goes on")
        else:
            self.last_word(f"done: {path} has all {step} steps; next: {what_next}")

    def messages(self, texts: Iterable[str]) -> None:
        """Prints each text on lines of its own."""
        for text in texts:
            self.message(text)

    def warning(self, text: str) -> None:
        """Prints `warning: text`, and writes it to events.jsonl with the step that was written last."""
        super().warning(text)
        self._event({"warning": text})

    def _event(self, event: dict[str, Any]) -> None:
        if self._waiting is not None:
            self._waiting.append(event)
            return
        if self._writer is not None:  # else the files are closed: the run has ended
            self._writer.write_event(self._step, event)

    def warnings(self, texts: Iterable[str]) -> None:
        """Prints `warning: text` for each."""
        for text in texts:
            self.warning(text)

    def stops_in_steps(self) -> None:
        """To be called where a step that is cut short goes on later, so that a request to stop need not wait for it."""
        assert self._stop is not None, "outside of `recording`"
        self._stop.plan = "leaving this step, whose episodes are kept, then saving"

    def stop_is_requested(self) -> bool:
        """Whether one of the processes was asked to stop. All of them must ask at the same step."""
        assert self._stop is not None, "outside of `recording`"
        return hosts.any_process(self._stop.requested)


def _id_of(folder: pathlib.Path) -> str:
    """The id of the run in a folder; for one of an older version, which has none, a hash of what it starts from."""
    return run_id(folder) or hashlib.blake2b((folder / IDENTITY).read_bytes(), digest_size=16).hexdigest()


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are finite numbers, without the step."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if name != "step" and isinstance(value, numbers.Real) and math.isfinite(value)
    }
