import jax.numpy as jnp
import numpy as np
import pytest

from rl.algorithms.loss_types import KL_ESTIMATORS
from rl.training.packing import TrainCompletion, TrainGroup, TrainSequence, pack, plan_packing
from rl.training.token_values import MeasuredTokens
from rl.training.train_step import TokenMeasures

PLAN = {
    "num_groups": 2,
    "group_size": 2,
    "max_prompt_length": 4,
    "max_completion_length": 6,
    "max_tokens_per_microbatch": 64,
    "num_row_shards": 1,
    "preferred_row_length": 16,
}


def completion(ids, trained=None, further=()):
    """A completion for whose token i the sampler has the log-prob -i / 8."""
    ids = np.array(ids, np.int32)
    trained = None if trained is None else np.array(trained, bool)
    return TrainCompletion(ids, 1.0, None, -ids / 8, trained, further=further)


def measured(groups, computed, plan, **change):
    """Values that name their tokens: token i has the log-prob -i, and the reference gives it 0.25 more."""
    packed = pack(computed, plan, np.float64)
    slots = np.take_along_axis(
        packed.targets_MRN, packed.slots_MRCL.reshape(*packed.slots_MRCL.shape[:2], -1), axis=2
    ).reshape(packed.slots_MRCL.shape)
    logprobs = -slots.astype(np.float64)
    fields = {"reference": logprobs + 0.25, "advantages": None, "clipped": [slots == 13, slots == 7], **change}
    return MeasuredTokens(groups, computed, packed, logprobs, **fields)


def test_values_come_back_to_their_tokens_and_groups_that_were_left_out_have_none():
    groups = [
        TrainGroup(np.array([1, 2]), [completion([3, 4, 5]), completion([6, 7])]),
        TrainGroup(np.array([8]), [completion([9])]),
        TrainGroup(np.array([10, 11]), [completion([12, 13, 14, 15], trained=[1, 0, 0, 1])]),
    ]
    found = measured(groups, [groups[0], groups[2]], plan_packing(**PLAN)).by_completion("k3")
    assert [None if values is None else (-values.logprob).tolist() for values in found] == [
        [3, 4, 5],
        [6, 7],
        None,
        [12, 15],  # what the policy did not draw has no value
    ]
    assert [values.clipped.tolist() for values in found if values] == [[0, 0, 0], [0, 1], [0, 0]]
    np.testing.assert_allclose(found[0].difference, [-3 / 8 + 3, -4 / 8 + 4, -5 / 8 + 5])
    assert found[0].advantage is None


def test_the_drawn_tokens_of_all_sequences_of_an_episode_stand_in_order():
    plan = plan_packing(**PLAN, max_sequences=2, max_drawn=8)
    further = [TrainSequence(np.array([20, 21]), completion([22, 23, 24], trained=[1, 0, 1]))]
    groups = [TrainGroup(np.array([1]), [completion([3, 4], further=further), completion([5])])]
    found = measured(groups, groups, plan).by_completion("k1")
    assert [(-values.logprob).tolist() for values in found if values] == [[3, 4, 22, 24], [5]]


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_the_kl_is_that_of_the_loss(name):
    groups = [TrainGroup(np.array([1]), [completion([3, 4])])]
    (values,) = measured(groups, groups, plan_packing(**PLAN)).by_completion(name)
    np.testing.assert_allclose(values.kl, KL_ESTIMATORS[name](jnp.full(2, 0.25)), rtol=1e-6)
    (values,) = measured(groups, groups, plan_packing(**PLAN), reference=None).by_completion(name)
    assert values.kl is None


def test_the_first_update_gives_the_logprobs_where_nobody_needed_old_ones():
    one, two = TokenMeasures(np.zeros(1), np.zeros(1, bool)), TokenMeasures(np.ones(1), None)
    tokens = MeasuredTokens([], [], None, None, None, None, []).with_update(one).with_update(two)
    assert (tokens.logprobs is one.logprobs_MRCL, len(tokens.clipped)) == (True, 1)
