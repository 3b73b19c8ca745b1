"""The text of each token of a sequence, such that all pieces together are the text of the sequence.

In: token ids. Out: a piece of text for each. A character whose bytes are spread over several tokens belongs to the last
of them; the others have an empty piece. Special tokens are text, too.
"""

from collections.abc import Sequence

from rl.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes that are no character decode to


class TokenTexts:
    """Pieces of text by token. Remembers the text of each id that it has seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """A piece for each id."""
        ids = [int(token) for token in token_ids]
        pieces = [self._text_of(token) for token in ids]
        whole = self._decode(ids)
        return pieces if "".join(pieces) == whole else self._one_by_one(ids, whole)

    def _text_of(self, token: int) -> str:
        if token not in self._alone:
            self._alone[token] = self._decode([token])
        return self._alone[token]

    def _one_by_one(self, ids: list[int], whole: str) -> list[str]:
        """The pieces where tokens by themselves have other text than in the sequence: a decoder that drops the space
        before a first word, or characters of several tokens.
        """
        pieces, first, shown = [], 0, 0  # nothing before `first` is decoded again; the text before `shown` is given out
        for end in range(1, len(ids) + 1):
            known, text = self._decode(ids[first:shown]), self._decode(ids[first:end])
            if text.endswith(_REPLACEMENT) or not text.startswith(known):
                pieces.append("")
                continue
            pieces.append(text[len(known) :])
            first, shown = shown, end
        given = "".join(pieces)
        if pieces and whole.startswith(given):  # what the last tokens leave open, such as half a character
            pieces[-1] += whole[len(given) :]
        return pieces

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
