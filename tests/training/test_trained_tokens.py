"""Completions in which an environment put tokens between those that the policy drew: these are read, and nothing else.
And episodes of several sequences, whose drawn tokens count as one completion.

Legend: B sequences, L tokens of a completion, E episodes of one or more sequences.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rewards.batch import RewardResult
from rewards.contract import RewardSpec
from rl.algorithms.loss_metrics import finish_metrics
from rl.config.load import load_config
from rl.data.prompt_rows import PromptRow
from rl.rollout.episode import Episode, EpisodeSequence, episode_metrics, failure_problems
from rl.rollout.groups import judge, minibatches, sample_records, with_advantages
from rl.rollout.scoring import ScoredCompletions
from rl.sampler.contract import Completion
from rl.sampler.token_draw import SamplingParams
from rl.training.packing import TrainCompletion, TrainGroup, TrainSequence, pack
from rl.training.token_advantages import TokenRewards, token_advantages
from tests.training.test_train_step import (
    BETA,
    PLAN,
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
# The sequences of each episode. The first one's prompt is the group's. Others have the same prompt, or that of another
# group, or one that goes on from the group's.
MEMBERS = ((0, 1, 5), (2,), (6, 8, 3), (4,), (7,))


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
        "ratio/mean": ratios.mean(),
        "ratio/max": ratios.max(),
        "drawn_difference/max": np.abs(drawn.old_BL - drawn.sampler_BL)[mask_BL].max(),
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
    assert (first["trained"], first["num_tokens"]) == ([1, 0, 0, 1], 4)
    assert "trained" not in second
    assert "further" not in second


def test_an_episode_hands_all_its_sequences_on_and_is_as_long_as_all_that_was_drawn():
    config = load_config(None, ["grpo.group_size=2", "grpo.prompts_per_step=1"])
    none = np.zeros((2, 0), np.float32)

    def turn(number: int) -> Completion:
        logprobs = np.array([-0.5, -1.5], np.float32) * number
        return Completion(0, 0, np.int32([number, 9]), logprobs, logprobs, "eos", 9, none, none)

    def episode(*numbers: int) -> Episode:
        return Episode("x", [sequence(number) for number in numbers], reward=1.0, ended="done")

    def sequence(number: int) -> EpisodeSequence:
        made = EpisodeSequence([7, number])
        if number:
            made.add_turn(turn(number))
            made.add_read([5])
            made.add_turn(turn(number))
        return made

    played = [episode(1, 0, 2), episode(3, 4, 5)]
    for each in played:
        each.settle(max_sequences=2)
    assert [(e.failure is None, e.ended, e.num_turns) for e in played] == [
        (True, "done", 4),
        (False, "too_many_sequences", 6),
    ]
    assert episode_metrics(played)["episodes/too_many_sequences"] == 0.5
    assert episode_metrics(played)["observation_length/mean"] == (2 + 3) / 2
    (problem,) = failure_problems(played)
    assert "rollout.max_sequences must be >= 3" in problem
    group = [each.completion(0, g, SamplingParams(4)) for g, each in enumerate(played)]
    rows = [PromptRow("x", np.int32([7]), {}, 0)]
    scored = ScoredCompletions([group], ["a", "b"], RewardResult([[1.0], [None]], {}, [], {}, {}), played)
    rollout = with_advantages(config, judge(config, rows, scored, [RewardSpec("mine", "module:function", 1.0, {})]))
    assert (rollout.kept_B.tolist(), rollout.metrics["completion_length/mean"]) == ([True, False], (8 + 12) / 2)
    ((packed_group,),) = minibatches(config, rollout)
    (kept,) = packed_group.completions
    ((prompt_ids, further),) = kept.further
    assert (packed_group.prompt_ids.tolist(), kept.token_ids.tolist()) == ([7], [1, 1, 9, 5, 1, 9])
    assert (prompt_ids.tolist(), further.token_ids.tolist(), kept.num_trained) == ([7, 2], [2, 9, 5, 2, 9], 8)
    np.testing.assert_array_equal(further.sampler_logprobs, np.float32([-1, -3, 0, -1, -3]))
    record = sample_records(rollout, 1)[0]
    told = {"prompt": "", "prompt_ids": [7, 2], "token_ids": [2, 9, 5, 2, 9], "trained": [1, 1, 0, 1, 1]}
    assert record["further"] == [told]
    assert (record["num_tokens"], record["trained"]) == (6, [0, 1, 1, 0, 1, 1])


# Several sequences


@pytest.fixture(scope="module")
def several(episodes):
    """The sequences as five episodes: what `Trainer` takes of a problem, with the drawn tokens of each episode side by
    side. `rows_EL`, `places_EL` say where each stands in `episodes`.
    """
    drawn = [[(b, place) for b in own for place in np.flatnonzero(episodes.trained_BL[b])] for own in MEMBERS]
    longest = max(map(len, drawn))
    mask_EL = np.arange(longest) < np.array(list(map(len, drawn)))[:, None]
    rows_EL, places_EL = (
        np.array([[pair[i] for pair in own] + [0] * (longest - len(own)) for own in drawn]) for i in range(2)
    )
    values = {name: np.where(mask_EL, getattr(episodes, name)[rows_EL, places_EL], 0.0) for name in Problem._fields[5:]}

    def further(b: int) -> TrainSequence:
        if b != 3:
            return TrainSequence(episodes.prompt_of[b], episodes.completion(b))
        # Its first token, an observation, as the end of its prompt: the same computation.
        whole = episodes.completion(b)
        names = ("token_ids", "sampler_logprobs", "rollout_logprobs", "trained")
        cut = dataclasses.replace(whole, **{name: getattr(whole, name)[1:] for name in names})
        return TrainSequence(np.append(episodes.prompt_of[b], whole.token_ids[:1]), cut)

    def completion(own: tuple[int, ...]) -> TrainCompletion:
        return dataclasses.replace(episodes.completion(own[0]), further=[further(b) for b in own[1:]])

    groups = [[0, 1], [2, 3], [4]]
    found = [
        TrainGroup(prompt, [completion(MEMBERS[e]) for e in own])
        for prompt, own in zip(episodes.prompts, groups, strict=True)
    ]
    return types.SimpleNamespace(
        groups=groups,
        train_groups=lambda order: [found[g] for g in order],
        lengths=mask_EL.sum(axis=1).tolist(),
        mask_BL=mask_EL.astype(float),
        advantages_B=episodes.advantages_B[[own[0] for own in MEMBERS]],
        rows_EL=rows_EL,
        places_EL=places_EL,
        **values,
    )


@pytest.mark.parametrize(("flavour", "shorter"), [("nnx", ()), pytest.param("linen", (8,), marks=pytest.mark.long)])
def test_an_episode_of_several_sequences_is_one_completion_of_the_loss(episodes, several, flavour, shorter):
    """Against a row for each sequence and a loss over each episode's drawn tokens: means within an episode and over
    episodes, the ratio of a whole episode, entropies. shorter: a length at which the last of the pieces is computed.
    """
    plan = dataclasses.replace(PLAN, completion_length=11, max_sequences=3, shorter_lengths=shorter)
    overrides = ["grpo.importance_sampling_level=sequence"]
    with jax.enable_x64(True):
        packed = make_trainer(flavour, "float64", plan=plan, overrides=overrides, family=FAMILY, **TWO_LAYERS[FAMILY])
        got = packed.loss_and_gradient(several)
        every_token = plain_logprobs(packed.policy, episodes)

        def loss(params):
            now = [values[several.rows_EL, several.places_EL] for values in every_token(params)]
            return plain_loss(*now, several, level="sequence")

        function = jax.jit(jax.value_and_grad(loss))
        want_loss, want_gradient = jax.device_get(function(noisy_params(packed.policy.config)))
    assert abs(got[0] - want_loss) <= 1e-11 * abs(want_loss)
    assert_close_leaf_by_leaf(got[1], want_gradient, 1e-11)


def test_sequences_of_an_episode_share_prompts_and_count_once(episodes, several):
    plan = dataclasses.replace(PLAN, completion_length=11, max_sequences=3)
    batch = pack(several.train_groups(range(3)), plan)
    assert (batch.sequence_ids_MRC >= 0).sum() == batch.sequence_mask_MRC.sum() == len(MEMBERS)
    assert sorted(batch.sequence_ids_MRC[batch.sequence_ids_MRC >= 0].tolist()) == [0, 1, 2, 3, 4]
    # Group 0 with the prompt of one sequence of its own; group 1 likewise; group 2.
    rows = sorted((batch.group_ids_MRT >= 0).sum(axis=2)[batch.sequence_mask_MRC.any(axis=2)].tolist())
    assert rows == [6 + 1, 4 + 2 + 6 + (2 + 5), 2 + 3 + (6 + 6) + 4 + 1]
    tokens = np.take_along_axis(batch.targets_MRN, batch.slots_MRCL.reshape(*batch.targets_MRN.shape[:2], -1), axis=2)
    for place in zip(*np.nonzero(batch.sequence_ids_MRC >= 0), strict=True):
        e, count = batch.sequence_ids_MRC[place], int(batch.mask_MRCL[place].sum())
        drawn = tokens.reshape(batch.slots_MRCL.shape)[place][:count]
        want = episodes.completions_BL[several.rows_EL[e], several.places_EL[e]][: several.lengths[e]]
        np.testing.assert_array_equal(drawn, want)
        np.testing.assert_allclose(batch.sampler_logprobs_MRCL[place][:count], several.sampler_BL[e][:count], rtol=1e-6)
        assert batch.advantages_MRC[place] == np.float32(several.advantages_B[e])


def test_kl_in_reward_goes_on_over_the_sequences_of_an_episode(several):
    plan = dataclasses.replace(PLAN, completion_length=11, max_sequences=3)
    with jax.enable_x64(True):
        batch = pack(several.train_groups(range(3)), plan, np.float64)
        old, reference = np.zeros((2, *batch.mask_MRCL.shape))
        places = list(zip(*np.nonzero(batch.sequence_ids_MRC >= 0), strict=True))
        for place in places:
            e = batch.sequence_ids_MRC[place]
            old[place], reference[place] = several.old_BL[e], several.reference_BL[e]
        rewards = TokenRewards(batch.mask_MRCL, batch.advantages_MRC, old, reference)
        (got,), _ = token_advantages([rewards], BETA, "k1")
    kl_EL = several.mask_BL * (several.old_BL - several.reference_BL)
    returns_EL = several.advantages_B[:, None] - BETA * np.cumsum(kl_EL[:, ::-1], axis=1)[:, ::-1]
    drawn = returns_EL[several.mask_BL > 0]
    want_EL = several.mask_BL * (returns_EL - drawn.mean()) / (drawn.std(ddof=1) + 1e-4)
    for place in places:
        np.testing.assert_allclose(got[place], want_EL[batch.sequence_ids_MRC[place]], rtol=0, atol=1e-12)
