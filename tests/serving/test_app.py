"""The HTTP interface over a tiny model: what it answers is what the sampler draws, and what it refuses has a name."""

import asyncio
import contextlib
import importlib
import json
import threading
import time

import httpx
import jax
import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.devices.mesh import create_mesh, tree_shardings
from rl.models.config import logical_axes
from rl.models.flavours import create_policy
from rl.sampler.contract import Completion, Request
from rl.sampler.slot_rules import DrawRules
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams
from rl.serving.app import ServerLimits, create_app
from rl.serving.bodies import read_chat
from rl.serving.calls import Calls
from rl.serving.chat import OPENS, Chats, _Content
from rl.serving.completions import Texts
from rl.serving.conversations import Conversations
from rl.serving.engine import Job
from rl.serving.server import open_socket
from tests.helpers.pages import texts
from tests.helpers.tiny_models import noisy_params, tiny_config

TEMPLATE = """\
{%- if tools %}<tools>{{ tools | tojson }} {"name": x, "arguments": y} in <tool_call></tool_call></tools>{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|eos|>{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
LIMIT, TOP = 24, 3
# The part of docs/serving.md that serves from inside a program: what is tested here is what it makes.
BLOCK = texts("docs/serving.md", "python")[-1]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


class Served:
    """A tiny model behind the interface."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        config = load_config(None)
        mesh = create_mesh(config.mesh, jax.devices()[:1])
        policy = create_policy(tiny_config("qwen3", vocab_size=tokenizer.vocab_size), pure_nnx=True)
        params = noisy_params(policy.config)
        shardings = tree_shardings(params, logical_axes(policy.config), mesh, config.mesh.rules)

        def decode(token_ids) -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=False)

        self.sampler = Sampler(policy, mesh, shardings, rules=config.mesh.rules, decode_text=decode)
        self.params = jax.device_put(params, shardings)
        self.call = SamplingParams(LIMIT, eos_ids=tuple(tokenizer.eos_ids), top_logprobs=TOP)
        names = {"sampler": self.sampler, "sampling": self.call, "params": self.params, "tokenizer": tokenizer}
        exec(BLOCK, names)
        self.engine, self.finished, app = names["engine"], names["finished"], names["app"]
        assert self.engine.limits.max_tokens == LIMIT
        assert TestClient(app).get("/v1/models").json()["data"][0]["id"] == "policy"
        self.limits = ServerLimits(max_body_bytes=20_000, request_seconds=600, body_seconds=0.5)
        self.app = create_app(self.engine, tokenizer, "tiny", self.limits, on_call=self.finished.append)
        self.client = TestClient(self.app)

    def post(self, path: str, status: int = 200, **body):
        response = self.client.post(path, json=body)
        assert response.status_code == status, response.text
        return response.json()

    def stream(self, path: str, **body) -> list:
        response = self.client.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.text.split("\n\n")
        assert events.pop() == ""
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def drawn(self, prompt_ids, seed: int, limit: int = LIMIT, sample: int = 0, **rules):
        """The completion of a call of the sampler."""
        request = Request(0, 0, sample, limit, seed, rules=DrawRules(**rules))
        return dict(self.sampler.stream(self.params, [prompt_ids], [request], self.call, jax.random.key(0)))[0]

    def wait_until(self, holds) -> None:
        for _ in range(60_000):
            if holds():
                return
            time.sleep(0.01)
        raise AssertionError("it does not come to that")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE.replace("<|eos|>", load_tokenizer("byte").backend.eos_token))
    made = Served(load_tokenizer("byte", path))
    yield made
    made.engine.close()
    assert made.engine.drain(600)


def joined(parts) -> list:
    return [value for part in parts for value in part]


def close(found, expected) -> None:
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), atol=1e-5, rtol=0)


def test_texts_are_those_of_the_sampler_with_the_same_seed_and_rules(served):
    tokenizer, prompts = served.tokenizer, ["ab", "c d e"]
    rules = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.2}
    rules |= {"frequency_penalty": 0.1, "presence_penalty": 0.2}
    asked = {"seed": 5, "max_tokens": 9, "n": 2, "logprobs": 2, "return_token_ids": True, **rules}
    answer = served.post("/v1/completions", model="tiny", prompt=prompts, **asked)
    by_ids = served.post("/v1/completions", prompt=[tokenizer.encode(text) for text in prompts], **asked)
    assert by_ids["choices"] == answer["choices"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    num_drawn = 0
    for choice in answer["choices"]:
        prompt, sample = divmod(choice["index"], 2)
        ids = tokenizer.encode(prompts[prompt])
        expected = served.drawn(ids, 5, 9, sample, **rules)
        num_drawn += len(expected.token_ids)
        assert choice["token_ids"] == expected.token_ids.tolist()
        assert choice["prompt_token_ids"] == ids
        assert choice["text"] == tokenizer.decode(expected.token_ids)
        assert choice["finish_reason"] == {"eos": "stop"}.get(expected.finish_reason, expected.finish_reason)
        close(choice["logprobs"]["token_logprobs"], expected.policy_logprobs)
        assert [len(top) in (1, 2, 3) for top in choice["logprobs"]["top_logprobs"]] == [True] * len(expected.token_ids)
    usage = answer["usage"]
    num_prompt = sum(len(tokenizer.encode(text)) for text in prompts)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_prompt, num_drawn)
    assert usage["total_tokens"] == num_prompt + num_drawn


def test_a_stream_is_the_answer_in_pieces(served):
    asked = {"prompt": ["ab", "xyz"], "seed": 3, "max_tokens": 15, "n": 2, "logprobs": 1, "return_token_ids": True}
    whole = served.post("/v1/completions", **asked)
    events = served.stream("/v1/completions", **asked, stream_options={"include_usage": True})
    last = events.pop()
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len(events) > 4
    assert all(event["usage"] is None for event in events)
    for choice in whole["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert joined(piece.get("token_ids", []) for piece in own) == choice["token_ids"]
        parts = [piece["logprobs"] for piece in own if piece["logprobs"]]
        for name, values in choice["logprobs"].items():
            assert joined(part[name] for part in parts) == values
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]


def test_an_echoed_prompt_has_the_log_probs_of_the_weights_and_the_best_one_is_the_very_number(served):
    ids = [*served.tokenizer.encode("a b"), *np.random.default_rng(0).integers(0, 250, 60).tolist()]
    likeliest = served.drawn(ids, 0, 8, temperature=0).token_ids.tolist()
    ids += likeliest  # some tokens are the likeliest
    asked = {
        "prompt": [ids, ids[:9]],
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
        "return_tokens_as_token_ids": True,
    }
    expected = served.sampler.prompt_logprobs(served.params, [ids], 1.0, None)[0]
    for max_tokens in (0, 1):
        answer = served.post("/v1/completions", max_tokens=max_tokens, **asked)
        logprobs = answer["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert len(logprobs["token_logprobs"]) == len(ids) + max_tokens
        assert len(answer["choices"][1]["logprobs"]["token_logprobs"]) == 9 + max_tokens
        close(logprobs["token_logprobs"][1 : len(ids)], expected)
        is_best = [
            own == max(top.values())
            for own, top in list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[1:]
        ]
        assert is_best[len(ids) - 1 - len(likeliest) : len(ids) - 1] == [True] * len(likeliest)
        assert not all(is_best)
        assert logprobs["tokens"][-1 - max_tokens] == f"token_id:{ids[-1]}"
        assert answer["choices"][0]["text"].startswith("a b")
    bos, eos = served.tokenizer.backend.bos_token, served.tokenizer.backend.eos_token
    for prompt in (f"a\u00e9{eos}\u20acb", served.tokenizer.encode("\u00e9 b")):
        (choice,) = served.post("/v1/completions", prompt=prompt, echo=True, logprobs=0, max_tokens=5)["choices"]
        text = choice["text"]
        told = list(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True))
        assert told[0] == (bos, 0), "what the server puts there is no text of the client's"
        assert all(text[offset] == token for token, offset in told if len(token) == 1 and token != "\ufffd")
        assert {text[offset] for token, offset in told[:-5] if token == "\ufffd"} <= {*"\u00e9\u20ac"}
        assert all(text[offset:].startswith(eos) for token, offset in told[:-5] if token == eos)
        assert [offset for token, offset in told[1:-5] if token == "b"] == [text.index("b")]
        assert told[-5][1] == (len(prompt) if isinstance(prompt, str) else len("\u00e9 b"))
    streamed = served.stream("/v1/completions", max_tokens=1, **asked)
    parts = [
        event["choices"][0]["logprobs"]["token_logprobs"] for event in streamed if not event["choices"][0]["index"]
    ]
    assert joined(parts) == logprobs["token_logprobs"]


def test_stop_strings_end_texts_before_them_and_streams_never_show_their_beginning(served):
    tokenizer = served.tokenizer
    plain = served.post("/v1/completions", prompt="ab", seed=8, ignore_eos=True, max_tokens=LIMIT)["choices"][0]["text"]
    stop = next(plain[i : i + 2] for i in range(8, len(plain) - 1) if plain[i : i + 2].isascii())
    asked = {"prompt": "ab", "seed": 8, "ignore_eos": True, "max_tokens": LIMIT, "stop": [stop, "\x00\x00\x00"]}
    choice = served.post("/v1/completions", **asked, return_token_ids=True)["choices"][0]
    assert choice["text"] == plain[: plain.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert stop in tokenizer.decode(choice["token_ids"], skip_special_tokens=False)
    kept = served.post("/v1/completions", **asked, include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == choice["text"] + stop
    pieces = [event["choices"][0]["text"] for event in served.stream("/v1/completions", **asked)]
    assert "".join(pieces) == choice["text"]


def test_a_chat_is_the_templates_prompt_and_what_is_drawn(served):
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    asked = {"messages": messages, "seed": 4, "max_completion_tokens": 10, "n": 2, "logprobs": True, "top_logprobs": 2}
    asked |= {"return_token_ids": True}
    served.finished.clear()
    answer = served.post("/at/row-3/v1/chat/completions", **asked)
    told = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    ids = served.tokenizer.encode_chat(told)
    assert answer["prompt_token_ids"] == ids
    assert served.post("/tokenize", messages=messages)["tokens"] == ids
    for sample, choice in enumerate(answer["choices"]):
        expected = served.drawn(ids, 4, 10, sample)
        assert choice["token_ids"] == expected.token_ids.tolist()
        assert choice["message"]["content"] == served.tokenizer.decode(expected.token_ids)
        content = choice["logprobs"]["content"]
        close([entry["logprob"] for entry in content], expected.policy_logprobs)
        assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(expected.token_ids)
        assert all(entry["bytes"] in (None, list(entry["token"].encode())) for entry in content)
    (call,) = served.finished
    assert (call.key, call.messages, call.prompt_ids) == ("row-3", told, [ids, ids])
    assert [c.token_ids.tolist() for c in call.completions] == [choice["token_ids"] for choice in answer["choices"]]
    assert call.answers == [choice["message"] for choice in answer["choices"]]
    events = served.stream("/v1/chat/completions", **asked, stream_options={"include_usage": True})
    assert events[0]["prompt_token_ids"] == ids
    assert not any("prompt_token_ids" in event for event in events[1:])
    usage = events.pop()["usage"]
    assert usage["completion_tokens"] == answer["usage"]["completion_tokens"]
    for choice in answer["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"].get("content", "") for piece in own) == choice["message"]["content"]
        assert joined(piece.get("token_ids", []) for piece in own) == choice["token_ids"]
        entries = joined(piece["logprobs"]["content"] for piece in own if piece["logprobs"])
        assert entries == choice["logprobs"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_a_prompt_that_goes_on_from_an_earlier_answer_reads_only_what_follows(served):
    counts, asked = served.engine.counts, {"max_tokens": 8, "return_token_ids": True, "ignore_eos": True}
    ids = served.tokenizer.encode("a conversation of many words")
    first = served.post("/v1/completions", prompt=ids, seed=1, **asked)["choices"][0]["token_ids"]
    longer = [*ids, *first, *served.tokenizer.encode("more", add_bos=False)]
    before = counts.num_reused_tokens, counts.num_going_on
    rules = {"frequency_penalty": 0.5, "min_tokens": 3}
    second = served.post("/v1/completions", prompt=longer, seed=2, **asked, **rules)
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": len(ids) + len(first)}
    assert (counts.num_reused_tokens - before[0], counts.num_going_on - before[1]) == (len(ids) + len(first), 1)
    expected = served.drawn(longer, 2, 8, frequency_penalty=0.5, min_completion_length=3, ends_at_eos=False)
    assert second["choices"][0]["token_ids"] == expected.token_ids.tolist()
    for seed in range(3):  # others take its place
        served.post("/v1/completions", prompt=[seed, 1, 2], seed=seed, max_tokens=2)
    third = served.post("/v1/completions", prompt=longer, seed=2, **asked, **rules)
    assert third["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert third["choices"][0]["token_ids"] == expected.token_ids.tolist()


def test_a_chat_that_goes_on_from_a_remembered_one_keeps_the_tokens_that_were_drawn(served):
    tokenizer = served.tokenizer
    client = TestClient(create_app(served.engine, tokenizer, "tiny", served.limits, most_conversations=2))
    eos = tokenizer.eos_ids[0]

    def chat(messages, path="/v1/chat/completions", **more) -> dict:
        body = {"messages": messages, "max_tokens": 7, "return_token_ids": True, **more}
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    asked = [{"role": "user", "content": "a"}]
    first = chat(asked, seed=6, ignore_eos=True)
    (choice,) = first["choices"]
    longer = [*asked, {"role": "assistant", "content": choice["message"]["content"]}, {"role": "user", "content": "b"}]
    rendered = tokenizer.encode_chat(longer)
    drawn = [*first["prompt_token_ids"], *choice["token_ids"]]
    expected = [*drawn, *([] if drawn[-1] == eos else [eos]), *tokenizer.encode("[user]b", add_bos=False), eos]
    expected += tokenizer.encode("[assistant]", add_bos=False)
    assert expected != rendered, "bytes that are no text would be read as others"
    second = chat(longer, seed=7)
    assert second["prompt_token_ids"] == expected
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == len(drawn)
    assert chat(longer, "/at/other/v1/chat/completions")["prompt_token_ids"] == rendered, "a KEY shares nothing"
    assert chat(longer, tools=[TOOL])["prompt_token_ids"] != expected, "with other tools it is another chat"
    for word in "cd":
        chat([{"role": "user", "content": word}])
    assert chat(longer)["prompt_token_ids"] == rendered, "the oldest are forgotten"


def test_calls_of_tools_are_read_from_the_text_and_may_be_begun(served):
    messages = [{"role": "user", "content": "2 + 3?"}]
    asked = {"messages": messages, "tools": [TOOL], "seed": 1, "max_tokens": 6, "return_token_ids": True}
    plain = served.tokenizer.encode_chat(messages)
    with_tools = served.tokenizer.encode_chat(messages, [TOOL])
    assert served.post("/v1/chat/completions", **asked, tool_choice="none")["prompt_token_ids"] == plain
    assert served.post("/v1/chat/completions", **asked)["prompt_token_ids"] == with_tools
    named = {"type": "function", "function": {"name": "add"}}
    answer = served.post("/v1/chat/completions", **asked, tool_choice=named)
    begun = '<tool_call>\n{"name": "add", "arguments": '
    assert answer["prompt_token_ids"] == [*with_tools, *served.tokenizer.encode(begun, add_bos=False)]
    assert answer["choices"][0]["message"]["content"].startswith(begun)
    # The policy of this test calls nothing, so what it would have drawn is given.
    call = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'
    made = Chats(Calls(served.engine, 60), served.tokenizer, "tiny", lambda call: None)
    prepared = asyncio.run(made.prepare(read_chat(asked, TOP), ""))
    token_ids = np.array([*served.tokenizer.encode(f"so {call}{call}", add_bos=False), *served.tokenizer.eos_ids])
    zeros = np.zeros(len(token_ids), np.float32)
    none = np.zeros((len(token_ids), 0))
    drawn = Completion(0, 0, token_ids, zeros, zeros, "eos", int(token_ids[-1]), none, none)
    message, finish_reason = made._message(prepared, drawn)
    assert finish_reason == "tool_calls"
    assert message["content"] == "so"
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "add", "arguments": '{"a": 2}'}] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "5"} for call in message["tool_calls"]]
    message = {name: value for name, value in message.items() if name != "refusal"}
    again = served.post("/tokenize", messages=[*messages, message, *results], tools=[TOOL])["tokens"]
    assert served.tokenizer.decode(again).count(call) == 2


HOSTILE = [
    ({"content": b"{"}, 400, "must be JSON"),
    ({"content": b"[" * 100_000}, 413, "at most 20000 bytes"),
    ({"content": b"[" * 15_000}, 400, "must be JSON"),
    ({"content": b'{"prompt": "a", "seed": ' + b"9" * 9000 + b"}"}, 400, "must be JSON"),
    ({"content": b'{"prompt": "a", "temperature": NaN}'}, 400, "NaN is no number"),
    ({"content": b"\xff\xfe"}, 400, "must be JSON"),
    ({"json": []}, 400, "must be a JSON object"),
    ({"json": {}}, 400, "prompt must be"),
    ({"json": {"prompt": "\ud800"}}, 400, "prompt must be valid Unicode"),
    ({"json": {"prompt": ""}}, 200, ""),
    ({"json": {"prompt": []}}, 400, "prompt must be"),
    ({"json": {"prompt": [[]]}}, 400, "prompt must be"),
    ({"json": {"prompt": ["a", [1]]}}, 400, "prompt must be"),
    ({"json": {"prompt": [1, True]}}, 400, "prompt must be"),
    ({"json": {"prompt": [10**6]}}, 400, "prompt must have token ids in"),
    ({"json": {"prompt": [-1]}}, 400, "prompt must be"),
    ({"json": {"prompt": "a" * 300}}, 400, "at most 256 tokens"),
    ({"json": {"prompt": "a", "max_tokens": 10**6}}, 400, f"max_tokens must be at most {LIMIT} here"),
    ({"json": {"prompt": "a", "max_tokens": 0}}, 400, "max_tokens must be"),
    ({"json": {"prompt": "a", "n": 1000}}, 400, "n must be"),
    ({"json": {"prompt": "a", "n": 11}}, 400, "n must be at most 10 here"),
    ({"json": {"prompt": ["a"] * 11}}, 400, "prompt must be at most 10 here"),
    ({"json": {"prompt": ["a"] * 6, "n": 2}}, 400, "n times the prompts must be at most 10 here"),
    ({"json": {"prompt": ["a"] * 11, "echo": True, "max_tokens": 0, "logprobs": 0}}, 400, "prompt must be at most 10"),
    ({"json": {"prompt": ["a"] * 6, "echo": True, "logprobs": 0}}, 400, "with echo and logprobs, must be at most 10"),
    ({"json": {"prompt": "a", "temperature": 1e-30}}, 400, "temperature must be"),
    ({"json": {"prompt": "a", "temperature": "1"}}, 400, "temperature must be"),
    ({"json": {"prompt": "a", "top_p": 0}}, 400, "top_p must be"),
    ({"json": {"prompt": "a", "stop": ["x"] * 17}}, 400, "stop must be"),
    ({"json": {"prompt": "a", "stop": ""}}, 400, "stop must be"),
    ({"json": {"prompt": "a", "logprobs": 4}}, 400, "logprobs must be"),
    ({"json": {"prompt": "a", "min_tokens": 20}}, 400, "min_tokens must be at most the limit of tokens, 16"),
    ({"json": {"prompt": "a", "response_format": {"type": "json_object"}}}, 400, "response_format is not supported"),
    ({"json": {"prompt": "a", "logit_bias": {"5": 1}}}, 400, "logit_bias is not supported"),
    ({"json": {"prompt": "a", "best_of": 2}}, 400, "best_of must be"),
    ({"json": {"prompt": "a", "wat": 2}}, 400, "'wat' is no field"),
    ({"json": {"prompt": "a", "\ud800": 2}}, 400, "is no field"),
    ({"json": {"prompt": "a", "model": "gpt-4"}}, 404, "the model here is 'tiny'"),
    ({"content": b'{"prompt": "a"}', "headers": {"content-type": "text/plain"}}, 415, "Content-Type"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_what_cannot_be_is_refused_by_its_name(served, case):
    given, status, words = HOSTILE[case]
    if "json" in given:
        given = {"content": json.dumps(given["json"]).encode()}
    headers = {"content-type": "application/json", **given.get("headers", {})}
    response = served.client.post("/v1/completions", content=given["content"], headers=headers)
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert words in error["message"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user"}, "content must be"),
        ({"role": "robot", "content": "a"}, "role must be one of"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "type must be one of text"),
        ({"role": "user", "content": "a", "tool_calls": []}, "tool_calls must be left out"),
        ({"role": "assistant", "content": "a"}, "the beginning of an answer alone"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments must be"),
    ],
)
def test_a_message_that_is_none_is_refused_by_its_name(served, message, words):
    error = served.post("/v1/chat/completions", 400, messages=[message])["error"]
    assert words in error["message"]


def test_what_others_serve_is_refused_by_name_and_the_rest_is_told(served):
    client = served.client
    for path, word in (
        ("/v1/embeddings", "no embeddings"),
        ("/v1/responses", "chat/completions"),
        ("/nowhere", "Not Found"),
    ):
        response = client.post(path, json={})
        assert response.status_code == 404
        assert word in response.json()["error"]["message"]
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["max_model_len"] == 256 + LIMIT
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    ids = served.tokenizer.encode("abc")
    assert served.post("/tokenize", prompt="abc") == {"count": len(ids), "max_model_len": 256 + LIMIT, "tokens": ids}
    served.post("/v1/completions", prompt="abc", max_tokens=1)
    text = client.get("/metrics").text
    assert 'grpo_requests_total{path="/v1/completions",status="200"}' in text
    assert f"grpo_drawn_tokens_total {float(served.engine.counts.num_drawn_tokens)}" in text


def test_a_full_server_says_so_and_a_fault_is_counted_as_other_answers(served, monkeypatch):
    app = create_app(served.engine, served.tokenizer, "tiny")
    asked = {"prompt": "abc", "n": 10, "ignore_eos": True, "max_tokens": LIMIT}

    async def ask_twice() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            answers = [client.post("/v1/completions", json=asked) for _ in range(2)]
            return sorted(answer.status_code for answer in await asyncio.gather(*answers))

    assert asyncio.run(ask_twice()) == [200, 429]

    async def broken(*arguments) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Texts, "prepare", broken)
    client = TestClient(app, raise_server_exceptions=False)
    response = client.post("/v1/completions", json=asked)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "fault")
    assert client.get("/nowhere").status_code == 404
    text = client.get("/metrics").text
    for path, status in (("/v1/completions", 200), ("/v1/completions", 429), ("/v1/completions", 500), ("other", 404)):
        assert f'grpo_requests_total{{path="{path}",status="{status}"}} 1.0' in text


def test_a_key_and_the_name_of_the_host_are_asked_for(served):
    app = create_app(served.engine, served.tokenizer, "tiny", api_key="secret", hosts=("localhost",))
    client = TestClient(app, base_url="http://localhost:1234")
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"authorization": b"Bearer wrong\xe9"}).status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
    assert (
        client.get("/v1/models", headers={"authorization": "Bearer secret", "host": "evil.example"}).status_code == 403
    )


def scope(path: str = "/v1/completions") -> dict:
    headers = [(b"content-type", b"application/json")]
    return {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": headers, "http_version": "1.1", "scheme": "http", "server": ("a", 1), "client": ("b", 2),
            "root_path": "", "asgi": {"version": "3.0", "spec_version": "2.3"}}  # fmt: skip


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_away_frees_its_slot(served, streams):
    counts = served.engine.counts
    before, sent = counts.num_cancelled, []

    async def leave() -> None:
        body = {"prompt": "ab", "max_tokens": LIMIT, "ignore_eos": True, "n": 8, "stream": streams}
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            if messages:
                return messages.pop(0)
            while counts.num_drawing == 0:
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message) -> None:
            sent.append(message)

        await served.app(scope(), receive, send)

    asyncio.run(leave())
    served.wait_until(lambda: counts.num_drawing == counts.num_waiting == 0)
    assert counts.num_cancelled - before == 8
    answer = served.post("/v1/completions", prompt="ab", seed=5, max_tokens=4)
    assert answer["choices"][0]["text"]


def test_a_body_that_does_not_come_and_a_request_that_takes_too_long_end(served):
    async def dawdle() -> int:
        sent = []

        async def receive():
            await asyncio.sleep(3600)

        async def send(message) -> None:
            sent.append(message)

        await served.app(scope(), receive, send)
        return sent[0]["status"]

    assert asyncio.run(dawdle()) == 408
    hasty = TestClient(create_app(served.engine, served.tokenizer, "tiny", ServerLimits(request_seconds=0.0)))
    response = hasty.post("/v1/completions", json={"prompt": "ab", "max_tokens": LIMIT, "ignore_eos": True})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": LIMIT, "ignore_eos": True, "stream": True}
    response = hasty.post("/v1/chat/completions", json=body)
    *_, last, end = response.text.split("\n\n")
    assert (response.status_code, end) == (200, ""), "the answer had begun"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert served.engine.counts.num_timeouts > 1


def test_many_requests_leave_nothing_behind(served):
    news, done = {}, threading.Event()

    def tell(items) -> None:
        news.update(items)
        if len(news) == 200:
            done.set()

    rng = np.random.default_rng(0)
    for first in range(200):
        job = Job(rng.integers(0, 250, 5).tolist(), int(rng.integers(1, 4)), DrawRules(), tell, seed=first)
        while True:
            with contextlib.suppress(Exception):
                served.engine.submit([job])
                break
            time.sleep(0.001)
    assert done.wait(600)
    served.engine.forget()
    session = served.engine._session
    served.wait_until(lambda: served.engine.counts.num_parked == 0 and session.num_left == 0)
    schedule = session._schedule
    assert [len(book) for book in (schedule._requests, schedule._prompts, schedule._uses, session._turns)] == [0] * 4
    assert served.engine._num_open == 0


def test_the_engine_takes_other_weights_and_gives_them_back(served):
    asked = {"prompt": "ab", "seed": 5, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
    before = served.post("/v1/completions", **asked)["choices"][0]["token_ids"]
    served.engine.load(None)
    error = served.post("/v1/completions", 503, **asked)["error"]
    assert "no weights" in error["message"]
    served.engine.load(jax.tree.map(lambda array: array * 0.5, served.params))
    assert served.post("/v1/completions", **asked)["choices"][0]["token_ids"] != before
    served.engine.load(served.params)
    assert served.post("/v1/completions", **asked)["choices"][0]["token_ids"] == before


def test_the_client_of_openai_reads_answers_streams_and_errors(served):
    openai = pytest.importorskip("openai", reason="needs the extra judge")
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 2, "max_tokens": 9}
    named = {"type": "function", "function": {"name": "add"}}

    async def ask() -> None:
        http = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__)  # httpx, or httpx2
        http_client = http.AsyncClient(transport=http.ASGITransport(app=served.app))
        client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http_client, max_retries=0)
        async with client:
            whole = await client.chat.completions.create(**chat, logprobs=True, top_logprobs=1)
            stream = await client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
            chunks = [chunk async for chunk in stream]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == whole.choices[0].message.content
            assert chunks[-1].usage == whole.usage
            assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
            raw = await client.chat.completions.with_raw_response.create(**chat)
            assert raw.parse().choices[0].message == whole.choices[0].message
            assert whole._request_id.startswith("req_")
            assert whole._request_id != raw.request_id
            called = await client.chat.completions.create(**chat, tools=[TOOL], tool_choice=named)
            assert called.choices[0].message.content.startswith('<tool_call>\n{"name": "add"')
            texts = await client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, n=2)
            assert len(texts.choices) == 4
            assert [model.id async for model in await client.models.list()] == ["tiny"]
            with pytest.raises(openai.BadRequestError, match="response_format is not supported") as raised:
                await client.chat.completions.create(**chat, response_format={"type": "json_object"})
            assert raised.value.param == "response_format"
            assert raised.value.request_id.startswith("req_")
            with pytest.raises(openai.NotFoundError, match="no embeddings"):
                await client.embeddings.create(model="tiny", input="a")

    asyncio.run(ask())


# A template of Llama's format, in which a call needs no end.
CALLER = """\
{%- for tool in tools or [] %}<|start_header_id|>{{ tool | tojson }} {"name": x, "parameters": y}{% endfor %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{{ "called" if m.tool_calls }}<|eos|>{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""


def calling_params(served):
    """Weights with which `{` follows a space, `}` follows `{`, and `}` or the end of the turn follow `}`, evenly."""
    space, opens, closes = (served.tokenizer.encode(text, add_bos=False)[0] for text in " {}")
    params = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), served.params)
    for place, token in enumerate((space, opens, closes, served.tokenizer.eos_ids[0])):
        params["embed_tokens"]["embedding"][token, place] = 1.0
    mlp = params["layers_0"]["mlp"]
    for place, following in enumerate(((1,), (2,), (2, 3))):  # the MLP turns each token into those that follow it
        mlp["gate_proj"]["kernel"][place, place] = mlp["up_proj"]["kernel"][place, place] = 1.0
        mlp["down_proj"]["kernel"][place, following] = 10.0
    params["layers_0"]["post_attention_layernorm"]["scale"][:] = 1.0
    params["norm"]["scale"][:] = 10.0
    return params


@contextlib.contextmanager
def listening(app):
    """The URL of an application that is served on a socket."""
    opened = open_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_a_call_of_a_tool_reaches_the_clients_of_openai_whole_and_in_pieces(served, tmp_path):
    openai = pytest.importorskip("openai", reason="needs the extra judge")
    (tmp_path / "chat.jinja").write_text(CALLER.replace("<|eos|>", served.tokenizer.backend.eos_token))
    tokenizer = load_tokenizer("byte", tmp_path / "chat.jinja")
    messages = [{"role": "user", "content": "2 + 3?"}]
    asked = {"model": "tiny", "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}}
    served.engine.load(
        jax.device_put(calling_params(served), jax.tree.map(lambda array: array.sharding, served.params))
    )

    def is_call(choice) -> bool:
        return choice.finish_reason == "tool_calls" and choice.message.content is None

    def check(message, finish_reason) -> None:
        (call,) = message.tool_calls
        assert (finish_reason, message.content or None, call.type) == ("tool_calls", None, "function")
        assert (call.function.name, call.function.arguments) == ("add", "{}")

    def joined_calls(chunks) -> list[tuple]:
        deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
        return [(delta.index, delta.id, delta.function.name, delta.function.arguments) for delta in deltas]

    async def ask_async(url: str, seed: int) -> list[tuple]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(messages=messages, seed=seed, **asked)
            check(whole.choices[0].message, whole.choices[0].finish_reason)
            stream = await client.chat.completions.create(messages=messages, seed=seed, stream=True, **asked)
            return joined_calls([chunk async for chunk in stream])

    try:
        with listening(create_app(served.engine, tokenizer, "tiny")) as root:
            url = f"{root}/v1"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                # One in four draws closes both braces and ends.
                many = client.chat.completions.create(messages=messages, seed=0, n=8, **asked)
                picked = next(choice for choice in many.choices if is_call(choice))
                check(picked.message, picked.finish_reason)
                seeds = ((s, client.chat.completions.create(messages=messages, seed=s, **asked)) for s in range(100))
                seed, answer = next((seed, answer) for seed, answer in seeds if is_call(answer.choices[0]))
                check(answer.choices[0].message, answer.choices[0].finish_reason)
                stream = client.chat.completions.create(messages=messages, seed=seed, stream=True, **asked)
                told = [(0, answer.choices[0].message.tool_calls[0].id, "add", "{}")]
                assert joined_calls(list(stream)) == told
                with client.chat.completions.stream(messages=messages, seed=seed, **asked) as events:
                    final = events.get_final_completion()
                check(final.choices[0].message, final.choices[0].finish_reason)
                said = answer.choices[0].message.model_dump(exclude_none=True)
                result = {"role": "tool", "tool_call_id": told[0][1], "content": "5"}
                more = [*messages, said, result]
                after = client.chat.completions.create(model="tiny", messages=more, tools=[TOOL], max_tokens=1)
                assert after.usage.prompt_tokens > answer.usage.prompt_tokens - len('{"name": "add", "parameters": ')
            assert asyncio.run(ask_async(url, seed)) == told
    finally:
        served.engine.load(served.params)


CALL = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "told"),
    [
        ("plain words", "plain words", "plain words"),
        (f"so\n{CALL}", "so", "so"),
        (CALL, None, ""),
        ("a <tool_", "a <tool_", "a <tool_"),
        ("a < b", "a < b", "a < b"),
        ("a <tool_call>{", "a <tool_call>{", "a <tool_call>{"),
    ],
)
def test_a_stream_with_tools_tells_no_part_of_a_call_as_content(text, content, told):
    for size in (1, 3, 100):
        pieces = _Content("hermes")
        parts = [pieces.push(text[first : first + size]) for first in range(0, len(text), size)]
        assert OPENS not in "".join(parts)
        assert "".join(parts) + pieces.rest(content) == told


def test_a_chat_goes_on_though_others_have_pushed_its_tools_out_meanwhile(served, monkeypatch):
    monkeypatch.setattr("rl.serving.conversations.MOST_TOOLS", 0)  # as another thread may do between two lines
    asked = [{"role": "user", "content": "a"}]
    served.post("/v1/chat/completions", messages=asked, max_tokens=4, seed=1)
    call = served.finished[-1]
    conversations = Conversations(served.tokenizer, served.call.eos_ids, 4)
    conversations.add(call)
    ids = conversations.prompt_ids("", [*asked, call.answers[0], *asked], [])
    assert ids is not None
    assert ids[: len(call.prompt_ids[0])] == [*call.prompt_ids[0]]
