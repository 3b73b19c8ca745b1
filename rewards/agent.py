"""An agent: the user's code with a loop of its own, which asks the policy over OpenAI's interface.

In: `async def run(base_url, row, ...)`, or a plain function, which runs in a thread of its own. Out: the form of an
environment (`rewards.environment_kinds`): what the agent asks is the prompt, or the observations behind the policy's
last turn; what it returns is the reward. Not here: HTTP (`rewards.agent_server`).

A call that goes on with the conversation of an earlier one is its next turn, whatever was asked in between. Messages
are compared by role, text, and names and arguments of tool calls, because clients write them back in their own form.
Any other call has the policy begin again with the messages of the call (`Step.prompt`). Calls that an agent makes at
the same time are answered one after the other.
"""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import json
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rewards.agent_server import AgentServer, Answer, AskError, asked_of
from rewards.chat_request import same_message
from rewards.environment import Message, Step, TurnTokens
from rewards.environment_replies import asked_digest
from rewards.in_worker import Rejected, short
from rewards.messages import ROLES
from rewards.tools import Functions, is_async

ARGUMENTS = ("base_url", "row", "seed", "api_key", "model")  # that an agent may ask for by name
MODEL = "policy"  # the name under which agents ask for it; any other serves as well
_SETTLE_SECONDS = 0.005  # for calls that are made at one time to arrive
_PATIENCE_SECONDS = 1.0  # for the call that an agent made when it was played before


def check_agent(run: Any, label: str) -> None:
    """ValueError where a function is no agent."""
    rule = f"must be a function of base_url and row, and maybe {', '.join(ARGUMENTS[2:])}"
    if not inspect.isfunction(run):
        raise ValueError(f"{label} {rule}, got {short(run)}; write `async def run(base_url, row)`")
    for name, parameter in inspect.signature(run).parameters.items():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and name not in ARGUMENTS:
            raise ValueError(f"{label} {rule}, and it asks for {name!r}; give it a default value")


@dataclasses.dataclass
class _Call:
    """A call of the policy that waits for its answer. wave: the number of answers that were given before it came."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    parses: bool  # whether the answer may have tool calls
    answer: asyncio.Future[Answer]
    wave: int

    @property
    def order(self) -> tuple[int, str]:
        """Calls that came at one time are in the order of what they say, whichever came first."""
        return self.wave, json.dumps([self.messages, self.tools, self.parses], sort_keys=True)


class _Asked(NamedTuple):
    """What `asked_digest` reads."""

    messages: list[Message]
    prompt: list[Message] | None
    tools: list[dict[str, Any]] | None
    sequence: int | None


@dataclasses.dataclass
class _Sequence:
    """A conversation so far, of the calls that go on from each other."""

    told: list[Message]
    tools: list[dict[str, Any]]


class AgentPlayer:
    """One episode of an agent.

    tools: JSON schemas that the call shows the policy which is to be answered next. parses: whether its answer may call
      them.
    """

    def __init__(self, run: Callable[..., Any], server: AgentServer) -> None:
        self._run, self._server = run, server
        self._key = secrets.token_hex(8)
        self._waiting: list[_Call] = []
        self._arrived = asyncio.Event()
        self._num_answers = 0
        self._task: asyncio.Task[Any] | None = None
        self._call: _Call | None = None  # that the policy answers next
        self._sequences: list[_Sequence] = []
        self._now = 0  # the sequence of this call
        self._over = ""  # why nothing more is answered
        self.functions: Functions = {}
        self.instance: Any = None
        self.tools: list[dict[str, Any]] = []
        self.parses = False

    async def ask(self, body: Mapping[str, Any]) -> Answer:
        """The policy's answer to a request. Raises `AskError` where there will be none."""
        messages, tools, parses = asked_of(body)
        if self._over:
            raise AskError(self._over, "episode_over")
        call = _Call(messages, tools, parses, asyncio.get_running_loop().create_future(), self._num_answers)
        self._waiting.append(call)
        self._arrived.set()
        return await call.answer

    async def reset(self, row: Mapping[str, Any], seed: int, expects: str | None = None) -> Any:
        """Starts the agent; the prompt is what it asks first. expects: the digest of that (`asked_digest`), where it is
        known from an earlier play.
        """
        given = (f"{self._server.url}/at/{self._key}/v1", dict(row), seed, self._key, MODEL)
        names = inspect.signature(self._run).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
        arguments = {name: value for name, value in zip(ARGUMENTS, given, strict=True) if takes_all or name in names}
        self._server.open(self._key, self)
        self._task = asyncio.ensure_future(self._play(arguments))
        call = await self._next(expects)
        if call is None:
            raise Rejected("not_a_step", "the agent returned before it asked the policy, which leaves nothing to train")
        self._begin(call)
        return call.messages

    def name_of_turn(self) -> str:
        """Tells the turn that is answered next from all others of the episode, by what was said before it, and not by
        when it is asked.
        """
        told = self._sequences[self._now].told
        number = sum(_alike(sequence.told, told) for sequence in self._sequences[: self._now])
        return json.dumps([[same_message(message) for message in told], number], sort_keys=True)

    async def step(self, message: Message, tokens: TurnTokens | None = None, expects: str | None = None) -> Step:
        """Answers the call, and waits for the next one or for the agent's end. tokens: what the turn took. expects: as
        in `reset`.
        """
        self._sequences[self._now].told.append(message)
        call = await self._hand(Answer(message, tokens), expects)
        if call is None:
            assert self._task is not None
            return Step(reward=self._task.result(), done=True)
        number = self._sequence_of(call)
        if number is None:
            self._begin(call)
            return Step(prompt=call.messages)
        sequence, is_other = self._sequences[number], number != self._now
        observations = call.messages[len(sequence.told) :]
        sequence.told.extend(observations)
        self._call, self._now, self.tools, self.parses = call, number, call.tools, call.parses
        return Step(observations, sequence=number if is_other else None)

    async def finish(self) -> tuple[Any, Any]:
        """Where a limit has ended the episode, the agent is told so, and may still return a reward."""
        assert self._task is not None
        if self._task.done():
            return None, {}
        self._over = "the episode is over, by a limit of rollout or of sampling; return a reward now"
        self._refuse()
        try:
            return await self._task, {}
        except Exception as error:
            if self._over in str(error):  # it let the refusal end it: there is no reward
                return None, {}
            raise

    async def close(self, reason: str | None) -> None:
        """Ends the agent."""
        self._over = self._over or "the episode is over"
        self._server.close(self._key)
        self._refuse()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            with contextlib.suppress(BaseException):
                await self._task

    async def _play(self, arguments: Mapping[str, Any]) -> Any:
        """What the agent returns. What would end the loop, and every other episode with it, is an error as any."""
        try:
            if is_async(self._run):
                return await self._run(**arguments)
            return await _in_thread(functools.partial(self._run, **arguments))
        except (SystemExit, KeyboardInterrupt) as error:
            told = RuntimeError(f"the agent wanted to end the process, with {error!r}")
            raise told.with_traceback(error.__traceback__) from None

    def _sequence_of(self, call: _Call) -> int | None:
        """The sequence that a call goes on with: the longest whose messages begin those of the call, with the same
        tools, and what follows are observations. None: it begins another.
        """
        found, longest = None, 0
        for number, sequence in enumerate(self._sequences):
            size = len(sequence.told)
            observations = call.messages[size:]
            goes_on = call.tools == sequence.tools and all(one["role"] in ROLES for one in observations)
            if size > longest and goes_on and observations and _alike(call.messages[:size], sequence.told):
                found, longest = number, size
        return found

    def _begin(self, call: _Call) -> None:
        self._sequences.append(_Sequence([*call.messages], call.tools))
        self._call, self._now = call, len(self._sequences) - 1
        self.tools, self.parses = call.tools, call.parses

    def _digest(self, call: _Call) -> str:
        """The digest of what the worker says where this call is the next one."""
        number = self._sequence_of(call) if self._sequences else None
        if not self._sequences:
            asked = _Asked(call.messages, None, call.tools, None)
        elif number is None:
            asked = _Asked([], call.messages, call.tools, None)
        else:
            observations = call.messages[len(self._sequences[number].told) :]
            asked = _Asked(observations, None, None, None if number == self._now else number)
        return asked_digest(asked)

    async def _hand(self, answer: Answer, expects: str | None) -> _Call | None:
        """Gives the turn to the call that waits for it. Where its client has gone away, the same call made again gets
        it: clients try again when an answer takes them too long. Then `_next`.
        """
        assert self._call is not None
        while True:
            is_there = not self._call.answer.done()
            if is_there:
                self._num_answers += 1
                self._call.answer.set_result(answer)
            call = await self._next(expects if is_there else None)
            if is_there or call is None or call.order[1] != self._call.order[1]:
                return call
            self._call = call

    async def _next(self, expects: str | None) -> _Call | None:
        """The next call whose client waits, or None when the agent has ended. Raises what the agent raised.

        Of several that come at one time the order is that of `_Call.order`, so that the clock has no part in it. Of an
        episode that is played again it is that in which they were answered before.
        """
        assert self._task is not None
        patience, settled = None, 0
        loop = asyncio.get_running_loop()
        while True:
            if self._task.done():
                self._task.result()
                return None
            self._waiting = [call for call in self._waiting if not call.answer.done()]
            if expects is None and self._waiting and len(self._waiting) == settled:
                return self._take(min(self._waiting, key=lambda call: call.order))
            if expects is not None and self._waiting:
                known = [call for call in self._waiting if self._digest(call) == expects]
                if known:
                    return self._take(known[0])
                patience = patience or loop.time() + _PATIENCE_SECONDS
                if loop.time() > patience:  # it asks for something else than before
                    expects = None
                    continue
            settled = len(self._waiting)
            self._arrived.clear()
            seconds = None
            if self._waiting:
                seconds = _SETTLE_SECONDS if expects is None else _PATIENCE_SECONDS
            await self._something(seconds)

    async def _something(self, seconds: float | None) -> None:
        """Waits for another call, for the agent's end, or for so many seconds."""
        assert self._task is not None
        arrived = asyncio.ensure_future(self._arrived.wait())
        try:
            await asyncio.wait({arrived, self._task}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            arrived.cancel()

    def _take(self, call: _Call) -> _Call:
        self._waiting.remove(call)
        return call

    def _refuse(self) -> None:
        """Answers all that waits with why there is no answer."""
        waiting, self._waiting = [*([] if self._call is None else [self._call]), *self._waiting], []
        for call in waiting:
            if not call.answer.done():
                call.answer.set_exception(AskError(self._over, "episode_over"))


async def _in_thread(function: Callable[[], Any]) -> Any:
    """What a function returns in a thread of its own, which does not keep the process alive. So many agents may block
    as there are episodes; one that is given up goes on until its next call is refused.
    """
    loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def tell(result: Any, error: BaseException | None) -> None:
        if not done.done():
            done.set_result(result) if error is None else done.set_exception(error)

    def run() -> None:
        result, problem = None, None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  user code raises what it likes
            is_ending = isinstance(error, (SystemExit, KeyboardInterrupt, StopIteration))
            problem = RuntimeError(f"the agent ended with {error!r}") if is_ending else error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, result, problem)

    threading.Thread(target=run, daemon=True).start()
    return await done


def _alike(messages: Sequence[Message], others: Sequence[Message]) -> bool:
    return len(messages) == len(others) and all(
        same_message(one) == same_message(other) for one, other in zip(messages, others, strict=True)
    )
