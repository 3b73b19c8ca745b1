"""Draws and scores completions: reward functions judge each completion while others are still drawn.

In: a sampler, weights, prompts, the running reward workers. Out: `ScoredCompletions`. Not here: advantages
(`rl.rollout.groups`), and the isolation of workers (`rewards.runner`).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rewards.batch import RewardResult, Share, result_of
from rewards.choice import LETTERS, right_letter
from rewards.contract import RewardSpec
from rewards.in_process import InProcess
from rewards.moment import Moment, sample_seed
from rewards.replies import Result
from rewards.runner import RewardRunner
from rl.config.load import Config
from rl.config.objects import function_of
from rl.config.sections import ENVIRONMENT
from rl.data.prompt_rows import Prompt, PromptRow
from rl.data.tokenizer import Tokenizer, split_prefill
from rl.devices import hosts
from rl.devices.mesh import no_implicit_transfers
from rl.rollout.episode import Episode, row_of
from rl.rollout.episodes import EpisodeSource
from rl.rollout.journal import StepJournal
from rl.rollout.reward_model import RewardModel, check_prompts, open_reward_models
from rl.run.metrics import Stopwatch
from rl.sampler.contract import Completion, CompletionSource, Request, requests_for
from rl.sampler.token_draw import SamplingParams

_ROWS_TO_TRY = 100  # rows among which two with different prompts are searched


def start_rewards(
    config: Config,
    rows: Sequence[PromptRow],
    log_path: pathlib.Path | None,
    mesh: Mesh | None,
    models: Mapping[str, RewardModel] | None = None,
    episodes: EpisodeSource | None = None,
) -> RewardRunner:
    """Starts the worker processes with the run's reward functions, which may use every column of the data rows.

    Each process of the run has its own workers, which judge its share of the completions. Some rows serve to find out
    how the functions are called. Reward models lie on the mesh, where all processes compute them together;
    without such models it may be None. models: those that are open already. episodes: where environments give rewards,
    these are one function more, `environment`.
    """
    models = open_reward_models(config, mesh) if models is None else models
    check_prompts(models, [prompt_form(row.prompt) for row in rows[:1]])
    specs = [
        RewardSpec(
            f.label,
            f.function,
            f.weight,
            f.kwargs,
            f.calls,
            None if (given := function_of(f.function)) is None else given.pickled,
        )
        for f in config.rewards.functions
    ]
    in_process: dict[str, InProcess] = dict(models)
    if episodes is not None and config.rollout.environments:
        specs.append(RewardSpec(ENVIRONMENT, "rollout.environment", config.rollout.environment_weight, {}))
        in_process[ENVIRONMENT] = episodes.reward
    in_process |= {} if episodes is None else episodes.judges
    columns = sorted({name for row in rows for name in row.columns})
    section = config.rewards

    def gather(result: RewardResult) -> list[RewardResult]:
        return [result_of(part) for part in hosts.gather(dataclasses.asdict(result))]

    share = None if jax.process_count() == 1 else Share(jax.process_index(), jax.process_count(), gather)
    runner = RewardRunner(
        specs,
        columns,
        section.num_workers,
        section.timeout_seconds,
        log_path=log_path,
        env=section.env,
        memory_gb=section.memory_gb,
        rows=[(prompt_form(row.prompt), row.columns) for row in rows[:_ROWS_TO_TRY]],
        share=share,
        moment=Moment(max_steps=config.grpo.steps),
        in_process=in_process,
        retries=section.retries,
        on_error=section.on_error,
    )
    for calls in hosts.gather(runner.calls):
        runner.adopt(calls)
    return runner


class ScoredCompletions(NamedTuple):
    """Completions [P][G], their texts [B], and the rewards of each; of episodes also these [B]."""

    completions: list[list[Completion]]
    texts: list[str]
    result: RewardResult
    episodes: Sequence[Episode] = ()


def sample_and_score(
    sampler: CompletionSource,
    params: Any,
    rows: Sequence[PromptRow],
    num_samples: int,
    sampling: SamplingParams,
    key: jax.Array,
    runner: RewardRunner,
    tokenizer: Tokenizer,
    watch: Stopwatch,
    prompt_indices: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    moment: Moment | None = None,
    seed: int = 0,
    source: EpisodeSource | None = None,
    episode_step: int | None = None,
    journal: StepJournal | None = None,
    stops: Callable[[bool], bool] | None = None,
) -> ScoredCompletions:
    """Draws completions of every row, and runs the reward functions on each as it ends, while others are still drawn.

    Args:
      key, prompt_indices: all randomness, see `Sampler.sample`.
      names: the reward functions to run; None: all.
      moment: where the run stands; None: at its start. seed: of the run, for the seeds of reward functions.
      source: draws episodes in place of single turns. episode_step: the step from which the seeds of environments
        follow; None: that of the moment. journal, stops: of the step, see `EpisodeSource.draw`.
      watch: "rollout" counts the time until the last completion, "reward" the time of the rewards after that.
    """
    row_B = [row for row in rows for _ in range(num_samples)]
    indices = range(len(rows)) if prompt_indices is None else prompt_indices
    requests = requests_for(indices, num_samples, sampling.max_completion_length)
    done: dict[int, Completion] = {}
    episodes: dict[int, Episode] = {}
    texts: dict[int, str] = {}
    columns = {name: [row.columns.get(name) for row in row_B] for name in runner.columns}
    prompts = [prompt_form(row.prompt) for row in row_B]
    step = 0 if moment is None else moment.step
    seeds = [sample_seed(seed, step, request.prompt_index, request.sample_index) for request in requests]
    wants_texts = runner.wants_texts
    keys = [(request.prompt_index, request.sample_index) for request in requests]

    def note(b: int, name: str, result: Result) -> None:
        if journal is not None:
            journal.note_reward(keys[b], name, result)

    how: dict[str, Any] = {"group_size": num_samples, "names": names, "moment": moment, "seeds": seeds, "note": note}
    with runner.begin(prompts, columns, **how) as scoring:
        with watch.timer("rollout"), no_implicit_transfers():
            if source is None:
                drawn = sampler.stream(params, [row.prompt_ids for row in rows], requests, sampling, key)
            else:
                of_step = step if episode_step is None else episode_step
                how_drawn = sampler, params, rows, requests, sampling, key, seed, of_step, journal, moment, stops
                drawn = _episodes(source, episodes, *how_drawn)
            for b, completion in drawn:
                row, episode, ids = row_B[b], episodes.get(b), completion.token_ids.tolist()
                ids = ids if episode is None else episode.all_ids
                done[b], texts[b] = completion, tokenizer.decode(ids)
                form, asked = completion_form(row.prompt, texts[b]), None
                if episode is not None:
                    row = row_of(row, [episode], episode.prompt_ids)
                    form = form if isinstance(form, str) else episode.told
                    asked = [prompt_form(row.prompt)]
                read = [read_texts(row, ids, tokenizer)] if wants_texts else None
                known = None if journal is None else [journal.rewards(keys[b])]
                scoring.add([b], [form], [ids], [completion.finish_reason], read, asked, known)
        with watch.timer("reward"):
            if source is not None:
                source.judge_next([episodes[b] for b in range(len(requests))])
            result = scoring.result()
        if journal is not None:
            journal.sync(waits=True)
    groups = [[done[p * num_samples + g] for g in range(num_samples)] for p in range(len(rows))]
    ordered = [episodes[b] for b in range(len(requests))] if source is not None else []
    # What a function said of an episode that was lost does not count.
    kept = [
        [None] * len(values) if ordered and ordered[b].failure is not None else values
        for b, values in enumerate(result.rewards)
    ]
    result = dataclasses.replace(result, rewards=kept)
    return ScoredCompletions(groups, [texts[b] for b in range(len(requests))], result, ordered)


def _episodes(
    source: EpisodeSource,
    episodes: dict[int, Episode],
    sampler: CompletionSource,
    params: Any,
    rows: Sequence[PromptRow],
    requests: Sequence[Request],
    sampling: SamplingParams,
    key: jax.Array,
    seed: int,
    step: int,
    journal: StepJournal | None,
    moment: Moment | None,
    stops: Callable[[bool], bool] | None,
) -> Iterator[tuple[int, Completion]]:
    """Draws an episode for each request as `CompletionSource.stream` draws completions; notes them in `episodes`."""
    num_samples = len(requests) // len(rows)
    indices = [request.prompt_index for request in requests[::num_samples]]
    for b, episode in source.draw(
        sampler, params, rows, num_samples, sampling, key, indices, seed, step, journal, moment, stops
    ):
        episodes[b] = episode
        yield b, episode.completion(requests[b].prompt_index, requests[b].sample_index, sampling)


def read_texts(row: PromptRow, token_ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, str]:
    """A prompt, and it with its completion, as the policy reads them: with special tokens."""
    prompt_ids = row.prompt_ids.tolist()
    query = tokenizer.decode([*prompt_ids, *token_ids], skip_special_tokens=False)
    if isinstance(row.prompt, str):
        return row.prompt, query
    return tokenizer.decode(prompt_ids, skip_special_tokens=False), query


def prompt_form(prompt: Prompt) -> Prompt:
    """The form of a prompt for reward functions: text, or the messages that are answered."""
    return prompt if isinstance(prompt, str) else split_prefill(prompt)[0]


def completion_form(prompt: Prompt, text: str) -> Any:
    """The form of a completion for reward functions: text for a text prompt, a list with one assistant message for a
    chat prompt. As in TRL, the message includes a beginning that the prompt gave.
    """
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": split_prefill(prompt)[1] + text}]


def right_text(answer: Any, specs: Sequence[RewardSpec]) -> str:
    """A right answer as text: what its column holds, or the letter of an option that is named by its position."""
    for spec in specs:
        if spec.function == "rewards.choice:multiple_choice":
            return right_letter(answer, spec.kwargs.get("letters", LETTERS)) or str(answer)
    return str(answer)
