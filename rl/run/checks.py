"""Rules that need the data and the model's shape, checked before anything heavy starts."""

from rl.algorithms.from_config import check_estimator, check_loss, loss_config
from rl.algorithms.loss_types import loss_type_of
from rl.config.load import Config, require
from rl.data.order import Order, order_of
from rl.data.prompts import PromptData, check_enough_rows
from rl.sampler.create import planned_prompt_length
from rl.sampler.token_draw import SamplingParams


def check_recipe(config: Config, data: PromptData, sampling: SamplingParams, max_positions: int) -> None:
    """Rules that need the data and the model's shape; ValueError when one is broken. What the start is to say of a
    curriculum is added to `data.messages`.
    """
    is_rewarded = bool(config.rollout.environments) and config.rollout.environment_weight
    if not is_rewarded:
        require(config.rewards.functions, "rewards.functions", "[{function: rewards.number:exact_number_flexible}]")
    if not is_rewarded and not any(function.weight for function in config.rewards.functions):
        raise ValueError(
            "rewards.functions must hold a weight other than 0, got only metrics; there is nothing to learn from"
        )
    check_enough_rows(len(data.rows), config.grpo.prompts_per_step)
    order = order_of(config.data, data, config.seed, config.grpo.prompts_per_step)  # as far as the data allow one
    if isinstance(order, Order) and order.curriculum is not None:
        data.messages.extend(order.curriculum.notes())
    if not config.sampling.temperature > 0:
        raise ValueError(
            f"sampling.temperature must be > 0 for training, got {config.sampling.temperature}; "
            "evaluation is greedy anyway"
        )
    longest = max([planned_prompt_length(config, data), *(len(row.prompt_ids) for row in data.evaluated_rows)])
    longest += config.longest_completion
    if longest > max_positions:
        raise ValueError(
            f"prompt and completion must fit the model's {max_positions} positions, got up to {longest}; lower "
            "data.max_prompt_length or sampling.max_completion_length (of episodes: rollout.max_episode_tokens)"
        )
    check_loss(loss_config(config))
    check_estimator(config)
    _check_ratios_of_sequences(config, sampling)


def _check_ratios_of_sequences(config: Config, sampling: SamplingParams) -> None:
    """With log-probs of the whole softmax the ratio of trainer to sampler holds, at each token, the probability that
    the rules of sampling left; over a sequence these multiply: https://github.com/huggingface/trl/issues/6789.
    """
    grpo, loss_type = config.grpo, loss_type_of(loss_config(config))
    if grpo.policy_distribution == "sampled" or not sampling.reshaping_rules:
        return
    key = ""
    if grpo.off_policy_mask_threshold is not None:
        key = f"grpo.off_policy_mask_threshold={grpo.off_policy_mask_threshold}"
    elif grpo.sampler_is_correction:
        if grpo.sampler_is_mode.startswith("sequence"):
            key = f"grpo.sampler_is_mode={grpo.sampler_is_mode}"
        elif loss_type.builds_in_sampler_ratio:
            key = f"grpo.sampler_is_correction=true and grpo.loss_type={grpo.loss_type}"
    elif grpo.old_logprobs == "sampler":
        if grpo.importance_sampling_level == "sequence":
            key = "grpo.old_logprobs=sampler and grpo.importance_sampling_level=sequence"
        elif loss_type.is_of_sequences:
            key = f"grpo.old_logprobs=sampler and grpo.loss_type={grpo.loss_type}"
    if key:
        rules = ", ".join(f"sampling.{name}" for name in sampling.reshaping_rules)
        can_be_set = not sampling.needs_counts and config.sampling.source is None
        way_out = "set it, or turn these rules off" if can_be_set else "turn these rules off"
        raise ValueError(
            f"grpo.policy_distribution must be sampled with {key} and {rules}, got full: the ratio of a sequence would "
            "multiply, token by token, the probability that these rules left, so its weight would vanish with length, "
            f"or all of them would count as off-policy; {way_out}"
        )
