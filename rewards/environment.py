"""What an environment is: our own protocol, which all other forms are turned into (`rewards.environment_kinds`).

An environment plays one episode: it opens a conversation, answers the policy's turns, and may give rewards. It runs in
a worker process (`rewards.environment_worker`), which `rewards.environment_runner` looks after.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

OPENENV, TEXTARENA = "openenv:", "textarena:"  # begin the names of environments that are in no file of the user's
AGENT = "agent:"  # begins the name of a function that is an agent, `rollout.agent`
Message = dict[str, Any]  # role and content; of a tool also name and tool_call_id; of a turn maybe tool_calls


def is_ready_made(reference: str) -> bool:
    """Whether what a configuration names is a server of OpenEnv or a game of textarena, and no class in a file."""
    return reference.startswith((OPENENV, TEXTARENA))


@dataclasses.dataclass(frozen=True)
class Step:
    """How an environment answers a turn.

    messages: observations, which the policy reads next; their role is user, tool or system. reward: of this turn; None:
      there is none. done: whether the episode is over. metrics: numbers for `metrics.jsonl`.
    prompt: what the policy reads next in place of all that was said before, a whole prompt as of `reset`. Then there
      are no messages. What it drew before is trained on where it stands; the episode goes on in another sequence.
    sequence: the sequence that goes on with the messages, by its number from 0; None: that of the turn.
    """

    messages: Sequence[Message] = ()
    reward: float | None = None
    done: bool = False
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prompt: str | Sequence[Message] | None = None
    sequence: int | None = None


@dataclasses.dataclass(frozen=True)
class TurnTokens:
    """What a turn took: tokens that the policy read before it, those that it drew, and whether a limit has cut it."""

    prompt: int
    drawn: int
    is_cut: bool


class Environment(Protocol):
    """A class (or a function that makes one) with these methods, each of which may be `async`. One is made for each
    episode, without arguments.

    A class may have `tools`, a list of functions or JSON schemas: the policy is shown them, and `step` gets the calls
    in the message's `tool_calls` and answers them itself.
    """

    def reset(self, row: Mapping[str, Any], seed: int) -> str | list[Message]:
        """The whole prompt. row: the data row, whose `prompt` is what the data asked. seed: of all that is random; the
        global random state is seeded by it already.
        """
        ...

    def step(self, message: Message) -> Step:
        """Answers a turn: role assistant, content, and tool_calls where there are tools."""
        ...

    def close(self) -> None:
        """The end of the episode. A `close(reason)` is told why: what the run says, or "failure"."""
        ...
