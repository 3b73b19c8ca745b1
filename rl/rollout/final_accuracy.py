"""Held-out accuracy at the end of a run that draws nothing before. It is prepared at the start and measured
at the end.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from rl.config.load import Config
from rl.data.prompt_rows import PromptRow
from rl.data.tokenizer import Tokenizer
from rl.models.config import ModelConfig
from rl.models.policy import Policy
from rl.rollout.evaluation import evaluate, left_out_of_evaluation
from rl.rollout.reward_model import open_reward_models, weight_bytes
from rl.rollout.scoring import start_rewards
from rl.run.console import Console
from rl.sampler.contract import CompletionSource
from rl.sampler.create import create_sampler, eos_ids, greedy, sampling_params
from rl.sampler.token_draw import check_vocabulary


class FinalAccuracy:
    """Accuracy of greedy completions of held-out prompts. Without such prompts or reward functions it does nothing.

    Args:
      param_shardings: of the policy's weights.
      rows: the held-out prompts.

    Raises:
      ValueError: the measurement would be refused at the end: reward functions do not start, ids are outside the
        vocabulary, or there is too little memory.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        model_config: ModelConfig,
        mesh: Mesh,
        param_shardings: Any,
        tokenizer: Tokenizer,
        rows: Sequence[PromptRow],
    ) -> None:
        self._config, self._rows, self._tokenizer, self._mesh = config, rows, tokenizer, mesh
        self._sampling = sampling_params(config, eos_ids(config, model_config, tokenizer))
        self._sampler: CompletionSource | None = None
        if not (rows and config.rewards.functions):
            return
        check_vocabulary(self._sampling, model_config.vocab_size)
        self._judges = open_reward_models(config, mesh)
        beside = weight_bytes(self._judges)
        self._sampler = sampler = create_sampler(config, policy, mesh, param_shardings, tokenizer, beside=beside)
        sampler.expect([row.prompt_ids for row in rows])
        sampler.check(len(rows), 1, greedy(self._sampling))
        start_rewards(config, rows, None, mesh, self._judges).close()

    def say(self, params: Any, log_path: pathlib.Path | None, console: Console) -> None:
        """Measures the accuracy with these weights, and prints it. `log_path`: the file for the output of reward
        functions.
        """
        if self._sampler is None:
            return
        reward = self._config.eval.reward
        with start_rewards(self._config, self._rows, log_path, self._mesh, self._judges) as runner:
            if problem := left_out_of_evaluation(runner, reward):
                console.warning(problem)
            names = self._config.data.source_names
            with console.alive("evaluating"):
                result = evaluate(
                    self._sampler, params, self._rows, runner, self._tokenizer, self._sampling, reward, sources=names
                )
        console.message(f"held-out greedy accuracy {result.accuracy:.1%} on {result.num_prompts} prompts")
        for name, own in result.sources.items():
            console.message(f"  source {name}: {own.accuracy:.1%} on {own.num_prompts} prompts")

    def close(self) -> None:
        """Drops programs that wait to be compiled."""
        if self._sampler is not None:
            self._sampler.close()
