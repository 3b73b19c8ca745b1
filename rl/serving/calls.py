"""Calls of the interface while they run: jobs of the engine, and news about them in an asyncio loop.

In: prompts and options of one request. Out: the news of its jobs, in order; jobs that nobody wants any more are
cancelled. Not here: HTTP (`rl.serving.app`), and what is told of completions (`rl.serving.answers`).
"""

import asyncio
import contextlib
import dataclasses
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rl.sampler.contract import Completion
from rl.sampler.slot_rules import DrawRules
from rl.serving.bodies import ApiError
from rl.serving.engine import Closed, Drawn, Engine, Failed, Full, Job, News

_STATUS = {"timeout": (504, "timeout"), "closed": (503, "shutting_down"), "fault": (500, "engine_failed")}


@dataclasses.dataclass(frozen=True)
class FinishedCall:
    """A request that came to its end, for those who want to know what was drawn.

    Attributes:
      key: the part KEY of a path /at/KEY/v1/...; "" without one.
      messages, tools: of a chat, as the chat template got them; empty for texts.
      prompt_ids: of each completion. completions: their tokens and log-probs.
      answers: of a chat, the assistant's message of each completion, as it was told; of a text, the texts.
    """

    key: str
    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]]
    prompt_ids: Sequence[Sequence[int]]
    completions: Sequence[Completion]
    answers: Sequence[Any]


class Inbox:
    """Takes news from the engine's thread into the queues of an asyncio loop; one for each loop, so that the thread
    wakes a loop once at each look.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # nobody is kept from closing and forgetting it
        self.queues: dict[Job, asyncio.Queue[tuple[Job, News]]] = {}

    def __call__(self, items: list[tuple[Job, News]]) -> None:
        loop = self._loop()
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it was closed, and everybody who waited is gone
                loop.call_soon_threadsafe(self._put, items)

    def _put(self, items: list[tuple[Job, News]]) -> None:
        for job, news in items:
            if job in self.queues:
                self.queues[job].put_nowait((job, news))


class Calls:
    """Makes and runs jobs. seconds: the time limit of a request."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self.engine, self._seconds = engine, seconds
        self._inboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Inbox] = weakref.WeakKeyDictionary()

    def jobs(
        self,
        prompts: Sequence[Sequence[int]],
        rules: DrawRules,
        limit: int,
        num_choices: int,
        seed: int | None,
        streams: bool,
    ) -> list[Job]:
        """A job for each choice of each prompt. ApiError for what cannot be drawn."""
        inbox, deadline = self._inbox(), time.monotonic() + self._seconds
        self._check_count(len(prompts), num_choices)
        for prompt_ids in prompts:
            self.check(prompt_ids, rules, limit, seed)
        return [
            Job(prompt_ids, limit, rules, inbox, seed, choice, streams, deadline)
            for prompt_ids in prompts
            for choice in range(num_choices)
        ]

    def score_jobs(self, prompts: Sequence[Sequence[int]], temperature: float, num_top: int) -> list[Job]:
        """A job for the log-probs of each prompt."""
        inbox, deadline = self._inbox(), time.monotonic() + self._seconds
        rules = DrawRules(temperature=temperature)
        self._check_count(len(prompts), 1)
        for prompt_ids in prompts:
            self.check(prompt_ids, rules, 1, None)
        return [Job(ids, 0, rules, inbox, deadline=deadline, num_top=num_top) for ids in prompts]

    def check(self, prompt_ids: Sequence[int], rules: DrawRules, limit: int, seed: int | None) -> None:
        """ApiError for a prompt or rules that cannot be drawn."""
        most = self.engine.limits.max_prompt_tokens
        if len(prompt_ids) > most:
            raise ApiError(
                400,
                f"a prompt may have at most {most} tokens here, got {len(prompt_ids)}; shorten it, or start the server "
                "with a larger data.max_prompt_length",
                param="prompt",
                code="context_length_exceeded",
            )
        longest, least = self.engine.limits.max_tokens, rules.min_completion_length
        if limit > longest:
            raise ApiError(
                400,
                f"max_tokens must be at most {longest} here, got {limit}; ask for fewer, or start the server with a "
                "larger sampling.max_completion_length",
                param="max_tokens",
            )
        if least > limit:
            raise ApiError(
                400, f"min_tokens must be at most the limit of tokens, {limit}, got {least}", param="min_tokens"
            )
        try:
            self.engine.check(prompt_ids, limit, rules, seed)
        except ValueError as error:
            text = str(error).replace("requests[0].rules.", "").replace("requests[0].", "")
            text = text.replace("prompts[0]", "prompt")
            raise ApiError(400, text, param=text.partition(" ")[0]) from None

    def _check_count(self, num_prompts: int, num_choices: int) -> None:
        """ApiError for a request of more completions than the server ever holds: to try again would not help."""
        what = "n" if num_prompts == 1 else "prompt" if num_choices == 1 else "n times the prompts"
        self._check_jobs(num_prompts * num_choices, what)

    def _check_jobs(self, count: int, what: str) -> None:
        most = self.engine.limits.num_slots + self.engine.limits.max_waiting
        if count > most:
            raise ApiError(
                400,
                f"{what} must be at most {most} here, the completions that are drawn or wait, got {count}; ask in "
                "several requests, or start the server with a larger --queue",
                param="prompt" if what == "prompt" else "n",
            )

    @contextlib.asynccontextmanager
    async def running(self, jobs: Sequence[Job]) -> AsyncIterator["Running"]:
        """Runs jobs; those that are not over at the end are cancelled. ApiError where the engine takes none."""
        self._check_jobs(len(jobs), "n times the prompts, and once more the prompts with echo and logprobs,")
        inbox, queue = self._inbox(), asyncio.Queue[tuple[Job, News]]()
        inbox.queues.update(dict.fromkeys(jobs, queue))
        is_in = False
        try:
            try:
                self.engine.submit(jobs)
            except Full as error:
                raise ApiError(429, f"the server is full: {error}; try again", code="server_full") from None
            except Closed as error:
                raise ApiError(503, f"the server takes no requests: {error}", code="shutting_down") from None
            is_in = True
            yield Running(queue, len(jobs))
        finally:
            for job in jobs:
                del inbox.queues[job]
                if is_in and not job.is_over:
                    self.engine.cancel(job)

    def _inbox(self) -> Inbox:
        loop = asyncio.get_running_loop()
        if loop not in self._inboxes:
            self._inboxes[loop] = Inbox(loop)
        return self._inboxes[loop]


class Running:
    """The news of jobs, until all are over."""

    def __init__(self, queue: "asyncio.Queue[tuple[Job, News]]", num_left: int) -> None:
        self._queue, self._num_left = queue, num_left

    async def news(self) -> AsyncIterator[tuple[Job, Any]]:
        """(job, news) as they come. ApiError for a job that failed."""
        while self._num_left:
            job, news = await self._queue.get()
            if isinstance(news, Failed):
                status, code = _STATUS[news.kind]
                raise ApiError(status, news.message, code=code)
            self._num_left -= not isinstance(news, Drawn)
            yield job, news
