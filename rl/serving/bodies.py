"""The bodies of requests: JSON that anybody may have written becomes what to draw, or an error that names the field.

In: bytes. Out: `ChatBody`, `TextBody` or `TokenizeBody`. Fields have the names, types and defaults of OpenAI's API, and
some of vLLM's. A field that is not known, or that would change the answer and is not supported, is refused by its name:
nothing is accepted and ignored. Not here: messages and tools (`rewards.chat_request`), what the model and the server
bear (`rl.serving.app`), answers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rewards import chat_request
from rewards.chat_request import check_unicode, read_messages, read_tool_choice, read_tools
from rl.files.json_file import Fields, shown
from rl.sampler.slot_rules import DrawRules

MOST_CHOICES = 128
MOST_STOPS, LONGEST_STOP = 16, 1000  # stop strings of a request, and characters of one
SEEDS = 2**32
LEAST_TEMPERATURE = 0.001  # below, what a float holds of the logits would decide


class ApiError(Exception):
    """What is wrong with a request, in the words of OpenAI's error bodies."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class DrawOptions:
    """What chats and texts have in common.

    limit: the most tokens of a completion; None: the default of the endpoint. num_choices: of each prompt.
    num_top: the most likely tokens that are told with each token; None: no log-probs are.
    returns_ids: whether token ids are told. ids_as_text: whether tokens are told as `token_id:7`, not as their text.
    keeps_stop: whether the text keeps the stop string. keeps_special: whether it keeps special tokens.
    """

    model: str | None
    rules: DrawRules
    limit: int | None
    num_choices: int
    seed: int | None
    streams: bool
    includes_usage: bool
    num_top: int | None
    returns_ids: bool
    ids_as_text: bool
    keeps_stop: bool
    keeps_special: bool


@dataclasses.dataclass(frozen=True)
class ChatBody:
    """A chat. tools: JSON schemas. tool_choice: "none", "auto", "required" or the name of a tool in a tuple of one."""

    options: DrawOptions
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    tool_choice: str | tuple[str]
    is_parallel: bool


@dataclasses.dataclass(frozen=True)
class TextBody:
    """Prompts of text or of token ids. echoes: whether the answer begins with the prompt."""

    options: DrawOptions
    prompts: list[str | list[int]]
    echoes: bool
    adds_special: bool


@dataclasses.dataclass(frozen=True)
class TokenizeBody:
    """A text, or a chat, whose token ids are wanted."""

    model: str | None
    text: str | None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    adds_special: bool


# They name, count or route a request, and change no answer.
_WITHOUT_EFFECT = {
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "request_id", "cache_salt",
    "priority",
}  # fmt: skip
# Fields that are accepted with the values that mean what happens anyway.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), "answers are never stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "logit_bias": (({},), "biases are those of the server: start it with sampling.logit_bias"),
    "response_format": (({"type": "text"},), "answers are not constrained to a grammar; ask in the prompt, and check"),
    "modalities": ((["text"],), "there is text only"),
    "stop_token_ids": (([],), "EOS ids are those of the server: start it with sampling.eos_ids"),
    "allowed_token_ids": (([],), "forbidden ids are those of the server: start it with sampling.forbidden_ids"),
    "bad_words": (([],), "forbidden ids are those of the server: start it with sampling.forbidden_ids"),
    "logits_processors": (([],), "code of a client is not run"),
    "suffix": (("",), "a text in the middle cannot be drawn"),
    "use_beam_search": ((False,), "tokens are drawn"),
    "length_penalty": ((1, 1.0), "there is no beam search"),
    "chat_template": ((), "the template is the server's: start it with tokenizer.chat_template"),
    "chat_template_kwargs": (({},), "start the server with data.chat_template_kwargs"),
    "add_generation_prompt": ((True,), "the assistant always answers"),
    "continue_final_message": ((), "a last message by the assistant is always continued"),
    "documents": (([],), "write them into the messages"),
    "spaces_between_special_tokens": ((True, False), ""),
    "verbosity": (("medium",), "ask in the prompt"),
}
_OF_ALL = {
    "model", "n", "seed", "stop", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "max_tokens", "min_tokens", "ignore_eos", "stream", "stream_options", "logprobs",
    "return_token_ids", "return_tokens_as_token_ids", "include_stop_str_in_output", "skip_special_tokens",
}  # fmt: skip
_OF_CHATS = {
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
}  # fmt: skip
_OF_TEXTS = {"prompt", "echo", "best_of", "add_special_tokens"}
_OF_TOKENIZE = {"model", "prompt", "messages", "tools", "add_special_tokens", "add_generation_prompt"}


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body. ApiError where it is none."""
    try:
        return chat_request.read_json(body)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def read_chat(values: Mapping[str, Any], most_top: int) -> ChatBody:
    """The body of /v1/chat/completions. most_top: see `EngineLimits`. ApiError for what cannot be."""
    _check_names(values, _OF_ALL | _OF_CHATS)
    with _named() as fields_of:
        fields = fields_of(values)
        num_top = None
        if fields.flag("logprobs", False):
            num_top = fields.whole("top_logprobs", 0, most_top, 0)
        elif fields.has("top_logprobs") and values["top_logprobs"] != 0:
            raise fields.refuse("top_logprobs", "left out without logprobs=true")
        limit = _limit(fields, ("max_completion_tokens", "max_tokens"), 1)
        tools = read_tools(values)
        tool_choice = read_tool_choice(values, tools)
        messages = read_messages(values)
        is_parallel = fields.flag("parallel_tool_calls", True)
        return ChatBody(_options(fields, num_top, limit), messages, tools, tool_choice, is_parallel)


def read_text(values: Mapping[str, Any], most_top: int) -> TextBody:
    """The body of /v1/completions. ApiError for what cannot be."""
    _check_names(values, _OF_ALL | _OF_TEXTS)
    with _named() as fields_of:
        fields = fields_of(values)
        num_top = fields.whole("logprobs", 0, most_top, None)
        echoes = fields.flag("echo", False)
        limit = _limit(fields, ("max_tokens",), 0 if echoes else 1)
        options = _options(fields, num_top, limit)
        if fields.whole("best_of", 1, MOST_CHOICES, options.num_choices) != options.num_choices:
            raise fields.refuse("best_of", "left out, or equal to n: all that is drawn is returned")
        if limit == 0 and options.streams:
            raise fields.refuse("max_tokens", "at least 1 in a stream")
        return TextBody(options, _prompts(fields), echoes, fields.flag("add_special_tokens", True))


def read_tokenize(values: Mapping[str, Any]) -> TokenizeBody:
    """The body of /tokenize. ApiError for what cannot be."""
    _check_names(values, _OF_TOKENIZE)
    with _named() as fields_of:
        fields = fields_of(values)
        model, adds_special = fields.text("model", None), fields.flag("add_special_tokens", True)
        if fields.has("prompt") == fields.has("messages"):
            raise fields.refuse("prompt", "there, or messages, one of both")
        if fields.has("prompt"):
            return TokenizeBody(model, fields.text("prompt"), [], [], adds_special)
        return TokenizeBody(model, None, read_messages(values), read_tools(values), adds_special)


class _named:
    """Turns the `ValueError` of a field into an `ApiError` that names it."""

    def __enter__(self) -> type[Fields]:
        return Fields

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError):
            raise ApiError(400, str(error), param=str(error).partition(" must be ")[0][:200] or None) from None


def _check_names(values: Mapping[str, Any], known: set[str]) -> None:
    for name, value in values.items():
        if name in known or name in _WITHOUT_EFFECT or value is None:
            continue
        if name not in _ONLY:
            raise ApiError(
                400,
                f"{shown(name)} is no field that this server knows; leave it out",
                param=name[:200].encode(errors="replace").decode(),
            )
        allowed, reason = _ONLY[name]
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise ApiError(400, f"{name} is not supported, got {shown(value)}: {reason}", param=name)


def _limit(fields: Fields, names: Sequence[str], least: int) -> int | None:
    given = [fields.whole(name, least, 2**31 - 1) for name in names if fields.has(name)]
    if len(set(given)) > 1:
        raise fields.refuse(names[0], f"equal to {names[1]} where both are given")
    return given[0] if given else None


def _options(fields: Fields, num_top: int | None, limit: int | None) -> DrawOptions:
    streams, stream_options = fields.flag("stream", False), fields.section("stream_options")
    if stream_options.values and not streams:
        raise fields.refuse("stream_options", "left out without stream=true")
    unknown = set(stream_options.values) - {"include_usage", "include_obfuscation", "continuous_usage_stats"}
    if unknown:
        raise fields.refuse("stream_options", "an object with include_usage")
    for name in ("include_obfuscation", "continuous_usage_stats"):
        if stream_options.flag(name, False):
            raise stream_options.refuse(name, "left out or false, because it is not supported")
    top_k, seed = fields.whole("top_k", -1, 2**31 - 1, 0), fields.whole("seed", -(2**63), 2**63 - 1, None)
    rules = DrawRules(
        temperature=fields.number("temperature", 0, 100, 1.0),
        top_k=max(top_k, 0),
        top_p=fields.number("top_p", 0, 1, 1.0),
        min_p=fields.number("min_p", 0, 1, 0.0),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100, 1.0),
        frequency_penalty=fields.number("frequency_penalty", -100, 100, 0.0),
        presence_penalty=fields.number("presence_penalty", -100, 100, 0.0),
        min_completion_length=fields.whole("min_tokens", 0, 2**31 - 1, 0),
        ends_at_eos=not fields.flag("ignore_eos", False),
        stop_strings=_stops(fields),
    )
    if 0 < rules.temperature < LEAST_TEMPERATURE:
        raise fields.refuse("temperature", f"0 (the most likely token), or at least {LEAST_TEMPERATURE}")
    if rules.top_p == 0:
        raise fields.refuse("top_p", "above 0; for the most likely token set temperature=0")
    if limit is not None and rules.min_completion_length > limit:
        raise fields.refuse("min_tokens", f"at most the limit of tokens, {limit}")
    return DrawOptions(
        model=fields.text("model", None),
        rules=rules,
        limit=limit,
        num_choices=fields.whole("n", 1, MOST_CHOICES, 1),
        seed=None if seed is None else seed % SEEDS,
        streams=streams,
        includes_usage=stream_options.flag("include_usage", False),
        num_top=num_top,
        returns_ids=fields.flag("return_token_ids", False),
        ids_as_text=fields.flag("return_tokens_as_token_ids", False),
        keeps_stop=fields.flag("include_stop_str_in_output", False),
        keeps_special=not fields.flag("skip_special_tokens", True),
    )


def _stops(fields: Fields) -> tuple[str, ...]:
    given = fields.values.get("stop")
    stops = [given] if isinstance(given, str) else fields.texts("stop", [])
    if len(stops) > MOST_STOPS or any(not 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise fields.refuse("stop", f"at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters")
    for stop in stops:
        check_unicode("stop", stop)
    return tuple(stops)


def _prompts(fields: Fields) -> list[str | list[int]]:
    rule = "text, a list of token ids, or a list of texts or of lists of token ids"
    given = fields.values.get("prompt")
    if isinstance(given, list) and given and _are_ids(given):
        prompts: list[Any] = [given]
    else:
        prompts = given if isinstance(given, list) else [given]
    if not prompts or len({type(prompt) for prompt in prompts}) > 1:
        raise fields.refuse("prompt", rule)
    for prompt in prompts:
        if isinstance(prompt, str):
            check_unicode("prompt", prompt)
        elif not (isinstance(prompt, list) and prompt and _are_ids(prompt)):
            raise fields.refuse("prompt", rule)
    return prompts


def _are_ids(values: Sequence[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**31 for value in values)
