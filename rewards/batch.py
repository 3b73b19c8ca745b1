"""The bookkeeping of one batch: which samples must still go to which function, and the results of the others.

In: completions as they arrive, and the reports of workers. Out: tasks, and at the end a `RewardResult`. No processes
and no clocks here.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rewards.contract import Calls, RewardSpec
from rewards.failed import FirstFailure, OnError
from rewards.logged import MAX_NAMES, Sums, add_sums
from rewards.moment import Moment
from rewards.replies import FAILURES, BrokenWorker, Done, Failure, LoadedFunction, Result

COUNTS = (*FAILURES, "none")
TOO_MANY = (
    f"logged more than {MAX_NAMES} metrics in a batch, and the others are left out: a metric is one name for the whole "
    "batch, values of a completion are for log_extra"
)

_PIECES_PER_WORKER = 4  # small enough to balance the load, large enough for little message overhead
_PROBLEMS_PER_FUNCTION = 3
_MOST_SORTS = 20  # of one function's failures in a batch
_GRACE_SECONDS = 1.0  # added to an async time limit, which the worker itself enforces first


@dataclasses.dataclass(frozen=True)
class Effort:
    """What the calls of a function took, in a batch or several.

    seconds: summed over completions, those that failed included. A call for several completions counts for each with
      an equal share, as it does for the time limit. slowest: the most that one completion took. completions: their
      number. retries: how often calls were made again after errors of the network.
    """

    seconds: float = 0.0
    slowest: float = 0.0
    completions: int = 0
    retries: int = 0

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(
            self.seconds + other.seconds,
            max(self.slowest, other.slowest),
            self.completions + other.completions,
            self.retries + other.retries,
        )

    @classmethod
    def of_call(cls, seconds: float, completions: int, retries: int = 0) -> "Effort":
        """That of one call."""
        return cls(seconds, seconds / completions, completions, retries)

    @property
    def mean(self) -> float:
        """Seconds of a completion; NaN without any."""
        return self.seconds / self.completions if self.completions else math.nan


@dataclasses.dataclass(frozen=True)
class RewardResult:
    """Rewards of one batch.

    rewards: per sample a list with one float or None per function, in the order of the specs.
    counts: for each function the number of samples by failure (`FAILURES`), and "none" for samples that it declined to
      judge. A failed call counts for each of its samples.
    problems: a few readable messages per function. effort: of each function that was called.
    failures: per function that failed the sorts of its failures, with the last message of each. Messages of one sort
        differ in values only, such as a completion that they quote.
    logged: per sample {function: {name: value}}, what functions keep with it; empty where nothing was called. sums: per
        function that logged metrics {metric: [sum, number of values]}, see `rewards.logged`.
    first_failure: of any function that was called; None: nothing failed.
    """

    rewards: list[list[float | None]]
    counts: dict[str, dict[str, int]]
    problems: list[str]
    effort: dict[str, Effort]
    failures: dict[str, dict[str, str]]
    logged: list[dict[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    sums: dict[str, Sums] = dataclasses.field(default_factory=dict)
    first_failure: FirstFailure | None = None


def result_of(fields: Mapping[str, Any]) -> RewardResult:
    """The result whose `dataclasses.asdict` these are."""
    effort = {name: Effort(**own) for name, own in fields["effort"].items()}
    first = fields["first_failure"] and FirstFailure(**fields["first_failure"])
    return RewardResult(**{**fields, "effort": effort, "first_failure": first})


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of every batch that this process judges, where several processes judge a batch together.

    Completions are cut into equal blocks, one for each process; for functions that need groups, at the borders of
    groups. A function of the whole batch runs in one process.

    index, count: the number of this process, and of processes. gather: value of this process -> values of all
      processes.
    """

    index: int
    count: int
    gather: Callable[[RewardResult], list[RewardResult]]

    def owns(self, item: int, count: int) -> bool:
        """Whether item `item` of `count` samples or groups of a batch is in this process's block."""
        return item * self.count // count == self.index

    def owns_function(self, key: int) -> bool:
        """Whether this process runs the function at this position of the specs, which takes the whole batch."""
        return key % self.count == self.index


def merge_results(results: Sequence[RewardResult]) -> RewardResult:
    """The result of a batch from those of its shares, each of which has None for samples of other shares."""
    first = results[0]
    if len(results) == 1:
        return first

    def known(values: Sequence[float | None]) -> float | None:
        return next((value for value in values if value is not None), None)

    rewards = [
        [known(values) for values in zip(*rows, strict=True)]
        for rows in zip(*(result.rewards for result in results), strict=True)
    ]
    counts = {
        name: {kind: sum(result.counts[name][kind] for result in results) for kind in kinds}
        for name, kinds in first.counts.items()
    }
    effort = added_effort(result.effort for result in results)
    problems = [line for result in results for line in result.problems]
    failures: dict[str, dict[str, str]] = {}
    for result in results:
        for name, sorts in result.failures.items():
            failures[name] = failures.get(name, {}) | sorts
    logged = [
        {name: values for part in parts for name, values in part.items()}
        for parts in zip(*(result.logged for result in results), strict=True)
    ]
    sums: dict[str, Sums] = {}
    for result in results:
        for name, own in result.sums.items():
            add_sums(sums.setdefault(name, {}), own)
    failed = [result.first_failure for result in results if result.first_failure is not None]
    first_failure = min(failed, key=lambda failure: failure.sample, default=None)
    return RewardResult(rewards, counts, problems, effort, failures, logged, sums, first_failure)


def added_effort(efforts: Iterable[Mapping[str, Effort]]) -> dict[str, Effort]:
    """The efforts of several results, by function."""
    total: dict[str, Effort] = {}
    for of_functions in efforts:
        for name, own in of_functions.items():
            total[name] = total.get(name, Effort()) + own
    return total


def replace_function(result: RewardResult, other: RewardResult, position: int, name: str, problem: str) -> RewardResult:
    """`result` with the rewards of `other` for the function at this position of the specs. Its effort stays.

    problem: a message that is put before the function's problems.
    """
    rewards = [
        [*row[:position], new[position], *row[position + 1 :]]
        for row, new in zip(result.rewards, other.rewards, strict=True)
    ]
    own, of_others = problems_of(name, other.problems), problems_of(name, result.problems)
    problems = [*(line for line in result.problems if line not in of_others), problem, *own]
    counts = result.counts | {name: other.counts[name]}
    failures = {key: sorts for key, sorts in result.failures.items() if key != name}
    failures |= {key: sorts for key, sorts in other.failures.items() if key == name}
    logged = [_with_own(old, new, name) for old, new in zip(result.logged, other.logged, strict=True)]
    sums = _with_own(result.sums, other.sums, name)
    return RewardResult(rewards, counts, problems, result.effort, failures, logged, sums, result.first_failure)


def _with_own(values: Mapping[str, Any], others: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Values by function, with those of one function taken from others."""
    kept = {key: value for key, value in values.items() if key != name}
    return kept | ({name: others[name]} if name in others else {})


def problems_of(name: str, problems: Sequence[str]) -> list[str]:
    """The problems of one function, from the problems of a result."""
    return [line for line in problems if line.startswith(_title(name))]


class Drawn(NamedTuple):
    """A completion that arrived, in its JSON form.

    token_ids: None where they are not known, or no function takes them. texts: prompt, and prompt with completion, as
      text with special tokens; None: not known. known: what functions that judge each completion by itself have given
      it before, by name; they are not called.
    """

    completion: Any
    token_ids: list[int] | None
    finish_reason: str
    texts: tuple[str, str] | None = None
    known: Mapping[str, Result] = {}


@dataclasses.dataclass(frozen=True)
class BatchInputs:
    """A batch in its JSON form: prompts, columns and seeds of all samples, the moment of the run, and what has been
    drawn so far, by sample. is_trial: whether its rewards count for nothing, as in the checks of the start.
    """

    prompts: list[Any]
    columns: dict[str, list[Any]]
    seeds: Sequence[int] = ()
    moment: Moment = dataclasses.field(default_factory=Moment)
    drawn: dict[int, Drawn] = dataclasses.field(default_factory=dict)
    is_trial: bool = False


@dataclasses.dataclass
class Task:
    """One request to a worker: some samples of one function."""

    key: int  # position of the function in the specs
    title: str  # of the call, in messages
    mode: str  # batch | each | together, see rewards.worker
    samples: list[int]  # positions in the batch
    limit: float  # seconds the worker may take until its next reply
    request: dict[str, Any]
    answered: set[int] = dataclasses.field(default_factory=set)  # positions in `samples`

    def unanswered(self) -> list[int]:
        return [sample for position, sample in enumerate(self.samples) if position not in self.answered]


class Batch:
    """The state of one batch: open tasks, and results.

    A function that judges each completion by itself gets completions as they arrive. One that compares the completions
    of a group waits for the whole group, and one that takes the whole batch waits for the batch. No function is called
    with less.

    calls: how each function is called. keys: positions of the functions that are called at all. group_size: samples of
      a group, which are consecutive. on_error: raise: after a failure there are no more tasks. note: is told of each
      reward that a call for one completion gave: sample, name, result.

    Attributes:
      first_failure: see `RewardResult`.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        functions: Sequence[LoadedFunction],
        calls: Sequence[Calls],
        keys: Collection[int],
        inputs: BatchInputs,
        group_size: int,
        timeout: float,
        num_workers: int,
        share: Share | None = None,
        retries: int = 0,
        on_error: OnError = "none",
        note: Callable[[int, str, Result], None] | None = None,
    ):
        size = len(inputs.prompts)
        self._note = note
        self._calls, self.keys, self.group_size = calls, sorted(keys), group_size
        self._share = share
        self._size = size if share is None else sum(share.owns(sample, size) for sample in range(size))
        self._effort = [Effort() for _ in specs]
        self._specs, self._functions, self.inputs = specs, functions, inputs
        self._timeout, self._num_workers, self._retries = timeout, num_workers, retries
        self.on_error: OnError = on_error
        self.first_failure: FirstFailure | None = None
        self._rewards: list[list[float | None]] = [[None] * len(specs) for _ in range(size)]
        self._counts: list[dict[str, int]] = [dict.fromkeys(COUNTS, 0) for _ in specs]
        self._losses: list[list[_Loss]] = [[] for _ in specs]
        self._logged: list[dict[str, dict[str, Any]]] = [{} for _ in range(size)]
        self._sums: list[Sums] = [{} for _ in specs]
        self._logs_too_much: set[int] = set()
        self._at_home: list[collections.deque[Task]] = [collections.deque() for _ in range(num_workers)]
        self._anywhere: collections.deque[Task] = collections.deque()
        self._arrived: list[collections.deque[int]] = [collections.deque() for _ in functions]  # and in no task yet

    def again(self, calls: Sequence[Calls], keys: Collection[int]) -> "Batch":
        """The same batch without its completions, for other functions or other ways to call them."""
        inputs = dataclasses.replace(self.inputs, drawn={})
        of_run = self._timeout, self._num_workers, self._share, self._retries, self.on_error
        return Batch(self._specs, self._functions, calls, keys, inputs, self.group_size, *of_run)

    def add(self, drawn: Mapping[int, Drawn]) -> None:
        """Adds completions that arrived, by sample."""
        if not drawn:  # an empty batch is nothing to call a function with
            return
        inputs, size = self.inputs, len(self.inputs.prompts)
        inputs.drawn.update(drawn)
        own = [sample for sample in drawn if self._share is None or self._share.owns(sample, size)]
        for key in self.keys:
            if self._calls[key] == "elementwise":
                for sample in own:
                    known = drawn[sample].known.get(self._specs[key].name)
                    if known is None:
                        self._arrived[key].append(sample)
                    else:
                        self._count(key, sample, known)
            elif self._calls[key] == "needs_group":
                self._anywhere.extend(self._group_tasks(key, drawn))
            elif len(inputs.drawn) == size and (self._share is None or self._share.owns_function(key)):
                task = self._task(key, "batch", list(range(size)), "the call with the whole batch")
                self._at_home[key % self._num_workers].append(task)

    def _group_tasks(self, key: int, arrived: Collection[int]) -> list[Task]:
        """Calls for the groups that became complete with these samples."""
        known, size = self.inputs.drawn, self.group_size
        num_groups, tasks = len(self.inputs.prompts) // size, []
        for group in sorted({sample // size for sample in arrived}):
            members = list(range(group * size, (group + 1) * size))
            is_own = self._share is None or self._share.owns(group, num_groups)
            if is_own and all(sample in known for sample in members):
                mode = "batch" if self._functions[key].style == "batch" else self._mode(key)
                tasks.append(self._task(key, mode, members, f"the call with group {group}"))
        return tasks

    def _mode(self, key: int) -> str:
        """How a worker runs a function that is called for one completion at a time on several."""
        return "together" if self._functions[key].is_async else "each"

    def take(self, worker: int) -> Task | None:
        """The next task for a worker. Whole-batch calls first: they take longest and run nowhere else."""
        if self.first_failure is not None and self.on_error == "raise":
            return None
        for waiting in (self._at_home[worker], self._anywhere):
            if waiting:
                return waiting.popleft()
        for key, arrived in enumerate(self._arrived):
            if arrived:
                mode = self._mode(key)
                length = min(self._piece_length(mode, self._size), len(arrived))
                return self._task(key, mode, [arrived.popleft() for _ in range(length)])
        return None

    def record(self, task: Task, result: Result) -> None:
        """Records the result of one sample. BrokenWorker where the worker cannot have reached it yet, or has sent it
        already.
        """
        is_next = result.index == len(task.answered) or task.mode == "together"
        if result.index in task.answered or not is_next:
            raise BrokenWorker(f"a reward for sample {result.index} of its task out of turn")
        task.answered.add(result.index)
        sample = task.samples[result.index]
        self._count(task.key, sample, result, is_alone=task.mode != "batch")
        is_alone = task.mode != "batch" and self._calls[task.key] == "elementwise"
        if self._note is not None and is_alone and result.failure is None:
            self._note(sample, self._specs[task.key].name, result)

    def _count(self, key: int, sample: int, result: Result, is_alone: bool = True) -> None:
        """Takes the result of one sample. is_alone: it was called for by itself."""
        if is_alone:
            self._effort[key] += Effort.of_call(result.seconds, 1, result.retries)
        if result.failure is not None:
            self._lose(key, sample, result.failure, result.trace)
        elif result.value is None:
            self._counts[key]["none"] += 1
        self._rewards[sample][key] = result.value
        if result.logged:
            self._logged[sample][self._specs[key].name] = result.logged
        if not add_sums(self._sums[key], result.sums):
            self._logs_too_much.add(key)

    def finish(self, task: Task, done: Done) -> None:
        """Ends a task that the worker has finished, or whose one call failed. BrokenWorker where it cannot be
        finished.
        """
        failed = done.failure is not None and task.mode == "batch" and not task.answered
        if not failed and (done.failure is not None or task.unanswered()):
            raise BrokenWorker(
                f"the end of a task with {len(task.unanswered())} of {len(task.samples)} rewards missing"
            )
        if task.mode == "batch":
            self._effort[task.key] += Effort.of_call(done.seconds, len(task.samples), done.retries)
        if done.failure is not None:
            self._lose_call(task, done.failure, done.trace)

    def interrupted(self, task: Task, failure: Failure, seconds: float, trace: str = "") -> None:
        """The worker died or had to be killed in the middle of a task, `seconds` after its last reply. trace: what it
        left in the log.
        """
        left = task.unanswered()
        if not left:
            return
        if task.mode == "batch":
            self._effort[task.key] += Effort.of_call(seconds, len(task.samples))
            self._lose_call(task, failure, trace)
        elif task.mode == "each" or len(left) == 1:
            self._effort[task.key] += Effort.of_call(seconds, 1)
            self._lose(task.key, left[0], failure, trace)
            if left[1:]:
                self._anywhere.appendleft(self._task(task.key, "each", left[1:]))
        else:  # several were running, so each runs alone to show which one failed
            self._spread(task.key, left, "each")

    def lose_all(self, task: Task, failure: Failure, trace: str = "") -> None:
        """The worker lost the function, so the task's samples cannot be judged."""
        if task.mode == "batch":
            self._lose_call(task, failure, trace)
            return
        for sample in task.unanswered():
            self._lose(task.key, sample, failure, trace)

    def result(self) -> RewardResult:
        """The result, once no task is left."""
        names = [spec.name for spec in self._specs]
        problems = [
            line for name, found in zip(names, self._losses, strict=True) for line in _problem_lines(name, found)
        ]
        counts = dict(zip(names, self._counts, strict=True))
        failures = {name: _failures(found) for name, found in zip(names, self._losses, strict=True) if found}
        problems += [f"{_title(names[key])} {TOO_MANY}" for key in sorted(self._logs_too_much)]
        effort = {names[key]: self._effort[key] for key in self.keys}
        sums = {name: found for name, found in zip(names, self._sums, strict=True) if found}
        return RewardResult(self._rewards, counts, problems, effort, failures, self._logged, sums, self.first_failure)

    def _note_failure(self, key: int, sample: int, call: str, failure: Failure, trace: str) -> None:
        if self.first_failure is None:
            inputs, (kind, message) = self.inputs, failure
            asked = inputs.prompts[sample], inputs.drawn[sample].completion
            self.first_failure = FirstFailure(
                self._specs[key].name, sample, call, kind, message, *asked, trace, inputs.moment.step
            )

    def _lose_call(self, task: Task, failure: Failure, trace: str) -> None:
        """Fails all samples of one call. A call with fewer samples would give other rewards than were meant."""
        lost, (kind, message) = task.unanswered(), failure
        self._note_failure(task.key, lost[0], task.title, failure, trace)
        self._counts[task.key][kind] += len(lost)
        self._losses[task.key].append(_Loss(lost[0], task.title, kind, message, f"; {len(lost)} not judged"))

    def _spread(self, key: int, samples: list[int], mode: str) -> None:
        length = self._piece_length(mode, len(samples))
        for start in range(0, len(samples), length):
            self._anywhere.append(self._task(key, mode, samples[start : start + length]))

    def _piece_length(self, mode: str, num_samples: int) -> int:
        # Awaiting many at once is the point of an async function, so its pieces are as large as they can be.
        return -(-num_samples // (self._num_workers * (1 if mode == "together" else _PIECES_PER_WORKER)))

    def _task(self, key: int, mode: str, samples: list[int], title: str = "") -> Task:
        inputs, function = self.inputs, self._functions[key]
        drawn = [inputs.drawn[sample] for sample in samples]
        has_ids = function.takes_completion_ids and all(one.token_ids is not None for one in drawn)
        request = {
            "op": "run",
            "key": key,
            "mode": mode,
            "limit": self._timeout,
            "retries": self._retries,
            "traces": self.on_error == "raise",
            "prompts": [inputs.prompts[sample] for sample in samples],
            "completions": [one.completion for one in drawn],
            "columns": {name: [inputs.columns[name][sample] for sample in samples] for name in function.columns},
            "completion_ids": [one.token_ids for one in drawn] if has_ids else None,
            "finish_reasons": [one.finish_reason for one in drawn],
            "seeds": [inputs.seeds[sample] for sample in samples],
            "moment": dataclasses.asdict(inputs.moment),
            "texts": [one.texts for one in drawn] if function.style == "openrlhf" else None,
            "groups": self._groups(samples) if function.takes_group else None,
            "is_trial": inputs.is_trial,
        }
        limits = {
            "batch": self._timeout * len(samples),
            "each": self._timeout,
            "together": self._timeout + _GRACE_SECONDS,
        }
        return Task(key, title, mode, samples, limits[mode], request)

    def _groups(self, samples: Sequence[int]) -> dict[str, Any]:
        """The completions of each group that samples are from, and the place of each sample's group among these."""
        size, drawn = self.group_size, self.inputs.drawn
        groups = list(dict.fromkeys(sample // size for sample in samples))
        members = [[drawn[group * size + place].completion for place in range(size)] for group in groups]
        return {"members": members, "group_of": [groups.index(sample // size) for sample in samples]}

    def _lose(self, key: int, sample: int, failure: Failure, trace: str) -> None:
        kind, message = failure
        self._note_failure(key, sample, f"sample {sample} of its batch", failure, trace)
        self._counts[key][kind] += 1
        self._losses[key].append(_Loss(sample, f"sample {sample}", kind, message))


class _Loss(NamedTuple):
    """A call that failed: its first sample, what it is called, how it failed, and what that cost."""

    sample: int
    call: str
    kind: str
    message: str
    cost: str = ""

    @property
    def sort(self) -> str:
        """See `sort_of`."""
        return sort_of(self.kind, self.message)


def sort_of(kind: str, message: str) -> str:
    """Kind of a failure, type of the error and place in the code: what is alike in messages that quote other values."""
    return f"{kind}: {message.partition(':')[0]} ({message.rpartition('(')[2]}"


def _problem_lines(name: str, losses: Sequence[_Loss]) -> list[str]:
    """The first of each of the first few sorts of failures of a function, by sample, and how many more there are."""
    sorts: dict[str, list[_Loss]] = {}
    for loss in sorted(losses):
        sorts.setdefault(loss.sort, []).append(loss)
    shown = [*sorts.values()][:_PROBLEMS_PER_FUNCTION]
    lines = []
    for first, *alike in shown:
        more = f"; {len(alike)} more like it" if alike else ""
        lines.append(f"{_title(name)} {first.call}: {first.kind}: {first.message}{first.cost}{more}")
    more = len(losses) - sum(map(len, shown))
    return lines + ([f"{_title(name)}: {more} more"] if more else [])


def failure_lines(name: str, failed: Sequence[tuple[int, Failure]]) -> tuple[list[str], dict[str, str]]:
    """The problems and the sorts of failures of a function, as in a `RewardResult`. `failed`: samples with failures."""
    losses = [_Loss(sample, f"sample {sample}", kind, message) for sample, (kind, message) in failed]
    return _problem_lines(name, losses), _failures(losses)


def _failures(losses: Sequence[_Loss]) -> dict[str, str]:
    """The last message of each sort; of the first few sorts."""
    messages = {loss.sort: f"{loss.kind}: {loss.message}" for loss in sorted(losses)}
    return dict([*messages.items()][:_MOST_SORTS])


def _title(name: str) -> str:
    return f"reward {name!r}"
