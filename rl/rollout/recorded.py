"""Environments of episodes that a journal knows in part: answers that are known are not asked for.

In: the requests of `rl.rollout.episodes`, and a step's journal. Out: the same replies as the environments themselves
would give. An episode that is over has no environment. One that was cut short gets a fresh environment, which hears the
recorded turns first: where it answers otherwise, the episode is forgotten and begins again. All further answers go into
the journal.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rewards.environment import TurnTokens
from rewards.environment_replies import asked_digest
from rewards.environment_rewards import EpisodeFacts
from rewards.environment_runner import EnvironmentReply
from rl.rollout.journal import Key, Recorded, StepJournal, row_digest, same_answer
from rl.rollout.shared_environments import Environments

_WHY = "it answered something else than before the run was stopped, with the same row, seed and turns"


class _Wanted(NamedTuple):
    """A request. text: a turn, or why the episode ends. facts: for reward functions at the end. tokens: of a turn."""

    op: Literal["begin", "step", "finish"]
    text: str = ""
    facts: EpisodeFacts | None = None
    tokens: TurnTokens | None = None


@dataclasses.dataclass
class _Played:
    """An episode. row, seed: of its environment. told: how many of the recorded replies were handed on. heard: how many
    of them its environment has given. wanted: what it is asked when it has given those that were handed on, or "begin"
    while the first is not handed on; None: nothing. closes: its environment is being closed, and a fresh one comes
    next, or none.
    """

    key: Key
    row: Mapping[str, Any]
    seed: int
    recorded: Recorded
    told: int = 0
    heard: int = 0
    wanted: "_Wanted | None" = None
    closes: Literal["for_another", "for_good"] | None = None


class RecordedEnvironments:
    """The environments of a run for the episodes of one call; those that a journal knows go on from there.

    keys: the key of each episode, by its number.
    """

    def __init__(self, own: Environments, journal: StepJournal, keys: Sequence[Key]) -> None:
        self._own, self._journal, self._keys = own, journal, keys
        self._played: dict[int, _Played] = {}
        self._ready: list[EnvironmentReply] = []

    def environment_of(self, row: Mapping[str, Any], /) -> str:
        """The name of the environment that plays a row, see `EnvironmentRunner`, as for the others here."""
        return self._own.environment_of(row)

    def begin(self, episode: int, row: Mapping[str, Any], seed: int, expects: str | None = None) -> None:
        """Opens an episode."""
        key = self._keys[episode]
        played = _Played(key, row, seed, self._journal.episode(key, row_digest(row, seed)))
        self._played[episode] = played
        if played.recorded.is_over:
            self._tell(episode, played)
            return
        if played.recorded.replies:
            played.wanted = _Wanted("begin")
        self._begin_own(episode, played)

    def step(self, episode: int, text: str, tokens: TurnTokens | None = None, expects: str | None = None) -> None:
        """A turn. Where it is the recorded one, so is the answer."""
        self._ask(episode, _Wanted("step", text, tokens=tokens))

    def finish(self, episode: int, reason: str, facts: EpisodeFacts | None = None) -> None:
        """The end of an episode."""
        self._ask(episode, _Wanted("finish", reason, facts))

    def poll(self, timeout: float) -> list[EnvironmentReply]:
        """Replies, recorded ones at once."""
        for reply in self._own.poll(0.0 if self._ready else timeout):
            self._take(reply, self._played[reply.episode])
        self._journal.sync()
        ready, self._ready = self._ready, []
        return ready

    def drop_all(self) -> None:
        """Forgets all episodes."""
        self._played, self._ready = {}, []
        self._own.drop_all()

    def _ask(self, episode: int, wanted: _Wanted) -> None:
        played = self._played[episode]
        known = played.recorded.replies
        if played.told < len(known) and known[played.told].op == wanted.op:
            self._tell(episode, played)
        elif played.heard == played.told:
            self._send(episode, wanted)
        else:  # the policy has drawn another turn than before, and the environment is not there, or is further
            del known[played.told :]
            played.wanted = wanted
            self._begin_again(episode, played)

    def _send(self, episode: int, wanted: _Wanted) -> None:
        if wanted.op == "step":
            self._own.step(episode, wanted.text, wanted.tokens)
        else:
            self._own.finish(episode, wanted.text, wanted.facts)

    def _tell(self, episode: int, played: _Played) -> None:
        reply = played.recorded.replies[played.told]
        played.told += 1
        self._ready.append(dataclasses.replace(reply, episode=episode))

    def _take(self, reply: EnvironmentReply, played: _Played) -> None:
        """Takes in what an environment says: what is new, or what is compared with what it said."""
        episode = reply.episode
        if played.closes is not None:
            closed, played.closes = played.closes, None
            if closed == "for_another":
                self._begin_own(episode, played)
            return
        if played.wanted is None:
            self._journal.add_reply(played.key, reply)
            played.heard += 1
            self._tell(episode, played)
            return
        wanted, known = played.wanted, played.recorded.replies
        if not same_answer(reply, known[played.heard]):
            self._differs(episode, played, is_running=reply.failure is None)
            return
        played.heard += 1
        goal = len(known) if wanted.op == "begin" else played.told
        if played.heard < goal:
            said, answer = played.recorded.said[played.heard - 1], known[played.heard]
            self._own.step(episode, *said, None if answer.op == "finish" else asked_digest(answer))
            return
        played.wanted = None
        if wanted.op == "begin":
            self._tell(episode, played)
        else:
            self._send(episode, wanted)

    def _differs(self, episode: int, played: _Played, *, is_running: bool) -> None:
        """An environment has answered otherwise: the episode begins again, or is lost where it has begun."""
        assert played.wanted is not None
        op, played.wanted = played.wanted.op, None
        if op == "begin":
            played.recorded = self._journal.forget(played.key)
            self._begin_again(episode, played, is_running=is_running)
            return
        self._journal.add_reply(played.key, EnvironmentReply(episode, op, failure=("replay", _WHY)))
        self._tell(episode, played)
        if is_running:
            played.closes = "for_good"
            self._own.finish(episode, "failure")

    def _begin_again(self, episode: int, played: _Played, *, is_running: bool | None = None) -> None:
        """A fresh environment for an episode, when the old one is closed, if there is one."""
        is_running = played.heard > 0 if is_running is None else is_running
        played.heard = 0
        if is_running:
            played.closes = "for_another"
            self._own.finish(episode, "failure")
        else:
            self._begin_own(episode, played)

    def _begin_own(self, episode: int, played: _Played) -> None:
        known = played.recorded.replies
        self._own.begin(episode, played.row, played.seed, asked_digest(known[0]) if known else None)
