"""Supervised fine-tuning through the train step: minibatches of pairs, and the loss that imitates them.

The loss is the mean negative log-likelihood of the completion tokens. It equals CISPO
(https://arxiv.org/abs/2506.13585) with advantage 1 and the policy itself as old policy: -log p of each token, over the
tokens of the update. So the train step of `rl.training.train_step` is used unchanged.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rl.algorithms.from_config import loss_config
from rl.algorithms.loss_types import LossConfig
from rl.config.load import Config
from rl.data.prompts import PairRow
from rl.devices import hosts
from rl.devices.mesh import replicated
from rl.models.policy import Policy
from rl.training.packing import PackingPlan, TrainCompletion, TrainGroup, pack, plan_packing
from rl.training.shaped_inputs import packing_options
from rl.training.train_step import Minibatch, UpdateMetrics, batch_shardings
from rl.training.update import train_step_options


def negative_log_likelihood(config: Config) -> LossConfig:
    """The loss settings under which the train step computes the token mean of -log p."""
    neutral = {
        "custom_term": None,
        "loss_args": (),
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "sampler_is_correction": False,
    }
    neutral |= {
        "entropy_coef": 0.0,
        "positive_nll_coef": 0.0,
        "use_adaptive_entropy": False,
        "importance_sampling_level": "token",
    }
    return dataclasses.replace(loss_config(config), loss_type="cispo", epsilon_high=1.0, **neutral)


def supervised_options(config: Config, plan: PackingPlan) -> dict[str, Any]:
    """`train_step_options` for pairs: log-probs are of the whole softmax at temperature 1, and a step is one update."""
    other = {"temperature": 1.0, "drawn_from": None, "minibatches_per_rollout": 1, "keeps_tokens": False}
    return {**train_step_options(config, plan), **other}


def plan_for_pairs(config: Config, rows: Sequence[PairRow], policy: Policy, mesh: Mesh) -> PackingPlan:
    """Static shapes that hold every minibatch of these rows."""
    return plan_packing(
        num_groups=config.sft.batch_size,
        group_size=1,
        max_prompt_length=max(len(row.prompt_ids) for row in rows),
        max_completion_length=max(len(row.completion_ids) for row in rows),
        **packing_options(config, policy, mesh),
    )


def minibatch_of(rows: Sequence[PairRow], plan: PackingPlan, config: Config, mesh: Mesh) -> Minibatch:
    """The minibatch of one update on the mesh. Each pair is a group of one completion with advantage 1."""
    groups = [TrainGroup(row.prompt_ids, [TrainCompletion(row.completion_ids, advantage=1.0)]) for row in rows]
    batch = hosts.put(pack(groups, plan), batch_shardings(mesh, config.mesh.rules))
    scalars = (np.int32(num_tokens_of(rows)), np.float32(0.0), np.bool_(False))
    num_items, entropy_coef, on_policy = hosts.put(scalars, replicated(mesh))
    return Minibatch(batch, num_items, entropy_coef, on_policy=on_policy)


def num_tokens_of(rows: Sequence[PairRow]) -> int:
    """The number of tokens of all completions."""
    return sum(len(row.completion_ids) for row in rows)


def metrics_of(update: UpdateMetrics) -> dict[str, float]:
    """The measurements of one update as keys of metrics.jsonl. `update` is on the host."""
    metrics = {
        "loss": float(update.loss),
        "grad_norm": float(update.grad_norm),
        "skipped_updates": int(not update.is_applied),
    }
    lost_share = update.lost_share
    return metrics if lost_share is None else {**metrics, "update/lost_share": float(lost_share)}
