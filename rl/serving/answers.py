"""Completions as OpenAI's API tells them: choices, log-probs, calls of tools, usage.

In: what was drawn. Out: JSON-able objects. Log-probs are under softmax(logits / temperature), as everywhere in Tandem,
at temperature 1 when greedy, and have the shortest form that gives the same number again.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rewards.chat_request import told_call
from rewards.tool_calls import Call
from rl.data.tokenizer import Tokenizer
from rl.serving.text import REPLACEMENT, token_text

LEAST_LOGPROB = -9999.0  # for minus infinity, which JSON lacks
FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class TokenNames:
    """Texts of single tokens. ids_as_text: `token_id:7` in place of the text, which tokens may share."""

    def __init__(self, tokenizer: Tokenizer, ids_as_text: bool) -> None:
        self._tokenizer, self._ids_as_text = tokenizer, ids_as_text
        self._texts: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        if self._ids_as_text:
            return f"token_id:{token_id}"
        if token_id not in self._texts:
            self._texts[token_id] = token_text(self._tokenizer, token_id)
        return self._texts[token_id]


def number(value: Any) -> float:
    """A log-prob as JSON has it."""
    return float(str(value)) if math.isfinite(value) else LEAST_LOGPROB


def chat_logprobs(
    names: TokenNames,
    token_ids: Iterable[int],
    logprobs: np.ndarray,
    top_ids: np.ndarray,
    top_logprobs: np.ndarray,
    num_top: int,
) -> dict[str, Any]:
    """The field `logprobs` of a chat's choice."""

    def told(token_id: int, logprob: Any) -> dict[str, Any]:
        text = names(int(token_id))
        content = None if REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": number(logprob), "bytes": content}

    content = []
    for place, token_id in enumerate(token_ids):
        best = zip(top_ids[place][:num_top], top_logprobs[place][:num_top], strict=True)
        content.append({**told(token_id, logprobs[place]), "top_logprobs": [told(*pair) for pair in best]})
    return {"content": content, "refusal": None}


def text_logprobs(
    names: TokenNames,
    token_ids: Iterable[int],
    logprobs: Any,
    top_ids: Any,
    top_logprobs: Any,
    num_top: int,
    offsets: Sequence[int],
) -> dict[str, Any]:
    """The field `logprobs` of a text's choice.

    Args:
      logprobs, top_ids, top_logprobs: by token, None at a token that has none, the first of a prompt.
      offsets: by token, the characters of the text before it, see `rl.serving.text.TextOffsets`.
    """
    tokens = [names(int(token_id)) for token_id in token_ids]
    tops = []
    for place, token in enumerate(tokens):
        if logprobs[place] is None:
            tops.append(None)
            continue
        best: dict[str, float] = {}
        for top_id, value in zip(top_ids[place][:num_top], top_logprobs[place][:num_top], strict=True):
            best.setdefault(names(int(top_id)), number(value))  # of tokens with one text, the likeliest
        best.setdefault(token, number(logprobs[place]))
        tops.append(best)
    told = [None if value is None else number(value) for value in logprobs]
    return {"tokens": tokens, "token_logprobs": told, "top_logprobs": tops, "text_offset": list(offsets)}


def tool_calls(calls: Sequence[Call], prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The field `tool_calls` of a message. The ids follow from the tokens, so that the same draw has the same ids."""
    drawn = hashlib.blake2b(np.asarray([*prompt_ids, *token_ids], np.int64).tobytes(), digest_size=10).hexdigest()
    return [told_call(call.name, call.arguments, f"call_{drawn}{place:04d}") for place, call in enumerate(calls)]


def usage(num_prompt: int, num_drawn: int, num_reused: int) -> dict[str, Any]:
    """The field `usage`. num_reused: tokens of prompts whose keys and values were there already."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_drawn,
        "total_tokens": num_prompt + num_drawn,
        "prompt_tokens_details": {"cached_tokens": num_reused},
    }
