"""Text of tokens as they come: never half a character, and nothing that may be the beginning of a stop string.

In: token ids, a few at a time. Out: the text that is certain by then. All pieces together are the text of the whole
completion, without the stop string that ended it. Not here: where a completion ends (`rl.sampler.endings`).
"""

from collections.abc import Iterable, Sequence

from rl.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
_BYTES_OF_CHARACTER = 4  # at most, in UTF-8


class TextStream:
    """The text of one completion.

    Args:
      stops: stop strings of the request. keeps_stop: whether the text keeps the one that ends it.
      keeps_special: whether special tokens are part of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), keeps_stop: bool = False, keeps_special: bool = False
    ) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._keeps_stop, self._keeps_special = keeps_stop, keeps_special
        self._ids: list[int] = []
        self._first, self._shown = 0, 0  # tokens before which nothing is decoded again; tokens whose text is known
        self._text = ""  # what is known
        self._num_sent = 0  # characters of it

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens make certain."""
        self._ids.extend(int(token) for token in token_ids)
        # A tokenizer may write the first word of a text otherwise than a later one, so a few known tokens come first.
        known = self._decode(self._ids[self._first : self._shown])
        text = self._decode(self._ids[self._first :])
        if not text.endswith(REPLACEMENT) and text.startswith(known):
            self._text += text[len(known) :]
            self._first, self._shown = self._shown, len(self._ids)
        return self._send(len(self._text) - self._num_held())

    def finish(self, token_ids: Iterable[int], stop: str | None) -> str:
        """The rest of the text.

        Args:
          token_ids: the tokens that were not pushed yet. stop: the stop string that ended the completion.
        """
        self._ids.extend(int(token) for token in token_ids)
        text = text_of(self._tokenizer, self._ids, stop, self._keeps_stop, self._keeps_special)
        # Text that was sent stays as it is. Only a decoder that rewrites what it wrote would differ there.
        self._text = text if text.startswith(self._text[: self._num_sent]) else self._text
        return self._send(len(self._text))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=not self._keeps_special)

    def _num_held(self) -> int:
        """The characters at the end that may be the beginning of a stop string."""
        unsent = self._text[self._num_sent :]
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop), len(unsent)), longest, -1):
                if stop.startswith(unsent[-length:]):
                    longest = length
                    break
        return longest

    def _send(self, end: int) -> str:
        text = self._text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return text


class TextOffsets:
    """The characters of a text that come before each of its tokens: those that the reader of the text sees.

    A token in the middle of a character begins where the character does, and one without text where the next one does.

    Args:
      keeps_special: whether special tokens are part of the text. start: characters before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, keeps_special: bool = False, start: int = 0) -> None:
        self._tokenizer, self._keeps_special, self._end = tokenizer, keeps_special, start
        self._ids: list[int] = []  # the last ones; `num_known` of them, with `num_shown` characters, are in `end`
        self._num_known = self._num_shown = 0

    def push(self, token_ids: Iterable[int]) -> list[int]:
        """The offsets of the tokens that come next."""
        return [self._push(int(token)) for token in token_ids]

    def _push(self, token: int) -> int:
        before = self._decode(self._ids)
        self._ids.append(token)
        text = self._decode(self._ids)
        pairs = zip(before, text, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(text)))
        if text.endswith(REPLACEMENT):  # perhaps it is the next byte of the same character
            first = min(first, len(text) - 1)
        start = self._end + first - self._num_shown
        if not text.endswith(REPLACEMENT) or len(self._ids) - self._num_known >= _BYTES_OF_CHARACTER:
            self._end += max(0, len(text) - self._num_shown)
            # A tokenizer may write the first word of a text otherwise, so what comes next is read behind this.
            del self._ids[: self._num_known]
            self._num_known, self._num_shown = len(self._ids), len(self._decode(self._ids))
        return max(start, 0)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=not self._keeps_special)


def text_of(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    stop: str | None = None,
    keeps_stop: bool = False,
    keeps_special: bool = False,
) -> str:
    """The text of a whole completion. stop: the stop string that ended it; what is behind it belongs to no text."""
    text = tokenizer.decode(token_ids, skip_special_tokens=not keeps_special)
    if stop is None:
        return text
    # The last token completes it, and the text of the tokens before that one does not show it.
    before = tokenizer.decode(token_ids[:-1], skip_special_tokens=not keeps_special)
    start = text.find(stop, max(0, len(before) - len(stop) + 1 if text.startswith(before) else 0))
    if start < 0:  # it holds a special token, which the text leaves out
        return before
    return text[: start + len(stop)] if keeps_stop else text[:start]


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself as text, special or not. Bytes that are no character are U+FFFD."""
    return tokenizer.decode([token_id], skip_special_tokens=False)
