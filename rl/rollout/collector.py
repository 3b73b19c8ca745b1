"""Draws and judges the groups of a step, and measures accuracy on held-out prompts.

In: a sampler and running reward functions; then weights and a step. Out: groups of completions with rewards, or the
metrics of an evaluation. Not here: the choice of a step's prompts (`rl.rollout.step_prompts`), drawing and judging
itself (`rl.rollout.scoring`), advantages (`rl.rollout.groups`).
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from rewards.moment import Moment
from rewards.runner import RewardRunner
from rl.config.load import Config
from rl.data.order import order_of
from rl.data.prompt_rows import PromptRow
from rl.data.prompts import PromptData
from rl.data.tokenizer import Tokenizer
from rl.devices import hosts
from rl.models.train_state import PureState
from rl.rollout.episodes import EpisodeSource, LeftStep
from rl.rollout.eval_sets import check_followed, check_functions, evaluate_set
from rl.rollout.evaluation import evaluate, left_out_of_evaluation
from rl.rollout.failing import FailureWatch
from rl.rollout.groups import Judged, counted_function, judge, pass_rates
from rl.rollout.journal import Journal, StepJournal, code_digest
from rl.rollout.reward_check import tell_of_rewards
from rl.rollout.scoring import sample_and_score
from rl.rollout.step_prompts import check_calls, collect
from rl.run.eval_files import evaluation_file
from rl.run.log import RunLog
from rl.run.progress import ORDER_STEP, REWARD_STATE, Progress
from rl.sampler.contract import CompletionSource
from rl.sampler.create import prompts_at_a_time
from rl.sampler.token_draw import SamplingParams

_FIRST_ROWS = 32  # whose answers are wrong for the row that the check of the start judges


class Collector:
    """Draws completions with the policy of a run, and has its reward functions judge them.

    Args:
      data: the rows to train on, and those that evaluations ask.
      sampler: draws with the weights that each call hands over.
      runner: the running reward functions.
      sampling: the rules of rollouts. Evaluations are greedy.
      log: counts the seconds of a step.
      episodes: draws completions of several turns; None: of one.

    Raises:
      ValueError: the reward functions cannot judge what the configuration asks for, see `check_calls`.
    """

    def __init__(
        self,
        config: Config,
        data: PromptData,
        sampler: CompletionSource,
        runner: RewardRunner,
        sampling: SamplingParams,
        tokenizer: Tokenizer,
        log: RunLog,
        episodes: EpisodeSource | None = None,
    ) -> None:
        check_calls(config, runner)
        self._config, self._sampler, self._runner, self._log = config, sampler, runner, log
        self._sampling, self._tokenizer, self._episodes = sampling, tokenizer, episodes
        self._numbers = {(row.source, row.index): number for number, row in enumerate(data.train)}
        self._order = order_of(config.data, data, config.seed, config.grpo.prompts_per_step)
        self._first_rows = data.train[:_FIRST_ROWS]
        self._rows, self._held_out, self._stream = data.rows, data.evaluated(config.eval), data.stream
        self._sets = data.sets
        check_functions(config, self._sets, runner)
        check_followed(config, data, [spec.name for spec in runner.specs], has_episodes=episodes is not None)
        self._epoch = 0.0  # how often the training rows were used up so far
        self._journal: Journal | None = None
        self._of_step: StepJournal | None = None
        self._failures = FailureWatch(runner.specs, config.rewards.max_failed_share, config.health.patience)
        self.evaluation_is_left = False  # the last one that was due: the run was asked to stop meanwhile

    def journal(self, folder: pathlib.Path) -> contextlib.AbstractContextManager[object]:
        """A context in which the turns of episodes are kept in the run's folder, so that a step that is cut short goes
        on where it was. ValueError where the disk is full, as for `draw_and_judge` inside it.
        """
        if self._episodes is None:
            return contextlib.nullcontext()
        self._journal = Journal(folder, code_digest(self._config))
        self._log.stops_in_steps()
        return self._journal

    @property
    def reward_state(self) -> dict[str, Any]:
        """The findings so far about the reward functions, and about the prompts where a curriculum needs them, as JSON
        values for `restore`.
        """
        found = (self._runner.calls, self._runner.doubts, self._failures.steps_down)
        state: dict[str, Any] = dict(zip(REWARD_STATE[:3], found, strict=True))
        state[ORDER_STEP] = self._order.prompts_per_step
        curriculum = self._order.curriculum
        return state | {"curriculum": curriculum.state} if curriculum is not None else state

    @property
    def reward_is_down(self) -> bool:
        """Whether a reward function failed so often, for so many steps, that the run should be saved and end."""
        return self._failures.error is not None

    def raise_if_reward_is_down(self) -> None:
        """ValueError, naming the function, its failures and the way out; to be called when the run is saved."""
        if self._failures.error is not None:
            raise ValueError(self._failures.error)

    def restore(self, reward_state: Mapping[str, Any]) -> None:
        """Takes over the findings of an earlier part of the run (empty: none). ValueError as at the start."""
        if reward_state:
            self._runner.adopt(reward_state["reward_calls"], reward_state.get("reward_doubts"))
            check_calls(self._config, self._runner)
            self._failures.restore(reward_state.get("reward_steps_down", {}))
            began_with, now = reward_state.get(ORDER_STEP), self._config.grpo.prompts_per_step
            if began_with not in (None, now):
                self._order = self._order.laid_out_for(began_with)
                self._log.message(
                    f"steps take {now} prompts from here on; the run began with {began_with}, and goes on in that order"
                )
            if self._order.curriculum is not None:
                self._order.curriculum.restore(reward_state.get("curriculum", {}))

    def report_rewards(self, is_new: bool) -> None:
        """Prints how reward functions are called and what no evaluation measures, and warns about odd scores.

        Args:
          is_new: whether no step is done yet; the own answer of the first data row, and junk, are then scored.
        """
        if is_new and self._config.rewards.check_on_gold:
            longest = self._sampling.max_completion_length
            tell_of_rewards(self._log, self._runner, self._rows[0], self._tokenizer, longest, self._first_rows)
        self._log.messages(self._runner.notes())
        self._log.messages(self._episodes.notes() if self._episodes is not None else ())
        self._say_what_is_left_out()

    def draw_and_judge(self, state: PureState, step: int, position: int) -> Judged | None:
        """The groups on which step number `step` (from 0) is trained. None where the run was asked to stop meanwhile,
        and the journal has what was drawn so far.

        Args:
          state: the weights to draw with; all randomness follows from its key and the step.
          position: how many rows, in the run's order, are used up.
        """
        self._epoch = self._order.epochs(position)
        if self._journal is not None:
            self._of_step = self._journal.step(step, state.params)
        draw = functools.partial(self._draw, state, step)
        try:
            groups = collect(self._config, self._rows, self._order, position, step, draw)
        except LeftStep:
            return None
        self._epoch = self._order.epochs(groups.position)
        if self._stream is not None:
            self._log.messages(self._stream.take_messages())
        self._sampler.release()  # the weights are about to change
        self._failures.end_step()
        if self._of_step is not None:
            self._log.messages(self._of_step.told())
            groups = dataclasses.replace(groups, metrics=groups.metrics | self._of_step.metrics())
        if (curriculum := self._order.curriculum) is not None:
            curriculum.end_step()
            groups = dataclasses.replace(groups, metrics=groups.metrics | curriculum.metrics())
        return groups

    def evaluate_if_due(
        self, state: PureState, steps_done: int, folder: pathlib.Path | None = None
    ) -> dict[str, float | None]:
        """Metrics of the policy on the held-out prompts and on each set after `steps_done` steps; empty where no
        evaluation is due, or where it is left because the run was asked to stop while episodes were played.

        folder: the run folder, where the samples are kept; None: nowhere.
        """
        self.evaluation_is_left = False
        section, is_last = self._config.eval, steps_done == self._config.grpo.steps
        if not (self._held_out or self._sets) or (steps_done % section.every and not is_last):
            return {}
        try:
            return self._evaluate(
                state, steps_done, folder, stops=None if is_last and self._is_followed else self._is_left
            )
        except LeftStep:
            self.evaluation_is_left = True
            self._log.message(f"the evaluation after step {steps_done} is left, and made by the next start")
            return {}

    def evaluate_late(self, state: PureState, progress: Progress, folder: pathlib.Path) -> dict[str, float | None]:
        """The same when a run begins or goes on: before the first step, or where the start before left an evaluation. A
        start between them may have made it: then it is in the line of its step.
        """
        self._epoch = self._order.epochs(progress.position)
        known = self._log.evaluated(folder, progress.steps_done) if progress.has_left else {}
        return known or self.evaluate_if_due(state, progress.steps_done, folder)

    @property
    def _is_followed(self) -> bool:
        """Whether the best checkpoint is kept, which the last checkpoint has to name."""
        return self._config.checkpoint.best.metric is not None

    def _evaluate(
        self, state: PureState, steps_done: int, folder: pathlib.Path | None, stops: Callable[[bool], bool] | None
    ) -> dict[str, float | None]:
        """An evaluation that is due. Raises LeftStep where it is left."""
        section, metrics = self._config.eval, dict[str, float | None]()
        moment, place = self._moment(steps_done), folder if hosts.is_first() else None
        with self._log.timer("eval"), evaluation_file(place, steps_done, section.keep_samples) as write:
            if self._held_out:
                result = evaluate(
                    self._sampler,
                    state.params,
                    self._held_out,
                    self._runner,
                    self._tokenizer,
                    self._sampling,
                    section.reward,
                    moment,
                    self._config.data.source_names,
                    self._episodes,
                    prompts_at_a_time(section, 1),
                    write,
                    stops,
                )
                metrics |= result.metrics()
            for name, rows in self._sets.items():
                of_set = evaluate_set(
                    name,
                    section,
                    self._sampler,
                    state.params,
                    rows,
                    self._runner,
                    self._tokenizer,
                    self._sampling,
                    moment,
                    self._episodes,
                    write,
                    stops,
                )
                self._log.message(f"eval after step {steps_done}, {of_set.brief()}")
                metrics |= of_set.metrics()
        return metrics

    def _draw(self, state: PureState, step: int, rows: Sequence[PromptRow], indices: Sequence[int]) -> Judged:
        """A group for each row. `indices`: the number of each row in its randomness."""
        calls = self._runner.calls
        scored = sample_and_score(
            self._sampler,
            state.params,
            rows,
            self._config.grpo.group_size,
            self._sampling,
            jax.random.fold_in(jax.random.wrap_key_data(state.rng), step),
            self._runner,
            self._tokenizer,
            self._log.stopwatch,
            indices,
            moment=self._moment(step),
            seed=self._config.seed,
            source=self._episodes,
            journal=self._of_step,
            stops=None if self._of_step is None else self._is_left,
        )
        if self._runner.calls != calls:  # these completions showed that a function compares them
            check_calls(self._config, self._runner)
            self._say_what_is_left_out()
        scored = scored._replace(result=self._failures.add(scored.result))
        judged = judge(self._config, rows, scored, self._runner.specs)
        if self._order.curriculum is not None:
            name = counted_function(self._config, self._runner.specs)
            self._order.curriculum.note(
                {self._numbers[row.source, row.index]: rate for row, rate, _ in pass_rates(judged, name)}
            )
        return judged

    def _is_left(self, is_idle: bool) -> bool:
        """Whether the step is to be left. Several processes ask each other only while there is nothing to draw."""
        return (is_idle or hosts.num_processes() == 1) and self._log.stop_is_requested()

    def _moment(self, step: int) -> Moment:
        return Moment(step, self._config.grpo.steps, self._epoch)

    def _say_what_is_left_out(self) -> None:
        if self._held_out and (problem := left_out_of_evaluation(self._runner, self._config.eval.reward)):
            self._log.warning(problem)
