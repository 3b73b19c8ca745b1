"""Turns of a conversation, and what answers them, as token ids that are appended to the ids that are there.

In: the messages of an episode. Out: the ids of its prompt, and after each turn of the policy the ids of what follows:
the end of the turn where the policy did not write it, the observations, and the beginning of the next turn. Ids that
are there are never rewritten, and drawn tokens are never tokenized again. Not here: what observations say (an
environment, in `rewards`), and drawing.

The rule for chats: render the conversation with a probe at the end of the turn. What follows the turn is the tail of
that text, from the end-of-turn marker behind the probe on. The marker is a special token, and one of the ids that end a
completion. So there is one place in the text where the tail begins, whatever was said before.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rl.data.prompt_rows import conversation_problem
from rl.data.tokenizer import Messages, Tokenizer
from rl.files.json_file import shown

TOOL_ROLES = ("tool", "user")
_PROBES = ("tandem-probe-0", "(another probe, of 2.5 lines)")
_THOUGHT = "tandem-thought"
_WAY_OUT = "set tokenizer.chat_template to another Jinja file, or set data.chat=false"


class Turns(Protocol):
    """How turns and observations of a conversation become token ids.

    Attributes:
      end_ids: ids with which a turn ends as the template ends it. The first is the end-of-turn marker, which
        `observation_ids` writes behind a turn that ended otherwise. Empty for prompts of plain text, whose turns need
        no end.
      tools: JSON schemas that the template shows to the policy.
    """

    @property
    def end_ids(self) -> tuple[int, ...]: ...

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]: ...

    def prompt_ids(self, prompt: str | Messages) -> list[int]:
        """Token ids that open an episode, up to the point where the policy goes on.

        Raises:
          ValueError: the prompt is none, or the chat template refuses it.
        """
        ...

    def observation_ids(self, history: Messages, observations: Messages, has_ended: bool) -> list[int]:
        """Token ids that follow a turn, up to the point where the policy goes on. None of them is trained.

        Args:
          history: the conversation before the turn; a last message by the assistant is the turn (or its beginning).
          observations: what answers the turn, by others than the assistant; may be empty.
          has_ended: whether the last id of the turn is one of `end_ids`. Otherwise it was cut, or stopped by a text or
            by another EOS id, and the marker comes first.

        Raises:
          ValueError: an observation is no message of text by another than the assistant; or the chat template refuses
            the conversation, or does not write the turn and the marker behind it.
        """
        ...

    def notes(self) -> list[str]:
        """What a run should say once, in words."""
        ...


def text_turns(tokenizer: Tokenizer) -> Turns:
    """Turns of a prompt of plain text: an observation is the text of its messages, appended as it is.

    Raises:
      ValueError: the tokenizer cannot continue a text without adding to it.
    """
    start = tokenizer.encode("a")
    for anchor in ("", "\n"):  # SentencePiece-like tokenizers put a space in front of the first word of a text
        turns = _TextTurns(tokenizer, anchor)
        if all(tokenizer.decode(start + turns.encode(text)) == "a" + text for text in ("b c", " b")):
            return turns
    raise ValueError(
        "the tokenizer must continue a text as it is written for episodes on plain text, got another text for 'b c'; "
        "use another tokenizer, or chats (data.chat=true)"
    )


def chat_turns(
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    tools: Sequence[Mapping[str, Any]] = (),
    tool_role: str = "tool",
) -> Turns:
    """Turns of a chat, by the tokenizer's chat template, which is tried here before anything heavy happens.

    Args:
      eos_ids: the ids that end a completion in this run.
      tools: JSON schemas of the functions that the policy may call.
      tool_role: whose message a result is: `tool`, or `user` for templates that refuse or do not know the tool role.
        Results of one turn then become one message, a line each, in the order of the calls.

    Raises:
      ValueError: there is no chat template; it does not end turns with a special token among `eos_ids`; what it writes
        behind a turn depends on what the turn says or on the number of turns before it, or is tokenized otherwise
        alone; it does not show the tools, or refuses their results.
    """
    assert tool_role in TOOL_ROLES, tool_role
    name, asked = tokenizer.template_name, _message("user", "What now?")
    is_shown = bool(tools) and tokenizer.render([asked], tools) != tokenizer.render([asked])
    if tools and not is_shown and tool_role == "tool":
        raise ValueError(
            f"{name} must show the policy its tools, got the same text with and without them; set "
            "tokenizer.chat_template to a Jinja file that writes the variable `tools`, or set rollout.tool_role=user "
            "and describe the tools in data.system_prompt"
        )
    shown_tools = tuple(tools) if is_shown else ()
    first = tokenizer.render([asked, _message("assistant", _PROBES[0]), asked], shown_tools)
    marker = _find_marker(tokenizer, eos_ids, first.partition(_PROBES[0])[2])
    turns = _ChatTurns(tokenizer, (marker,), shown_tools, tool_role, is_described=bool(tools) and not is_shown)
    answers = {"a message of the user": [asked]}
    if tools:
        results = [_message("tool", text, name="look", tool_call_id=f"call0000{text}") for text in ("1", "2")]
        answers |= {"a result": results[:1], "two results": results}
    for kind, answer in answers.items():
        _check_tails(turns, kind, [asked], answer)
    if tools and tool_role == "tool":
        turns = dataclasses.replace(turns, end_ids=(marker, *_ends_of_calls(turns, eos_ids, [asked], results[:1])))
    return turns


@dataclasses.dataclass(frozen=True)
class _TextTurns:
    """`anchor`: a text in front of which a continuation is tokenized, because alone it would get a space."""

    tokenizer: Tokenizer
    anchor: str
    end_ids: tuple[int, ...] = ()
    tools: Sequence[Mapping[str, Any]] = ()

    def prompt_ids(self, prompt: str | Messages) -> list[int]:
        if not isinstance(prompt, str):
            raise ValueError(
                f"the prompt of an episode must be text with data.chat=false, got {shown(prompt)}; set data.chat=true, "
                "or have the environment's reset return text"
            )
        return self.tokenizer.encode(prompt)

    def observation_ids(self, history: Messages, observations: Messages, has_ended: bool) -> list[int]:
        _check_observations(observations)
        return self.encode("".join(message["content"] for message in observations))

    def encode(self, text: str) -> list[int]:
        before = self.tokenizer.encode(self.anchor, add_bos=False)
        ids = self.tokenizer.encode(self.anchor + text, add_bos=False)
        return ids[len(before) :]

    def notes(self) -> list[str]:
        return []


@dataclasses.dataclass(frozen=True)
class _ChatTurns:
    """What follows a turn is rendered over the real conversation, the turn's own text included. A short fixed one would
    be cheaper, and wrong: some templates choose how the next turn begins by a word in the system message or an earlier
    question (SmolLM3's and Nemotron's /no_think). The price is a rendering for each turn, which grows with the
    conversation. The probe is at the end of the turn, and a text that no message holds. So what was said before can
    neither move the place where the tail begins nor be taken for it.

    Messages of the assistant are rendered as plain text. Nothing of them is in the tail, and Llama's templates refuse
    two calls in one message.

    `is_described`: the template shows no tools, so that the prompt has to.
    """

    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    tools: Sequence[Mapping[str, Any]]
    tool_role: str
    is_described: bool

    def prompt_ids(self, prompt: str | Messages) -> list[int]:
        messages = [_message("user", prompt)] if isinstance(prompt, str) else prompt
        if problem := conversation_problem(messages):
            raise ValueError(f"the prompt of an episode must be text or messages with role and content, got {problem}")
        if len(messages) == 1 and messages[0]["role"] == "assistant":
            raise ValueError(
                "the prompt of an episode must hold a message before that of the assistant, which is the beginning of "
                f"the answer, got {shown(messages)}"
            )
        return self.tokenizer.encode_chat(self.told(messages), self.tools)

    def observation_ids(self, history: Messages, observations: Messages, has_ended: bool) -> list[int]:
        _check_observations(observations)
        ids = self.tokenizer.encode(self.tail(history, observations), add_bos=False)
        assert ids[0] == self.end_ids[0], (ids[:4], self.end_ids)
        return ids[1:] if has_ended else ids

    def tail(self, history: Messages, observations: Messages, probe: str = _PROBES[0]) -> str:
        """The text that follows a turn, which begins with the marker."""
        while probe in str((history, observations)):
            probe += "0"
        marker = self.tokenizer.decode(self.end_ids[:1], skip_special_tokens=False)
        try:
            text = self.render(history, probe, observations)
        except ValueError as error:
            has_result = self.tool_role == "tool" and any(message["role"] == "tool" for message in observations)
            way_out = "; or set rollout.tool_role=user, where it refuses results of tools" if has_result else ""
            raise ValueError(f"{error}{way_out}") from error
        # A template that trims turns gives the marker right behind the probe. White space that it writes there itself
        # is left to the policy.
        tail = text.rpartition(probe)[2].lstrip()
        if text.count(probe) != 1 or not tail.startswith(marker):
            raise ValueError(
                f"{self.tokenizer.template_name} must write a turn once and {marker!r} behind it, got {text[-200:]!r} "
                f"for a turn that ends with {probe!r}; {_WAY_OUT}"
            )
        return tail

    def render(self, history: Messages, probe: str, observations: Messages) -> str:
        """The text of a conversation in which the turn ends with the probe."""
        plain = [
            _message("assistant", message.get("content") or "") if message["role"] == "assistant" else message
            for message in history
        ]
        end = len(plain)
        while end and plain[end - 1]["role"] == "assistant":  # the beginning of an answer, and its rest
            end -= 1
        turn = _message("assistant", "".join(message["content"] for message in plain[end:]) + probe)
        return self.tokenizer.render(self.told([*plain[:end], turn, *observations]), self.tools)

    def notes(self) -> list[str]:
        name, asked = self.tokenizer.template_name, _message("user", "What now?")
        notes = []
        if self.is_described:
            notes.append(
                f"{name} does not show the policy its tools: they must be described in the prompts (data.system_prompt)"
            )
        thinks = _message("assistant", f"<think>\n{_THOUGHT}\n</think>\n\n")
        kinds = {"user": asked, "tool": _message("tool", "1", name="look", tool_call_id="call00001")}
        strips, rewrites = [], []
        for role, answer in kinds.items():
            if role == "user" or (self.tools and self.tool_role == "tool"):
                if _THOUGHT not in self.render([asked, thinks], _PROBES[0], [answer]):
                    strips.append(role)
                begins = self.tokenizer.render([asked], self.tools) + _PROBES[0]
                if not self.render([asked], _PROBES[0], [answer]).startswith(begins):
                    rewrites.append(role)
        if strips:
            notes.append(
                f"{name} leaves the thinking of earlier turns out once a message with the role {' or '.join(strips)} "
                "follows; in an episode it stays, because tokens that are there are never rewritten"
            )
        if rewrites:
            notes.append(
                f"{name} writes a turn, or what stands before it, otherwise once a message with the role "
                f"{' or '.join(rewrites)} follows; in an episode both stay as they were, because tokens that are there "
                "are never rewritten"
            )
        return notes

    def told(self, messages: Messages) -> Messages:
        """The messages with results as messages of the user, if `tool_role` says so. Those that follow each other
        become one, because templates that know no tools want user and assistant in turn.
        """
        if self.tool_role == "tool":
            return messages
        told: Messages = []
        for is_answer, run in itertools.groupby(messages, lambda message: message["role"] in ("tool", "user")):
            run = list(run)
            if is_answer and any(message["role"] == "tool" for message in run):
                run = [_message("user", "\n".join(message["content"] for message in run))]
            told += run
        return told


def _message(role: str, content: str, **others: str) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def _check_observations(observations: Messages) -> None:
    problem = conversation_problem(observations) if observations else None
    if problem is None and any(message["role"] == "assistant" for message in observations):
        problem = "a message of the assistant"
    if problem is not None:
        raise ValueError(
            f"observations must be messages with role and content, by others than the assistant, got {problem}; "
            "correct what the environment returns"
        )


def _find_marker(tokenizer: Tokenizer, eos_ids: Sequence[int], behind: str) -> int:
    """The id among `eos_ids` with whose text `behind` begins, white space apart: what the template writes behind a
    turn.
    """
    for token_id, text in _special_eos(tokenizer, eos_ids).items():
        if behind.lstrip().startswith(text):
            return token_id
    names = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in eos_ids]
    raise ValueError(
        f"{tokenizer.template_name} must end a turn with a special token that ends completions (ids {list(eos_ids)}: "
        f"{shown(names)}) for episodes of several turns, got {behind[:60]!r} behind a turn; add its id to "
        f"sampling.eos_ids if it is a special token, {_WAY_OUT}"
    )


def _special_eos(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> dict[int, str]:
    """{id: text} of those ids that are special tokens: their text is always one id, whatever stands around it."""
    added = tokenizer.backend.backend_tokenizer.get_added_tokens_decoder()
    special = {token_id: added[token_id].content for token_id in eos_ids if token_id in added}
    special = {token_id: text for token_id, text in special.items() if added[token_id].special and text.strip()}
    longest_first = sorted(special.items(), key=lambda pair: -len(pair[1]))
    return {token_id: text for token_id, text in longest_first if tokenizer.encode(text, add_bos=False) == [token_id]}


def _check_tails(turns: _ChatTurns, kind: str, asked: Messages, answer: Messages) -> None:
    """ValueError unless the same follows two different turns, and a turn with and without an earlier one, and its ids
    alone are those that it has behind a turn.
    """
    tokenizer, tails = turns.tokenizer, {}
    for history in (asked, [*asked, _message("assistant", "Look."), *answer]):
        for probe in _PROBES:
            try:
                tail = turns.tail(history, answer, probe)
            except ValueError as error:
                raise ValueError(f"{kind} must be able to follow a turn: {error}") from error
            tails[tail] = f"{probe!r} {'with' if len(history) > 1 else 'without'} a turn before it"
            ids = tokenizer.encode(tail, add_bos=False)
            whole = tokenizer.encode(turns.render(history, probe, answer), add_bos=False)
            if whole[-len(ids) :] != ids:
                raise ValueError(
                    f"the tokenizer must give what follows a turn the same ids behind a turn and alone, got "
                    f"{whole[-len(ids) :]} and {ids} for {tail!r}; use another tokenizer, or {_WAY_OUT}"
                )
    if len(tails) > 1:
        (one, first), (other, second) = list(tails.items())[:2]
        raise ValueError(
            f"{tokenizer.template_name} must write the same behind every turn when {kind} follows, got {one!r} behind "
            f"{first} and {other!r} behind {second}; {_WAY_OUT}"
        )


def _ends_of_calls(turns: _ChatTurns, eos_ids: Sequence[int], asked: Messages, results: Messages) -> tuple[int, ...]:
    """What ends a turn that calls a tool, where the template writes calls itself and ends them otherwise than text, as
    Llama 3.1's does with builtin_tools; () otherwise.

    Raises:
      ValueError: something else follows a call than follows text.
    """
    tokenizer, probe = turns.tokenizer, _PROBES[0]
    call = {"type": "function", "id": results[0]["tool_call_id"]}
    call |= {"function": {"name": results[0]["name"], "arguments": {"text": probe}}}
    try:
        text = tokenizer.render([*asked, {**_message("assistant", ""), "tool_calls": [call]}, *results], turns.tools)
    except ValueError:  # it takes no calls, and is never given any
        return ()
    if text.count(probe) != 1:
        return ()
    behind = text.partition(probe)[2]
    special = _special_eos(tokenizer, eos_ids)
    ends = [(place, token_id) for token_id, end in special.items() if (place := behind.find(end)) >= 0]
    place, token_id = min(ends, default=(0, turns.end_ids[0]))
    tail, marker = turns.tail(asked, results), special[turns.end_ids[0]]
    if behind[place + len(special[token_id]) :] != tail[len(marker) :]:
        raise ValueError(
            f"{tokenizer.template_name} must write the same behind a turn that calls a tool and behind text, got "
            f"{behind[place:]!r} and {tail!r}; {_WAY_OUT}, or set rollout.tool_role=user"
        )
    return () if token_id == turns.end_ids[0] else (token_id,)
