"""An agent: the user's code with a loop of its own, which asks the policy over OpenAI's interface.

In: `async def run(base_url, row, ...)`, or a plain function, which runs in a thread of its own. Out: the form of an
environment (`rewards.environment_kinds`): what the agent asks is the prompt, or the observations behind the policy's
last turn; what it returns is the reward. Not here: HTTP (`rewards.agent_server`).

A call that goes on with the conversation of the last one is its next turn. Messages are compared by role, text, and
names and arguments of tool calls, because clients write them back in their own form. Any other call has the policy
begin again with the messages of the call (`Step.prompt`). Calls that an agent makes at the same time are answered one
after the other.
"""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.agent_server import AgentServer, AskError, asked_of, told_of
from rewards.environment import Message, Step
from rewards.in_worker import Rejected, short
from rewards.messages import ROLES
from rewards.tools import Functions, is_async

ARGUMENTS = ("base_url", "row", "seed", "api_key", "model")  # that an agent may ask for by name
MODEL = "policy"  # the name under which agents ask for it; any other serves as well


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
    """A call of the policy that waits for its answer."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    parses: bool  # whether the answer may have tool calls
    answer: asyncio.Future[Message]


class AgentPlayer:
    """One episode of an agent.

    tools: JSON schemas that the call shows the policy which is to be answered next. parses: whether its answer may call
      them.
    """

    def __init__(self, run: Callable[..., Any], server: AgentServer) -> None:
        self._run, self._server = run, server
        self._key = secrets.token_hex(8)
        self._calls: asyncio.Queue[_Call] = asyncio.Queue()
        self._task: asyncio.Task[Any] | None = None
        self._call: _Call | None = None  # that the policy answers next
        self._told: list[Message] = []  # the conversation so far
        self._over = ""  # why nothing more is answered
        self.functions: Functions = {}
        self.instance: Any = None
        self.tools: list[dict[str, Any]] = []
        self.parses = False

    async def ask(self, body: Mapping[str, Any]) -> Message:
        """The policy's answer to a request. Raises `AskError` where there will be none."""
        messages, tools, parses = asked_of(body)
        if self._over:
            raise AskError(self._over, "episode_over")
        call = _Call(messages, tools, parses, asyncio.get_running_loop().create_future())
        self._calls.put_nowait(call)
        return await call.answer

    async def reset(self, row: Mapping[str, Any], seed: int) -> Any:
        """Starts the agent; the prompt is what it asks first."""
        given = (f"{self._server.url}/at/{self._key}/v1", dict(row), seed, self._key, MODEL)
        names = inspect.signature(self._run).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
        arguments = {name: value for name, value in zip(ARGUMENTS, given, strict=True) if takes_all or name in names}
        self._server.open(self._key, self)
        self._task = asyncio.ensure_future(self._play(arguments))
        call = await self._next()
        if call is None:
            raise Rejected("not_a_step", "the agent returned before it asked the policy, which leaves nothing to train")
        self._begin(call)
        return call.messages

    async def step(self, message: Message) -> Step:
        """Answers the call, and waits for the next one or for the agent's end."""
        told, call = [*self._told, message], await self._hand(message)
        if call is None:
            assert self._task is not None
            return Step(reward=self._task.result(), done=True)
        observations = call.messages[len(told) :]
        goes_on = call.tools == self.tools and all(
            one["role"] in ROLES and isinstance(one["content"], str) for one in observations
        )
        if goes_on and observations and _alike(call.messages[: len(told)], told):
            self._call, self.parses, self._told = call, call.parses, [*told, *observations]
            return Step(observations)
        self._begin(call)
        return Step(prompt=call.messages)

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

    def _begin(self, call: _Call) -> None:
        self._call, self._told = call, call.messages
        self.tools, self.parses = call.tools, call.parses

    async def _hand(self, message: Message) -> _Call | None:
        """Gives the turn to the call that waits for it. Where its client has gone away, the same call made again gets
        it: clients try again when an answer takes them too long. Then `_next`.
        """
        assert self._call is not None
        while True:
            is_there = not self._call.answer.done()
            if is_there:
                self._call.answer.set_result(message)
            call = await self._next()
            if is_there or call is None or not _is_again(call, self._call):
                return call
            self._call = call

    async def _next(self) -> _Call | None:
        """The next call whose client waits, or None when the agent has ended. Raises what the agent raised."""
        while (call := await self._next_of_all()) is not None and call.answer.done():
            pass
        return call

    async def _next_of_all(self) -> _Call | None:
        assert self._task is not None
        asked = asyncio.ensure_future(self._calls.get())
        try:
            await asyncio.wait({asked, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
        if self._task.done():
            self._task.result()
            return None
        return asked.result()

    def _refuse(self) -> None:
        """Answers all that waits with why there is no answer."""
        waiting = [] if self._call is None else [self._call]
        while not self._calls.empty():
            waiting.append(self._calls.get_nowait())
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


def _is_again(call: _Call, other: _Call) -> bool:
    return (call.messages, call.tools, call.parses) == (other.messages, other.tools, other.parses)


def _alike(messages: Sequence[Message], others: Sequence[Message]) -> bool:
    return len(messages) == len(others) and all(map(_is_alike, messages, others))


def _is_alike(message: Message, other: Message) -> bool:
    return told_of(message) == told_of(other)
