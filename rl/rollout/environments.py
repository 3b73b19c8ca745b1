"""Starts the environments and tools of a run, and makes their rewards one of the run's rewards.

In: the section `rollout`, the tokenizer, the EOS ids. Out: an `EpisodeSource`, or None where completions have one turn;
and `EnvironmentReward`, which judges an episode by what its environment gave. Not here: episodes themselves
(`rl.rollout.episodes`), worker processes (`rewards.environment_runner`).
"""

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from rewards.contract import RewardSpec
from rewards.environment_rewards import asks_for_environments
from rewards.environment_runner import EnvironmentRunner
from rewards.replies import FAILURES, Failure
from rewards.tool_calls import FORMATS, format_of_template
from rl.config.load import Config
from rl.data.prompt_rows import PromptRow
from rl.data.tokenizer import Tokenizer
from rl.data.turns import Turns, chat_turns, text_turns
from rl.devices import hosts
from rl.rollout.episode import Episode
from rl.rollout.episodes import EpisodeLimits, EpisodeSource
from rl.rollout.shared_environments import Environments, SharedEnvironments


class EnvironmentReward:
    """The reward `environment` of a batch of episodes. `episodes` are those that are judged next."""

    def __init__(self) -> None:
        self.episodes: Sequence[Episode] = ()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | Failure | None]:
        """What the environment gave in each episode; None where it gave nothing, or nothing is known of an episode."""
        if len(self.episodes) != len(completions):  # completions that are made up, to try reward functions
            return [None] * len(completions)
        return [_value(episode) for episode in self.episodes]


class EpisodeJudge:
    """A reward function that asks for `environments`: what it gave, in the worker of each episode."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.episodes: Sequence[Episode] = ()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | Failure | None]:
        """What it gave to each episode; None where the episode was lost."""
        if len(self.episodes) != len(completions):  # as in `EnvironmentReward`
            return [None] * len(completions)
        values = [episode.judged.get(self._name) for episode in self.episodes]
        return [_known(value) if isinstance(value, tuple) else value for value in values]


def _value(episode: Episode) -> float | Failure | None:
    if episode.failure is None:
        return episode.reward
    return _known(episode.failure)


def _known(failure: Failure) -> Failure:
    """A failure of an environment as one of a reward function."""
    kind, message = failure
    return failure if kind in FAILURES else ("exception", f"{kind}: {message}")


@contextlib.contextmanager
def start_episodes(
    config: Config,
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    rows: Sequence[PromptRow],
    log_path: pathlib.Path | None,
) -> Iterator[EpisodeSource | None]:
    """The environments and tools of a run, running until the end of the context; None without any.

    rows: data rows, of which the first is tried.

    Raises:
      ValueError: an environment or a tool cannot be loaded, or the chat template cannot show tools or observations.
    """
    section = config.rollout
    if not section.has_turns:
        yield None
        return
    tool_format: str = section.tool_format
    if tool_format == "auto" and config.data.chat and tokenizer.has_chat_template:
        tool_format = format_of_template(tokenizer.backend.get_chat_template()) or "auto"
        if tool_format == "auto" and section.agent is not None and _may_call(tokenizer, section.tool_role):
            raise ValueError(
                f"rollout.tool_format must be one of {', '.join(FORMATS)} with rollout.agent, got 'auto': "
                f"{tokenizer.template_name} shows the policy the tools of an agent, and calls of them in no format "
                "that is known; an agent without tools may name any"
            )
    columns = sorted({name for row in rows for name in row.columns})
    specs = [
        RewardSpec(entry.label, entry.function, entry.weight, entry.kwargs, entry.calls)
        for entry in (config.rewards.functions if section.environments else ())
        if asks_for_environments(entry.function, (*columns, *entry.kwargs))
    ]
    with EnvironmentRunner(
        section.environments,
        section.tools,
        num_workers=section.num_workers,
        step_timeout_seconds=section.step_timeout_seconds,
        episode_timeout_seconds=section.episode_timeout_seconds,
        max_episodes_per_worker=section.episodes_per_worker,
        memory_gb=section.memory_gb,
        env=config.rewards.env,
        log_path=log_path,
        tool_format=tool_format,
        rewards=specs,
        columns=columns,
    ) as runner:
        turns = {name: make_turns(config, tokenizer, eos_ids, tools) for name, tools in runner.tools_of.items()}
        drawn = config.sampling.max_completion_length
        turn = drawn if section.max_turn_tokens is None else min(section.max_turn_tokens, drawn)
        num_processes = hosts.num_processes()
        places = section.num_workers * section.episodes_per_worker * num_processes
        limits = EpisodeLimits(
            config.data.max_prompt_length, section.max_turns, turn, config.longest_completion, section.max_sequences
        )
        for row in rows:
            try:
                runner.environment_of(row.columns)
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from error
        for row in rows[:1] if section.agent is None else ():  # an agent writes the prompt
            length = len(turns[runner.environment_of(row.columns)].prompt_ids(row.prompt))
            if length > limits.prompt_tokens:
                raise ValueError(
                    f"data.max_prompt_length must be >= {length}, the tokens of the first prompt with the schemas of "
                    f"the tools, got {limits.prompt_tokens}"
                )
        environments: Environments = runner
        if num_processes > 1:
            environments = SharedEnvironments(runner, jax.process_index(), num_processes, hosts.gather)
        judges = {spec.name: EpisodeJudge(spec.name) for spec in specs}
        with_tools = functools.partial(make_turns, config, tokenizer, eos_ids)
        how = limits, EnvironmentReward(), section.in_order, places, judges, with_tools
        yield EpisodeSource(environments, turns, tokenizer, *how)


def _may_call(tokenizer: Tokenizer, tool_role: str) -> bool:
    """Whether the policy may be told of tools that an agent brings: by the template, or by what the agent writes."""
    asked = [{"role": "user", "content": "What now?"}]
    function = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
    tool = {"type": "function", "function": function}
    return tool_role == "user" or tokenizer.render(asked, [tool]) != tokenizer.render(asked)


def make_turns(config: Config, tokenizer: Tokenizer, eos_ids: Sequence[int], tools: Sequence[dict[str, Any]]) -> Turns:
    """How turns and observations become tokens: by the chat template, or as they are after prompts of plain text."""
    if config.data.chat:
        return chat_turns(tokenizer, tuple(eos_ids), tools=tools, tool_role=config.rollout.tool_role)
    return text_turns(tokenizer)
