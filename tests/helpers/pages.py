"""The fenced blocks and the command lines of a page of documentation."""

import pathlib
import re
import shlex
from typing import NamedTuple

from tests.helpers.places import ROOT

_BLOCK = re.compile(r"^```(?P<language>\w*) ?(?P<name>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^ *(?:\$ )?(grpo [a-z].*)$", re.MULTILINE)


class Block(NamedTuple):
    """language and name: of the line that opens it, ```python my_game.py; empty where it has none."""

    language: str
    name: str
    text: str


def read(page: str | pathlib.Path) -> str:
    """The text of a page, named from the root of the checkout."""
    return (ROOT / page).read_text()


def blocks(page: str | pathlib.Path) -> list[Block]:
    """The fenced blocks of a page in their order."""
    text = read(page)
    found = [Block(match["language"], match["name"], match["text"]) for match in _BLOCK.finditer(text)]
    assert len(found) == text.count("\n```") // 2, page  # none is left open, and none opens in another way
    return found


def texts(page: str | pathlib.Path, language: str) -> list[str]:
    """The texts of the blocks in one language."""
    return [block.text for block in blocks(page) if block.language == language]


def commands(page: str | pathlib.Path) -> list[list[str]]:
    """The words after `grpo` of each command that stands in a line of code of its own, comments left out."""
    found = []
    for line in _COMMAND.findall(read(page).replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        while words:
            end = next((place for place, word in enumerate(words) if word.endswith(";")), len(words) - 1)
            command = [word.rstrip(";") for word in words[: end + 1]]
            found += [command[1:]] if command[0] == "grpo" else []
            words = words[end + 1 :]
    return found
