"""A worker with environments: `python -m rewards.environment_worker`, started by `rewards.environment_runner`.

In: requests on standard input. Out: replies on standard output (frames of `rewards.protocol`). Code of the user runs in
the main thread, inside an event loop: plain functions one at a time, async ones at the same time. It never imports jax.
What the user's code gets are copies, so that nothing it changes in a row, a turn or a call is told as what was there.

    {"op": "load", "environments": {name: "file.py:Class"}, "tools": [...], "format": f,
        "wants_schemas": whether to read those of the tools, "path": [...],
        "rewards": [fields of a RewardSpec, ...] that ask for environments, "columns": [...]}
        -> "loaded" or "refused"
    {"op": "begin", "episode": n, "environment": name, "row": {...}, "seed": s, "limit": seconds}
    {"op": "step", "episode": n, "text": a turn, "limit": seconds}
    {"op": "finish", "episode": n, "reason": why it ends, "limit": seconds, "facts": for reward functions, or null}
        -> "done"
    {"op": "drop", "episode": n}
        -> nothing

The fields of a reply are in `rewards.environment_replies`; each repeats the nonce of its request. An episode that
failed is forgotten, and so is one that is finished.
"""

import asyncio
import contextlib
import copy
import dataclasses
import hashlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from rewards.agent import AgentPlayer
from rewards.agent_server import AgentServer
from rewards.calling import Clock, RandomState, TimeLimit, task_factory, task_in
from rewards.contract import BoundReward
from rewards.environment import Message, Step, TurnTokens
from rewards.environment_kinds import Kind, Player, load_kind, tools_alone
from rewards.environment_replies import LABEL, TOOLS_LABEL, TOOLS_NAME
from rewards.environment_rewards import EpisodeFacts, judge, load_rewards
from rewards.in_worker import (
    Errors,
    Rejected,
    Watchdog,
    as_reward,
    claim_pipes,
    read_requests,
    short,
    survive_signals,
    write_frame,
)
from rewards.logged import number_of
from rewards.messages import checked_metrics, checked_observations, checked_prompt
from rewards.protocol import HEADER, pack
from rewards.replies import MAX_FRAME, MAX_REWARD, MAX_TEXT, Failure, one_line
from rewards.reward_call import call_one
from rewards.tool_calls import FORMATS, Call, Format, Turn, parse_turn
from rewards.tools import add_tool, answers, is_async, load_tools, schema_of
from rewards.worker_variables import missing_variable

_REST_SECONDS = 0.5  # from the last answer until the watchdog rests
_CLOSE_SECONDS = 1.0  # for environments that are open when this worker ends
# Files in which no code of the user is: this one, and those of these functions.
_CALLERS = [__file__, *(function.__code__.co_filename for function in (task_in, load_kind, answers, judge, call_one))]


def main() -> None:
    """Serve requests until standard input closes."""
    requests, replies = claim_pipes()
    survive_signals()
    with contextlib.suppress(ImportError):
        import numpy  # noqa: F401  so that its random state is the episode's when an environment imports it late
    loop = asyncio.new_event_loop()
    loop.set_task_factory(task_factory)
    worker = _Worker(loop, replies)

    def take(request: dict[str, Any] | None) -> None:
        loop.call_soon_threadsafe(worker.handle, request)

    threading.Thread(target=read_requests, args=(requests, take), daemon=True).start()
    try:
        loop.run_forever()
        loop.run_until_complete(worker.close())
    finally:
        loop.close()


@dataclasses.dataclass
class _Episode:
    kind: Kind
    player: Player
    state: RandomState
    seed: int
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_turns: int = 0
    finished: "_Done | None" = None  # what its end came to, while reward functions judge it


@dataclasses.dataclass
class _Done:
    """What a request came to, apart from a failure."""

    messages: str | list[Message] = dataclasses.field(default_factory=list)
    action: Message | None = None
    reward: float | None = None
    done: bool = False
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    num_tool_calls: int = 0
    num_bad_tool_calls: int = 0
    judged: dict[str, Any] = dataclasses.field(default_factory=dict)  # {function: number, None, or [kind, message]}
    prompt: str | list[Message] | None = None
    tools: list[dict[str, Any]] | None = None  # that the policy is shown from here on, where an agent says so
    sequence: int | None = None


class _Worker:
    """The environments that are loaded, the episodes that are played, and how requests are answered."""

    def __init__(self, loop: asyncio.AbstractEventLoop, replies: BinaryIO):
        self._loop, self._replies = loop, replies
        self._kinds: dict[str, Kind] = {}
        self._functions: dict[str, Callable[..., Any]] = {}  # of the run's tools
        self._rewards: dict[str, BoundReward] = {}
        self._format: Format | None = None
        self._agents = AgentServer()
        self._episodes: dict[int, _Episode] = {}
        self._tasks: set[asyncio.Task] = set()  # the loop itself forgets them
        self._is_closing = False
        self._clock = Clock()
        self._errors = Errors(_CALLERS)
        self._traces: list[list[str]] = []  # that the next reply tells: (kind, message, traceback) of each
        self._watchdog = Watchdog()
        self._rest: asyncio.TimerHandle | None = None

    def handle(self, request: dict[str, Any] | None) -> None:
        """Begin to answer a request; None ends the loop."""
        if request is None:
            self._loop.stop()
            return
        if request["op"] == "load":
            task = self._loop.create_task(self._load(request))
        elif request["op"] == "drop":
            dropped = self._episodes.pop(request["episode"], None)  # now, as another may begin under its number
            if dropped is None:  # it is forgotten already
                return
            task = task_in(self._loop, dropped.state, self._close(dropped, None))
        else:
            seed = request.get("seed")
            if seed is not None:  # it begins
                kind = self._kinds[request["environment"]]
                begun = _Episode(kind, kind.make_player(), RandomState(seed, self._clock), seed, request["row"])
                self._episodes[request["episode"]] = begun
            episode = self._episodes[request["episode"]]
            self._watchdog.watch(request["limit"])
            task = task_in(self._loop, episode.state, self._answer(request, episode))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def close(self) -> None:
        """Close what is open, because there will be no more requests."""
        self._is_closing = True
        for task in [*self._tasks]:
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                for number in [*self._episodes]:
                    await self._forget(number, None)
                await self._agents.stop()
        for *_, trace in self._traces:  # no reply will tell them
            print(trace, end="", file=sys.stderr)

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not self._tasks and self._rest is None:  # later, because it takes longer than most calls
            self._rest = self._loop.call_later(_REST_SECONDS, self._rest_if_idle)

    def _rest_if_idle(self) -> None:
        self._rest = None
        if not self._tasks:
            self._watchdog.rest()

    async def _load(self, request: Mapping[str, Any]) -> None:
        sys.path.extend(entry for entry in request["path"] if entry not in sys.path)
        nonce, names = request["nonce"], request["environments"]
        try:
            self._functions = load_tools(request["tools"], TOOLS_LABEL)
            for name, reference in names.items():
                label = f"{LABEL} {name!r}"
                self._kinds[name] = await load_kind(reference, label, self._agents, is_one_of_several=len(names) > 1)
                self._check_names(self._kinds[name], label)
            if not names:
                self._kinds[TOOLS_NAME] = tools_alone()
            self._rewards = load_rewards(request["rewards"], request["columns"])
            schemas = {name: self._schemas(name) if request["wants_schemas"] else [] for name in self._kinds}
        except ValueError as error:
            message = f"{one_line(str(error), MAX_TEXT // 2)}{missing_variable(error)}"
            self._reply({"nonce": nonce, "op": "refused", "error": message})
            return
        self._format = request["format"]
        tells = {
            name: {
                "form": kind.form,
                "is_async": kind.is_async or any(map(is_async, self._functions.values())),
                "schemas": schemas[name],
            }
            for name, kind in self._kinds.items()
        }
        self._reply({"nonce": nonce, "op": "loaded", "environments": tells})

    def _check_names(self, kind: Kind, label: str) -> None:
        """ValueError where a tool of the environment and one of the run have the same name."""
        if kind.has_own_tools and self._functions:
            raise ValueError(
                f"{label}: it answers calls of its own 'tools' itself, so rollout.tools must be empty; add those to it"
            )
        functions = dict(self._functions)
        for source in kind.schema_sources:
            if callable(source):
                add_tool(functions, source.__name__, source, label)

    def _schemas(self, name: str) -> list[dict[str, Any]]:
        own = [
            schema_of(source, f"{LABEL} {name!r}") if callable(source) else source
            for source in self._kinds[name].schema_sources
        ]
        return [schema_of(function, TOOLS_LABEL) for function in self._functions.values()] + own

    async def _answer(self, request: Mapping[str, Any], episode: _Episode) -> None:
        number, failure, done = request["episode"], None, _Done()
        limit = TimeLimit(request["limit"], episode.state)
        try:
            with limit:
                done = await self._do(request, episode)
                if request["op"] == "finish":
                    await self._forget(number, request["reason"])
        except BaseException as error:  # noqa: BLE001  user code raises what it likes; it is counted, shown
            late = isinstance(error, TimeoutError) and limit.is_over
            failure = ("timeout", f"no answer within {request['limit']:g} s") if late else self._failure(error)
            if episode.finished is not None:  # it is a reward function that took too long
                done = episode.finished
                done.judged |= {name: failure for name in self._rewards if name not in done.judged}
                failure = None
            await self._forget(number, None if episode.finished is None else request["reason"])
        if self._is_closing:  # nobody reads a reply
            return
        reply = self._packed(request["nonce"], done, failure, limit.elapsed)
        if len(reply) - HEADER.size > MAX_FRAME:
            await self._forget(number, None)
            rule = f"an answer must be at most {MAX_FRAME} bytes of JSON, got {len(reply)}; shorten the messages"
            reply = self._packed(request["nonce"], _Done(), ("not_a_step", rule), limit.elapsed)
        write_frame(self._replies, reply)

    async def _do(self, request: Mapping[str, Any], episode: _Episode) -> _Done:
        player = episode.player
        if request["op"] == "begin":
            how = (request["expects"],) if isinstance(player, AgentPlayer) else ()
            prompt = checked_prompt(await player.reset(copy.deepcopy(request["row"]), request["seed"], *how))
            return _Done(prompt, tools=_tools_of(player))
        if request["op"] == "step":
            return await self._step(request, episode)
        reward, metrics = await player.finish()
        done = _Done(reward=_reward(reward), metrics=checked_metrics(metrics))
        if request["facts"] is not None:
            episode.finished = done
            await self._judge(EpisodeFacts.of_json(request["facts"]), episode, done, request["limit"])
        return done

    async def _judge(self, facts: EpisodeFacts, episode: _Episode, done: _Done, limit: float) -> None:
        """Has the reward functions judge an episode whose environment has said its last word."""
        for name, bound in self._rewards.items():
            try:
                value, logged = await judge(bound, episode.player.instance, episode.row, facts, limit)
                done.judged[name] = _reward(value)
                metrics = {f"{name}/{metric}": mean for metric, mean in logged.items()}
                done.metrics |= checked_metrics(metrics)
            except asyncio.CancelledError:  # the time is over
                raise
            except BaseException as error:  # noqa: BLE001  user code raises what it likes; it is counted, shown
                done.judged[name] = self._failure(error)

    async def _step(self, request: Mapping[str, Any], episode: _Episode) -> _Done:
        text = request["text"]
        action: Message = {"role": "assistant", "content": text}
        functions = {**self._functions, **episode.player.functions}
        episode.num_turns += 1
        if isinstance(episode.player, AgentPlayer):
            return await self._answer_agent(action, episode.player, episode, request)
        if not functions and not episode.kind.has_own_tools:
            return _stepped(await episode.player.step(copy.deepcopy(action)), action, [], 0, 0)
        turn = self._parse(text)
        ids = [_call_id(episode.seed, episode.num_turns, place) for place in range(len(turn.calls))]
        made = [(one, call_id) for one, call_id in zip(turn.calls, ids, strict=True) if one.problem is None]
        if turn.calls:
            action["content"] = turn.content
        if made:
            action["tool_calls"] = _told_calls(made)
        asked = [(one, call_id) for one, call_id in zip(turn.calls, ids, strict=True) if one.problem is not None]
        asked = asked if episode.kind.has_own_tools else [*zip(turn.calls, ids, strict=True)]
        observations, num_bad = await answers([one for one, _ in asked], [call_id for _, call_id in asked], functions)
        is_for_player = not turn.calls or (episode.kind.has_own_tools and bool(made))
        step = await episode.player.step(copy.deepcopy(action)) if is_for_player else Step()
        return _stepped(step, action, observations, len(turn.calls), num_bad)

    async def _answer_agent(
        self, action: Message, player: AgentPlayer, episode: _Episode, request: Mapping[str, Any]
    ) -> _Done:
        """Hands a turn to an agent, which runs its tools itself. What cannot be read as a call is text."""
        turn = self._parse(action["content"]) if player.parses else Turn(action["content"], ())
        name = player.name_of_turn()
        made = [
            (one, _call_id(episode.seed, name, place)) for place, one in enumerate(turn.calls) if one.problem is None
        ]
        if made:
            action |= {"content": turn.content, "tool_calls": _told_calls(made)}
        tokens = None if request["tokens"] is None else TurnTokens(*request["tokens"])
        step = await player.step(action, tokens, request["expects"])
        done = _stepped(step, action, [], len(turn.calls), len(turn.calls) - len(made))
        if step.prompt is not None:
            done.tools = _tools_of(player)
        return done

    def _parse(self, text: str) -> Turn:
        if self._format is None:
            formats = ", ".join(FORMATS)
            raise Rejected(
                "not_a_step", f"rollout.tool_format must be one of {formats} where there are tools, got auto"
            )
        return parse_turn(text, self._format)

    async def _forget(self, number: int, reason: str | None) -> None:
        """Close an episode. reason: None where it failed. What that raises is in the log only, because what the episode
        was worth is known.
        """
        episode = self._episodes.pop(number, None)
        if episode is not None:
            await self._close(episode, reason)

    async def _close(self, episode: _Episode, reason: str | None) -> None:
        try:
            await episode.player.close(reason)
        except Exception as error:  # noqa: BLE001  user code raises what it likes
            self._failure(error)

    def _failure(self, error: BaseException) -> Failure:
        """Kind and line of an error. The runner is told the traceback of the first of its sort."""
        failure = self._errors.failure(error)
        if self._errors.is_new:
            self._traces.append([*failure, self._errors.trace])
        return failure

    def _packed(self, nonce: str, done: _Done, failure: Failure | None, seconds: float) -> bytes:
        done = done if failure is None else _Done()
        kind, message = failure or (None, None)
        told = {"kind": kind, "message": message and one_line(message), "seconds": seconds, "traces": self._traces}
        self._traces = []
        return pack({"nonce": nonce, "op": "done", **vars(done), **told})

    def _reply(self, message: Mapping[str, Any]) -> None:
        write_frame(self._replies, pack(message))


def _stepped(step: Step, action: Message, observations: list[Message], num_calls: int, num_bad: int) -> _Done:
    """What a turn came to. observations: answers of tools, which come first."""
    if number_of(step.done) not in (0.0, 1.0):
        raise Rejected("not_a_step", f"step gave done {short(step.done)}, it must be True or False")
    said, prompt = checked_observations(step.messages), None
    if step.prompt is not None:
        prompt = checked_prompt(step.prompt, "step")
        if said:
            raise Rejected("not_a_step", "step gave messages and a prompt, and the policy reads the prompt only")
    sequence = step.sequence
    if sequence is not None:
        if prompt is not None:
            raise Rejected("not_a_step", "step gave a prompt and a sequence, and a prompt begins another sequence")
        if type(sequence) is not int or sequence < 0:
            raise Rejected("not_a_step", f"step gave the sequence {short(sequence)}, it must be a number from 0")
    messages = observations + said
    reward, metrics = _reward(step.reward), checked_metrics(step.metrics)
    return _Done(
        messages, action, reward, bool(step.done), metrics, num_calls, num_bad, prompt=prompt, sequence=sequence
    )


def _told_calls(calls: Sequence[tuple[Call, str]]) -> list[dict[str, Any]]:
    """The field `tool_calls` of a turn. calls: with their ids."""
    return [
        {"type": "function", "id": call_id, "function": {"name": one.name, "arguments": copy.deepcopy(one.arguments)}}
        for one, call_id in calls
    ]


def _tools_of(player: Player) -> list[dict[str, Any]] | None:
    return player.tools if isinstance(player, AgentPlayer) else None


def _reward(value: Any) -> float | None:
    reward = as_reward(value)
    if reward is not None and abs(reward) > MAX_REWARD:
        raise Rejected("out_of_range", f"gave the reward {reward:g}, it must be within {MAX_REWARD:g} of 0")
    return reward


def _call_id(seed: int, turn: int | str, place: int) -> str:
    """Nine letters and digits, as some chat templates want them, which follow from the episode."""
    return hashlib.blake2b(f"{seed} {turn} {place}".encode(), digest_size=8).hexdigest()[:9]


if __name__ == "__main__":
    main()
