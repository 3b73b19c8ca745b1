"""Draws episodes: completions of several turns, with the observations of an environment or of tools between them.

In: an open session of the sampler, running environments, data rows. Out: an `Episode` for each sample as it ends. Token
ids are appended and never made again from text: a turn's tokens are those that were drawn, an observation's tokens are
put behind them untrained. Not here: what becomes of episodes (`rl.rollout.episode`), rewards (`rl.rollout.scoring`),
worker processes (`rewards.environment_runner`), the text of observations (`rl.data.turns`), decoding (`rl.sampler`).

What an episode looks like, with two turns (d: drawn and trained; o: put there and only read):

    prompt                     turn 1    observation           turn 2
    <user>7 * 12?<assistant>   dddddddd  oooooooooooooooooooo  dddddd
    shared by the group        \\_______ token_ids of the completion _______/

Legend: P prompts, G episodes per prompt, B = P * G.
"""

import collections
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from rewards.environment import TurnTokens
from rewards.environment_rewards import EpisodeFacts
from rewards.environment_runner import EnvironmentReply
from rewards.in_process import InProcess
from rewards.moment import Moment, sample_seed
from rl.data.prompt_rows import Prompt, PromptRow
from rl.data.tokenizer import Tokenizer, split_prefill
from rl.data.turns import Turns
from rl.rollout.episode import (
    DONE,
    FAILED,
    MAX_DRAWN,
    MAX_TOKENS,
    MAX_TURNS,
    Episode,
    num_alike,
    too_many_sequences,
)
from rl.rollout.journal import StepJournal
from rl.rollout.recorded import RecordedEnvironments
from rl.rollout.shared_environments import Environments
from rl.sampler.contract import Completion, CompletionSource, DrawSession, Request
from rl.sampler.token_draw import SamplingParams

MOST_TOOLS = 64  # different sets of tools of agents whose turns are kept
_WAIT_SECONDS = 0.05  # for environments, when there is nothing to draw


class LeftStep(Exception):
    """The run was asked to stop in the middle of a step, whose episodes are in the journal."""


class EpisodeLimits(NamedTuple):
    """The limits of an episode beside `sampling.max_completion_length`, the tokens that the policy draws: tokens of the
    prompt, turns, tokens of a turn, tokens after the prompt of a sequence, and sequences.
    """

    prompt_tokens: int
    turns: int
    turn_tokens: int
    tokens: int
    sequences: int = 1


class EpisodeReward(InProcess, Protocol):
    """A reward function that judges episodes by what their environments gave: those that are handed over here."""

    episodes: Sequence[Episode]


class EpisodeSource:
    """What episodes are drawn with, besides a sampler and weights.

    environments: running, and closed by whoever made them.
    turns: the tokens of turns and observations, by the name of the environment; each shows its own tools.
    reward: the reward function of the environments, which gets the episodes of a batch. judges: the others that get
      these, by name: what functions that ask for the instances have said of each.
    in_order: wait for all environments that were asked before anything more is drawn. What is computed together then
      follows from what was drawn, and not from the clock, and log-probs are the same bit for bit.
    max_running: episodes that may have an environment at a time; groups begin as a whole.
    make_turns: of JSON schemas of tools, for agents, who bring their own.
    """

    def __init__(
        self,
        environments: Environments,
        turns: Mapping[str, Turns],
        tokenizer: Tokenizer,
        limits: EpisodeLimits,
        reward: EpisodeReward,
        in_order: bool = False,
        max_running: int = 2**31,
        judges: Mapping[str, EpisodeReward] | None = None,
        make_turns: Callable[[Sequence[dict[str, Any]]], Turns] | None = None,
    ) -> None:
        self._make_turns, self._made_turns = make_turns, {}
        self.environments, self.turns, self.tokenizer = environments, turns, tokenizer
        self.limits, self.reward = limits, reward
        self.in_order, self.max_running, self.judges = in_order, max_running, dict(judges or {})

    def judge_next(self, episodes: Sequence[Episode]) -> None:
        """Hands over the episodes that are judged next."""
        for reward in (self.reward, *self.judges.values()):
            reward.episodes = episodes

    def with_tools(self, tools: Sequence[dict[str, Any]]) -> Turns:
        """The turns of an agent with these tools. ValueError where the chat template cannot show them."""
        assert self._make_turns is not None
        key = json.dumps(tools, sort_keys=True)
        if key not in self._made_turns:
            self._made_turns[key] = self._make_turns(tools)
            if len(self._made_turns) > MOST_TOOLS:  # the oldest; tools may differ in every call
                del self._made_turns[next(iter(self._made_turns))]
        return self._made_turns[key]

    def notes(self) -> list[str]:
        """What a run should say once."""
        return list(dict.fromkeys(note for turns in self.turns.values() for note in turns.notes()))

    def turns_of(self, row: PromptRow) -> Turns:
        """The tokens of the turns of a row. ValueError, naming the row, where no environment is known to play it."""
        try:
            return self.turns[self.environments.environment_of(row.columns)]
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error

    def draw(
        self,
        sampler: CompletionSource,
        params: Any,
        rows: Sequence[PromptRow],
        num_samples: int,
        sampling: SamplingParams,
        key: Any,
        prompt_indices: Sequence[int],
        seed: int,
        step: int,
        journal: StepJournal | None = None,
        moment: Moment | None = None,
        stops: Callable[[bool], bool] | None = None,
    ) -> Iterator[tuple[int, Episode]]:
        """Draws `num_samples` episodes of every row; yields (place [B], episode) as each ends.

        Args:
          stops: asked again and again whether the step is left, with whether nothing is to be drawn at that time, which
            is so in all processes or in none. Then `LeftStep` is raised, when the journal has all that is known.
          moment: where the run stands, for reward functions; None: at its start.
          journal: what is known of these episodes already, and where what they say and draw is added; None: nothing.
          seed, step: of the run; the seed of an environment follows from both and from the prompt's index, and is the
            same for the whole group.
        """
        session = sampler.open(params, sampling, key, len(rows), num_samples, self.limits.tokens)
        seeds = [sample_seed(seed, step, index, 0) for index in prompt_indices]
        call = _Call(self, session, rows, num_samples, sampling, prompt_indices, seeds, journal)
        call.stops = stops
        if self.judges:
            own = [sample_seed(seed, step, *key) for key in call.keys]
            call.facts_of = functools.partial(_facts, self.tokenizer, own, moment or Moment())
        try:
            for b, episode in call.run():
                episode.settle(self.limits.sequences)
                yield b, episode
        finally:
            self.environments.drop_all()


class _Call:
    """One call of `EpisodeSource.draw`: where each of its episodes stands."""

    def __init__(
        self,
        source: EpisodeSource,
        session: DrawSession,
        rows: Sequence[PromptRow],
        num_samples: int,
        sampling: SamplingParams,
        prompt_indices: Sequence[int],
        seeds: Sequence[int],
        journal: StepJournal | None,
    ) -> None:
        self._tokenizer, self._journal = source.tokenizer, journal
        self.facts_of: Callable[[int, Episode], EpisodeFacts] | None = None
        self.stops: Callable[[bool], bool] | None = None
        self.keys = [(int(index), sample) for index in prompt_indices for sample in range(num_samples)]
        self._environments: Environments = source.environments
        if journal is not None:
            self._environments = RecordedEnvironments(source.environments, journal, self.keys)
        self._turns_P = [source.turns_of(row) for row in rows]
        self._turns_of_agents: dict[tuple[int, int], Turns] = {}  # by place and sequence
        self._with_tools = source.with_tools
        self._limits, self._session, self._sampling = source.limits, session, sampling
        self._in_order, self._num_asked = source.in_order, 0
        self._groups = collections.deque(enumerate(zip(rows, seeds, strict=True)))  # that have not begun
        self._max_running, self._num_running = source.max_running, 0
        self._num_samples, self._indices = num_samples, prompt_indices
        self._episodes = [Episode(prompt=row.prompt) for row in rows for _ in range(num_samples)]
        self._to_begin = [num_samples] * len(rows)  # episodes of each group whose environment has not begun
        self._repeating: list[set[int]] = [set() for _ in rows]  # places of each group that still have recorded turns
        self._to_draw: list[dict[int, int]] = [{} for _ in rows]  # of each group, by place: the limit of its next turn
        self._numbers: dict[int, int] = {}  # {place: number in the session}, until it is finished there
        self._places: dict[int, int] = {}  # the other way
        self._drawing: set[int] = set()  # places of which a turn is being drawn
        self._over: list[int] = []  # places that have ended since they were yielded last
        self._closing: set[int] = set()  # places that are lost, and whose environments have not closed yet

    def _ask(self, p: int, row: PromptRow, seed: int) -> None:
        """Has the environments of a group begin."""
        self._num_running += self._num_samples
        for b in range(p * self._num_samples, (p + 1) * self._num_samples):
            try:
                self._environments.begin(b, {**row.columns, "prompt": row.prompt}, seed)
                self._num_asked += 1
            except ValueError as error:  # a value of the row that cannot be sent
                self._begin(b, EnvironmentReply(b, "begin", failure=("row", f"{row.where}: {error}")))

    def run(self) -> Iterator[tuple[int, Episode]]:
        """Until all episodes have ended."""
        num_left = len(self._episodes)
        while num_left:
            self._leave_if_asked(is_idle=not self._session.has_work)
            while self._groups and self._num_running + self._num_samples <= max(self._max_running, self._num_samples):
                p, (row, seed) = self._groups.popleft()
                self._ask(p, row, seed)
            for reply in self._replies():
                self._read(reply)
            for number, completion in self._session.poll():
                self._end_turn(self._places[number], completion)
            if self._journal is not None:
                self._journal.sync()
            over, self._over = self._over, []
            for b in over:
                yield b, self._episodes[b]
            num_left -= len(over)
            self._num_running -= len(over)
        while self._closing:  # they would keep the workers busy, and be ended with them
            self._leave_if_asked(is_idle=True)
            for reply in self._environments.poll(_WAIT_SECONDS):
                self._read(reply)
        if self._journal is not None:
            self._journal.sync(waits=True)

    def _leave_if_asked(self, *, is_idle: bool) -> None:
        """Raises `LeftStep` where the step is to be left. is_idle: nothing is drawn until an environment answers."""
        if self.stops is not None and self.stops(is_idle):
            if self._journal is not None:
                self._journal.sync(waits=True)
            raise LeftStep

    def _replies(self) -> list[EnvironmentReply]:
        """The replies that are there. In order: all that were asked for, by the places of their episodes."""
        if not self._in_order:
            return self._environments.poll(0.0 if self._session.has_work else _WAIT_SECONDS)
        replies: list[EnvironmentReply] = []
        while len(replies) < self._num_asked:
            self._leave_if_asked(is_idle=True)
            replies += self._environments.poll(_WAIT_SECONDS)
        self._num_asked = 0
        return sorted(replies, key=lambda reply: reply.episode)

    def _read(self, reply: EnvironmentReply) -> None:
        b, episode = reply.episode, self._episodes[reply.episode]
        if reply.op == "finish":
            self._closing.discard(b)
        if episode.failure is not None or b in self._over:
            return
        episode.seconds += reply.seconds
        episode.metrics.update(reply.metrics)
        episode.judged.update(reply.judged)
        if reply.reward is not None:
            episode.add_reward(reply.reward)
        if reply.op == "begin":
            self._begin(b, reply)
        elif reply.failure is not None:
            self._fail(b, reply.failure)
        elif reply.op == "step":
            self._go_on(b, reply)
        else:
            self._over.append(b)

    def _begin(self, b: int, reply: EnvironmentReply) -> None:
        """Notes the prompt of an episode. When its group is complete, the turns of all its episodes are asked for."""
        episode, p = self._episodes[b], b // self._num_samples
        failure = reply.failure
        if failure is None:
            episode.prompt = reply.messages
            try:
                self._show_tools(b, 0, reply)
                episode.sequences[0].prompt_ids = self._prompt_ids(b, 0, reply.messages, "what reset returns")
            except ValueError as error:
                failure = "prompt", str(error)
        if failure is not None:
            self._fail(b, failure, is_running=reply.failure is None)
        self._to_begin[p] -= 1
        if self._to_begin[p]:
            return
        prompts: dict[tuple[int, ...], list[int]] = {}
        for place in range(p * self._num_samples, (p + 1) * self._num_samples):
            if self._episodes[place].failure is None:
                prompts.setdefault(tuple(self._episodes[place].prompt_ids), []).append(place)
        if not prompts:
            return
        num_common = num_alike(list(prompts))
        num_others = max(map(len, prompts)) - num_common
        limit = min(self._limits.turn_tokens, self._limits.tokens - num_others)
        least = max(self._sampling.min_completion_length, 1)
        if not num_common or limit < least:
            rule = f"prompts of a group must begin alike, and leave {least} of rollout.max_episode_tokens to the policy"
            why = f"{rule}, got {num_common} tokens alike and up to {num_others} behind them; reset must use its seed"
            for place in [place for members in prompts.values() for place in members]:
                self._episodes[place].sequences[0].prompt_ids = []
                self._fail(place, ("prompt", why), is_running=True)
            return
        for place in [place for members in prompts.values() for place in members]:
            self._to_draw[p][place] = limit
        self._repeat(p)

    def _turns(self, b: int, sequence: int) -> Turns:
        return self._turns_of_agents.get((b, sequence), self._turns_P[b // self._num_samples])

    def _show_tools(self, b: int, sequence: int, reply: EnvironmentReply) -> None:
        """Has the tools of an agent shown in a sequence. ValueError where the chat template cannot show them."""
        if reply.tools is not None:
            self._turns_of_agents[b, sequence] = self._with_tools(reply.tools)

    def _prompt_ids(self, b: int, sequence: int, prompt: Prompt, what: str) -> list[int]:
        """The ids of the prompt of a sequence. ValueError where it is none, or too long."""
        prompt_ids = self._turns(b, sequence).prompt_ids(prompt)
        if not 1 <= len(prompt_ids) <= self._limits.prompt_tokens:
            most = f"data.max_prompt_length ({self._limits.prompt_tokens})"
            raise ValueError(f"{what} must have 1 to {most} tokens, got {len(prompt_ids)}")
        return prompt_ids

    def _repeat(self, p: int) -> None:
        """Tells the recorded turns of a group again, and has the session draw the others and all that comes then."""
        known = {place: turn for place in self._to_draw[p] if (turn := self._recorded_turn(place)) is not None}
        self._repeating[p] = {*known}
        for place, turn in known.items():
            del self._to_draw[p][place]
            self._end_turn(place, turn)
        if not known:
            self._submit(p)

    def _recorded_turn(self, b: int) -> Completion | None:
        """The next turn of an episode, where the journal has it. In order all turns are drawn again, because what is
        computed together is in their log-probs; only environments answer from the journal then.
        """
        if self._journal is None or self._in_order:
            return None
        return self._journal.recorded_turn(self.keys[b], self._episodes[b].num_turns)

    def _stop_repeating(self, b: int) -> None:
        """Notes that no recorded turn of an episode is left, or that it ends."""
        p = b // self._num_samples
        if b in self._repeating[p]:
            self._repeating[p].remove(b)
            if not self._repeating[p]:
                self._submit(p)

    def _submit(self, p: int) -> None:
        """Has the session draw the next turns of a group's episodes. Those with equal prompts share them."""
        limits, self._to_draw[p] = self._to_draw[p], {}
        prompts: dict[tuple[int, ...], list[int]] = {}
        for place in limits:
            prompts.setdefault(tuple(self._episodes[place].now.prompt_ids), []).append(place)
        requests, places = [], []
        for number, members in enumerate(prompts.values()):
            for place in members:
                sequence, limit = self._episodes[place].now, limits[place]
                sample = sequence.sample if self._episodes[place].current else place % self._num_samples
                begun = tuple(sequence.token_ids)
                requests.append(Request(number, int(self._indices[p]), sample, limit, None, begun))
                places.append(place)
        if not requests:
            return
        numbers = self._session.submit([np.array(prompt, np.int32) for prompt in prompts], requests)
        for place, number in zip(places, numbers, strict=True):
            self._numbers[place], self._places[number] = number, place
            self._drawing.add(place)

    def _end_turn(self, b: int, completion: Completion) -> None:
        """Hands a turn to the environment, or ends the episode at a limit."""
        episode = self._episodes[b]
        self._drawing.discard(b)
        num_read = len(episode.now.prompt_ids) + len(episode.now.token_ids)
        episode.add_turn(completion)
        if episode.failure is not None:  # its environment was lost meanwhile
            self._leave_session(b)
            self._over.append(b)
            return
        if completion.finish_reason == "length":
            if episode.num_drawn >= self._sampling.max_completion_length:
                episode.ended = MAX_DRAWN
            elif len(episode.now.token_ids) >= self._most_tokens(b):
                episode.ended = MAX_TOKENS
        # Also where a limit has cut the turn: the environment judges what there is.
        text = self._tokenizer.decode(_without_end(completion), skip_special_tokens=False)
        tokens = TurnTokens(num_read, len(completion.token_ids), completion.finish_reason == "length")
        if self._journal is not None:
            self._journal.add_turn(self.keys[b], episode.num_turns - 1, completion, text, tokens)
        self._environments.step(b, text, tokens)
        self._num_asked += 1

    def _go_on(self, b: int, reply: EnvironmentReply) -> None:
        """Puts the observation behind the turn, or ends the episode."""
        episode = self._episodes[b]
        assert reply.action is not None
        episode.say([reply.action])
        episode.num_tool_calls += reply.num_tool_calls
        episode.num_bad_tool_calls += reply.num_bad_tool_calls
        assert not isinstance(reply.messages, str), "observations are messages"
        observations = episode.unread = reply.messages
        if episode.ended or reply.done or episode.num_turns >= self._limits.turns:
            self._end(b, episode.ended or (DONE if reply.done else MAX_TURNS))
            return
        if reply.prompt is not None:
            self._begin_again(b, reply, reply.prompt)
            return
        if reply.sequence is not None and reply.sequence != episode.current:
            if reply.sequence >= len(episode.sequences):
                rule = f"step gave the sequence {reply.sequence}, the episode has {len(episode.sequences)}, from 0 on"
                self._fail(b, ("not_a_step", rule), is_running=True)
                return
            self._leave_session(b)
            episode.current = reply.sequence
        last, turns = episode.now.turns[-1], self._turns(b, episode.current)
        has_ended = last.finish_reason == "eos" and last.stop_reason in turns.end_ids
        try:
            ids = turns.observation_ids(episode.history, observations, has_ended)
        except ValueError as error:
            self._fail(b, ("observation", str(error)), is_running=True)
            return
        left = self._sampling.max_completion_length - episode.num_drawn
        room = self._most_tokens(b) - len(episode.now.token_ids) - len(ids)
        if left <= 0 or room <= 0:
            self._end(b, MAX_DRAWN if left <= 0 else MAX_TOKENS)
            return
        episode.say(observations)
        episode.unread = []
        episode.now.add_read(ids)
        limit = len(episode.now.token_ids) + min(left, room, self._limits.turn_tokens)
        if (turn := self._recorded_turn(b)) is not None:
            self._end_turn(b, turn)
        elif b in self._numbers:
            self._session.go_on(self._numbers[b], ids, limit)
            self._drawing.add(b)
        else:
            self._draw_later(b, limit)

    def _draw_later(self, b: int, limit: int) -> None:
        """Has a turn submitted to the session, when its group's recorded turns are told again."""
        p = b // self._num_samples
        self._to_draw[p][b] = limit
        if b in self._repeating[p]:
            self._stop_repeating(b)
        elif not self._repeating[p]:
            self._submit(p)

    def _begin_again(self, b: int, reply: EnvironmentReply, prompt: Prompt) -> None:
        """Has the next turn drawn behind another prompt."""
        episode, number = self._episodes[b], len(self._episodes[b].sequences)
        count = number + 1
        if count > self._limits.sequences:
            self._fail(b, too_many_sequences(count, self._limits.sequences), is_running=True)
            return
        try:
            self._show_tools(b, number, reply)
            prompt_ids = self._prompt_ids(b, number, prompt, "the prompt of a step")
        except ValueError as error:
            self._fail(b, ("prompt", str(error)), is_running=True)
            return
        left = self._sampling.max_completion_length - episode.num_drawn
        if left <= 0:
            self._end(b, MAX_DRAWN)
            return
        self._leave_session(b)
        episode.begin_again(prompt, prompt_ids, b % self._num_samples, self._num_samples)
        episode.unread = []
        if (turn := self._recorded_turn(b)) is not None:
            self._end_turn(b, turn)
            return
        self._draw_later(b, min(left, self._limits.tokens, self._limits.turn_tokens))

    def _most_tokens(self, b: int) -> int:
        """Tokens that a sequence may have: less where the prompts of its group differ, see `shared_prompt`."""
        if self._episodes[b].current:
            return self._limits.tokens
        first = b - b % self._num_samples
        # As in `shared_prompt`: an episode that is lost later has its part in what the group shares.
        prompts = [e.prompt_ids for e in self._episodes[first : first + self._num_samples] if e.prompt_ids]
        return self._limits.tokens - (max(map(len, prompts)) - num_alike(prompts))

    def _end(self, b: int, ended: str) -> None:
        self._episodes[b].ended = ended
        self._stop_repeating(b)
        self._leave_session(b)
        episode = self._episodes[b]
        self._environments.finish(b, ended, None if self.facts_of is None else self.facts_of(b, episode))
        self._num_asked += 1

    def _fail(self, b: int, failure: tuple[str, str], is_running: bool = False) -> None:
        """Ends an episode without a reward. is_running: its environment knows nothing of the failure."""
        episode = self._episodes[b]
        episode.failure, episode.ended = failure, FAILED
        self._stop_repeating(b)
        if is_running:
            self._environments.finish(b, FAILED)  # the reply says only that it has closed
            self._closing.add(b)
            self._num_asked += 1
        if b not in self._drawing:  # else when its turn has ended
            self._leave_session(b)
            self._over.append(b)

    def _leave_session(self, b: int) -> None:
        number = self._numbers.pop(b, None)
        if number is not None:
            self._session.finish(number)


def _facts(tokenizer: Tokenizer, seeds: Sequence[int], moment: Moment, b: int, episode: Episode) -> EpisodeFacts:
    """What reward functions get of an episode, as the others get it (`rl.rollout.scoring`)."""
    prompt, ids = episode.prompt, episode.all_ids
    completion = tokenizer.decode(ids) if isinstance(prompt, str) else episode.told
    asked = prompt if isinstance(prompt, str) else split_prefill(prompt)[0]
    last = episode.last_turn
    reason = "length" if last is None or episode.ended in (MAX_DRAWN, MAX_TOKENS) else last.finish_reason
    return EpisodeFacts(asked, completion, list(ids), reason, seeds[b], moment)


def _without_end(completion: Completion) -> list[int]:
    """The tokens of a turn without the EOS that ended it."""
    ids = completion.token_ids.tolist()
    return ids[:-1] if completion.finish_reason == "eos" else ids
