"""Run reward functions in worker processes, so that nothing they do can stop or poison a training step.

In: prompts, completions and dataset columns of one batch, all at once or as they come. Out: a `RewardResult` with one
number or None per sample and function, and an account of everything that went wrong. Not here: weights
(`rewards.rubric`), what a function may look like (`rewards.contract`).

The start decides how a function may be called, and it is never called with fewer completions:

    elementwise   one completion a call, spread over the workers; per-sample functions, and batch functions so marked
    needs_group   one group a call, anywhere; batch functions so marked, or that take `group`. A per-sample function
                  that takes `group` gets one completion a call, once the group is whole
    whole_batch   the whole batch in one call, always in the same worker: it may compare what it likes, and keep state

A batch function without a mark is tried, in workers that are replaced afterwards. It is elementwise if one call with
varied completions and calls with one each give the same rewards, bit for bit; otherwise it is whole_batch. It is also
whole_batch if its rewards hardly differ (see `rewards.probe`), because equal calls then show nothing. An elementwise
finding is checked again on a few batches of the run itself (see `rewards.doubt`). If those differ, the rewards are
those of the whole batch, and the function is whole_batch from then on.

A call that fails costs its samples. A worker that hangs, dies or sends what is no reply is killed with everything it
started, and replaced.

POSIX only (process groups, selectable pipes). Not thread-safe: one batch at a time.
"""

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from rewards.batch import (
    FAILURES,
    Batch,
    BatchInputs,
    Drawn,
    RewardResult,
    Share,
    added_effort,
    merge_results,
    replace_function,
    sort_of,
)
from rewards.contract import Calls, RewardSpec, Style, check_specs, column_notes
from rewards.doubt import Doubt, agree, second_best
from rewards.failed import FirstFailure, OnError, RewardFailedError
from rewards.in_process import DESCRIPTION, InProcess, with_values
from rewards.log import RewardLog, Tracebacks
from rewards.moment import Moment
from rewards.probe import Probe, Trial, probes, shows_how_it_judges
from rewards.process import WorkerProcess, load_request
from rewards.protocol import encode
from rewards.replies import BrokenWorker, Done, Failure, LoadedFunction, Refused, Reply, Result
from rewards.supervised import poll
from rewards.worker_variables import check_memory_gb, worker_environment

_LOAD_TRIES = 3  # a worker that dies during an import may succeed the next time
_CHECK_SECONDS = 10.0  # for trying one function that is not marked
_PROBE_CALLS: tuple[Calls, ...] = ("whole_batch", "elementwise", "whole_batch")
# In rising order of what a call must hold.
_CAREFUL: tuple[Calls, ...] = ("elementwise", "needs_group", "whole_batch")
_CLOSE_SECONDS = 3.0  # for exit handlers of user code

Note = Callable[[int, str, Result], None]
Review = Callable[[Batch, RewardResult], RewardResult]  # changes a batch's result, while its workers are idle


class RewardRunner:
    """Worker processes with the reward functions of a run loaded; close it, or use it as a context manager.

    specs: the functions.
    columns: names of the dataset columns that every `score` call will bring.
    num_workers: processes, >= 1.
    timeout_seconds: hard limit of one sample in one function (a batch call gets this times its number of samples).
    start_timeout_seconds: limit for importing one function.
    log_path: file for the functions' output and tracebacks (`rewards.log`); None: this process's stderr.
    env: names of the variables of this process's environment that workers get beside those of
      `rewards.worker_variables`.
    memory_gb: the most resident memory, in 1e9 bytes, of a worker with all that it started; beyond it they are killed.
      Linux only. None: no limit.
    rows: prompt and columns of data rows with which functions without a mark are tried. Without rows they get whole
      batches.
    share: the part of each batch that this process judges, where several processes call this with the same batches. All
      of them get the results of the whole batch. None: everything.
    moment: where the run stands until a batch says otherwise, in the checks of the start too.
    in_process: the functions of specs, by name, that run in this process when a batch is complete; no worker sees them.
    on_error: raise: `begin` makes scorings that stop at the first failure of a function, see `Scoring`.
    retries: how often a call is made again, within its time limit, that failed by an error of the network.

    Raises ValueError when a spec or an argument is invalid, a function does not import, or nothing provides one of
    its arguments.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        columns: Sequence[str],
        num_workers: int,
        timeout_seconds: float,
        *,
        start_timeout_seconds: float = 120.0,
        log_path: str | os.PathLike[str] | None = None,
        env: Sequence[str] = (),
        memory_gb: float | None = None,
        rows: Sequence[tuple[Any, Mapping[str, Any]]] = (),
        share: Share | None = None,
        moment: Moment | None = None,
        in_process: Mapping[str, InProcess] | None = None,
        retries: int = 0,
        on_error: OnError = "none",
    ):
        check_specs(specs)
        if num_workers < 1:
            raise ValueError(f"rewards.num_workers must be >= 1, got {num_workers}")
        if not timeout_seconds > 0:
            raise ValueError(f"rewards.timeout_seconds must be > 0, got {timeout_seconds}")
        check_memory_gb(memory_gb)
        environment = worker_environment(env, os.environ)
        self.specs = tuple(specs)
        self.columns = tuple(columns)
        self._timeout, self._retries = timeout_seconds, retries
        self._on_error: OnError = on_error
        self._share, self._moment = share, moment or Moment()
        given = in_process or {}
        self._in_process = {key: given[spec.name] for key, spec in enumerate(specs) if spec.name in given}
        requests = [load_request(key, spec, self.columns) for key, spec in enumerate(specs)]
        self._log = None if log_path is None else RewardLog(log_path)
        self._tracebacks = Tracebacks(self._log)
        log = None if self._log is None else self._log.descriptor
        self._workers = [
            WorkerProcess(requests, start_timeout_seconds, log, environment, memory_gb) for _ in range(num_workers)
        ]
        try:
            self._functions = self._load()
            self._reasons: dict[int, str] = {}  # {function that was tried: why it is not elementwise, or "" if it is}
            self._check_rows(rows)
            self._calls = self._settle(rows)
            self._doubts = {key: Doubt() for key, reason in self._reasons.items() if not reason}
        except BaseException:  # no worker may outlive a failed start, Ctrl-C included
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        group_size: int = 1,
        names: Collection[str] | None = None,
        finish_reasons: Sequence[str] | None = None,
        moment: Moment | None = None,
        seeds: Sequence[int] | None = None,
        is_trial: bool = False,
        texts: Sequence[tuple[str, str]] | None = None,
    ) -> RewardResult:
        """Score one batch. Order and values depend on the functions only, never on which worker was faster.

        prompts, completions: strings or chat message lists, handed through unchanged.
        columns: one list per dataset column.
        completion_ids: token ids per completion.
        finish_reasons: "eos", "stop" or "length" per completion; None: all "eos".
        group_size, names, moment, seeds, is_trial: see `begin`. texts: see `Scoring.add`.

        Failures of a function never raise. ValueError is for arguments whose lengths differ, a missing column, a value
        that cannot be sent, and completion_ids missing where a function requires them.
        """
        given = {"prompts": prompts, **columns, "completion_ids": completion_ids, "finish_reasons": finish_reasons}
        _check_lengths(given, "completion", len(completions))
        options: dict[str, Any] = {"group_size": group_size, "names": names, "moment": moment, "seeds": seeds}
        options["is_trial"] = is_trial
        with self.begin(prompts, columns, **options, on_error="none") as scoring:
            scoring.add(range(len(completions)), completions, completion_ids, finish_reasons, texts)
            return scoring.result()

    @property
    def calls(self) -> dict[str, Calls]:
        """How each function is called, by name."""
        return {spec.name: calls for spec, calls in zip(self.specs, self._calls, strict=True)}

    @property
    def elementwise(self) -> list[str]:
        """Names of the functions that judge each completion by itself."""
        return [name for name, calls in self.calls.items() if calls == "elementwise"]

    @property
    def in_process(self) -> list[str]:
        """Names of the functions that run in this process, and have no workers."""
        return [self.specs[key].name for key in self._in_process]

    @property
    def doubts(self) -> dict[str, dict[str, Any]]:
        """{name: fields of its `Doubt`} of each function that was found to be elementwise."""
        return {self.specs[key].name: dataclasses.asdict(doubt) for key, doubt in self._doubts.items()}

    def adopt(self, calls: Mapping[str, Calls], doubts: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Takes over findings of another process or an earlier part of the run. A function that was tried is called in
        the more careful of the two ways. doubts: the doubts of the earlier part.
        """
        for key in self._reasons:
            other = calls.get(self.specs[key].name, "elementwise")
            if _CAREFUL.index(other) > _CAREFUL.index(self._calls[key]):
                self._give_up(key, other, "a difference was found earlier in this run or in another process of it")
        for key in self._doubts:
            self._doubts[key] = Doubt(**(doubts or {}).get(self.specs[key].name, self.doubts[self.specs[key].name]))

    def _give_up(self, key: int, calls: Calls, reason: str) -> None:
        """Stops calling this function for one completion at a time."""
        self._calls[key], self._reasons[key] = calls, reason
        self._doubts.pop(key, None)

    def why_not_alone(self, name: str) -> str:
        """Why this function is not called for one completion at a time, in words."""
        key = next(key for key, spec in enumerate(self.specs) if spec.name == name)
        if self._functions[key].takes_group and self._calls[key] == "needs_group":
            return "it takes `group`, the completions of the same prompt"
        return self._reasons.get(key) or f"it is marked so ({self._calls[key]})"

    def notes(self) -> list[str]:
        """A line with the finding for each function that was tried, and for each dataset column whose name is also that
        of something the run provides.
        """
        functions: list[tuple[str, Style, Collection[str]]] = [
            (spec.name, function.style, function.replacing)
            for spec, function in zip(self.specs, self._functions, strict=True)
        ]
        alone = [key for key, reason in self._reasons.items() if not reason]
        notes = [self._note(key) for key in self._reasons if key not in alone]
        if alone:
            notes.append(self._note_of_alone(alone))
        return notes + column_notes(self.columns, functions)

    def _note(self, key: int) -> str:
        return (
            f"reward {self.specs[key].name!r} is called with whole batches, for {self._reasons[key]}; in its entry of "
            "rewards.functions, elementwise: true says that it judges each completion by itself, needs_group: true "
            "that it compares those of one prompt"
        )

    def _note_of_alone(self, keys: Sequence[int]) -> str:
        names = ", ".join(repr(self.specs[key].name) for key in keys)
        called = f"reward {names} is" if len(keys) == 1 else f"rewards {names} are"
        return (
            f"{called} called for one completion at a time: the start-up check found the same rewards as in one call "
            "with all. A few batches of the run are called whole as well, to see whether that holds; elementwise: true "
            "in an entry of rewards.functions saves those calls, elementwise: false keeps whole batches"
        )

    def begin(
        self,
        prompts: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        *,
        group_size: int = 1,
        names: Collection[str] | None = None,
        moment: Moment | None = None,
        seeds: Sequence[int] | None = None,
        on_error: OnError | None = None,
        is_trial: bool = False,
        note: Note | None = None,
    ) -> "Scoring":
        """Begin to score a batch whose completions come later, in any order; see `Scoring`.

        prompts, columns: one entry per sample, as for `score`; a prompt stands once for each of its completions.
        group_size: completions of each prompt, which are consecutive.
        names: the functions to call; None: all.
        moment: where the run stands; None: as at the start. seeds: a number per sample; None: its place in the batch.
        on_error: see `Scoring`; None: the runner's.
        is_trial: whether the rewards count for nothing; functions hear of it by this name.
        note: is told, in another thread, of each reward that a function gave to one completion by itself: sample, name
          and result. What it was told may be given to `Scoring.add` another time.

        ValueError where a function that needs groups would be called for groups of one.
        """
        keys = [key for key, spec in enumerate(self.specs) if names is None or spec.name in names]
        here = {key: function for key, function in self._in_process.items() if key in keys}
        sent = [key for key in keys if key not in here]
        of_run = self._share, self._compare, moment, seeds, here
        stops = on_error or self._on_error
        return self._begin(
            prompts, columns, [*self._calls], sent, group_size, *of_run, on_error=stops, is_trial=is_trial, note=note
        )

    def _begin(
        self,
        prompts: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        calls: Sequence[Calls],
        keys: Sequence[int],
        group_size: int,
        share: Share | None = None,
        review: Review | None = None,
        moment: Moment | None = None,
        seeds: Sequence[int] | None = None,
        in_process: Mapping[int, InProcess] | None = None,
        on_error: OnError = "none",
        is_trial: bool = True,
        note: Note | None = None,
    ) -> "Scoring":
        if len(prompts) % group_size:
            raise ValueError(f"the batch must hold whole groups of {group_size}, got {len(prompts)} samples")
        for key in keys:
            if calls[key] == "needs_group" and group_size < 2:
                raise ValueError(
                    f"reward {self.specs[key].name!r} compares the completions of a prompt (needs_group), and there is "
                    "one for each here; leave it out, or draw more"
                )
        wanted = {name for function in self._functions for name in function.columns}
        missing = sorted(wanted - {*columns})
        if missing:
            raise ValueError(f"score needs the columns {sorted(wanted)}, got no {missing[0]!r}")
        _check_lengths({**columns, "seeds": seeds}, "prompt", len(prompts))
        inputs = BatchInputs(
            prompts=encode(list(prompts), "prompts"),
            columns={name: encode(list(columns[name]), f"column {name!r}") for name in sorted(wanted)},
            seeds=range(len(prompts)) if seeds is None else [int(seed) for seed in seeds],
            moment=moment or self._moment,
            is_trial=is_trial,
        )
        of_run = self._timeout, len(self._workers), share, self._retries, on_error, note
        batch = Batch(self.specs, self._functions, calls, keys, inputs, group_size, *of_run)
        how = share, review, in_process, self._log, self._tracebacks
        return Scoring(self.specs, self._functions, self._workers, batch, len(prompts), *how)

    def _compare(self, batch: Batch, result: RewardResult) -> RewardResult:
        """The result of a batch. Where a function turns out to compare completions, its rewards are those of the whole
        batch.
        """
        for key in [key for key in batch.keys if key in self._doubts]:
            doubt, name = self._doubts[key], self.specs[key].name
            alone = [row[key] for row in result.rewards]
            if not doubt.is_raised_by(alone, batch.group_size):
                continue
            doubt.left -= 1
            whole = self._call_whole(key, batch)
            result = dataclasses.replace(result, effort=added_effort([result.effort, whole.effort]))
            some_failed = any(result.counts[name][kind] for kind in FAILURES)
            if any(whole.counts[name][kind] for kind in FAILURES):
                failed = f"{whole.problems[0]} (a call that was made to see whether {name!r} compares completions)"
                result = dataclasses.replace(result, problems=[*result.problems, failed])
            elif agree(alone, [row[key] for row in whole.rewards], some_failed=some_failed):
                doubt.highest = second_best(alone, batch.group_size)
            else:
                reason = "in a batch of this run calls with one completion gave other rewards than one call with all"
                self._give_up(key, "whole_batch", reason)
                result = replace_function(result, whole, key, name, self._note(key))
        return result

    def _call_whole(self, key: int, batch: Batch) -> RewardResult:
        """The result of one call with all completions of a batch, in all processes that share the batch."""
        of_all: list[Calls] = ["whole_batch"] * len(self.specs)
        again = batch.again(of_all, [key])
        size = len(batch.inputs.prompts)
        how = self._share, None, None, self._log, self._tracebacks
        with Scoring(self.specs, self._functions, self._workers, again, size, *how) as scoring:
            scoring.add_encoded(batch.inputs.drawn)
            return scoring.result()

    def style(self, name: str) -> Style:
        """Which signature a function has."""
        return next(f.style for spec, f in zip(self.specs, self._functions, strict=True) if spec.name == name)

    @property
    def wants_texts(self) -> bool:
        """Whether a function reads prompt and completion as text with special tokens, as OpenRLHF's do."""
        return any(function.style == "openrlhf" for function in self._functions)

    def try_on(self, names: Collection[str], prompt: Any, columns: Mapping[str, Any]) -> dict[str, Trial]:
        """What functions in workers make of right and wrong answers of one row, called as in the run; in this process
        alone.

        A function is tried until two rewards differ, with at most the completions of `rewards.probe`, and given up
        after ten seconds. The workers are replaced afterwards.

        Args:
          columns: one value (not a list) per dataset column.
        """
        found = {}
        for key, spec in enumerate(self.specs):
            if spec.name in names and key not in self._in_process:
                found[spec.name] = self._try_on(key, probes([(prompt, columns)], self.columns))
        for worker in self._workers if found else ():
            worker.renew()
        return found

    def try_group(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        completion_ids: Sequence[Sequence[int]],
        finish_reasons: Sequence[str],
        texts: Sequence[tuple[str, str]] | None = None,
    ) -> RewardResult | None:
        """The rewards of completions of one prompt by the functions in workers, called as in the run, in this process
        alone; None after ten seconds. Arguments are as for `score`. Workers are replaced afterwards if one of the
        functions is not called for one completion at a time, so that it remembers nothing.
        """
        keys = [key for key in range(len(self.specs)) if key not in self._in_process]
        with self._begin(prompts, columns, self._calls, keys, len(prompts)) as scoring:
            scoring.add(range(len(prompts)), completions, completion_ids, finish_reasons, texts)
            try:
                result = scoring.result(_CHECK_SECONDS)
            except TimeoutError:
                result = None
        for worker in self._workers if any(self._calls[key] != "elementwise" for key in keys) else ():
            worker.renew()
        return result

    def _try_on(self, key: int, given: Sequence[Probe]) -> Trial:
        deadline, name, trial = time.monotonic() + _CHECK_SECONDS, self.specs[key].name, Trial(0, 0, "", frozenset())
        for probe in given:
            group = slice(probe.group_size)
            columns = {column: values[group] for column, values in probe.columns.items()}
            size = probe.group_size
            with self._begin(probe.prompts[group], columns, self._calls, [key], size) as scoring:
                scoring.add(range(size), probe.completions[group], probe.completion_ids[group])
                try:
                    result = scoring.result(max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    return trial
            trial = trial.with_result(name, [row[key] for row in result.rewards], result)
            if len(trial.rewards) != 1:
                return trial
        return trial

    def close(self) -> None:
        """End the workers; exit handlers of user code get a few seconds. Closing twice does nothing."""
        for worker in self._workers:
            worker.hang_up()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for worker in self._workers:
            worker.end_by(deadline)
        if self._log is not None:
            self._log.close()

    def _load(self) -> list[LoadedFunction]:
        """Load each function in one worker, in parallel; the other workers load it when they first need it."""
        functions: dict[int, LoadedFunction] = dict.fromkeys(self._in_process, DESCRIPTION)
        for key in range(len(self.specs)):
            if key not in functions:
                self._home(key).to_load.append(key)
        tries = [0] * len(self.specs)

        def take(worker: WorkerProcess, reply: Reply) -> None:
            if isinstance(reply, Refused):
                raise ValueError(reply.error)
            assert isinstance(reply, LoadedFunction), reply
            assert worker.loading is not None, reply
            functions[worker.loading] = reply
            worker.loaded.add(worker.loading)
            worker.loading = None
            worker.load_next()

        for worker in self._workers:
            worker.load_next()
        while busy := [worker for worker in self._workers if worker.loading is not None]:
            poll(busy)
            for worker in busy:
                failure = _listen(worker, functools.partial(take, worker))
                key = worker.loading
                if failure is None or key is None:
                    continue
                tries[key] += 1
                if failure[0] == "timeout" or tries[key] == _LOAD_TRIES:
                    spec, times = self.specs[key], f" {tries[key]} times" if tries[key] > 1 else ""
                    raise ValueError(f"reward {spec.name!r}: importing {spec.function!r} failed{times}: {failure[1]}")
                worker.restart()
                worker.to_load.appendleft(key)
                worker.load_next()
        return [functions[key] for key in range(len(self.specs))]

    def _check_rows(self, rows: Sequence[tuple[Any, Mapping[str, Any]]]) -> None:
        """ValueError where a function that raises only for wrong rows and settings does so for one of these rows."""
        keys = [key for key, function in enumerate(self._functions) if function.tries_rows]
        if not rows or not keys:
            return
        prompts = [prompt for prompt, _ in rows]
        columns = {name: [values.get(name) for _, values in rows] for name in self.columns}
        nothing = ["" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}] for prompt in prompts]
        of_all: list[Calls] = ["elementwise"] * len(self.specs)
        with self._begin(prompts, columns, of_all, keys, 1) as scoring:
            scoring.add(range(len(rows)), nothing, [[]] * len(rows))
            try:
                result = scoring.result(_CHECK_SECONDS)
            except TimeoutError:
                return
        for name, failures in result.failures.items():
            if num := result.counts[name]["exception"]:
                share, message = f"{num} of the first {len(rows)} data rows", next(iter(failures.values()))
                raise ValueError(
                    f"reward {name!r} cannot judge {share}: {message}; mend these rows, leave them out "
                    "(data.prepare), or change the function's kwargs"
                )

    def _settle(self, rows: Sequence[tuple[Any, Mapping[str, Any]]]) -> list[Calls]:
        """How each function is called from now on."""
        tried = [key for key, function in enumerate(self._functions) if function.calls is None]
        if not rows:
            self._reasons = dict.fromkeys(tried, "there are no rows to try it with")
        elif tried:
            given = probes(rows, self.columns)
            self._reasons = {key: self._try(key, given) for key in tried}
            for worker in self._workers:
                worker.renew()  # so that functions remember nothing of the check
        return [
            function.calls or ("whole_batch" if self._reasons[key] else "elementwise")
            for key, function in enumerate(self._functions)
        ]

    def _try(self, key: int, given: Sequence[Probe]) -> str:
        """Why a function cannot be called for one completion at a time; empty: it can."""
        deadline = time.monotonic() + _CHECK_SECONDS
        for probe in given:
            reason, rewards = self._try_with(key, probe, deadline)
            if reason or shows_how_it_judges(probe, rewards):
                return reason
        return (
            "in the start-up check no two completions of a prompt got more than the rest, which does not show whether "
            "it compares completions"
        )

    def _try_with(self, key: int, given: Probe, deadline: float) -> tuple[str, list[float | None]]:
        """(why a function cannot be called for one completion at a time, its rewards if it can).

        In the end it is called with the batch again, which shows changes by state, a clock or chance.
        """
        first, values, name = None, [], self.specs[key].name
        for calls in _PROBE_CALLS:
            of_all: list[Calls] = [calls] * len(self.specs)
            with self._begin(given.prompts, given.columns, of_all, [key], given.group_size) as scoring:
                scoring.add(range(len(given.prompts)), given.completions, given.completion_ids)
                try:
                    result = scoring.result(max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    return f"the start-up check took longer than {_CHECK_SECONDS:g} s", []
            if any(result.counts[name][kind] for kind in FAILURES):
                return f"it failed in the start-up check ({next(iter(result.failures[name].values()))})", []
            values = [row[key] for row in result.rewards]
            rewards = [repr(value) for value in values]  # tells 0.0 from -0.0
            if first is not None and rewards != first:
                return "in the start-up check calls with one completion gave other rewards than one call with all", []
            first = rewards
        return "", values

    def _home(self, key: int) -> WorkerProcess:
        return self._workers[key % len(self._workers)]


class Scoring:
    """A batch that is scored while its completions arrive. A context manager, which stops running calls at its end.

    Functions that judge each completion by itself (per-sample, verl, `elementwise`) run on completions that have
    arrived, through a thread of this process that speaks to the workers. Functions of the whole batch run when the
    batch is complete. The result equals that of `RewardRunner.score`.

    A batch whose `on_error` is raise ends at the first failure of a function: no further function is called, and
    `result` raises RewardFailedError. `add` does, too, where one process judges the batch; several processes raise it
    together, in `result`, which tells all of them of a failure in one.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        functions: Sequence[LoadedFunction],
        workers: Sequence[WorkerProcess],
        batch: Batch,
        num_samples: int,
        share: Share | None,
        review: Review | None,
        in_process: Mapping[int, InProcess] | None,
        log: RewardLog | None,
        tracebacks: Tracebacks,
    ):
        self._share, self._review, self._in_process, self._log = share, review, in_process or {}, log
        self._tracebacks = tracebacks
        self._reviewed: RewardResult | None = None
        self._specs, self._functions, self._workers = specs, functions, workers
        self._batch = batch
        self._size, self._left = num_samples, set(range(num_samples))
        self._arrivals: list[dict[int, Drawn]] = []
        self._changed = threading.Condition()  # guards _arrivals, _left and _stopped; the batch belongs to the thread
        self._stopped = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        self._done = self._thread.submit(self._work)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.shutdown()

    def add(
        self,
        samples: Sequence[int],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        finish_reasons: Sequence[str] | None = None,
        texts: Sequence[tuple[str, str]] | None = None,
        prompts: Sequence[Any] | None = None,
        known: Sequence[Mapping[str, Result]] | None = None,
    ) -> None:
        """Adds completions of these samples (places in the batch). Each may be added once.

        finish_reasons: see `RewardRunner.score`. texts: prompt, and prompt with completion, as text with special
          tokens; None: not known. See `RewardRunner.wants_texts`. prompts: what was asked, where it is known only now;
          None: what `begin` was given. known: rewards by the names of functions that judge each completion by itself,
          which are not called; see `RewardRunner.begin`.

        Raises ValueError for arguments whose lengths differ, a value that cannot be sent, completion_ids missing where
        a function requires them, and a sample that is not in the batch or came before.
        """
        given = {"completions": completions, "completion_ids": completion_ids}
        given |= {"finish_reasons": finish_reasons, "texts": texts, "prompts": prompts, "known": known}
        _check_lengths(given, "sample", len(samples))
        for spec, function in zip(self._specs, self._functions, strict=True):
            if function.needs_completion_ids and completion_ids is None:
                raise ValueError(f"reward {spec.name!r} requires completion_ids, got none; pass them to score")
        if not any(function.takes_completion_ids for function in self._functions):
            completion_ids = None  # converting them is the largest part of preparing a batch
        added = set[int]()
        for sample in samples:
            if not 0 <= sample < self._size:
                raise ValueError(f"sample {sample} is not in the batch of {self._size}")
            if sample not in self._left or sample in added:
                raise ValueError(f"sample {sample} of the batch came before")
            added.add(sample)
        ready = encode(list(completions), "completions")
        if prompts is not None:
            asked = encode(list(prompts), "prompts")
            # They are read when their completions are there.
            for sample, prompt in zip(samples, asked, strict=True):
                self._batch.inputs.prompts[sample] = prompt
        drawn = {}
        for place, sample in enumerate(samples):
            ids = None if completion_ids is None else [int(token) for token in completion_ids[place]]
            reason = "eos" if finish_reasons is None else str(finish_reasons[place])
            before = {} if known is None else known[place]
            drawn[sample] = Drawn(ready[place], ids, reason, None if texts is None else texts[place], before)
        self.add_encoded(drawn)

    def add_encoded(self, drawn: dict[int, Drawn]) -> None:
        """`add` for values, by sample, that were checked and are in their JSON form."""
        if self._share is None:
            self._raise_if_failed(self._batch.first_failure)
        with self._changed:
            self._left.difference_update(drawn)
            self._arrivals.append(drawn)
            self._changed.notify()

    def result(self, timeout: float | None = None) -> RewardResult:
        """Waits for the rewards of the whole batch, whose completions must all have arrived. TimeoutError after
        `timeout` seconds.
        """
        if self._left:
            raise ValueError(
                f"the result needs the whole batch, {len(self._left)} of {self._size} completions are missing"
            )
        self._done.result(timeout)
        if self._reviewed is None:
            result = self._batch.result()
            result = result if self._share is None else merge_results(self._share.gather(result))
            inputs = self._batch.inputs
            completions = [inputs.drawn[sample].completion for sample in range(self._size)]
            for key, function in self._in_process.items():
                name = self._specs[key].name
                result = with_values(result, key, name, function, inputs.prompts, completions, inputs.moment.step)
            self._raise_if_failed(result.first_failure)
            self._reviewed = result if self._review is None else self._review(self._batch, result)
        return self._reviewed

    def _raise_if_failed(self, failure: FirstFailure | None) -> None:
        if failure is not None and self._batch.on_error == "raise":
            raise RewardFailedError(failure)

    # The thread

    def _work(self) -> None:
        try:
            self._run()
        finally:
            # After a stop, a late reply must not count for the next batch.
            for worker in self._workers:
                if worker.task is not None:
                    worker.restart()

    def _run(self) -> None:
        while True:
            with self._changed:
                arrivals, self._arrivals = self._arrivals, []
                whole = not self._left
                if self._stopped:
                    return
            for drawn in arrivals:
                self._batch.add(drawn)
            for position, worker in enumerate(self._workers):
                if worker.task is None:
                    worker.start_task(self._batch.take(position))
            busy = [worker for worker in self._workers if worker.task is not None]
            if busy:
                poll(busy)
                for worker in busy:
                    self._advance(worker)
            elif whole:
                return
            else:
                with self._changed:
                    self._changed.wait_for(lambda: self._arrivals or self._stopped)

    def _advance(self, worker: WorkerProcess) -> None:
        """Read the replies of a busy worker, and notice when there will be no more."""
        batch = self._batch
        failure = _listen(worker, functools.partial(self._take, worker))
        task, was_loading = worker.task, worker.loading is not None
        if failure is None:
            return
        if task is None:  # it had answered before it broke
            worker.restart()
            return
        seconds = worker.finish()
        worker.restart()
        trace = self._log.tail() if self._log is not None and batch.on_error == "raise" else ""
        if was_loading:
            batch.lose_all(task, (failure[0], f"while importing: {failure[1]}"), trace)
        else:
            batch.interrupted(task, failure, seconds, trace)

    def _take(self, worker: WorkerProcess, reply: Reply) -> None:
        task = worker.task
        assert task is not None, reply
        if isinstance(reply, Result):
            self._batch.record(task, reply)
            self._tell(reply)
            worker.extend_deadline(task)
        elif isinstance(reply, LoadedFunction):
            if reply != self._functions[task.key]:  # the file changed since the start: another way to call it
                raise BrokenWorker("another signature than at the start")
            worker.loaded.add(task.key)
            worker.loading = None
            worker.send_task(task)
        elif isinstance(reply, Refused):  # the file changed since the start
            worker.loading = None
            self._batch.lose_all(task, ("exception", reply.error))
            worker.finish()
        else:
            self._batch.finish(task, reply)
            self._tell(reply)
            worker.finish()

    def _tell(self, reply: Result | Done) -> None:
        if reply.failure is not None and reply.trace:
            self._tracebacks.tell(sort_of(*reply.failure), reply.trace)


def _listen(worker: WorkerProcess, take: Callable[[Reply], None]) -> Failure | None:
    """Pass on the replies of a busy worker. Returns the failure, if there will be no more replies."""
    failure = worker.failure()  # asked before reading, so that all replies of a dead worker have arrived
    has_spoken = False
    try:
        for reply in worker.receive():
            take(reply)
            has_spoken = True
    except BrokenWorker as error:
        return "crash", f"the worker process sent {error}; it was killed"
    is_over = worker.task is None and worker.loading is None
    return None if has_spoken or is_over else failure


def _check_lengths(given: Mapping[str, Sequence[Any] | None], what: str, count: int) -> None:
    for name, values in given.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{name} must have one entry per {what} ({count}), got {len(values)}")
