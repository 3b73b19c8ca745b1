"""The environments of all processes of a run, which look like one runner's in each of them.

In: the own runner of a process. Out: what every process hears is the same, in the same order: the replies of all. Each
episode is played by one process. Not here: worker processes (`rewards.environment_runner`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rewards.environment import TurnTokens
from rewards.environment_rewards import EpisodeFacts
from rewards.environment_runner import EnvironmentReply, EnvironmentRunner, reply_of

Gather = Callable[[Any], list[Any]]


class Environments(Protocol):
    """What episodes need of environments; see `EnvironmentRunner`."""

    def environment_of(self, row: Mapping[str, Any], /) -> str: ...
    def begin(self, episode: int, row: Mapping[str, Any], seed: int, expects: str | None = None) -> None: ...
    def step(self, episode: int, text: str, tokens: TurnTokens | None = None, expects: str | None = None) -> None: ...
    def finish(self, episode: int, reason: str, facts: EpisodeFacts | None = None) -> None: ...
    def poll(self, timeout: float) -> list[EnvironmentReply]: ...
    def drop_all(self) -> None: ...


class SharedEnvironments:
    """Environments of which each process plays every `num_processes`-th episode.

    All processes make the same calls. `poll` waits for all of them, and gives each the replies of all. So whatever
    follows from replies is the same everywhere, though the processes' clocks are not.

    Args:
      own: this process's runner.
      gather: gives the JSON-able value of every process, in the order of processes, as `rl.devices.hosts.gather` does.
    """

    def __init__(self, own: EnvironmentRunner, process: int, num_processes: int, gather: Gather) -> None:
        self._own, self._process, self._num_processes, self._gather = own, process, num_processes, gather

    def environment_of(self, row: Mapping[str, Any], /) -> str:
        """The name of the environment that plays a row, see `EnvironmentRunner`."""
        return self._own.environment_of(row)

    def begin(self, episode: int, row: Mapping[str, Any], seed: int, expects: str | None = None) -> None:
        """Opens an episode. Raises ValueError as `EnvironmentRunner.begin` does, in every process."""
        if self._is_own(episode):
            self._own.begin(episode, row, seed, expects)
        else:
            self._own.check(row)

    def step(self, episode: int, text: str, tokens: TurnTokens | None = None, expects: str | None = None) -> None:
        """Hands a turn to an episode."""
        if self._is_own(episode):
            self._own.step(episode, text, tokens, expects)

    def finish(self, episode: int, reason: str, facts: EpisodeFacts | None = None) -> None:
        """Ends an episode."""
        if self._is_own(episode):
            self._own.finish(episode, reason, facts)

    def poll(self, timeout: float) -> list[EnvironmentReply]:
        """The replies of all processes. Each waits until there is one of its own or the time is over, in seconds."""
        own = [dataclasses.asdict(reply) for reply in self._own.poll(timeout)]
        return [reply_of(fields) for part in self._gather(own) for fields in part]

    def drop_all(self) -> None:
        """Forgets all episodes."""
        self._own.drop_all()

    def _is_own(self, episode: int) -> bool:
        return episode % self._num_processes == self._process
