"""One thread that owns the weights and an open session of the sampler, and draws what others ask for.

In: jobs, each one completion of one prompt, from any thread. Out: news about them, what was drawn so far and how each
ended, given to the function that a job names. Also log-probs of prompts. Not here: text, HTTP (`rl.serving.app`),
drawing itself (`rl.sampler.slot_session`).

A job waits here until a slot is free. One whose time is over, or that nobody wants any more, frees its slot at the next
look of the host. A job that ended may stay parked with its keys and values. A later prompt that begins with its prompt
and what it drew goes on from there, so that only what follows is read. Parked jobs are forgotten oldest first, when
their place is needed. What is left of a forgotten job is a count.
"""

import collections
import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rl.sampler.contract import Completion, Request, check_requests
from rl.sampler.slot_rules import DrawRules, SlotSampling
from rl.sampler.slot_session import SlotSession

LARGEST_INDEX = 2**31 - 1
IDLE_SECONDS = 1.0  # between two looks at time limits where nothing is drawn


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """How much an engine takes in and holds.

    max_prompt_tokens, max_tokens: of a prompt, and of a completion.
    num_slots: jobs that are drawn at a time. num_parked: jobs that ended, whose keys and values are kept.
    max_row_tokens: tokens behind the first prompt of a parked conversation: what was drawn and what is read in all its
      calls. At least max_tokens.
    max_waiting: jobs that wait for a slot.
    chunk: tokens of each job that are decoded between two looks of the host, and told at a time.
    """

    max_prompt_tokens: int
    max_tokens: int
    num_slots: int
    num_parked: int
    max_row_tokens: int
    max_waiting: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Tokens as they are drawn, with the log-probs of `rl.sampler.contract.Completion`."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job ended, with all that it drew. num_reused: tokens of its prompt whose keys and values were there."""

    completion: Completion
    num_reused: int


@dataclasses.dataclass(frozen=True)
class PromptScore:
    """Log-probs of a prompt's tokens from the second on, [T - 1], and the most likely ones, [T - 1, N], best first."""

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Failed:
    """Why there is no result. kind: "timeout", "closed" or "fault"."""

    kind: str
    message: str


News = Drawn | Ended | PromptScore | Failed
Tell = Callable[[list[tuple["Job", News]]], None]


@dataclasses.dataclass(eq=False)
class Job:
    """One completion that somebody wants, or the log-probs of a prompt.

    Attributes:
      prompt_ids: the whole prompt. limit: the most tokens to draw; 0: none, the prompt's log-probs are wanted.
      rules: how they are drawn; with limit 0 only the temperature is read.
      tell: called in the engine's thread with all news of a look that go to this function; it must return at once.
      seed, sample_index: with a seed they are all the randomness; None: the engine's own, by arrival.
      streams: whether tokens are told as they are drawn.
      deadline: on the clock of `time.monotonic`; None: no limit.
      num_top: of a prompt's log-probs, the N most likely tokens that are told.
    """

    prompt_ids: Sequence[int]
    limit: int
    rules: DrawRules
    tell: Tell
    seed: int | None = None
    sample_index: int = 0
    streams: bool = False
    deadline: float | None = None
    num_top: int = 0
    num_told: int = 0
    number: int | None = None
    num_reused: int = 0
    is_over: bool = False


@dataclasses.dataclass
class EngineCounts:
    """What happened so far, and how things are. One thread writes, others read single numbers."""

    num_jobs: int = 0
    num_ended: int = 0
    num_cancelled: int = 0
    num_timeouts: int = 0
    num_prompt_tokens: int = 0
    num_reused_tokens: int = 0
    num_drawn_tokens: int = 0
    num_scored_tokens: int = 0
    num_going_on: int = 0
    num_forgotten: int = 0
    num_drawing: int = 0
    num_waiting: int = 0
    num_parked: int = 0


class Closed(Exception):
    """The engine takes no more jobs, or is not running. The message says why."""


class Full(Exception):
    """As many jobs wait as may."""


@dataclasses.dataclass(frozen=True)
class _Parked:
    """A job that ended. ids: its prompt and what it drew. num_first: those in the table of prompts."""

    ids: np.ndarray
    num_first: int


class Engine:
    """Draws jobs with the weights that `load` was given.

    Args:
      sampler: `rl.sampler.slot_sampler.Sampler`, whose text for stop strings should show special tokens.
      sampling: what is the same for all jobs: EOS ids, biases, forbidden ids, the number of most likely tokens that are
        told. Its rules are not read.
      logprob_chunk: see `PromptScorer.logprobs`.

    Raises:
      ValueError: the session does not fit the memory.
    """

    def __init__(self, sampler: Any, sampling: Any, limits: EngineLimits, logprob_chunk: int | None = None) -> None:
        assert limits.max_row_tokens >= limits.max_tokens, limits
        self.limits, self.counts = limits, EngineCounts()
        self.sampling = SlotSampling.of(dataclasses.replace(sampling, max_completion_length=limits.max_tokens))
        self._sampler, self._logprob_chunk = sampler, logprob_chunk
        self._sizes = limits.num_slots, limits.num_parked, limits.max_row_tokens, limits.chunk
        sampler.expect_length(limits.max_prompt_tokens)
        sampler.check_endless(*self._sizes[:3])
        self._changed = threading.Condition()
        self._arrived: collections.deque[Job] = collections.deque()  # guarded by _changed
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()  # guarded by _changed
        self._num_open = 0  # jobs that are not over; guarded by _changed
        self._is_closing, self._closed_because = False, ""  # guarded by _changed
        self._has_stopped = False
        self.failure: str | None = None  # why the thread ended without being asked to
        self._session: SlotSession | None = None
        self._params: Any = None
        self._waiting: collections.deque[Job] = collections.deque()
        self._scores: list[Job] = []
        self._drawing: dict[int, Job] = {}
        self._parked: dict[int, _Parked] = {}  # by number in the session, oldest first
        self._next_index = 0
        self._news: dict[Tell, list[tuple[Job, News]]] = {}
        self._thread = threading.Thread(target=self._run, name="serving", daemon=True)

    # From any thread

    def warm_up(self, params: Any) -> None:
        """Compiles what drawing needs, and returns when it is there."""
        self._sampler.warm_up_endless(params, self.sampling, *self._sizes)
        self._sampler.engine.programs.wait()

    def start(self, params: Any, seed: int | None = None) -> None:
        """Starts the thread. seed: of jobs without one; None: another at each start."""
        self.load(params, seed)
        self._thread.start()

    def load(self, params: Any, seed: int | None = None) -> None:
        """Other weights, from the next look of the host on. What is parked is forgotten.

        params: None: no weights are held, and jobs fail until there are some again. Jobs that are being drawn fail.
        """
        self._put(lambda: self._load(params, seed))

    def check(self, prompt_ids: Sequence[int], limit: int, rules: DrawRules, seed: int | None, sample: int = 0) -> None:
        """ValueError for a job that cannot be drawn. `requests[0]` in its message is the job."""
        request = Request(0, 0, sample, limit, seed, rules=rules)
        engine = self._sampler.engine
        check_requests(engine.policy.config, lambda ids: "", [prompt_ids], [request], self.sampling)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes jobs in, all or none.

        Raises:
          Closed: the engine is closing. Full: too many jobs wait.
        """
        with self._changed:
            if self._is_closing:
                raise Closed(self._closed_because)
            # Jobs that find a free slot at once do not wait.
            if self._num_open + len(jobs) > self.limits.num_slots + self.limits.max_waiting:
                raise Full(
                    f"{self._num_open} requests are drawn or wait, and at most {self.limits.max_waiting} may wait"
                )
            self._num_open += len(jobs)
            self._arrived.extend(jobs)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Drops a job; nothing more is told of it. One that is over stays as it is."""
        self._put(lambda: self._cancel(job))

    def forget(self) -> None:
        """Drops what is parked."""
        self._put(self._forget_all)

    def close(self, reason: str = "the server is shutting down") -> None:
        """Takes no more jobs in from now on."""
        with self._changed:
            self._is_closing, self._closed_because = True, self._closed_because or reason
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """After `close`: waits until all jobs are over, fails those that are not by then, and ends the thread. Returns
        whether all came to their end.
        """
        with self._changed:
            is_done = self._changed.wait_for(lambda: not self._num_open, seconds)
        self._put(self._stop)
        if self._thread.is_alive():
            self._thread.join()
        return is_done

    @property
    def is_running(self) -> bool:
        """Whether jobs are taken in."""
        return self._thread.is_alive() and not self._is_closing

    def _put(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(command)
            self._changed.notify_all()

    # In the engine's thread

    def _run(self) -> None:
        try:
            while not self._has_stopped:
                self._wait()
                self._take()
                while self._inbox:
                    self._inbox.popleft()()
                self._look()
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            self._fail_all("fault", f"the engine stopped: {self.failure}")
            raise
        finally:
            self._session = self._params = None

    def _wait(self) -> None:
        """Until there is something to do."""
        with self._changed:
            is_idle = not (self._drawing or self._waiting or self._scores)
            if is_idle and not self._inbox and not self._arrived:
                self._changed.wait(IDLE_SECONDS)

    def _look(self) -> None:
        """One look of the host: takes jobs in, drops what is late, decodes a chunk, tells the news."""
        self._drop_late()
        if self._session is None:
            if self._params is None:
                for job in [*self._waiting, *self._scores]:
                    self._end(job, Failed("closed", "there are no weights to draw with"))
                self._waiting.clear()
                self._scores.clear()
        else:
            if self._scores:
                self._score()
            while self._waiting and len(self._drawing) < self.limits.num_slots:
                self._begin(self._waiting.popleft())
            if self._session.has_work:
                self._decode()
            elif self._drawing:  # the prompts of parked jobs take the room of those that wait
                self._forget_oldest()
        self._note()

    def _note(self) -> None:
        counts = self.counts
        counts.num_drawing, counts.num_waiting, counts.num_parked = (
            len(self._drawing),
            len(self._waiting) + len(self._scores),
            len(self._parked),
        )
        news, self._news = self._news, {}
        for tell, items in news.items():
            tell(items)

    def _take(self) -> None:
        """Takes in what arrived; commands about it come later."""
        while self._arrived:
            job = self._arrived.popleft()
            self.counts.num_jobs += 1
            (self._waiting if job.limit else self._scores).append(job)

    def _begin(self, job: Job) -> None:
        session = self._session
        assert session is not None
        self.counts.num_prompt_tokens += len(job.prompt_ids)
        index, self._next_index = self._next_index, (self._next_index + 1) % LARGEST_INDEX
        request = Request(0, index, job.sample_index, job.limit, job.seed, rules=job.rules)
        found = self._find(job)
        if found is not None:
            number, num_kept = found
            parked = self._parked.pop(number)
            job.num_reused = parked.num_first + num_kept
            session.follow(number, num_kept, list(job.prompt_ids[job.num_reused :]), request)
            self.counts.num_going_on += 1
            self.counts.num_reused_tokens += job.num_reused
        else:
            while len(self._drawing) + len(self._parked) >= self.limits.num_slots + self.limits.num_parked:
                self._forget_oldest()
            (number,) = session.submit([np.asarray(job.prompt_ids, np.int32)], [request])
        job.number = number
        self._drawing[number] = job

    def _find(self, job: Job) -> tuple[int, int] | None:
        """The parked job with which a prompt goes on for longest: its number, and the tokens behind its own prompt that
        the new one has. The last token that was drawn may be missing: a template may not write what ended a turn.
        """
        session, prompt, best, longest = self._session, np.asarray(job.prompt_ids, np.int32), None, 0
        assert session is not None
        for number, parked in self._parked.items():
            whole = len(parked.ids)
            for length in (whole, whole - 1):
                if (
                    max(longest, parked.num_first) < length <= len(prompt)
                    and np.array_equal(prompt[:length], parked.ids[:length])
                    and session.has_room(len(prompt) - parked.num_first + job.limit)
                ):
                    best, longest = (number, length - parked.num_first), length
                    break
        return best

    def _decode(self) -> None:
        assert self._session is not None
        for number, completion in self._session.poll():
            job = self._drawing.pop(number)
            self.counts.num_drawn_tokens += len(completion.token_ids)
            self.counts.num_ended += 1
            self._end(job, Ended(completion, job.num_reused))
            if self.limits.num_parked:
                self._park(number, job, completion)
            else:
                self._session.finish(number)
        for number, job in self._drawing.items():
            if job.streams and (drawn := self._session.drawn(number, job.num_told)) is not None:
                token_ids, _, logprobs, top_ids, top_logprobs, *_ = drawn
                job.num_told += len(token_ids)
                self._add_news(job, Drawn(token_ids, logprobs, top_ids, top_logprobs))

    def _park(self, number: int, job: Job, completion: Completion) -> None:
        while len(self._parked) >= self.limits.num_parked:
            self._forget_oldest()
        assert self._session is not None
        ids = np.concatenate([job.prompt_ids, completion.token_ids]).astype(np.int32)
        self._parked[number] = _Parked(ids, self._session.prompt_length(number))

    def _forget_oldest(self) -> None:
        assert self._session is not None
        number = next(iter(self._parked))
        del self._parked[number]
        self._session.finish(number)
        self.counts.num_forgotten += 1

    def _forget_all(self) -> None:
        while self._parked:
            self._forget_oldest()

    def _score(self) -> None:
        """The log-probs of all prompts that wait for them."""
        jobs, self._scores = self._scores, []
        groups: dict[tuple[float, int], list[Job]] = {}
        for job in jobs:
            groups.setdefault((job.rules.temperature, job.num_top), []).append(job)
        for (temperature, num_top), own in groups.items():
            prompts = [job.prompt_ids for job in own]
            found = self._sampler.prompt_scores(self._params, prompts, temperature, self._logprob_chunk, num_top)
            for job, (logprobs, top_ids, top_logprobs) in zip(own, found, strict=True):
                self.counts.num_scored_tokens += len(job.prompt_ids)
                self.counts.num_ended += 1
                self._end(job, PromptScore(logprobs, top_ids, top_logprobs))

    def _cancel(self, job: Job) -> None:
        if not job.is_over:
            self._drop(job)
            self.counts.num_cancelled += 1
            self._end(job, None)

    def _drop(self, job: Job) -> None:
        """Takes a job out of wherever it is."""
        if job.number is not None:
            assert self._session is not None
            del self._drawing[job.number]
            self._session.cancel(job.number)
        elif job in self._waiting:
            self._waiting.remove(job)
        elif job in self._scores:
            self._scores.remove(job)

    def _drop_late(self) -> None:
        now = time.monotonic()
        for job in [*self._waiting, *self._scores, *self._drawing.values()]:
            if job.deadline is not None and job.deadline < now:
                self._drop(job)
                self.counts.num_timeouts += 1
                self._end(job, Failed("timeout", "the request took longer than the server allows"))

    def _end(self, job: Job, news: News | None) -> None:
        job.is_over, job.number = True, None
        if news is not None:
            self._add_news(job, news)
        with self._changed:
            self._num_open -= 1
            self._changed.notify_all()

    def _add_news(self, job: Job, news: News) -> None:
        self._news.setdefault(job.tell, []).append((job, news))

    def _load(self, params: Any, seed: int | None) -> None:
        for job in [*self._drawing.values()]:
            self._drop(job)
            self._end(job, Failed("closed", "the weights were replaced while the request was drawn"))
        self._parked.clear()
        self._session, self._params = None, params
        if params is not None:
            key = jax.random.key(secrets.randbits(32) if seed is None else seed)
            self._next_index = 0
            self._session = self._sampler.open_endless(params, self.sampling, key, *self._sizes)

    def _stop(self) -> None:
        self._fail_all("closed", self._closed_because or "the server is shutting down")
        self._has_stopped = True

    def _fail_all(self, kind: str, message: str) -> None:
        with self._changed:
            self._is_closing, self._closed_because = True, self._closed_because or message
        self._take()
        jobs = [*self._waiting, *self._scores, *self._drawing.values()]
        if kind == "fault":  # nothing that the session holds is to be trusted
            self._drawing.clear()
        for job in [*self._drawing.values()]:
            self._drop(job)
        self._waiting.clear()
        self._scores.clear()
        for job in jobs:
            self._end(job, Failed(kind, message))
        self._note()
