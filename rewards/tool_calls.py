"""Calls of tools in the text of a turn.

In: the text that a policy drew, and the format in which its chat template shows calls. Out: the text without the calls,
and the calls in their order, the malformed ones with what is wrong. Not here: running them (`rewards.tools`).

    hermes          <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>, any number   Hermes, Qwen 2.5 and 3
    llama_json      {"name": "add", "parameters": {"a": 1}}, maybe several with ; between       Llama 3.1 and 3.2
    llama_pythonic  [add(a=1), add(a=2)], literals only                                         Llama 3.2 and 4

In the formats of Llama a call is the whole turn, or what follows `<|python_tag|>`. What a policy thinks before
`</think>` holds no calls in any format. The text may be hostile: it takes time in proportion to its length, nesting is
bounded, and nothing is evaluated.
"""

import ast
import dataclasses
import json
import re
import warnings
from typing import Any, Literal, Never, get_args

Format = Literal["hermes", "llama_json", "llama_pythonic"]
FORMATS: tuple[Format, ...] = get_args(Format)

MAX_CALLS = 32  # in a turn; further ones are answered as one malformed call
_MAX_DEPTH = 32  # of nesting in arguments
_MAX_PYTHONIC = 100_000  # characters of a turn of pythonic calls
_PYTHON_TAG = "<|python_tag|>"
_OPENS, _CLOSES = "<tool_call>", "</tool_call>"
_NAME = r"[A-Za-z_][A-Za-z0-9_]{0,200}(?:\.[A-Za-z_][A-Za-z0-9_]{0,200}){0,8}"
_SPACE = re.compile(r"[;\s]*")  # between calls of llama_json
_LOOKS_LIKE_JSON_CALL = re.compile(r'\{\s*"name"\s*:')
_LOOKS_LIKE_PYTHONIC_CALL = re.compile(rf"\[\s*{_NAME}\s*\(")
# Of the literals that arguments may be, and of calls; anything else is refused before Python's parser sees it.
_TOKEN = re.compile(
    rf"""\s+|(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')(?![A-Za-z_])|{_NAME}(?!["'])|[+-]?\d[\d_.]*(?:[eE][+-]?\d+)?"""
    r"|(?P<opens>[(\[{])|(?P<closes>[)\]}])|[,:=]",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a tool. problem: what is wrong with a malformed one, in words that the policy can learn from."""

    name: str
    arguments: dict[str, Any]
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn's text without its well-formed calls, and all calls in their order."""

    content: str
    calls: tuple[Call, ...]


class _Malformed(Exception):
    """Why a text is no call."""


def parse_turn(text: str, call_format: Format) -> Turn:
    """The calls in the text of a turn. A turn without calls keeps its text as it is."""
    start = _end_of_thinking(text)
    parse = {"hermes": _hermes, "llama_json": _llama_json, "llama_pythonic": _llama_pythonic}[call_format]
    content, calls = parse(text[start:])
    if not calls:
        return Turn(text, ())
    if len(calls) > MAX_CALLS:
        rule = f"a turn may make at most {MAX_CALLS} calls; the rest was left out"
        calls = [*calls[:MAX_CALLS], Call("", {}, rule)]
    return Turn((text[:start] + content).strip(), tuple(calls))


def format_of_template(template: str) -> Format | None:
    """The format in which a chat template shows calls of tools; None where it is none of `FORMATS`.

    template: its Jinja source.
    """
    if _OPENS in template:
        # Others put names and values between tags of their own (Qwen3-Coder and 3.5, GLM, Nemotron).
        is_other = "<function=" in template or "<arg_key>" in template
        return "hermes" if "arguments" in template and not is_other else None
    if "<|start_header_id|>" in template or "<|header_start|>" in template:
        if re.search(r"\[\w+\(\w+=\w+", template):
            return "llama_pythonic"
        if re.search(r'"parameters\\?"\s*:', template):
            return "llama_json"
    return None


def _end_of_thinking(text: str) -> int:
    """Where the part of a turn begins that may hold calls."""
    before, closes, _ = text.partition("</think>")
    if closes:
        return len(before) + len(closes)
    return len(text) if text.lstrip().startswith("<think>") else 0


def _hermes(text: str) -> tuple[str, list[Call]]:
    kept, calls, place = [], [], 0
    while len(calls) <= MAX_CALLS and (start := text.find(_OPENS, place)) >= 0:
        kept.append(text[place:start])
        inside = start + len(_OPENS)
        end = text.find(_CLOSES, inside)
        if end < 0:
            calls.append(Call("", {}, f"the call is not closed by {_CLOSES}"))
            place = start
            break
        place = end + len(_CLOSES)
        call = _json_call(text[inside:end], "arguments")
        if call.problem is not None:  # so that the policy sees what it wrote
            kept.append(text[start:place])
        calls.append(call)
    return "".join([*kept, text[place:]]), calls


def _llama_json(text: str) -> tuple[str, list[Call]]:
    content, tag, rest = text.partition(_PYTHON_TAG)
    if not tag:
        content, rest = "", text
    place = _end_of_space(rest, 0)
    calls: list[Call] = []
    while rest.startswith("{", place) and len(calls) <= MAX_CALLS:
        try:
            value, end = _decode(rest, place)
        except _Malformed as problem:
            if tag or calls or _LOOKS_LIKE_JSON_CALL.match(rest, place):
                calls.append(Call("", {}, f"the call is no JSON: {problem}"))
            break
        if not tag and "name" not in value:  # an answer that is JSON
            break
        calls.append(_checked(value, "parameters"))
        if calls[-1].problem is not None:
            break
        place = _end_of_space(rest, end)
    if tag and not calls:
        calls.append(Call("", {}, f"what follows {_PYTHON_TAG} is no JSON object"))
    # Text that is no call stays, with its tag where there is none before it.
    tag = tag if len(calls) == 1 and calls[0].problem is not None else ""
    return content + tag + rest[place:], calls


def _llama_pythonic(text: str) -> tuple[str, list[Call]]:
    content, tag, rest = text.partition(_PYTHON_TAG)
    if not tag:
        content, rest = "", text
    rest = rest.strip()
    if not tag and not _LOOKS_LIKE_PYTHONIC_CALL.match(rest):
        return text, []
    try:
        return content, _pythonic_calls(rest)
    except _Malformed as problem:
        return text, [Call("", {}, f"the calls are not [name(argument=literal), ...]: {problem}")]


def _json_call(text: str, key: str) -> Call:
    text = text.strip()
    try:
        value, end = _decode(text)
        if text[end:].strip():
            raise _Malformed("there is text after the object")
    except _Malformed as problem:
        return Call("", {}, f"the call is no JSON object: {problem}")
    return _checked(value, key)


def _checked(value: dict[str, Any], key: str) -> Call:
    """The call that a JSON object is. key: of its arguments; the other format's is taken as well."""
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return Call("", {}, "the call has no 'name' that is a text")
    other = "parameters" if key == "arguments" else "arguments"
    if key not in value and other not in value:
        return Call(name, {}, f"the call has no {key!r}, a JSON object")
    arguments = value.get(key, value.get(other))
    if isinstance(arguments, str):  # JSON in JSON, as in OpenAI's form
        try:
            arguments, _ = _decode(arguments.strip())
        except _Malformed as problem:
            return Call(name, {}, f"{key!r} must be a JSON object: {problem}")
    if not isinstance(arguments, dict):
        return Call(name, {}, f"{key!r} must be a JSON object, got {type(arguments).__name__}")
    return Call(name, arguments)


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant, strict=False)  # line breaks in texts are taken


def _decode(text: str, place: int = 0) -> tuple[dict[str, Any], int]:
    """The JSON object at a place of a text, and where it ends."""
    if not text.startswith("{", place):
        raise _Malformed("it must begin with {")
    try:
        value, end = _decoder.raw_decode(text, place)
    except json.JSONDecodeError as error:
        raise _Malformed(f"{error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError):
        raise _Malformed("it holds a number or nesting that is not allowed") from None
    _check_value(value)
    return value, end


def _check_value(value: Any, depth: int = _MAX_DEPTH) -> None:
    if not depth:
        raise _Malformed(f"it is nested deeper than {_MAX_DEPTH}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Malformed("it holds half of a character (a lone surrogate)") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_value(key, depth)
            _check_value(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_value(item, depth - 1)
    elif isinstance(value, float) and not abs(value) < float("inf"):
        raise _Malformed("it holds a number that is not finite")


def _end_of_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None
    return found.end()


def _pythonic_calls(text: str) -> list[Call]:
    _check_tokens(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _Malformed(f"{type(error).__name__}") from None
    if not isinstance(tree, ast.List):
        raise _Malformed("it must be a list")
    calls = []
    for node in tree.elts:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
            raise _Malformed("every entry must be a call of a name")
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise _Malformed("every argument must have a name")
        arguments = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
        calls.append(Call(ast.unparse(node.func), arguments))
    return calls


def _check_tokens(text: str) -> None:
    """Refuses what is no call with literals before it reaches Python's parser, deep nesting above all."""
    if len(text) > _MAX_PYTHONIC or '"""' in text or "'''" in text:
        raise _Malformed(f"it is longer than {_MAX_PYTHONIC} characters, or holds three quotes in a row")
    place = depth = 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise _Malformed(f"unexpected text at character {place}")
        depth += bool(found["opens"]) - bool(found["closes"])
        if depth > _MAX_DEPTH:
            raise _Malformed(f"it is nested deeper than {_MAX_DEPTH}")
        place = found.end()


def _literal(node: ast.expr) -> Any:
    """The JSON value of a literal: tuples become lists."""
    try:
        value = json.loads(json.dumps(ast.literal_eval(node), allow_nan=False))
    except (ValueError, TypeError, RecursionError):
        rule = "every argument must be a literal: a text, a number, True, False, None, a list or a dict"
        raise _Malformed(rule) from None
    _check_value(value)
    return value
