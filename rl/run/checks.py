"""Rules that need the data and the model's shape, checked before anything heavy starts."""

from rl.algorithms.from_config import check_estimator, check_loss, loss_config
from rl.config.load import Config, require
from rl.data.prompts import PromptData, check_enough_rows


def check_recipe(config: Config, data: PromptData, max_positions: int) -> None:
    """Rules that need the data and the model's shape; ValueError when one is broken."""
    require(config.rewards.functions, "rewards.functions", "[{function: rewards.number:exact_number_flexible}]")
    if not any(function.weight for function in config.rewards.functions):
        raise ValueError(
            "rewards.functions must hold a weight other than 0, got only metrics; there is nothing to learn from"
        )
    check_enough_rows(len(data.train), config.grpo.prompts_per_step)
    if not config.sampling.temperature > 0:
        raise ValueError(
            f"sampling.temperature must be > 0 for training, got {config.sampling.temperature}; "
            "evaluation is greedy anyway"
        )
    longest = max(len(row.prompt_ids) for row in [*data.train, *data.held_out]) + config.sampling.max_completion_length
    if longest > max_positions:
        raise ValueError(
            f"prompt and completion must fit the model's {max_positions} positions, got up to {longest}; lower "
            "data.max_prompt_length or sampling.max_completion_length"
        )
    check_loss(loss_config(config))
    check_estimator(config)
