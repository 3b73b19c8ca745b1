"""Calls of tools in the text of a turn, also in a hostile one."""

import random

import pytest

from rewards.tool_calls import FORMATS, MAX_CALLS, Call, format_of_template, parse_turn

QWEN = """For each function call, return a json object with function name and arguments within <tool_call></tool_call>
<tool_call>\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\n</tool_call><|im_end|>"""
QWEN_CODER = "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\n arguments"
LLAMA = """{{- "<|start_header_id|>user<|end_header_id|>" }}{{- '{"name": "' + tool_call.name + '", ' }}
{{- '"parameters": ' }}{{- tool_call.arguments | tojson }}"""
LLAMA_PYTHONIC = (
    "<|start_header_id|> [func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2()]"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN, "hermes"),
        (QWEN_CODER, None),
        (LLAMA, "llama_json"),
        (LLAMA_PYTHONIC, "llama_pythonic"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", None),
    ],
)
def test_the_format_is_read_from_the_chat_template(template, expected):
    assert format_of_template(template) == expected


ADD = {"name": "add", "arguments": {"a": 1, "b": [2.5, None, {"c": "d\n"}]}}
ADD_CALL = Call("add", ADD["arguments"])
ADD_JSON = '{"name": "add", "arguments": {"a": 1, "b": [2.5, null, {"c": "d\\n"}]}}'


@pytest.mark.parametrize(
    ("call_format", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>\n{ADD_JSON}\n</tool_call>", "", [ADD_CALL]),
        (
            "hermes",
            f"First. <tool_call>{ADD_JSON}</tool_call>\n<tool_call>{ADD_JSON}</tool_call>",
            "First.",
            [ADD_CALL] * 2,
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [Call("f", {"a": 1})]),
        ("hermes", "<think>\n<tool_call>\n", "<think>\n<tool_call>\n", []),
        (
            "hermes",
            f"a <tool_call>b</think> c <tool_call>{ADD_JSON}</tool_call>",
            "a <tool_call>b</think> c",
            [ADD_CALL],
        ),
        ("hermes", "no call, with a space at the end ", "no call, with a space at the end ", []),
        ("llama_json", ADD_JSON.replace("arguments", "parameters"), "", [ADD_CALL]),
        ("llama_json", f"Well <|python_tag|>{ADD_JSON}; {ADD_JSON}", "Well", [ADD_CALL] * 2),
        ("llama_json", '{"answer": 4}', '{"answer": 4}', []),
        ("llama_json", 'A sentence {"name": "f", "parameters": {}}', 'A sentence {"name": "f", "parameters": {}}', []),
        (
            "llama_pythonic",
            "[add(a=-1, b='x\\n'), m.sub(c=[1, (2,)], d={\"k\": None}, e=True)]",
            "",
            [Call("add", {"a": -1, "b": "x\n"}), Call("m.sub", {"c": [1, [2]], "d": {"k": None}, "e": True})],
        ),
        ("llama_pythonic", "[1, 2]", "[1, 2]", []),
    ],
)
def test_calls_are_taken_from_the_text_of_a_turn(call_format, text, content, calls):
    turn = parse_turn(text, call_format)
    assert (turn.content, [*turn.calls]) == (content, calls)


@pytest.mark.parametrize(
    ("call_format", "text", "problem"),
    [
        ("hermes", "<tool_call>{</tool_call>", "no JSON object: Expecting property name"),
        ("hermes", "<tool_call>{} {}</tool_call>", "there is text after the object"),
        ("hermes", "<tool_call>[]</tool_call>", "it must begin with {"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "no 'name' that is a text"),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "no 'arguments', a JSON object"),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "must be a JSON object, got list"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "a number or nesting"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', "not finite"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', "lone surrogate"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "not closed by </tool_call>"),
        ("llama_json", '{"name": "f", "parameters": {', "the call is no JSON"),
        ("llama_json", "<|python_tag|>import os", "is no JSON object"),
        ("llama_pythonic", "[f(1)]", "every argument must have a name"),
        ("llama_pythonic", "[f(a=__import__('os'))]", "must be a literal"),
        ("llama_pythonic", "[f(a=1).g(b=2)]", "unexpected text"),
        ("llama_pythonic", "[f(a=1 if True else 2)]", "must be a literal"),
        ("llama_pythonic", "[f(a=lambda: 1)]", "must be a literal"),
        ("llama_pythonic", "[f(a=f'{1}')]", "unexpected text"),
        ("llama_pythonic", "[f(a=1]", "SyntaxError"),
    ],
)
def test_a_malformed_call_says_what_is_wrong_and_stays_in_the_text(call_format, text, problem):
    turn = parse_turn(text, call_format)
    assert turn.content == text
    (call,) = turn.calls
    assert call.problem is not None
    assert problem in call.problem


def test_a_turn_makes_a_bounded_number_of_calls():
    for text, call_format in (
        (f"<tool_call>{ADD_JSON}</tool_call>" * 100, "hermes"),
        (ADD_JSON * 100, "llama_json"),
        (f"[{', '.join(['f(a=1)'] * 100)}]", "llama_pythonic"),
    ):
        calls = parse_turn(text, call_format).calls
        assert len(calls) == MAX_CALLS + 1
        assert all(call.problem is None for call in calls[:-1])
        assert "at most 32 calls" in str(calls[-1].problem)


@pytest.mark.parametrize("call_format", FORMATS)
def test_hostile_text_is_parsed_without_an_error(call_format):
    n = 20_000
    hostile = [
        "<tool_call>" * n,
        "<tool_call>" * n + "</tool_call>" * n,
        "<tool_call>" + "[" * n + "</tool_call>",
        '<tool_call>{"name":"a","arguments":' + '{"a":' * n + "}" * n + "}</tool_call>",
        '{"name":"a","parameters":' + "[" * n,
        '{"name":"a","parameters":{"a":' + "9" * n + "}}",
        '{"name":"a","parameters":{}};' * n,
        *(f"[f(a={part * n}" for part in ("[", "(", "-", "a.", "not ", "1+", "''", "\\", "{1:")),
        f"[f({'a=1,' * n})]",
        "[f(a=" + "-" * n + "1)]",
        "[f(a=" + "[" * 30 + "]" * 30 + ")]",
        '[f(a="""' + "(" * n + '""")]',
        "<|python_tag|>" * n,
        "\0" * n,
        " " * n + "<think>" + "<tool_call>",
    ]
    tags = ["<tool_call>", "</tool_call>", "<|python_tag|>", "</think>", "name", "f(", "a="]
    pieces = [*tags, *"{}[]()\"'\\:,1 \n", chr(0xD800)]
    rng = random.Random(0)
    hostile += ["".join(rng.choices(pieces, k=60)) for _ in range(2000)]
    for text in hostile:
        turn = parse_turn(text, call_format)
        assert len(turn.calls) <= MAX_CALLS + 1
