"""Completions in which an environment put tokens between those that the policy drew: these are read, and nothing else.

Legend: B sequences, L tokens of a completion.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rewards.batch import RewardResult
from rewards.contract import RewardSpec
from rl.algorithms.loss_metrics import finish_metrics
from rl.config.load import load_config
from rl.data.prompt_rows import PromptRow
from rl.rollout.groups import judge, minibatches, sample_records, with_advantages
from rl.rollout.scoring import ScoredCompletions
from rl.sampler.contract import Completion
from rl.training.packing import TrainCompletion, TrainGroup, pack
from tests.training.test_train_step import (
    TWO_LAYERS,
    VOCAB,
    Problem,
    Trainer,
    assert_close_leaf_by_leaf,
    make_trainer,
    noisy_params,
    plain_logprobs,
    plain_loss,
    random_problem,
)

FAMILY = "gemma3_text"  # one layer of two sees three positions back: the window counts tokens of both kinds


class Episodes(Problem):
    """A `Problem` whose tokens were drawn in turns."""

    @property
    def trained_BL(self) -> np.ndarray:
        """Every third token is an observation, the first and the last among them; one completion has no other."""
        rows_B1, places_L = np.arange(len(self.mask_BL))[:, None], np.arange(self.mask_BL.shape[1])
        trained_BL = (self.mask_BL > 0) & ((rows_B1 + places_L) % 3 != 0)
        trained_BL[4] = False
        return trained_BL

    def completion(self, b: int) -> TrainCompletion:
        whole = super().completion(b)
        trained = self.trained_BL[b, : len(whole.token_ids)]
        sampler, rollout = (np.where(trained, x, 1e30) for x in (whole.sampler_logprobs, whole.rollout_logprobs))
        return TrainCompletion(whole.token_ids, whole.advantage, sampler, rollout, trained)


@pytest.fixture(scope="module")
def episodes() -> Episodes:
    """Log-probs that a caller has for observations are nonsense, and their entropies would be the highest."""
    problem = Episodes(*random_problem(family=FAMILY, **TWO_LAYERS[FAMILY]))
    trained_BL = problem.trained_BL
    assert sorted(set(trained_BL.sum(axis=1).tolist()))[:2] == [0, 1]
    old_BL, reference_BL = (np.where(trained_BL, x, np.nan) for x in (problem.old_BL, problem.reference_BL))
    return problem._replace(
        old_BL=old_BL, reference_BL=reference_BL, entropy_BL=np.where(trained_BL, problem.entropy_BL, 99)
    )


@pytest.fixture(scope="module")
def packed() -> Trainer:
    with jax.enable_x64(True):
        return make_trainer("nnx", "float64", family=FAMILY, **TWO_LAYERS[FAMILY])


@pytest.fixture(scope="module")
def result(episodes, packed):
    """(loss, gradient, what was measured) of the packed update."""
    with jax.enable_x64(True):
        return packed.loss_and_gradient(episodes)


def test_loss_gradient_and_metrics_are_those_of_the_drawn_tokens_alone(episodes, packed, result):
    """Against plain arrays in which the drawn tokens of each sequence stand side by side: observations are nowhere."""
    order_BL = np.argsort(~episodes.trained_BL, axis=1, kind="stable")
    mask_BL = np.take_along_axis(episodes.trained_BL, order_BL, axis=1)
    side_by_side = {name: np.take_along_axis(getattr(episodes, name), order_BL, axis=1) for name in Problem._fields[5:]}
    drawn = Problem(
        *episodes[:3],
        mask_BL.astype(float),
        episodes.advantages_B,
        **{name: np.where(mask_BL, values, 0.0) for name, values in side_by_side.items()},
    )
    every_token = plain_logprobs(packed.policy, episodes)

    def loss(params):
        logprobs_BL, entropy_BL = (jnp.take_along_axis(x, order_BL, axis=1) for x in every_token(params))
        return plain_loss(logprobs_BL, entropy_BL, drawn), (logprobs_BL, entropy_BL)

    with jax.enable_x64(True):
        function = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (want_loss, now), want_gradient = jax.device_get(function(noisy_params(packed.policy.config)))
        got_loss, gradient, update = result
        metrics = jax.device_get(finish_metrics(update.sums))
    assert abs(got_loss - want_loss) <= 1e-11 * abs(want_loss)
    assert_close_leaf_by_leaf(gradient, want_gradient, 1e-11)
    logprobs_BL, entropy_BL = now
    ratios, gaps = (np.exp(logprobs_BL - drawn.old_BL)[mask_BL], np.abs(logprobs_BL - drawn.rollout_BL)[mask_BL])
    expected = {
        "entropy": entropy_BL[mask_BL].mean(),
        "ratio_mean": ratios.mean(),
        "ratio_max": ratios.max(),
        "sampler_logprob_difference_max": np.abs(drawn.old_BL - drawn.sampler_BL)[mask_BL].max(),
    }
    np.testing.assert_allclose([metrics[name] for name in expected], list(expected.values()), rtol=1e-11)
    difference = update.difference
    assert int(difference.count) == mask_BL.sum()
    np.testing.assert_allclose((difference.total, difference.highest), (gaps.sum(), gaps.max()), rtol=1e-11)


def test_the_policy_reads_observations_and_nothing_else_of_them_counts(episodes, packed, result):
    """The log-probs that come with them change nothing, bit for bit; their tokens do."""
    other = {name: np.where(episodes.trained_BL, getattr(episodes, name), -7.0) for name in Problem._fields[5:]}
    tokens_BL = np.where(episodes.trained_BL, episodes.completions_BL, (episodes.completions_BL + 1) % VOCAB)
    with jax.enable_x64(True):
        same = packed.loss_and_gradient(episodes._replace(**other))
        changed = packed.loss_and_gradient(episodes._replace(completions_BL=tokens_BL))
    jax.tree.map(np.testing.assert_array_equal, same, result)
    assert abs(changed[0] - result[0]) > 1e-3


def test_only_drawn_tokens_are_predicted(episodes, packed):
    batch = pack(episodes.train_groups(range(len(episodes.groups))), packed.plan)
    assert batch.target_mask_MRN.sum() == batch.mask_MRCL.sum() == episodes.trained_BL.sum()
    sequences = batch.sequence_ids_MRC >= 0
    assert batch.sequence_mask_MRC[sequences].all()
    inputs = sum(len(prompt) for prompt in episodes.prompts) + sum(length - 1 for length in episodes.lengths)
    repeated = sum(len(episodes.prompts[g]) for g in range(3)) * 2  # of groups that are cut
    assert inputs <= (batch.group_ids_MRT >= 0).sum() <= inputs + repeated
    with pytest.raises(AssertionError):
        pack([TrainGroup(np.array([1]), [TrainCompletion(np.array([1, 2]), trained=np.array([True]))])], packed.plan)


def test_a_rollout_measures_drawn_tokens_and_hands_the_mask_on():
    overrides = ["rewards.overlong_buffer=0.5", "sampling.max_completion_length=4"]
    config = load_config(None, ["grpo.group_size=2", "grpo.prompts_per_step=1", *overrides])
    masks = [np.array([True, False, False, True]), None]
    none = np.zeros((4, 0), np.float32)
    group = [
        Completion(0, g, np.arange(4, dtype=np.int32), *[np.zeros(4)] * 2, "eos", None, none, none, trained=trained)
        for g, trained in enumerate(masks)
    ]
    rows = [PromptRow("x", np.array([7], np.int32), {}, 0)]
    scored = ScoredCompletions([group], ["a", "b"], RewardResult([[1.0], [0.0]], {}, [], {}, {}))
    judged = judge(config, rows, scored, [RewardSpec("mine", "module:function", 1.0, {})])
    assert judged.rewards == [[1.0, 0.0], [0.0, -1.0]], "two tokens of four are not overlong"
    rollout = with_advantages(config, judged)
    assert (rollout.num_tokens, rollout.metrics["completion_length/mean"]) == (6, 3)
    ((packed_group,),) = minibatches(config, rollout)
    assert [completion.trained for completion in packed_group.completions] == masks
    assert [np.arange(4)[completion.trained_places].tolist() for completion in packed_group.completions] == [
        [0, 3],
        [0, 1, 2, 3],
    ]
    first, second = sample_records(rollout, 2)
    assert (first["trained"], first["tokens"]) == ([1, 0, 0, 1], 4)
    assert "trained" not in second
