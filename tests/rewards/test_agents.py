"""Agents with a loop of their own: the real client of openai, against a worker that answers as the policy would."""

import json
import pathlib
import time
from collections.abc import Iterator

import httpx
import pytest

from rewards.environment import TurnTokens
from rewards.environment_replies import asked_digest
from rewards.environment_runner import EnvironmentReply, EnvironmentRunner
from tests.helpers.environments import ask
from tests.helpers.environments import start as start_runner

AGENTS = '''
import asyncio

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


async def chat(base_url, api_key, messages, **more):
    import openai  # here, because it takes a second, and most workers here do not need it
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    return await client.chat.completions.create(model="policy", messages=messages, temperature=0.1, **more)


async def adds(base_url, row, api_key, seed=None):
    """Runs what the policy calls, and tells how often it was asked."""
    messages = [{"role": "user", "content": row["question"]}]
    for turn in range(9):
        answer = await chat(base_url, api_key, messages, tools=[TOOL])
        choice = answer.choices[0]
        messages.append(choice.message.model_dump(exclude_none=True))
        if choice.finish_reason != "tool_calls":
            return turn + seed / 10
        for call in choice.message.tool_calls:
            result = str(sum(__import__("json").loads(call.function.arguments).values()))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


async def forgets(base_url, row, **more):
    """Its second call goes on, the third one has another history, the fourth other tools; then two at a time."""
    first = [{"role": "user", "content": "one"}]
    said = (await chat(base_url, more["api_key"], first)).choices[0].message.content
    two = [{"type": "text", "text": "two"}]
    second = [*first, {"role": "assistant", "content": said}, {"role": "user", "content": two}]
    stream = await chat(base_url, more["api_key"], second, stream=True)
    pieces = [piece.choices[0] async for piece in stream]
    assert pieces[-1].finish_reason == "stop"
    said = "".join(piece.delta.content or "" for piece in pieces)
    third = [{"role": "system", "content": f"it said {said}"}, {"role": "user", "content": "three"}]
    await chat(base_url, more["api_key"], third)
    await chat(base_url, more["api_key"], third, tools=[TOOL], tool_choice="none")
    both = [chat(base_url, more["api_key"], [{"role": "user", "content": name}]) for name in "ab"]
    answers = [answer.choices[0].message.content for answer in await asyncio.gather(*both)]
    return float(answers == ["to a", "to b"])


async def careful(base_url, row, api_key):
    await chat(base_url, api_key, [{"role": "user", "content": "go"}])
    try:
        await chat(base_url, api_key, [{"role": "user", "content": "more"}])
    except Exception as error:
        assert error.code == "episode_over", error
        return 0.25


async def careless(base_url, row, api_key):
    await chat(base_url, api_key, [{"role": "user", "content": "go"}])
    try:
        await chat(base_url, api_key, [{"role": "user", "content": "more"}])
    finally:
        if row.get("breaks"):
            raise KeyError("mine")


async def impatient(base_url, row, api_key):
    """Gives its first call up, and makes it again."""
    import httpx
    go, gone = [__import__("pathlib").Path(row[name]) for name in ("go", "gone")]
    messages = [{"role": "user", "content": "go"}]
    first = asyncio.ensure_future(chat(base_url, api_key, messages))
    while not go.exists():
        await asyncio.sleep(0.01)
    first.cancel()
    async with httpx.AsyncClient() as client:
        await client.get(f"{base_url}/models")  # meanwhile the server hears that the client is gone
    gone.touch()
    said = (await chat(base_url, api_key, messages)).choices[0].message.content
    await chat(base_url, api_key, [*messages, {"role": "assistant", "content": said}, *messages])
    return 0.5


async def interleaves(base_url, row, api_key):
    """Two chats of one client: in turn, and then both at one time, each after so many seconds."""
    import openai
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    chats = {name: [{"role": "user", "content": name}] for name in "ab"}
    used = []

    async def ask(name, seconds=0.0):
        await asyncio.sleep(seconds)
        answer = await client.chat.completions.create(model="policy", messages=chats[name])
        used.append((answer.usage.total_tokens, answer.choices[0].finish_reason))
        chats[name] += [answer.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "on"}]

    for name in "abab":
        await ask(name)
    await asyncio.gather(*[ask(name, seconds) for name, seconds in row["seconds"].items()])
    return float(used == [(5, "length")] + [(5, "stop")] * 5)


async def leaves_a_task(base_url, row, api_key):
    """A task that it starts wants to end the process, in the middle of a call."""
    async def end():
        await asyncio.sleep(0.05)
        raise SystemExit(3)

    task = asyncio.create_task(end())
    await chat(base_url, api_key, [{"role": "user", "content": "go"}])
    if row.get("awaits"):
        await task
    return 0.75


async def exits(base_url, row, api_key):
    await chat(base_url, api_key, [{"role": "user", "content": "go"}])
    raise SystemExit(3)


async def silent(base_url, row):
    return 1.0


async def hangs(base_url, row, api_key):
    try:
        await chat(base_url, api_key, [{"role": "user", "content": base_url}])
    except Exception as error:
        print(error)


def plain(base_url, row, api_key):
    import openai
    client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages = [{"role": "user", "content": "go"}]
    for said in ("more", "still more"):
        answer = client.chat.completions.create(model="policy", messages=messages)
        messages += [answer.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": said}]
    if row.get("breaks"):
        raise SystemExit(3)
    return len(messages) / 10


number = 3


async def demanding(base_url, budget):
    return 1.0
'''
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


@pytest.fixture(scope="module")
def agents(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("agents") / "agents.py"
    path.write_text(AGENTS)
    return path


def start(agents: pathlib.Path, *names: str, log_path: pathlib.Path | None = None) -> EnvironmentRunner:
    environments = {name: f"agent:{agents}:{name}" for name in names}
    return start_runner(environments, step_timeout_seconds=30.0, tool_format="hermes", log_path=log_path)


@pytest.fixture(scope="module")
def runner(agents) -> Iterator[EnvironmentRunner]:
    with start(
        agents,
        "adds",
        "forgets",
        "careful",
        "careless",
        "exits",
        "impatient",
        "hangs",
        "plain",
        "interleaves",
        "leaves_a_task",
        log_path=agents.with_suffix(".log"),
    ) as runner:
        yield runner


def test_an_agent_asks_runs_its_tools_and_gives_the_reward(runner):
    assert {*runner.forms.values()} == {"agent"}
    begun = ask(runner, 0, "begin", {"environment": "adds", "question": "1 + 2?"}, 7)
    assert begun.messages == [{"role": "user", "content": "1 + 2?"}]
    assert [tool["function"]["name"] for tool in begun.tools] == ["add"]
    called = ask(runner, 0, "step", f"let me see {CALL}")
    (call,) = called.action["tool_calls"]
    assert (called.action["content"], call["function"]) == ("let me see", json.loads(CALL[11:-12]))
    assert called.messages == [{"role": "tool", "tool_call_id": call["id"], "content": "3"}]
    assert (called.num_tool_calls, called.num_bad_tool_calls, called.prompt, called.tools) == (1, 0, None, None)
    again = ask(runner, 0, "step", f"once more {CALL}")
    assert again.action["tool_calls"][0]["id"] != call["id"]
    for episode, seed in ((1, 7), (2, 8)):
        ask(runner, episode, "begin", {"environment": "adds", "question": "1 + 2?"}, seed)
        (other,) = ask(runner, episode, "step", f"let me see {CALL}").action["tool_calls"]
        assert (other["id"] == call["id"]) == (seed == 7), "ids follow from the seed and from what was said"
        ask(runner, episode, "finish", "max_turns")
    bad = ask(runner, 0, "step", "<tool_call>{]</tool_call>")
    assert (bad.done, bad.reward, bad.num_bad_tool_calls) == (True, 2.7, 1)
    assert bad.action == {"role": "assistant", "content": "<tool_call>{]</tool_call>"}
    assert ask(runner, 0, "finish", "done").failure is None


def test_a_call_with_another_history_or_other_tools_begins_again_and_calls_at_one_time_are_answered_in_turn(runner):
    ask(runner, 0, "begin", {"environment": "forgets"}, 1)
    second = ask(runner, 0, "step", "first")
    assert (second.messages, second.prompt) == ([{"role": "user", "content": "two"}], None)
    third = ask(runner, 0, "step", "second")
    assert third.messages == []
    assert [message["content"] for message in third.prompt] == ["it said second", "three"]
    assert third.tools == []
    fourth = ask(runner, 0, "step", "third")
    assert fourth.prompt == third.prompt
    assert len(fourth.tools) == 1
    one = ask(runner, 0, "step", CALL)  # no tool may be called, so it is text
    assert "tool_calls" not in one.action
    other = ask(runner, 0, "step", f"to {one.prompt[0]['content']}")
    ended = ask(runner, 0, "step", f"to {other.prompt[0]['content']}")
    assert (ended.done, ended.reward) == (True, 1.0)
    ask(runner, 0, "finish", "done")


def interleaved(runner: EnvironmentRunner, seconds: dict[str, float], expects: list[str]) -> list[EnvironmentReply]:
    """The replies of an episode of two chats. expects: the digests of an earlier one's, or none."""
    known = [*expects, *[None] * (7 - len(expects))]
    replies = [ask(runner, 0, "begin", {"environment": "interleaves", "seconds": seconds}, 1, known[0])]
    for turn in range(6):
        replies.append(ask(runner, 0, "step", f"answer {turn}", TurnTokens(3, 2, not turn), known[turn + 1]))
    assert ask(runner, 0, "finish", "done").failure is None
    return replies


def test_a_call_goes_on_with_any_earlier_sequence_and_calls_at_one_time_come_as_before(runner):
    begun, *replies = interleaved(runner, {"a": 0.0, "b": 0.0}, [])
    on = [{"role": "user", "content": "on"}]
    assert begun.messages == [{"role": "user", "content": "a"}]
    asked = [(reply.prompt, reply.messages, reply.sequence) for reply in replies]
    assert asked[0] == ([{"role": "user", "content": "b"}], [], None)
    assert asked[1:5] == [(None, on, number) for number in (0, 1, 0, 1)]
    assert (replies[-1].done, replies[-1].reward) == (True, 1.0), "answers say what they took and what has cut them"
    digests = [asked_digest(reply) for reply in (begun, *replies)]
    # In whatever order they are made at one time, they come in the order of what they say.
    assert [asked_digest(reply) for reply in interleaved(runner, {"b": 0.0, "a": 0.0}, [])] == digests
    late = [asked_digest(reply) for reply in interleaved(runner, {"a": 0.1, "b": 0.0}, [])]
    assert (late[:4], late[4:6]) == (digests[:4], [asked_digest(EnvironmentReply(0, "step", on)), digests[4]])
    # Played again, they come as they did.
    again = interleaved(runner, {"a": 0.1, "b": 0.0}, digests[:-1])
    assert [asked_digest(reply) for reply in again] == digests


def test_a_task_of_an_agent_that_wants_to_end_the_process_costs_no_other_episode(runner):
    for episode, row in enumerate(({}, {"awaits": True})):
        ask(runner, episode, "begin", {"environment": "leaves_a_task", **row}, 1)
    time.sleep(0.1)
    ended = ask(runner, 0, "step", "text")
    assert (ended.done, ended.reward) == (True, 0.75)
    kind, line = ask(runner, 1, "step", "text").failure
    assert (kind, line.partition(" (")[0]) == (
        "exception",
        "RuntimeError: a task wanted to end the process, with SystemExit(3)",
    )
    assert ask(runner, 0, "finish", "done").failure is None


def test_a_plain_function_asks_with_a_client_that_blocks(runner):
    for episode, row in enumerate(({}, {"breaks": True})):
        begun = ask(runner, episode, "begin", {"environment": "plain", **row}, 1)
        assert begun.messages == [{"role": "user", "content": "go"}]
    for episode in range(2):
        assert ask(runner, episode, "step", "first").messages == [{"role": "user", "content": "more"}]
    ended = ask(runner, 0, "step", "second")
    assert (ended.done, ended.reward) == (True, 0.5)
    ask(runner, 0, "finish", "done")
    kind, line = ask(runner, 1, "step", "second").failure
    assert (kind, line[:47]) == ("exception", "RuntimeError: the agent ended with SystemExit(3")
    ask(runner, 1, "finish", "failed")


def test_at_a_limit_an_agent_is_told_so_and_may_still_give_a_reward(runner):
    ask(runner, 0, "begin", {"environment": "careful"}, 1)
    assert not ask(runner, 0, "step", "text").done
    ended = ask(runner, 0, "finish", "max_turns")
    assert (ended.reward, ended.failure) == (0.25, None)
    for episode, row in enumerate(({}, {"breaks": True})):
        ask(runner, episode, "begin", {"environment": "careless", **row}, 1)
        ask(runner, episode, "step", "text")
    ended = ask(runner, 0, "finish", "max_turns")
    assert (ended.reward, ended.failure) == (None, None), "the refusal alone has ended it"
    kind, line = ask(runner, 1, "finish", "max_turns").failure
    assert (kind, line) == ("exception", "KeyError: 'mine' (agents.py:60)")


def test_what_is_no_request_and_what_cannot_be_had_is_refused_by_name(runner):
    url = ask(runner, 0, "begin", {"environment": "hangs"}, 1).messages[0]["content"]
    messages = [{"role": "user", "content": "x"}]
    for body, code, rule in (
        ({"messages": messages, "n": 2}, "n", "n must be null or 1"),
        ({"messages": messages, "logprobs": True}, "logprobs", "logprobs must be null or false"),
        ({"messages": messages, "tool_choice": "required"}, "tool_choice", 'null or "auto" or "none"'),
        ({"messages": messages, "response_format": {"type": "json_object"}}, "unsupported", "must be text"),
        ({"messages": []}, "messages", "must be a list of 1 to 10000 messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "must be one of text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages", "tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages", "tool_calls must be a list"),
        ({"messages": messages, "tools": [1]}, "tools", "list of objects"),
        ([], "json", "a JSON object"),
    ):
        refused = httpx.post(f"{url}/chat/completions", json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (400, code), error
        assert rule in error["message"]
    assert httpx.post(f"{url}/chat/completions", content=b"{").json()["error"]["code"] == "json"
    assert httpx.post(f"{url}/chat/completions", content=b" " * (1 << 20) + b"{}").status_code == 413
    assert httpx.post(f"{url}/embeddings", json={}).status_code == 404
    assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "policy"
    other = url.replace("/at/", "/at/0")
    gone = httpx.post(f"{other}/chat/completions", json={"messages": messages})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "episode_over")
    assert ask(runner, 0, "finish", "failed").failure is None


def test_a_call_that_its_client_gave_up_and_makes_again_is_one_turn(runner, tmp_path):
    go, gone = tmp_path / "go", tmp_path / "gone"
    ask(runner, 0, "begin", {"environment": "impatient", "go": str(go), "gone": str(gone)}, 1)
    go.touch()
    while not gone.exists():
        time.sleep(0.01)
    second = ask(runner, 0, "step", "text")
    assert (second.prompt, second.messages) == (None, [{"role": "user", "content": "go"}])
    ended = ask(runner, 0, "step", "more")
    assert (ended.done, ended.reward) == (True, 0.5)
    assert ask(runner, 0, "finish", "done").failure is None


def test_an_agent_that_exits_costs_its_episode_and_not_its_worker(runner):
    for episode, name in enumerate(("careful", "exits")):
        ask(runner, episode, "begin", {"environment": name}, 1)
    kind, line = ask(runner, 1, "step", "text").failure
    assert (kind, line.partition(" (")[0]) == (
        "exception",
        "RuntimeError: the agent wanted to end the process, with SystemExit(3)",
    )
    assert "(agents.py:" in line
    ask(runner, 0, "step", "text")
    assert ask(runner, 0, "finish", "max_turns").reward == 0.25


def test_what_is_no_agent_is_refused_at_the_start(agents):
    for name, rule in (
        ("number", "rollout.agent"),
        ("demanding", "and it asks for 'budget'; give it a default value"),
        ("missing", "missing"),
    ):
        with pytest.raises(ValueError, match=rule):
            start(agents, name)
    with start(agents, "silent") as runner:
        kind, line = ask(runner, 0, "begin", {"prompt": ""}, 1).failure
        assert kind == "not_a_step"
        assert "returned before it asked the policy" in line
