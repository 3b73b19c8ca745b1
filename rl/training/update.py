"""The updates of one step: packs the minibatches, scores them where the loss needs it, and runs the compiled update.

In: the state, the reference, groups with advantages. Out: the next state and the measurements. Old log-probs are fixed
before the first update. They are not computed for that update, whose own they are, nor where the sampler's are used.
Epochs go over the same minibatches again. Not here: the loss and the compiled functions.

Rollouts of older weights. Three policies meet: the one that drew (mu), the one before the first update on the rollout
(old), and the one that is trained (pi). Where they are trained in the step that drew them, mu and old have the same
weights. An older rollout needs the ratio to mu, and there are three ways to it:

- `grpo.sampler_is_correction`: old is recomputed with the weights at hand, the clip bounds pi / old, and the sampler's
  log-probs give old / mu as a constant weight. This is decoupled PPO, https://arxiv.org/abs/2110.00641 and
  https://arxiv.org/abs/2505.24298 (AReaL): the trust region moves with the weights, so old rollouts do not clip all.
- `grpo.old_logprobs: sampler`: old is the distribution that was drawn from, so the ratio is pi / mu.
- neither: old is the plain softmax of the weights that drew, as the sampler computed it then (`rollout_logprobs`), so
  the ratio is again pi / mu, as in PPO. Log-probs that the trainer made now would claim that the rollout is on-policy.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rl.algorithms.entropy_coef import EntropyCoefState, applied_entropy_coef, next_entropy_coef
from rl.algorithms.from_config import loss_config
from rl.algorithms.loss_metrics import finish_metrics
from rl.config.load import Config
from rl.devices import hosts
from rl.devices.mesh import replicated
from rl.devices.programs import Program, callable_of
from rl.models.drawn_from import DrawnFrom
from rl.models.policy import Policy
from rl.models.train_state import PureState
from rl.models.trainable import Trainable
from rl.state.optimizer import updates_per_step
from rl.training.computed_groups import ComputedGroups, computed_groups, leaves_groups_out, uncomputed_share
from rl.training.packing import Batch, PackingPlan, TrainGroup, pack
from rl.training.token_advantages import TokenRewards, token_advantages_program
from rl.training.token_values import MeasuredTokens, TokenValues
from rl.training.train_step import (
    TRAIN_STEP,
    Minibatch,
    TrainStep,
    UpdateMetrics,
    batch_shardings,
    token_logprobs_program,
    update_program,
)

LOGPROBS, REFERENCE_LOGPROBS, ENTROPIES = "logprobs", "reference logprobs", "entropies"
TOKEN_ADVANTAGES = "token advantages"


class _Measured(NamedTuple):
    """One update's measurements on the host, and the metrics from its sums."""

    update: UpdateMetrics
    finished: dict[str, np.ndarray]


class Updater:
    """All updates of one step: packs minibatches, scores them where the loss needs it, and calls the train step.

    Args:
      train_step: from `jit_train_step`, with `train_step_options` of the same configuration and plan.
      plan: static shapes of the minibatches.
      state_shardings: a `NamedSharding` for each leaf of the state.

    Attributes:
      num_updates: updates of a step.
    """

    def __init__(
        self,
        train_step: TrainStep,
        config: Config,
        policy: Policy,
        plan: PackingPlan,
        state_shardings: PureState,
        *,
        mesh: Mesh,
    ):
        self.num_updates = updates_per_step(config)
        self._config = config
        self._plan = plan
        self._loss_config = loss_config(config)
        self._leaves_out = leaves_groups_out(config)
        self._dtype = batch_dtype(policy)
        self._replicated = replicated(mesh)
        self._batch_shardings = batch_shardings(mesh, config.mesh.rules)
        programs = scoring_programs(config, policy, state_shardings, plan, mesh)
        self._calls = {name: callable_of(name, program) for name, program in programs.items()}
        self._train_step = train_step
        self._tokens: list[MeasuredTokens] = []  # of each minibatch of the last step
        self._finish_metrics = jax.jit(finish_metrics, out_shardings=self._replicated)
        self._fill_unknown = jax.jit(
            lambda known, other: jnp.where(jnp.isnan(known), other, known),
            out_shardings=self._batch_shardings.mask_MRCL,
        )

    def update(
        self,
        state: PureState,
        reference: PureState | None,
        groups: Sequence[Sequence[TrainGroup]],
        entropy: EntropyCoefState,
        age: int = 0,
    ) -> tuple[PureState, EntropyCoefState, dict[str, float]]:
        """All updates of one step.

        Args:
          state: donated; do not use it again.
          reference: None when there is no KL term; the weights that its own policy takes, see `Trainable`.
          groups: the groups of each minibatch.
          entropy: the state of the adaptive entropy bonus.
          age: steps that were made since the weights that drew the completions; 0: those of `state` drew them. Above 0
            the ratio is taken to the policy that drew, see the module. The first such call may compile again; with a
            `compiled_file` whose train step takes no old log-probs it is a ValueError.

        Returns:
          The next state, the entropy coefficient's next state, and metrics: means over the updates that were made (over
          all when every one was skipped, to show what was not finite) and had a completion, the number of
          `skipped_updates`, and `logprob_difference` of the first update, where policy and sampler have the same
          weights. Where they do not, there are `rollout_age` and, in its place, `logprob_drift`: how far the policy
          moved since the draw. Where groups may be left out (`leaves_groups_out`), means are over the others, and
          `uncomputed_share` says how many of the tokens of prompts and completions were not computed.
        """
        assert age >= 0, age
        from_sampler = self._config.grpo.old_logprobs == "sampler"
        from_rollout = age > 0 and not from_sampler and not self._config.grpo.sampler_is_correction
        if from_rollout and self._config.compiled_file is not None and not needs_old_logprobs(self._config):
            raise ValueError(
                f"compiled_file must be null for a rollout of older weights ({age} steps), which needs old log-probs "
                "that the compiled train step does not take; leave it out, or set grpo.sampler_is_correction=true"
            )
        reference_name = REFERENCE_LOGPROBS if REFERENCE_LOGPROBS in self._calls else LOGPROBS
        num_items = sum(c.num_trained for minibatch in groups for group in minibatch for c in group.completions)
        self._tokens = []
        batches, parts = [], [computed_groups(minibatch, self._leaves_out) for minibatch in groups]
        for number, part in enumerate(parts):
            packed = pack(part.groups, self._plan, self._dtype)
            bare: Batch = hosts.put(packed, self._batch_shardings)
            # With the sampler's log-probs the ratio corrects for differences between sampler and trainer. For a
            # minibatch whose only update is the first one, they fill the place of old ones, which this update does not
            # read.
            old = bare.sampler_logprobs_MRCL if needs_old_logprobs(self._config) else None
            is_read = number > 0 or self._config.grpo.epochs > 1 or self._config.grpo.kl_in_reward
            if from_rollout:
                # A user's source knows no distribution but the one that it drew from.
                name = "rollout_logprobs_MRCL" if self._config.sampling.source is None else "sampler_logprobs_MRCL"
                old, drawn = getattr(bare, name), getattr(packed, name)
                is_read = bool(np.any(np.isnan(drawn) & (packed.mask_MRCL > 0)))
            now = None
            if _recomputes_old(self._config) and is_read:
                now = self._calls[LOGPROBS](state.params, bare_batch(bare))[0]
                old = self._fill_unknown(old, now) if from_rollout else now
            reference_logprobs = None
            if reference is not None:
                reference_logprobs = self._calls[reference_name](reference.params, bare_batch(bare))[0]
            batches.append(bare._replace(old_logprobs_MRCL=old, reference_logprobs_MRCL=reference_logprobs))
            both = (groups[number], part.groups)
            self._tokens.append(MeasuredTokens(*both, packed, now, reference_logprobs, bare.advantages_MRCL, []))
        kl_metric: dict[str, float] = {}
        if TOKEN_ADVANTAGES in self._calls:
            batches, kl_metric = self._with_token_advantages(batches)
            pairs = zip(self._tokens, batches, strict=True)
            self._tokens = [tokens._replace(advantages=batch.advantages_MRCL) for tokens, batch in pairs]
        measured: list[_Measured] = []
        for _ in range(self._config.grpo.epochs):
            for number, (batch, part) in enumerate(zip(batches, parts, strict=True)):
                is_first = not any(update.is_applied for update, _ in measured)
                on_policy = is_first and not from_sampler and not from_rollout
                minibatch = self._minibatch(state, batch, part, num_items, entropy, on_policy)
                state, update = self._train_step(state, minibatch)
                if update.tokens is not None:
                    self._tokens[number] = self._tokens[number].with_update(update.tokens)
                    update = update._replace(tokens=None)  # which stays on the devices
                measured.append(_Measured(*jax.device_get((update, self._finish_metrics(update.sums)))))
                entropy = self._next_entropy(entropy, measured[-1])
        uncomputed = {"uncomputed_share": uncomputed_share(parts)} if self._leaves_out else {}
        return state, entropy, self._metrics(measured, entropy, age) | kl_metric | uncomputed

    def token_values(self) -> list[TokenValues | None]:
        """What the updates of the last step measured of the tokens of each completion, in the order of its groups. All
        processes must call it; only the first gets values.
        """
        estimator = self._config.grpo.kl_estimator
        return [values for tokens in self._tokens for values in tokens.by_completion(estimator)]

    def _with_token_advantages(self, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        """The minibatches of a step with an advantage for each token. Nothing else needs the reference's log-probs."""
        rewards = tuple(TokenRewards.of(batch) for batch in batches)
        advantages, kl = self._calls[TOKEN_ADVANTAGES](rewards)
        pairs = zip(batches, advantages, strict=True)
        batches = [batch._replace(advantages_MRCL=each, reference_logprobs_MRCL=None) for batch, each in pairs]
        return batches, {"kl": float(jax.device_get(kl))}

    def _next_entropy(self, entropy: EntropyCoefState, measured: _Measured) -> EntropyCoefState:
        if not (self._loss_config.has_entropy_bonus and measured.update.is_applied):
            return entropy
        if not measured.update.sums.weights["selected_entropy"]:  # nothing was measured: no completion had a part
            return entropy
        now = float(measured.finished["selected_entropy"])
        return EntropyCoefState(next_entropy_coef(entropy.coef, now, self._loss_config), now)

    def _minibatch(
        self,
        state: PureState,
        batch: Batch,
        part: ComputedGroups,
        num_items: int,
        entropy: EntropyCoefState,
        on_policy: bool,
    ) -> Minibatch:
        coef = applied_entropy_coef(entropy.coef, entropy.last_entropy, self._loss_config)
        left_out = np.int32(part.num_left_out_sequences), np.int32(part.num_left_out_tokens)
        scalars = np.int32(num_items), self._dtype.type(coef), np.bool_(on_policy), *left_out
        # The quantile belongs to the policy at this update and to the whole minibatch, so it needs a pass of its own.
        entropies = self._calls[ENTROPIES](state.params, bare_batch(batch))[1] if ENTROPIES in self._calls else None
        num_items_in_batch, entropy_coef, *others = hosts.put(scalars, self._replicated)
        return Minibatch(batch, num_items_in_batch, entropy_coef, entropies, *others)

    def _metrics(self, measured: list[_Measured], entropy: EntropyCoefState, age: int) -> dict[str, float]:
        updates, applied = [], [one for one in measured if one.update.is_applied]
        shown = applied or measured
        computed = [one for one in shown if one.update.sums.weights["ratio/mean"]]
        for update, finished in computed or shown:
            updates.append({"loss": float(update.loss), "grad_norm": float(update.grad_norm)})
            updates[-1] |= {name: float(value) for name, value in finished.items()}
            if update.lost_share is not None:
                updates[-1]["update/lost_share"] = float(update.lost_share)
        metrics = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
        if not computed:
            metrics |= dict.fromkeys(shown[0].update.sums.numerators, math.nan)  # means over no token
        metrics["skipped_updates"] = len(measured) - len(applied)
        if self._loss_config.has_entropy_bonus:
            metrics["entropy_coef"] = entropy.coef
        first = measured[0].update.difference
        is_known = first.count > 0  # not of tokens from a source of the user's
        mean = float(first.total) / float(first.count) if is_known else math.nan
        highest = float(first.highest) if is_known else math.nan
        if age:
            return {**metrics, "logprob_drift/mean": mean, "logprob_drift/max": highest, "rollout_age": age}
        return {**metrics, "logprob_difference/mean": mean, "logprob_difference/max": highest}


def update_programs(
    config: Config,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    state_shardings: PureState,
    plan: PackingPlan,
    mesh: Mesh,
) -> dict[str, Program]:
    """{name: program} of all updates of a run: those that score minibatches, and the train step."""
    options = train_step_options(config, plan)
    train_step = update_program(policy, optimizer, loss_config(config), state_shardings, mesh=mesh, **options)
    return {**scoring_programs(config, policy, state_shardings, plan, mesh), TRAIN_STEP: train_step}


def train_step_options(config: Config, plan: PackingPlan) -> dict[str, Any]:
    """The arguments of `jit_train_step` from the configuration, other than loss and mesh, for minibatches of `plan`."""
    return {**_pass_options(config, plan), "minibatches_per_rollout": config.grpo.minibatches, "keeps_tokens": True}


def _pass_options(config: Config, plan: PackingPlan) -> dict[str, Any]:
    """The options of every pass over packed rows, with and without gradient."""
    return {
        "rules": config.mesh.rules,
        "temperature": config.sampling.temperature,
        "chunk_size": config.grpo.logprob_chunk,
        "shorter_lengths": plan.shorter_lengths,
        "max_sequences": plan.max_sequences,
        "drawn_from": drawn_from(config),
    }


def drawn_from(config: Config) -> DrawnFrom | None:
    """The rules of sampling that log-probs of training are under; None: they are of the whole softmax."""
    if config.grpo.policy_distribution == "full":
        return None
    return DrawnFrom.of(config.sampling, forbids_ends=config.sampling.min_completion_length > 0)


def scoring_programs(
    config: Config, policy: Policy, state_shardings: PureState, plan: PackingPlan, mesh: Mesh
) -> dict[str, Program]:
    """{name: program} of what an `Updater` calls besides the train step.

    One program gives old and reference log-probs. A reference that is the policy's frozen part has its own program.
    """
    common: dict[str, Any] = {"mesh": mesh, **_pass_options(config, plan)}
    programs, trainable = {}, Trainable(policy)
    if _recomputes_old(config) or (config.grpo.beta and not trainable.has_frozen):
        programs[LOGPROBS] = token_logprobs_program(policy, state_shardings.params, with_entropy=False, **common)
    if config.grpo.beta and trainable.has_frozen:
        base, shardings = trainable.reference_policy, trainable.reference_part(state_shardings.params)
        programs[REFERENCE_LOGPROBS] = token_logprobs_program(base, shardings, with_entropy=False, **common)
    if loss_config(config).selects_by_entropy:
        programs[ENTROPIES] = token_logprobs_program(policy, state_shardings.params, with_entropy=True, **common)
    if config.grpo.kl_in_reward:
        programs[TOKEN_ADVANTAGES] = token_advantages_program(
            config.grpo.minibatches, config.grpo.beta, config.grpo.kl_estimator, mesh=mesh, rules=config.mesh.rules
        )
    return programs


def batch_dtype(policy: Policy) -> np.dtype:
    """The dtype of a batch's floating-point fields: float32, or float64 for a float64 model."""
    return np.dtype(np.float64 if policy.config.dtype == "float64" else np.float32)


def needs_old_logprobs(config: Config) -> bool:
    """Whether a batch holds old log-probs: because the policy changes between the rollout and an update on it, or
    because they are the sampler's.
    """
    return _recomputes_old(config) or config.grpo.old_logprobs == "sampler"


def _recomputes_old(config: Config) -> bool:
    """Whether the policy computes old log-probs itself: several updates follow a rollout, or rewards hold a KL
    estimate, and the sampler's are not used.
    """
    is_needed = updates_per_step(config) > 1 or config.grpo.kl_in_reward
    return is_needed and config.grpo.old_logprobs != "sampler"


def bare_batch(batch: Batch) -> Batch:
    """`batch` without the fields that the trainer adds, as `token_logprobs_program` takes it."""
    return batch._replace(old_logprobs_MRCL=None, reference_logprobs_MRCL=None, advantages_MRCL=None)
