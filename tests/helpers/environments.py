"""Runners of environments, short, and files with environments and tools."""

import json
import pathlib
import textwrap
from collections.abc import Callable

from rewards.environment_runner import EnvironmentReply, EnvironmentRunner

QUESTION = [{"role": "user", "content": "Which number?"}]

GUESS = '''
    import random
    from rewards.environment import Step

    class Guess:
        """A number from 1 to 100, which the row may hold; hints until it is found."""

        def reset(self, row, seed):
            self.number, self.turns = row.get("number") or random.randint(1, 100), 0
            return row["prompt"]

        def step(self, message):
            self.turns += 1
            guess = int(message.pop("content"))  # its own copy of the turn
            if guess == self.number:
                return Step(reward=1.0 / self.turns, done=True, metrics={"turns": self.turns})
            hint = "higher" if guess < self.number else "lower"
            return Step([{"role": "user", "content": hint}], metrics={"distance": abs(guess - self.number)})

        def close(self):
            print("closed", self.number)
'''

TOOLS = '''
    import asyncio

    def add(a: int, b: int) -> int:
        """Adds two numbers.

        Args:
            a: the first
            b: the second
        """
        return a + b

    async def double(a: int) -> int:
        """Doubles a number.

        Args:
            a: the number
        """
        await asyncio.sleep(0)
        return 2 * a

    def divide(a: int, b: int) -> float:
        """Divides a number.

        Args:
            a: the number
            b: by what
        """
        return a / b

    def last(items: list[int]) -> int:
        """Takes the last number away.

        Args:
            items: the numbers
        """
        return items.pop()
'''


def writer(folder: pathlib.Path) -> Callable[..., Callable[[str], str]]:
    """Writes a file into the folder; the result gives the reference of one of its names."""

    def write_file(code: str, name: str = "mine") -> Callable[[str], str]:
        path = folder / f"{name}.py"
        path.write_text(textwrap.dedent(code))
        return lambda attribute: f"{path}:{attribute}"

    return write_file


def start(environments=None, tools=(), **options) -> EnvironmentRunner:
    """A runner of one worker, and of one environment called game where a reference is given."""
    limits = {"num_workers": 1, "step_timeout_seconds": 5.0, "episode_timeout_seconds": 20.0}
    limits |= {"max_episodes_per_worker": 16}
    if isinstance(environments, str):
        environments = {"game": environments}
    return EnvironmentRunner(environments or {}, list(tools), **(limits | options))


def replies_of(runner: EnvironmentRunner, count: int, seconds: float = 30.0) -> dict[int, EnvironmentReply]:
    """So many replies, by episode."""
    found = []
    while len(found) < count:
        new = runner.poll(seconds)
        assert new, found
        found += new
    assert len(found) == count
    return {reply.episode: reply for reply in found}


def ask(runner: EnvironmentRunner, episode: int, method: str, *arguments) -> EnvironmentReply:
    """The reply to one request."""
    getattr(runner, method)(episode, *arguments)
    return replies_of(runner, 1)[episode]


def hermes(name: str, **arguments) -> str:
    """The text of a call."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
