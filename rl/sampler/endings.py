"""Finds the end of a completion: an EOS id, a stop string, or its limit of tokens.

In: the tokens drawn so far, on the host. Out: the length of the completion and the reason of its end. Stop strings are
found across token boundaries. Not here: which completions run (`rl.sampler.request_queue`).
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from rl.sampler.token_draw import SamplingParams

REPLACEMENT = "\ufffd"


def find_stop(
    token_ids: Sequence[int],
    num_checked: int,
    sampling: SamplingParams,
    decode_text: Callable[[Sequence[int]], str],
    num_before: int = 0,
    num_earlier: int = 0,
) -> tuple[int, str] | None:
    """(number of tokens up to the one that completes the first stop string, that string), or None.

    A stop string is looked for in the text of all tokens together, so token boundaries do not matter. The completion
    ends after the fewest tokens whose text shows the stop string, however many tokens are looked at together. A stop
    string that `min_completion_length` tokens or fewer show does not count.

    Args:
      num_checked: the number of first tokens that are known to complete no stop string.
      num_before: tokens that were there before anything was drawn; a stop string that they show counts no more than one
        that the first `min_completion_length` tokens do.
      num_earlier: of these, the tokens before the turn, from which its `min_completion_length` tokens are counted.
    """
    stops, minimum = sampling.stop_strings, max(num_earlier + sampling.min_completion_length, num_before)

    def completed(text: str) -> str | None:
        held = [stop for stop in stops if stop in text]
        num_ignored = _num_shown(token_ids[:minimum], text, decode_text) if held else 0
        return next((stop for stop in held if text.find(stop, max(0, num_ignored - len(stop) + 1)) >= 0), None)

    first = max(num_checked, minimum) + 1
    if first > len(token_ids):
        return None
    text = decode_text(token_ids)
    if completed(text) is None and not _may_hide(text, token_ids[: first - 1], stops, decode_text):
        return None
    for num_tokens in range(first, len(token_ids) + 1):
        stop = completed(decode_text(token_ids[:num_tokens]))
        if stop is not None:
            return num_tokens, stop
    return None


def _num_shown(token_ids: Sequence[int], text: str, decode_text: Callable[[Sequence[int]], str]) -> int:
    """The number of first characters of `text` that the first tokens show, for some number of them.

    The text of all tokens may end in unfinished characters. Then the text of fewer tokens shows more.
    """
    num_shown = 0
    for num_tokens in range(len(token_ids), 0, -1):
        beginning = decode_text(token_ids[:num_tokens])
        num_shared = _num_shared(beginning, text)
        num_shown = max(num_shown, num_shared)
        if num_shared == len(beginning):
            break
    return num_shown


def _may_hide(
    text: str, checked: Sequence[int], stops: Sequence[str], decode_text: Callable[[Sequence[int]], str]
) -> bool:
    """Whether a stop string may show in the text of fewer tokens (more than the checked ones) and not in the text of
    all.

    Decoders write U+FFFD for bytes that are no character. Some do so for every byte of a run until its last character
    is finished. All other text only grows.
    """
    if any(REPLACEMENT in stop for stop in stops):
        return True
    return REPLACEMENT in text and REPLACEMENT in text[_num_shared(decode_text(checked), text) :]


def _num_shared(left: str, right: str) -> int:
    """The number of characters with which both texts start."""
    if right.startswith(left):
        return len(left)
    return next(i for i, (a, b) in enumerate(itertools.zip_longest(left, right)) if a != b)


def find_end(
    tokens: np.ndarray,
    num_checked: int,
    num_tokens: int,
    limit: int,
    sampling: SamplingParams,
    decode_text: Callable[[Sequence[int]], str] | None,
    num_before: int = 0,
    num_earlier: int = 0,
) -> tuple[int, str, int | str | None] | None:
    """(length, finish reason, stop reason) of a completion that ends among its newest tokens, or None.

    Args:
      tokens: with stop strings all `num_tokens` tokens, else only those after the first `num_checked`.
      limit: the most tokens that it may have.
      num_before: tokens that were there before anything was drawn, among the checked ones.
      num_earlier: see `find_stop`.
    """
    new_tokens = tokens[len(tokens) - (num_tokens - num_checked) :]
    eos_at = np.flatnonzero(np.isin(new_tokens, sampling.eos_ids))
    num_text = num_checked + int(eos_at[0]) if eos_at.size else num_tokens
    if sampling.stop_strings:
        assert decode_text is not None
        stop = find_stop(tokens[:num_text].tolist(), num_checked, sampling, decode_text, num_before, num_earlier)
        if stop is not None:
            return stop[0], "stop", stop[1]
    if eos_at.size:
        return num_text + 1, "eos", int(new_tokens[eos_at[0]])
    return (num_tokens, "length", None) if num_tokens == limit else None


class Drawing:
    """What is known of a request that has been begun: one array of columns per chunk of drawn tokens.

    before: tokens of the completion that were there before anything was drawn; `num_tokens` counts them as well.
    """

    def __init__(self, before: Sequence[int] = ()) -> None:
        self.before = np.array(before, np.int32)
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.num_tokens = len(before)

    def add(self, columns: tuple[np.ndarray, ...]) -> None:
        self.parts.append(columns)
        self.num_tokens += len(columns[0])

    def columns(self) -> list[np.ndarray]:
        return [np.concatenate(part) for part in zip(*self.parts, strict=True)]

    def since(self, num_seen: int) -> tuple[np.ndarray, ...] | None:
        """The columns of what was drawn after the first `num_seen` drawn tokens; None where nothing was."""
        start, later = self.num_tokens - len(self.before), []
        for part in reversed(self.parts):
            if start <= num_seen:
                break
            start -= len(part[0])
            later.append(part)
        if not later:
            return None
        return tuple(np.concatenate(part)[num_seen - start :] for part in zip(*reversed(later), strict=True))

    def token_ids(self) -> np.ndarray:
        """All tokens of the completion, those before the drawn ones included."""
        return np.concatenate([self.before, *(part[0] for part in self.parts)])
