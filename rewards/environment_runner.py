"""Play episodes of environments in worker processes, so that nothing they do can stop or poison a training step.

In: data rows, seeds and the policy's turns, as text. Out: prompts, observations, rewards and what went wrong, as
replies. Not here: how turns become tokens, and when an episode ends for its length (`rl`); what an environment may look
like (`rewards.environment`).

Every request gets one reply, through `poll`, and nothing else waits. A worker runs calls of plain functions one after
another, in the order in which they were asked, and async ones at the same time. An environment that raises, hangs, dies
or gives what it must not costs its own episode. The others in a worker that had to be killed are played again in a
fresh one, with the same row, seed and turns, and go on if what they answered is the same.

POSIX only (process groups, selectable pipes). Not thread-safe.
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from rewards.batch import sort_of
from rewards.contract import RewardSpec
from rewards.environment import Message, TurnTokens
from rewards.environment_replies import (
    LABEL,
    TOOLS_LABEL,
    TOOLS_NAME,
    Done,
    LoadedEnvironment,
    asked_digest,
    nonce_of,
    read_done,
    read_loaded,
)
from rewards.environment_rewards import EpisodeFacts
from rewards.log import RewardLog, Tracebacks
from rewards.protocol import encode, pack
from rewards.replies import BrokenWorker, Failure, Refused
from rewards.supervised import SupervisedProcess, import_path, poll
from rewards.tool_calls import FORMATS
from rewards.worker_variables import check_memory_gb, worker_environment

Op = Literal["begin", "step", "finish"]

_LOAD_TRIES = 3  # a worker that dies during an import may succeed the next time
_IDLE_DEATHS = 3  # of its worker, after which an episode is given up that was asked nothing
_CLOSE_SECONDS = 3.0  # for exit handlers of user code
_GRACE_SECONDS = 1.0  # for a worker to say itself that an async call took too long


@dataclasses.dataclass(frozen=True)
class EnvironmentReply:
    """The answer to one request.

    prompt: of a step that begins again what the policy reads next in place of all that was said; else None.
    sequence: the number of the sequence that the messages of a step follow; None: the same as that of the turn.
    tools: of an agent that begins, or begins again, the JSON schemas that the policy is shown; else None.
    messages: of a begin the prompt, messages or the text of a text prompt; of a step the observations. action: the
      turn as the environment understood it, a message of the assistant with `tool_calls`; None where there is none.
    reward: of the turn, or of the whole episode when it is finished. done: whether the environment says that the
      episode is over. metrics: numbers by name.
    failure: (kind, one line of text), see `rewards.environment_replies.FAILURES`. The episode is over then; to finish
      it is allowed, and gives the same failure.
    num_tool_calls: in the turn. num_bad_tool_calls: those that were answered with an error. seconds: of the call.
    judged: of an end, what each reward function that asks for environments gave: a number, None, or a failure.
    """

    episode: int
    op: Op
    messages: str | list[Message] = dataclasses.field(default_factory=list)
    action: Message | None = None
    reward: float | None = None
    done: bool = False
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    failure: Failure | None = None
    num_tool_calls: int = 0
    num_bad_tool_calls: int = 0
    seconds: float = 0.0
    judged: dict[str, float | Failure | None] = dataclasses.field(default_factory=dict)
    prompt: str | list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    sequence: int | None = None


def reply_of(fields: Mapping[str, Any]) -> EnvironmentReply:
    """The reply whose `dataclasses.asdict` these are, after they have been JSON."""

    def failure(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    judged = {name: failure(value) for name, value in fields["judged"].items()}
    return EnvironmentReply(**{**fields, "failure": failure(fields["failure"]), "judged": judged})


@dataclasses.dataclass
class _Call:
    """A request about an episode, and digests of its answer once it was answered: of all of it, and of what the policy
    reads next. An agent that makes several calls at a time is told the second, so that they come in the same order when
    it plays again.
    """

    op: Op
    fields: dict[str, Any]
    answer: bytes | None = None
    expects: str | None = None


@dataclasses.dataclass(eq=False)
class _Episode:
    """An episode: its calls so far, and how many of them its present worker process has answered."""

    number: int
    is_async: bool
    calls: list[_Call]
    worker: "_Worker | None" = None
    place: int = 0
    seconds: float = 0.0  # that its environment took, calls that were made again apart
    is_suspect: bool = False  # it, or another one, ended its worker; it is played alone until it answers
    num_idle_deaths: int = 0
    failure: Failure | None = None  # found before it was asked again
    judge_failure: Failure | None = None  # of reward functions, which ended its worker

    @property
    def next_call(self) -> _Call | None:
        """What is to be asked next."""
        return self.calls[self.place] if self.place < len(self.calls) else None


@dataclasses.dataclass
class _Running:
    """A request that was sent. limit: its seconds."""

    episode: _Episode
    call: _Call
    sent: float
    limit: float


class _Worker(SupervisedProcess):
    """One worker process, its episodes, and what it is asked."""

    def __init__(self, log: int | None, environment: Mapping[str, str], memory_gb: float | None, max_episodes: int):
        self.episodes: dict[int, _Episode] = {}
        self.num_failed_loads = 0
        self._max_episodes = max_episodes
        super().__init__("rewards.environment_worker", log, environment, memory_gb, "rollout")

    def _start(self) -> None:
        super()._start()
        self.is_loaded = False
        self.loading: str | None = None  # the nonce
        self.running: dict[str, _Running] = {}
        self.waiting: collections.deque[_Episode] = collections.deque()
        self.heard = 0.0  # when it last answered
        self.is_ordered = True  # whether calls of plain functions were answered in the order in which they were asked

    def load(self, request: Mapping[str, Any], timeout: float) -> None:
        """Ask for the environments."""
        self.loading = secrets.token_hex(8)
        self._send({**request, "nonce": self.loading})
        self.deadline = time.monotonic() + timeout

    def send_next(self, step_timeout: float, episode_timeout: float) -> None:
        """Ask what waits, as far as it may run beside what runs."""
        # A thread or timer of user code may have ended it while it was idle: no episode is to blame.
        if self.waiting and not self.running and self.has_ended():
            return
        while self.is_loaded and self.waiting:
            episode = self.waiting[0]
            if not self._may_run(episode):
                break
            self.waiting.popleft()
            call = episode.next_call
            assert call is not None, episode
            is_limited = call.op == "step" and call.answer is None
            limit = min(step_timeout, episode_timeout - episode.seconds) if is_limited else step_timeout
            running = _Running(episode, call, time.monotonic(), limit)
            # A reply names its request, so a late reply by a thread of user code does not count for the next one.
            nonce = secrets.token_hex(8)
            self.running[nonce] = running
            about = {"op": call.op, "episode": episode.number, "limit": running.limit, "nonce": nonce}
            self._send({**call.fields, **about, "expects": call.expects})

    def _may_run(self, episode: _Episode) -> bool:
        """Whether an episode may be asked beside those that are. One that may have ended its worker is asked alone."""
        for running in self.running.values():
            other = running.episode
            return not (episode.is_suspect or other.is_suspect) and episode.is_async == other.is_async
        return True

    def asked(self) -> list[_Episode]:
        """The episodes of which one has ended its worker, should that have ended now: of calls that run one after
        another it is the first.
        """
        episodes = [running.episode for running in self.running.values()]
        return episodes if not self.is_ordered or any(episode.is_async for episode in episodes) else episodes[:1]

    def due(self) -> float:
        """When a call must have been answered. A worker says itself that an async one took too long, so it is late only
        if the worker answers nothing, or if it would be late even had each of the others taken all of its time.
        """
        deadlines = [math.inf]
        for running in self.running.values():
            begun = max(running.sent, self.heard)
            if not running.episode.is_async:  # the next ones have not begun
                return begun + running.limit
            limit = running.limit + _GRACE_SECONDS
            deadlines.append(min(begun + limit, running.sent + limit * self._max_episodes))
        return min(deadlines)

    def drop(self, number: int) -> None:
        """Have the worker forget an episode, where it still holds it."""
        if self.is_loaded:
            self._send({"op": "drop", "episode": number})

    def _send(self, message: Mapping[str, Any]) -> None:
        self.send(pack(message))
        self.flush()


class EnvironmentRunner:
    """Worker processes with the environments of a run loaded; close it, or use it as a context manager.

    environments: `file.py:Class` by name, see `rewards.environment_kinds` for the forms. Of several the row's column
      `environment` chooses one.
    tools: `file.py:function`, which the policy may call. Without environments an episode is over when a turn calls
      none. A turn that calls tools is answered by them, and its environment does not see it.
    num_workers: processes, >= 1.
    step_timeout_seconds: hard limit of one call. episode_timeout_seconds: of all calls of an episode together.
    max_episodes_per_worker: how many episodes a worker holds; further ones begin when others have finished.
    memory_gb, env, log_path: as in `rewards.runner.RewardRunner`.
    tool_format: of `rewards.tool_calls.FORMATS`; "auto" where there are no tools.
    start_timeout_seconds: limit for importing the environments.
    rewards: reward functions that ask for the instances, and judge each episode at its end. columns: of the data.

    Attributes: tools, the JSON schemas of all tools; tools_of, those of each environment by its name.

    Raises ValueError where an argument is invalid, and where an environment or a tool does not import or has no schema.
    """

    def __init__(
        self,
        environments: Mapping[str, str],
        tools: Sequence[str],
        *,
        num_workers: int,
        step_timeout_seconds: float,
        episode_timeout_seconds: float,
        max_episodes_per_worker: int,
        memory_gb: float | None = None,
        env: Sequence[str] = (),
        log_path: str | os.PathLike[str] | None = None,
        tool_format: str = "auto",
        start_timeout_seconds: float = 120.0,
        rewards: Sequence[RewardSpec] = (),
        columns: Sequence[str] = (),
    ):
        if not environments and not tools:
            raise ValueError(f"a rollout with turns needs {LABEL} or {TOOLS_LABEL}, got neither")
        for name, number in (("num_workers", num_workers), ("episodes_per_worker", max_episodes_per_worker)):
            if number < 1:
                raise ValueError(f"rollout.{name} must be >= 1, got {number}")
        limits = {"step_timeout_seconds": step_timeout_seconds, "episode_timeout_seconds": episode_timeout_seconds}
        for name, seconds in limits.items():
            if not 0 < seconds < math.inf:
                raise ValueError(f"rollout.{name} must be > 0 and finite, got {seconds}")
        if tool_format not in (*FORMATS, "auto"):
            raise ValueError(f"rollout.tool_format must be auto or one of {', '.join(FORMATS)}, got {tool_format!r}")
        check_memory_gb(memory_gb, "rollout")
        variables = worker_environment(env, os.environ)  # a run passes the same names to workers of both kinds
        self._step_timeout, self._episode_timeout = step_timeout_seconds, episode_timeout_seconds
        self._start_timeout, self._max_episodes = start_timeout_seconds, max_episodes_per_worker
        self._request = {
            "op": "load",
            "environments": dict(environments),
            "tools": list(tools),
            "format": None if tool_format == "auto" else tool_format,
            "path": import_path(),
            "rewards": [dataclasses.asdict(spec) for spec in rewards],
            "columns": list(columns),
        }
        self._judges = [spec.name for spec in rewards]
        self._names = [*environments] or [TOOLS_NAME]
        self._episodes: dict[int, _Episode] = {}  # those that are not over
        self._failed: dict[int, Failure] = {}  # episodes that were told to have failed, and are not finished
        self._full: collections.deque[_Episode] = collections.deque()  # no worker has room for them
        self._ready: list[EnvironmentReply] = []
        self._log = None if log_path is None else RewardLog(log_path)
        self._tracebacks = Tracebacks(self._log)
        log = None if self._log is None else self._log.descriptor
        self._workers = [_Worker(log, variables, memory_gb, max_episodes_per_worker) for _ in range(num_workers)]
        try:
            self._kinds = self._load()
            self.tools_of = {name: kind.schemas for name, kind in self._kinds.items()}
            schemas = {json.dumps(schema, sort_keys=True): schema for of in self.tools_of.values() for schema in of}
            self.tools = [*schemas.values()]
            if self.tools and tool_format == "auto":
                rule = f"must be one of {', '.join(FORMATS)} where there are tools, got 'auto'"
                raise ValueError(f"rollout.tool_format {rule}; the chat template shows none that is known")
        except BaseException:  # no worker may outlive a failed start, Ctrl-C included
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def forms(self) -> dict[str, str]:
        """The form of each environment, see `rewards.environment_kinds`."""
        return {name: kind.form for name, kind in self._kinds.items()}

    def environment_of(self, row: Mapping[str, Any]) -> str:
        """The name of the environment that plays a row. Raises ValueError where there are several and the row names
        none of them.
        """
        if len(self._names) == 1:
            return self._names[0]
        name = row.get("environment")
        if name not in self._names:
            raise ValueError(
                f"a row's column 'environment' must name one of {LABEL} ({', '.join(self._names)}), got {name!r}"
            )
        return name

    def check(self, row: Mapping[str, Any]) -> tuple[str, Any]:
        """The name of the environment that plays a row, and the row as it is sent. Raises ValueError as `begin`."""
        return self.environment_of(row), encode(dict(row), "a row of the data")

    def begin(self, episode: int, row: Mapping[str, Any], seed: int, expects: str | None = None) -> None:
        """Opens an episode; the reply holds its prompt, and comes when a worker has room for it. episode: a number that
        no other running episode has. row: the data row. seed: of all that is random in it, in [0, 2**63). expects: the
        digest of what it asked when it was played before (`asked_digest`), where it was.

        Raises ValueError for a row whose environment is not known, or with a value that cannot be sent.
        """
        assert episode not in self._episodes, f"episode {episode} is running"
        self._failed.pop(episode, None)
        name, encoded = self.check(row)
        fields = {"environment": name, "row": encoded, "seed": int(seed)}
        begun = _Episode(episode, self._kinds[name].is_async, [_Call("begin", fields, expects=expects)])
        self._episodes[episode] = begun
        self._place(begun)

    def step(self, episode: int, text: str, tokens: TurnTokens | None = None, expects: str | None = None) -> None:
        """Hands a turn to an episode: the text that the policy drew, with special tokens, without its end marker.
        tokens: what it took, for agents; None: they are not told. expects: as in `begin`.
        """
        fields = {"text": text, "tokens": None if tokens is None else dataclasses.astuple(tokens)}
        self._ask(episode, _Call("step", fields, expects=expects))

    def finish(self, episode: int, reason: str, facts: EpisodeFacts | None = None) -> None:
        """Ends an episode; the reply holds the reward of the whole of it, where its environment gives one. reason: why
        it ends, which a `close(reason)` of it is told. facts: for reward functions; None: none is called.
        """
        if episode in self._failed:
            self._ready.append(EnvironmentReply(episode, "finish", failure=self._failed.pop(episode)))
            return
        told = None if facts is None or not self._judges else encode(dataclasses.asdict(facts), "an episode")
        self._ask(episode, _Call("finish", {"reason": reason, "facts": told}))

    def poll(self, timeout: float) -> list[EnvironmentReply]:
        """Waits until there is a reply or the time is over, in seconds. Returns at once where nothing is asked."""
        deadline = time.monotonic() + timeout
        while True:
            for worker in self._workers:
                self._advance(worker)
            busy = [worker for worker in self._workers if worker.running or worker.waiting]
            left = deadline - time.monotonic()
            if self._ready or left <= 0 or not busy:
                ready, self._ready = self._ready, []
                return ready
            for worker in busy:
                if worker.is_loaded:
                    worker.deadline = worker.due()
            poll(busy, left)

    def drop_all(self) -> None:
        """Forgets all episodes. Workers that are busy with some are replaced."""
        self._episodes, self._failed, self._ready = {}, {}, []
        self._full.clear()
        for worker in self._workers:
            held, worker.episodes = worker.episodes, {}
            if worker.running or worker.waiting:
                worker.restart()
                self._begin_load(worker)
                continue
            for number in held:
                worker.drop(number)

    def close(self) -> None:
        """End the workers; exit handlers of user code get a few seconds. Closing twice does nothing."""
        for worker in self._workers:
            worker.hang_up()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for worker in self._workers:
            worker.end(deadline, is_idle=not worker.running and worker.loading is None)
        if self._log is not None:
            self._log.close()

    def _load(self) -> dict[str, LoadedEnvironment]:
        """Load the environments in every worker. The first one also reads the schemas of tools, which takes time."""
        for worker in self._workers:
            self._begin_load(worker, wants_schemas=worker is self._workers[0])
        found: dict[str, LoadedEnvironment] = {}
        while loading := [worker for worker in self._workers if worker.loading is not None]:
            poll(loading)
            for worker in loading:
                is_first = worker is self._workers[0]
                told, failure = self._listen_to_load(worker)
                if isinstance(told, Refused):
                    raise ValueError(told.error)
                if told is not None and is_first:
                    found = told
                if failure is None:
                    continue
                worker.num_failed_loads += 1
                if failure[0] == "timeout" or worker.num_failed_loads == _LOAD_TRIES:
                    what = ", ".join([*self._request["environments"].values(), *self._request["tools"]])
                    times = f" {worker.num_failed_loads} times" if worker.num_failed_loads > 1 else ""
                    raise ValueError(f"{LABEL}: importing {what} failed{times}: {failure[1]}")
                worker.restart()
                self._begin_load(worker, wants_schemas=is_first)
        return found

    def _begin_load(self, worker: _Worker, *, wants_schemas: bool = False) -> None:
        worker.load({**self._request, "wants_schemas": wants_schemas}, self._start_timeout)

    def _listen_to_load(self, worker: _Worker) -> tuple[dict[str, LoadedEnvironment] | Refused | None, Failure | None]:
        """(what a worker told of its environments, or None; why it will tell nothing)."""
        death = worker.death()  # asked before reading, so that all replies of a dead worker have arrived
        try:
            for frame in worker.frames():
                nonce, fields = nonce_of(frame)
                if nonce != worker.loading:
                    raise BrokenWorker("a reply to something else than it was asked")
                told = read_loaded(fields, self._names)
                worker.loading, worker.is_loaded = None, not isinstance(told, Refused)
                worker.heard = time.monotonic()
                worker.num_failed_loads = 0
                return told, None
        except BrokenWorker as error:
            return None, ("died", f"the worker process sent {error}; it was killed")
        if death is None and time.monotonic() > worker.deadline:
            return None, ("timeout", f"no answer within {self._start_timeout:g} s")
        return None, death

    def _place(self, episode: _Episode) -> None:
        """Gives an episode to the worker that holds the fewest, if it has room."""
        worker = min(self._workers, key=lambda worker: len(worker.episodes))
        if len(worker.episodes) >= self._max_episodes:
            self._full.append(episode)
            return
        episode.worker = worker
        worker.episodes[episode.number] = episode
        self._queue(episode)

    def _ask(self, number: int, call: _Call) -> None:
        episode = self._episodes[number]
        assert episode.calls[-1].answer is not None, f"episode {number} is asked before it has answered"
        episode.calls.append(call)
        if episode.failure is not None:
            self._fail(episode, episode.failure)
        elif call.op == "step" and episode.seconds >= self._episode_timeout:
            limit = f"more than rollout.episode_timeout_seconds ({self._episode_timeout:g}) allows"
            self._fail(episode, ("timeout", f"its calls took {episode.seconds:.3g} s together, {limit}"))
        elif episode.next_call is call:  # otherwise it is being played again, and will come to it
            self._queue(episode)

    def _queue(self, episode: _Episode) -> None:
        worker = episode.worker
        assert worker is not None, episode
        worker.waiting.append(episode)
        worker.send_next(self._step_timeout, self._episode_timeout)

    def _advance(self, worker: _Worker) -> None:
        """Read the replies of a worker, notice when there will be no more, and ask what waits."""
        if worker.loading is not None:
            told, failure = self._listen_to_load(worker)
            if isinstance(told, Refused):  # the file changed since the start
                failure = "exception", f"while importing: {told.error}"
                worker.num_failed_loads = _LOAD_TRIES
            if failure is not None:
                self._failed_load(worker, failure)
        else:
            self._listen(worker)
        worker.send_next(self._step_timeout, self._episode_timeout)

    def _failed_load(self, worker: _Worker, failure: Failure) -> None:
        """Loads again, unless that failed too often: then the worker's episodes have failed."""
        worker.num_failed_loads += 1
        if worker.num_failed_loads >= _LOAD_TRIES:
            worker.num_failed_loads = 0
            for episode in [*worker.episodes.values()]:
                self._fail(episode, failure)
        waiting = [*worker.waiting]
        worker.restart()
        worker.waiting.extend(episode for episode in waiting if episode.number in worker.episodes)
        self._begin_load(worker)

    def _listen(self, worker: _Worker) -> None:
        death = worker.death()  # asked before reading, so that all replies of a dead worker have arrived
        has_spoken = False
        try:
            for frame in worker.frames():
                nonce, fields = nonce_of(frame)
                running = worker.running.get(nonce)
                if running is None:
                    raise BrokenWorker("a reply to something else than it was asked")
                done, traces = read_done(fields, running.call.op)
                for failure, trace in traces:
                    self._tracebacks.tell(sort_of(*failure), trace)
                if not running.episode.is_async and nonce != next(iter(worker.running)):
                    worker.is_ordered = False
                del worker.running[nonce]
                self._take(running, done)
                worker.heard, has_spoken = time.monotonic(), True
        except BrokenWorker as error:
            self._lost(worker, ("died", f"the worker process sent {error}; it was killed"))
            return
        if has_spoken:
            return
        if death is not None:
            self._lost(worker, death)
        elif time.monotonic() > worker.due():
            limit = next(iter(worker.running.values())).limit
            why = f"no answer within {limit:g} s; the worker process was killed, its stack is in the log"
            self._lost(worker, ("timeout", why))

    def _take(self, running: _Running, done: Done) -> None:
        """What a request came to, the first time or when it was made again."""
        episode, call = running.episode, running.call
        if done.failure is not None:
            told = done.failure
            if call.answer is not None:
                told = "replay", f"it failed when it was played again in a fresh worker: {told[0]}: {told[1]}"
            self._fail(episode, told, done.seconds)
            return
        digest, is_new = _digest(done), call.answer is None
        if not is_new and digest != call.answer:
            why = "it answered something else when it was played again in a fresh worker, with the same seed and turns"
            self._fail(episode, ("replay", why))
            return
        call.answer, call.expects, episode.place = digest, asked_digest(done), episode.place + 1
        if is_new:
            episode.seconds, episode.is_suspect, episode.num_idle_deaths = episode.seconds + done.seconds, False, 0
            told = {field.name: getattr(done, field.name) for field in dataclasses.fields(Done)}
            if episode.judge_failure is not None:
                told["judged"] = dict.fromkeys(self._judges, episode.judge_failure)
            self._ready.append(EnvironmentReply(episode.number, call.op, **told))
            if call.op == "finish":
                self._remove(episode)
        if episode.next_call is not None:
            self._queue(episode)

    def _fail(self, episode: _Episode, failure: Failure, seconds: float = 0.0) -> None:
        """Ends an episode. It is told when it is asked, which may be later."""
        call = episode.calls[-1]
        if episode.worker is not None:
            episode.worker.drop(episode.number)
        if call.answer is not None:
            episode.failure = failure
            if episode.worker is not None:
                episode.worker.episodes.pop(episode.number, None)
                self._fill()
            return
        self._remove(episode)
        if call.op != "finish":
            self._failed[episode.number] = failure
        self._ready.append(EnvironmentReply(episode.number, call.op, failure=failure, seconds=seconds))

    def _remove(self, episode: _Episode) -> None:
        del self._episodes[episode.number]
        if episode.worker is not None:
            episode.worker.episodes.pop(episode.number, None)
            self._fill()

    def _fill(self) -> None:
        """Lets episodes begin that no worker had room for."""
        while self._full and any(len(worker.episodes) < self._max_episodes for worker in self._workers):
            self._place(self._full.popleft())

    def _lost(self, worker: _Worker, failure: Failure) -> None:
        """Replaces a worker that died or had to be killed. The episode that it was asked about has failed. Where it
        could be one of several, each is asked alone in the fresh worker. All others are played again.
        """
        suspects = worker.asked()
        seconds = max((time.monotonic() - max(one.sent, worker.heard) for one in worker.running.values()), default=0.0)
        worker.restart()
        self._begin_load(worker)
        guilty = suspects if len(suspects) == 1 else []
        if guilty and (call := guilty[0].calls[-1]).fields.get("facts") is not None and guilty[0].next_call is call:
            # A reward function is guilty, or the environment in its end, which is asked again without the function.
            call.fields["facts"], guilty[0].judge_failure, guilty = None, failure, []
        others = [episode for episode in worker.episodes.values() if episode not in guilty]
        for episode in guilty:
            self._fail(episode, failure, seconds)
        for episode in others:
            episode.place, episode.is_suspect = 0, episode.is_suspect or episode in suspects
            episode.num_idle_deaths += not suspects
            if episode.num_idle_deaths > _IDLE_DEATHS:
                self._fail(episode, failure)
            elif episode.next_call is not None:
                self._queue(episode)


def _digest(done: Done) -> bytes:
    """What a call that is made again must answer."""
    told = [done.messages, done.prompt, done.tools, done.sequence, done.action, done.reward, done.done]
    text = json.dumps(told, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
