"""Chats that go on from an earlier answer keep its very tokens.

In: chats that came to their end, then a longer one. Out: the ids of its prompt: those of the earlier chat and of what
was drawn, and behind them what the chat template writes after a turn (`rl.data.turns`). Without this a template renders
the whole conversation again, and the tokens of an answer may be others than those that were drawn.

A chat goes on from an earlier one if its messages begin with those of the other and its answer: the same roles,
contents, names of tools and arguments of calls, with the same tools, under the same KEY. Ids of calls may differ. What
does not go on from an earlier chat begins a new sequence. So the order in which chats arrive does not matter.
"""

import collections
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.chat_request import same_message
from rl.data.tokenizer import Tokenizer
from rl.data.turns import Turns, chat_turns
from rl.serving.calls import FinishedCall

MOST_TOOLS = 64  # different sets of tools whose turns are kept


class Conversations:
    """What was drawn in the newest chats.

    Args:
      eos_ids: that end a completion. most: chats that are remembered; the oldest are forgotten first.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int], most: int) -> None:
        self._tokenizer, self._eos_ids, self._most = tokenizer, tuple(eos_ids), most
        self._ids: collections.OrderedDict[bytes, list[int]] = collections.OrderedDict()
        self._turns: collections.OrderedDict[str, Turns | None] = collections.OrderedDict()
        self._lock = threading.Lock()

    def add(self, call: FinishedCall) -> None:
        """Remembers a chat. Of several choices with the same answer the first one is kept."""
        for prompt_ids, completion, answer in zip(call.prompt_ids, call.completions, call.answers, strict=True):
            name = _name(call.key, call.tools, [*call.messages, answer])
            with self._lock:
                self._ids.setdefault(name, [*prompt_ids, *completion.token_ids.tolist()])
                self._ids.move_to_end(name)
                while len(self._ids) > self._most:
                    self._ids.popitem(last=False)

    def prompt_ids(
        self, key: str, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[int] | None:
        """The ids of a chat that goes on from an earlier one; None for others, and where the chat template does not
        write the same behind every turn.
        """
        last = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        if last < 0 or last == len(messages) - 1:
            return None
        with self._lock:
            before = self._ids.get(_name(key, tools, messages[: last + 1]))
        turns = self._turns_of(tools) if before is not None else None
        if before is None or turns is None:
            return None
        has_ended = before[-1] in turns.end_ids
        history, observations = list(messages[: last + 1]), list(messages[last + 1 :])
        return [*before, *turns.observation_ids(history, observations, has_ended)]

    def _turns_of(self, tools: Sequence[dict[str, Any]]) -> Turns | None:
        name = json.dumps(tools, sort_keys=True)
        with self._lock:
            if name in self._turns:
                return self._turns[name]
        try:
            turns = chat_turns(self._tokenizer, self._eos_ids, tools)
        except ValueError:  # the whole chat is rendered then
            turns = None
        with self._lock:
            self._turns[name] = turns
            if len(self._turns) > MOST_TOOLS:
                self._turns.popitem(last=False)
        return turns


def _name(key: str, tools: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]]) -> bytes:
    """A hash of what makes a conversation the same."""
    told = [key, list(tools), [same_message(message) for message in messages]]
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).digest()
