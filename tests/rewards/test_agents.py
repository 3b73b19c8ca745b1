"""Agents with a loop of their own: the real client of openai, against a worker that answers as the policy would."""

import json
import pathlib
import time
from collections.abc import Iterator

import httpx
import pytest

from rewards.environment_runner import EnvironmentRunner
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
    bad = ask(runner, 0, "step", "<tool_call>{]</tool_call>")
    assert (bad.done, bad.reward, bad.num_bad_tool_calls) == (True, 1.7, 1)
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
        ({"messages": []}, "messages", "must be a list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "must be text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages", "tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages", "tool_calls of a message must be a list"),
        ({"messages": messages, "tools": [1]}, "tools", "list of functions"),
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
