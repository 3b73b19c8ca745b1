"""Takes the values of secrets out of what a report shows.

In: JSON-like values, and the names in `rewards.env`, whose values reward functions may have written into what they
keep. Out: the same with `[NAME]` in the place of each value that this process finds in its own environment. A value
that it does not have cannot be recognised.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SHORTEST = 4  # characters; a shorter value is no secret, and would be found everywhere


class Mask:
    """Replaces secrets in texts. names: of variables of this process's environment."""

    def __init__(self, names: Iterable[str], variables: Mapping[str, str] = os.environ) -> None:
        found = {variables[name]: f"[{name}]" for name in names if len(variables.get(name, "")) >= _SHORTEST}
        self._marks = dict(sorted(found.items(), key=lambda item: -len(item[0])))  # a longer one may hold a shorter one

    def text(self, text: str) -> str:
        """The text without secrets."""
        for secret, mark in self._marks.items():
            text = text.replace(secret, mark)
        return text

    def value(self, value: Any) -> Any:
        """A JSON-like value without secrets, in keys as well."""
        if not self._marks:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def hidden(self, pieces: Sequence[str]) -> list[str | None]:
        """The pieces of a text, None for those with a part of a secret, of which the first has the mark instead."""
        shown: list[str | None] = list(pieces)
        whole = "".join(pieces)
        for secret, mark in self._marks.items():
            start = whole.find(secret)
            while start >= 0:
                end, place, first = start + len(secret), 0, True
                for index, piece in enumerate(pieces):
                    if place < end and place + len(piece) > start:
                        shown[index] = mark if first else None
                        first = False
                    place += len(piece)
                start = whole.find(secret, end)
        return shown
