"""The loss and the advantage that a configuration names: from the tables of this room, or `path/to/file.py:function`.

Out: the settings of the loss; a file's function, tried on a tiny problem before a run starts; and the file's hash,
which is part of the run's identity. docs/algorithms.md has the contracts with an example each:

- loss: `function(sequences, config, **grpo.loss_args) -> (term, metrics)`, like the policy terms of
  `rl.algorithms.loss_types`: `Rows` and `LossConfig` in, the term [B, T] or [B, 1] out, and metrics {name: [B, T] or
  [B, 1]}. No sequence may depend on another. The sum over the tokens is divided by the number of trained tokens of the
  rollout batch.
- advantage: `function(rewards_BK, weights_K, group_size) -> advantages_B`, numpy, see `rl.algorithms.advantages`.

A path is relative to the working directory, as for reward functions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rewards.importing import USER_ERRORS, import_function
from rl.algorithms.advantages import check_modes, compute_advantages
from rl.algorithms.loss_types import LOSS_TYPES, LossConfig, LossInputs, loss_type_of, validate_loss_config
from rl.algorithms.losses import denominators_for, grpo_loss, prepare
from rl.config.load import Config
from rl.config.sections import is_user_function
from rl.files.json_file import shown


def resolve(name: str, key: str) -> Callable[..., Any] | None:
    """The function of a file that `name`, the value of `key`, stands for; None for a name in the toolkit's tables.

    Raises:
        ValueError: the file does not import, or has no such function.
    """
    return import_function(name, key) if is_user_function(name) else None


def estimator_of(config: Config) -> str | Callable[..., Any]:
    """The `estimator` argument of `compute_advantages` for `grpo.advantage_estimator`."""
    name = config.grpo.advantage_estimator
    return resolve(name, "grpo.advantage_estimator") or name


def check_estimator(config: Config) -> None:
    """Refuses settings that contradict each other, and tries a user's estimator on two groups with one unjudged
    completion.

    Raises:
        ValueError: the message names the setting, or the function, what it must return and what it returned.
    """
    estimator, grpo = estimator_of(config), config.grpo
    if isinstance(estimator, str):
        check_modes(grpo.scale_rewards, grpo.aggregation, estimator)
        return
    num_functions = sum(function.weight != 0 for function in config.rewards.functions)
    num_functions += bool(config.rewards.overlong_buffer and config.rewards.overlong_factor)
    rewards_BK = np.linspace(0.0, 1.0, 2 * grpo.group_size * num_functions).reshape(-1, num_functions)
    rewards_BK[-1] = np.nan
    compute_advantages(
        rewards_BK, None, grpo.group_size, grpo.scale_rewards, grpo.aggregation, estimator, label(config)
    )


def label(config: Config) -> str:
    """The name of the estimator in messages."""
    return f"grpo.advantage_estimator {config.grpo.advantage_estimator}"


def check_loss(config: LossConfig) -> None:
    """Tries a user's loss, or a loss with arguments, on a tiny minibatch: an empty sequence, padding, both signs of A.

    Raises:
        ValueError: the message names the function, what it must return and what it returned.
    """
    if config.custom_term is None and not config.loss_args:
        return
    name = f"grpo.loss_type {config.loss_type}"
    # 4 sequences of up to 3 tokens; the third is empty.
    mask_BT = jnp.asarray([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    logprobs_BT = -jnp.linspace(0.1, 2.0, 12).reshape(4, 3)
    advantages_B, ones_B = jnp.asarray([1.0, -0.5, 0.5, -1.0]), jnp.ones(4)
    inputs = LossInputs(logprobs_BT - 0.1, logprobs_BT, logprobs_BT - 0.2, mask_BT, advantages_B, ones_B)
    denominators = denominators_for(mask_BT, ones_B, -logprobs_BT, config, entropy_coef=0.0, advantages_B=advantages_B)

    def term_of(logprobs_BT: jax.Array) -> Any:
        return loss_type_of(config).policy_term(prepare(logprobs_BT, inputs, config), config)

    def loss(part: slice) -> jax.Array:
        piece = LossInputs(*jax.tree.map(lambda x: x[part], tuple(inputs)))
        return grpo_loss(logprobs_BT[part], -logprobs_BT[part], piece, denominators, config)[0]

    try:
        _check_shapes(name, term_of(logprobs_BT), logprobs_BT.shape)
        # The gradient of the term alone, because the KL term and the bonus have one whatever the term is.
        gradient_BT = jax.grad(lambda x: jnp.sum(jnp.where(mask_BT, term_of(x)[0], 0)))(logprobs_BT)
    except _WrongResult:
        raise
    except USER_ERRORS as error:
        raise ValueError(f"{name} failed on a minibatch of 4 x 3 tokens: {type(error).__name__}: {error}") from error
    whole = loss(slice(0, 4))
    if not (jnp.isfinite(whole) and jnp.all(jnp.isfinite(gradient_BT))):
        raise ValueError(
            f"{name} must give a finite loss and gradient, got {whole} and {gradient_BT.tolist()} for log-probs "
            f"{logprobs_BT.tolist()}; give `where` finite values in both branches"
        )
    if not jnp.any(gradient_BT):
        raise ValueError(
            f"{name} must have a gradient by sequences.logprobs_BT (sequences.log_ratio_BT and sequences.ratio_BX "
            "carry it too), got 0 everywhere; is all of it inside stop_gradient?"
        )
    pieces = loss(slice(0, 1)) + loss(slice(1, 4))
    if not jnp.allclose(pieces, whole, rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"{name} must be a term of each sequence by itself, got {whole} for a minibatch and {pieces} for the sum "
            "of its pieces; nothing in it may depend on other sequences (no mean or sum over B)"
        )


class _WrongResult(ValueError):
    """The function returned a wrong form; the message says everything."""


def _check_shapes(name: str, result: Any, shape: tuple[int, ...]) -> None:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise _WrongResult(
            f"{name} must return (term, metrics), where metrics is a dict, got {type(result).__name__}; "
            "without metrics `return term, {}`"
        )
    for what, value in (("the term", result[0]), *((f"metric {key!r}", value) for key, value in result[1].items())):
        found = getattr(value, "shape", None)
        if found not in (shape, (shape[0], 1)):
            got = type(value).__name__ if found is None else f"shape {found}"
            raise _WrongResult(
                f"{name}: {what} must have shape [B, T] or [B, 1], here {shape} or {(shape[0], 1)}, got {got}; the "
                "loss masks and sums it"
            )


def loss_config(config: Config) -> LossConfig:
    """The settings of the loss, from the `grpo` section.

    Raises:
        ValueError: the name is neither in `LOSS_TYPES` nor a function of a file, the loss does not take
        `grpo.loss_args`, or settings contradict each other.
    """
    _check_keys(config)
    section = dataclasses.asdict(config.grpo)  # pyright: ignore[reportArgumentType]
    section["beta"] = 0.0 if config.grpo.kl_in_reward else config.grpo.beta  # the advantages hold the KL then
    made_here = {"max_completion_length", "custom_term", "loss_args"}
    names = {field.name for field in dataclasses.fields(LossConfig)} - made_here
    result = LossConfig(
        **{name: section[name] for name in names},
        custom_term=resolve(config.grpo.loss_type, "grpo.loss_type"),
        loss_args=tuple(sorted(config.grpo.loss_args.items())),
        max_completion_length=config.sampling.max_completion_length,
    )
    validate_loss_config(result)
    return result


def _check_keys(config: Config) -> None:
    """Rules of `grpo` keys that depend on the loss's entry in `LOSS_TYPES`."""
    grpo, name = config.grpo, config.grpo.loss_type
    if is_user_function(name):
        return
    if name not in LOSS_TYPES:
        raise ValueError(
            f"grpo.loss_type: must be one of {list(LOSS_TYPES)} or path/to/file.py:function, got {shown(name)}"
        )
    entry = LOSS_TYPES[name]
    if entry.epsilon_high_is_cap and grpo.epsilon_high is None:
        raise ValueError(
            f"grpo.epsilon_high must be set with loss_type {name}, where it is the cap of the ratio itself and not a "
            "distance from 1, got null; for example grpo.epsilon_high=5.0"
        )
    for key, value, off in (
        ("kl_in_reward", grpo.kl_in_reward, "false"),
        ("turn_advantages", grpo.turn_advantages, "null"),
    ):
        if entry.is_of_sequences and value:
            refused = ", ".join(sorted(other for other, entry in LOSS_TYPES.items() if entry.is_of_sequences))
            raise ValueError(
                f"grpo.loss_type must be none of {refused} with grpo.{key}, for they are of whole completions, got "
                f"{name!r}; take dapo, or set grpo.{key} to {off}"
            )
