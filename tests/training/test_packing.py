"""Packing is bookkeeping: every token lands exactly once, sees exactly its own past, and finds its way back.

The checks read a batch through the attention rule, written out here once more in numpy.
Legend: M micro-batches, R rows, T token positions, N completion tokens of a row, C completions of a row, L tokens of a
completion.
"""

import dataclasses
import math

import numpy as np
import pytest

from rl.training.packing import (
    Batch,
    PackingPlan,
    TrainCompletion,
    TrainGroup,
    TrainSequence,
    pack,
    plan_packing,
)

LAST = 999  # the last token of every completion in `ragged_groups`, and of nothing else


def ragged_groups(seed, num_groups=5, group_size=4, max_prompt=6, max_completion=7, full=False):
    """Groups with prompts and completions of random lengths, or all of the largest if `full`."""
    rng = np.random.default_rng(seed)

    def length(longest):
        return longest if full else int(rng.integers(1, longest + 1))

    def completion():
        count = length(max_completion)
        tokens = np.append(rng.integers(1, 900, count - 1), LAST).astype(np.int32)
        return TrainCompletion(tokens, float(rng.normal()), rng.normal(size=count), rng.normal(size=count))

    return [
        TrainGroup(rng.integers(1, 900, length(max_prompt)).astype(np.int32), [completion() for _ in range(group_size)])
        for _ in range(num_groups)
    ]


def plan_for(num_groups=5, group_size=4, max_prompt=6, max_completion=7, budget=64, shards=1, preferred=16, **others):
    return plan_packing(
        num_groups=num_groups,
        group_size=group_size,
        max_prompt_length=max_prompt,
        max_completion_length=max_completion,
        max_tokens_per_microbatch=budget,
        num_row_shards=shards,
        preferred_row_length=preferred,
        **others,
    )


def in_order(groups):
    """(prompt, completion) in the order in which `sequence_ids` counts."""
    return [(group.prompt_ids, completion) for group in groups for completion in group.completions]


def places(batch):
    """{sequence id: (m, r, c)}; each id must be there once."""
    found = list(zip(*np.nonzero(batch.sequence_ids_MRC >= 0), strict=True))
    result = {int(batch.sequence_ids_MRC[place]): tuple(map(int, place)) for place in found}
    assert len(result) == len(found)
    return result


def past_of(batch, m, r, position):
    """Tokens and positions that the token at `position` of a row sees, itself included, sorted by position."""
    group_T, branch_T, at_T = batch.group_ids_MRT[m, r], batch.branch_ids_MRT[m, r], batch.positions_MRT[m, r]
    seen_T = (group_T == group_T[position]) & (at_T <= at_T[position])
    seen_T &= (branch_T == 0) | (branch_T == branch_T[position])
    order = np.argsort(at_T[seen_T], kind="stable")
    return batch.tokens_MRT[m, r][seen_T][order].tolist(), at_T[seen_T][order].tolist()


def assert_batches_equal(left, right):
    for name, a, b in zip(Batch._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def assert_holds(batch, groups):
    """The whole contract of `pack` for these groups."""
    sequences, where = in_order(groups), places(batch)
    assert sorted(where) == list(range(len(sequences)))
    num_tokens = sum(len(completion.token_ids) for _, completion in sequences)
    assert batch.mask_MRCL.sum() == batch.target_mask_MRN.sum() == num_tokens
    assert batch.sequence_mask_MRC.sum() == len(sequences)
    used = set()
    for i, (prompt, completion) in enumerate(sequences):
        m, r, c = where[i]
        count = len(completion.token_ids)
        assert batch.mask_MRCL[m, r, c].tolist() == [1.0] * count + [0.0] * (batch.mask_MRCL.shape[-1] - count)
        slots = batch.slots_MRCL[m, r, c, :count]
        used |= {(m, r, int(n)) for n in slots}
        assert batch.target_mask_MRN[m, r, slots].all()
        assert batch.targets_MRN[m, r, slots].tolist() == completion.token_ids.tolist()
        assert batch.sequence_mask_MRC[m, r, c] == 1.0
        for drawn, n in enumerate(slots):
            past, positions = past_of(batch, m, r, batch.predictors_MRN[m, r, n])
            assert past == [*prompt.tolist(), *completion.token_ids[:drawn].tolist()]
            assert positions == list(range(len(past)))
    assert len(used) == num_tokens  # no slot serves two tokens


# Every token once, from its own past


@pytest.mark.parametrize("seed", range(6))
def test_every_token_lands_once_and_is_predicted_from_exactly_its_own_past(seed):
    groups = ragged_groups(seed)
    assert_holds(pack(groups, plan_for()), groups)


def test_a_prompt_is_stored_once_per_row_for_all_its_completions():
    groups = ragged_groups(1)
    batch = pack(groups, plan_for())
    inputs = sum(len(g.prompt_ids) + sum(len(c.token_ids) - 1 for c in g.completions) for g in groups)
    assert (batch.group_ids_MRT >= 0).sum() == inputs
    shared = (batch.group_ids_MRT >= 0) & (batch.branch_ids_MRT == 0)
    assert shared.sum() == sum(len(g.prompt_ids) for g in groups)


def test_the_last_token_of_a_completion_is_a_target_and_never_an_input():
    groups = ragged_groups(2)
    batch = pack(groups, plan_for())
    assert LAST not in batch.tokens_MRT
    assert (batch.targets_MRN == LAST).sum() == len(in_order(groups))


def test_sequences_lie_in_a_row_without_padding_between_them():
    batch = pack(ragged_groups(3), plan_for())
    used_MRT = batch.group_ids_MRT >= 0
    assert (np.diff(used_MRT.astype(int), axis=-1) <= 0).all()
    assert 0 < used_MRT.sum() < used_MRT.size


def test_padding_belongs_to_no_group_and_carries_neutral_values():
    batch = pack(ragged_groups(4), plan_for())
    empty_MRC = batch.sequence_ids_MRC < 0
    assert empty_MRC.any()
    assert not batch.sequence_mask_MRC[empty_MRC].any()
    assert not batch.advantages_MRC[empty_MRC].any()
    assert not batch.mask_MRCL[empty_MRC].any()
    unused_MRCL = batch.mask_MRCL == 0
    assert np.isnan(batch.sampler_logprobs_MRCL[unused_MRCL]).all()
    assert np.isnan(batch.rollout_logprobs_MRCL[unused_MRCL]).all()
    unused_MRT = batch.group_ids_MRT < 0
    assert set(batch.group_ids_MRT[unused_MRT].tolist()) == {-1}
    assert not batch.tokens_MRT[unused_MRT].any()


def test_advantages_and_logprobs_travel_with_their_completion():
    groups = ragged_groups(5)
    batch = pack(groups, plan_for(), np.float64)
    for i, (m, r, c) in places(batch).items():
        _, completion = in_order(groups)[i]
        count = len(completion.token_ids)
        assert batch.advantages_MRC[m, r, c] == completion.advantage
        np.testing.assert_array_equal(batch.sampler_logprobs_MRCL[m, r, c, :count], completion.sampler_logprobs)
        np.testing.assert_array_equal(batch.rollout_logprobs_MRCL[m, r, c, :count], completion.rollout_logprobs)


def test_kept_ids_lie_at_the_place_of_their_token():
    rng, groups = np.random.default_rng(0), ragged_groups(5)
    groups = [
        dataclasses.replace(
            group,
            completions=[
                dataclasses.replace(c, kept_words=rng.integers(1, 2**32, (len(c.token_ids), 3), np.uint32))
                for c in group.completions
            ],
        )
        for group in groups
    ]
    batch = pack(groups, dataclasses.replace(plan_for(), kept_words=3))
    assert batch.kept_words_MRNX.dtype == np.uint32
    for i, (m, r, c) in places(batch).items():
        _, completion = in_order(groups)[i]
        slots = batch.slots_MRCL[m, r, c, : len(completion.token_ids)]
        np.testing.assert_array_equal(batch.kept_words_MRNX[m, r, slots], completion.kept_words)
    assert not batch.kept_words_MRNX[~batch.target_mask_MRN].any()
    assert pack(groups, plan_for()).kept_words_MRNX is None
    with pytest.raises(ValueError, match=r"must say which ids could be drawn .* got None of this sampler"):
        pack(ragged_groups(5), dataclasses.replace(plan_for(), kept_words=3))


def test_unknown_logprobs_are_nan_beside_known_ones():
    known, unknown = TrainCompletion(np.int32([4, 5]), 1.0, np.zeros(2), np.zeros(2)), TrainCompletion(np.int32([6, 7]))
    batch = pack([TrainGroup(np.int32([1, 2]), [known, unknown])], plan_for(1, 2))
    where = places(batch)
    assert batch.sampler_logprobs_MRCL[where[0]][:2].tolist() == [0.0, 0.0]
    assert np.isnan(batch.sampler_logprobs_MRCL[where[1]]).all()
    assert np.isnan(batch.rollout_logprobs_MRCL[where[1]]).all()


def test_floating_point_fields_have_the_dtype_asked_for():
    for dtype in (np.float32, np.float64):
        batch = pack(ragged_groups(6), plan_for(), dtype)
        assert {x.dtype.type for x in batch if x is not None and np.issubdtype(x.dtype, np.floating)} == {dtype}


# Groups that do not fit, and other odd ones


def test_a_group_longer_than_a_row_is_cut_between_completions_and_its_prompt_repeated():
    groups = ragged_groups(7, num_groups=2, group_size=6, full=True)
    plan = plan_for(2, 6, budget=22)  # a prompt of 6 and two completions of 7
    batch = pack(groups, plan)
    assert plan.row_length == 22
    assert plan.completions_per_row == 2
    assert_holds(batch, groups)
    copies = sum(
        batch.tokens_MRT[m, r, :6].tolist() == groups[0].prompt_ids.tolist()
        for m, r in np.ndindex(batch.tokens_MRT.shape[:2])
    )
    assert copies == 3


def test_one_sequence_per_row_is_the_limit_of_cutting():
    groups = ragged_groups(8)
    plan = plan_for(budget=13)
    batch = pack(groups, plan)
    assert plan.num_rows == 1
    assert plan.num_microbatches == len(in_order(groups))
    assert_holds(batch, groups)


def test_completions_of_one_token_put_nothing_into_the_row():
    groups = [TrainGroup(np.int32([3, 4]), [TrainCompletion(np.int32([LAST]), 1.0)] * 4)]
    batch = pack(groups, plan_for(1, 4, max_completion=1))
    assert (batch.group_ids_MRT >= 0).sum() == 2
    assert_holds(batch, groups)


def test_groups_of_unequal_size_are_packed_and_empty_ones_left_out():
    groups = ragged_groups(9)
    groups = [TrainGroup(g.prompt_ids, g.completions[:keep]) for g, keep in zip(groups, (0, 1, 4, 0, 3), strict=True)]
    assert_holds(pack(groups, plan_for()), groups)


def test_a_minibatch_without_completions_is_one_piece_of_padding():
    batch = pack([TrainGroup(np.int32([1, 2]), [])], plan_for())
    assert batch.num_microbatches == 1
    assert not batch.mask_MRCL.any()
    assert (batch.group_ids_MRT == -1).all()
    assert (batch.sequence_ids_MRC == -1).all()


# Order


def test_packing_is_deterministic():
    assert_batches_equal(pack(ragged_groups(10), plan_for()), pack(ragged_groups(10), plan_for()))


def test_the_order_of_the_groups_changes_ids_only_never_contents():
    groups = ragged_groups(11)
    backwards = groups[::-1]
    assert_holds(pack(backwards, plan_for()), backwards)
    filled = [pack(order, plan_for()) for order in (groups, backwards)]
    assert sorted(filled[0].advantages_MRC.ravel()) == sorted(filled[1].advantages_MRC.ravel())


@pytest.mark.parametrize(
    ("sizes", "rows", "rows_in_given_order"),
    [
        # 12 and 10 begin a row each; 9 and 6 fit one of them only; 1 fits both (first fit: beside 12) and fills one.
        ((6, 9, 1, 10, 12), [[3, 1, 2], [4, 0]], 3),
        ((4, 11, 11), [[1, 0], [2]], 2),  # of two that are as full, the first
    ],
)
def test_a_group_goes_to_the_fullest_row_that_holds_it_the_longest_group_first(sizes, rows, rows_in_given_order):
    """Rows of 20 tokens; `sizes` are those of the prompts, whose only completion, of one token, needs no place."""
    completion = TrainCompletion(np.int32([LAST]), 1.0)
    groups = [TrainGroup(np.arange(1, size + 1, dtype=np.int32), [completion]) for size in sizes]
    batch = pack(groups, PackingPlan(3, 1, 20, 5, 7))
    assert [[i for i in row if i >= 0] for row in batch.sequence_ids_MRC[: len(rows), 0].tolist()] == rows
    assert batch.num_microbatches == len(rows)
    free = []
    for size in sizes:
        fitting = [r for r in range(len(free)) if size <= free[r]] or [len(free)]
        free += [20] if fitting == [len(free)] else []
        free[min(fitting, key=lambda r: free[r])] -= size
    assert len(free) == rows_in_given_order >= len(rows)


def test_rows_that_are_not_full_share_the_last_micro_batches():
    plan = plan_for(4, 3, budget=64, max_prompt=6, max_completion=9)
    plan = dataclasses.replace(plan, num_rows=2)
    for seed in range(10):
        batch = pack(ragged_groups(seed, 4, 3, max_prompt=6, max_completion=9), plan)
        fill = (batch.group_ids_MRT >= 0).sum(axis=2).ravel()[: 2 * batch.num_microbatches]
        assert fill.tolist() == sorted(fill, reverse=True)


def test_long_rows_may_be_computed_at_less_than_their_length():
    def lengths(max_completion, **others):
        sizes = {"max_prompt": 192, "budget": 4096, "preferred": 512}
        plan = plan_for(4, 8, max_completion=max_completion, **sizes, **others)
        return *plan.shorter_lengths, plan.row_length

    assert lengths(256, cuts_rows=True) == (1472, 1920, 2304)  # 5/8 and 13/16 in steps of 64
    assert lengths(104, cuts_rows=True) == (640, 832, 1024)
    assert lengths(100, cuts_rows=True) == (992,)
    assert lengths(256) == (2304,)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_rows", [1, 2])
def test_rows_are_filled_up_to_the_length_with_which_least_is_computed(seed, num_rows):
    groups = ragged_groups(seed, num_groups=7, group_size=3)
    plan = PackingPlan(21, num_rows, 40, 12, 7)

    def computed(plan, lengths):
        batch = pack(groups, plan)
        assert_holds(batch, groups)
        fill = (batch.group_ids_MRT >= 0).sum(axis=2).max(axis=1)[: batch.num_microbatches]
        return sum(min(length for length in lengths if n <= length) for n in fill)

    lengths = (16, 24, 40)
    best = min(computed(dataclasses.replace(plan, row_length=length), lengths) for length in lengths)
    assert computed(dataclasses.replace(plan, shorter_lengths=lengths[:-1]), lengths) == best


def test_a_short_length_that_needs_more_rows_than_there_are_is_not_filled():
    groups = ragged_groups(0, num_groups=4, group_size=2, full=True)  # of 18 positions, 12 for one completion
    plan = PackingPlan(2, 1, 40, 12, 7, shorter_lengths=(20,))
    assert pack(groups, plan).num_microbatches == 2
    assert pack(groups, dataclasses.replace(plan, num_microbatches=4)).num_microbatches == 2  # 4 x 20 is no less


# The plan


@pytest.mark.parametrize("seed", range(60))
def test_a_plan_holds_any_minibatch_it_was_made_for(seed):
    rng = np.random.default_rng(seed)
    sizes = {
        "num_groups": int(rng.integers(1, 6)),
        "group_size": int(rng.integers(1, 7)),
        "max_prompt": int(rng.integers(1, 12)),
        "max_completion": int(rng.integers(1, 12)),
    }
    shards = int(rng.integers(1, 4))
    least = shards * (sizes["max_prompt"] + sizes["max_completion"])
    budget = int(rng.integers(least, 4 * least + 1))
    plan = plan_for(**sizes, budget=budget, shards=shards, preferred=int(rng.integers(1, 64)))
    assert plan.num_rows % shards == 0
    assert plan.num_rows * plan.row_length <= budget
    shapes = set()
    for full in (False, True):
        groups = ragged_groups(seed, **sizes, full=full)
        batch = pack(groups, plan)
        assert_holds(batch, groups)
        assert 1 <= batch.num_microbatches <= plan.num_microbatches
        used_M = (batch.group_ids_MRT >= 0).any(axis=(1, 2))
        assert used_M.tolist() == [m < batch.num_microbatches for m in range(plan.num_microbatches)]
        shapes.add(tuple(np.shape(x) for x in batch if x is not None))
    assert len(shapes) == 1  # whatever the lengths, the compiled step sees one shape


def test_the_plan_of_a_typical_run_packs_short_groups_and_wastes_little():
    plan = plan_packing(
        num_groups=64,
        group_size=16,
        max_prompt_length=16,
        max_completion_length=6,
        max_tokens_per_microbatch=4096,
        num_row_shards=1,
        preferred_row_length=128,
    )
    assert plan == PackingPlan(
        num_microbatches=8, num_rows=8, row_length=128, completions_per_row=16, completion_length=6
    )


def test_a_row_is_at_most_a_sixteenth_longer_than_a_whole_group():
    for group in range(8, 3000):
        plan = plan_for(1, 1, max_prompt=1, max_completion=group - 1, budget=10_000, preferred=1)
        assert group <= plan.row_length <= max(17 / 16 * group, group + 7)


def test_rows_are_never_longer_than_the_budget_of_a_shard():
    assert plan_for(budget=64).row_length == 40
    assert plan_for(budget=33).row_length == 24  # two rows of two completions rather than of three and one
    assert plan_for(2, 6, budget=22).row_length == 22
    assert plan_for(2, 6, budget=45, shards=2).row_length == 22
    assert plan_for(1, 2**31, budget=64).row_length == 64  # found at once, however large the group


def test_work_is_dealt_evenly_over_the_pieces_in_use():
    plan = plan_for(30, 4, budget=160)
    assert (plan.num_microbatches, plan.num_rows) == (10, 3)
    batch = pack(ragged_groups(13, num_groups=14, full=True), plan)
    rows_M = (batch.group_ids_MRT >= 0).any(axis=2).sum(axis=1)[: batch.num_microbatches]
    assert batch.num_microbatches == math.ceil(14 / 3)
    assert rows_M.tolist() == [3, 3, 3, 3, 2]


def test_pieces_are_alike_at_the_longest_lengths_and_small_enough_for_shorter_ones():
    sizes = {"num_groups": 4, "group_size": 8, "max_prompt": 64, "max_completion": 128, "budget": 4096}
    whole = plan_for(**sizes, preferred=512)
    assert (whole.num_microbatches, whole.num_rows, whole.row_length) == (4, 1, 1088)
    # Where nothing is skipped, half a group per row: one prompt more, half of the scores.
    half = plan_for(**sizes, preferred=512, skips_blocks=False)
    assert (half.num_microbatches, half.num_rows, half.row_length) == (8, 1, 576)
    # Four rows would leave half of eight shards without one.
    spread = plan_for(**sizes | {"budget": 8 * 4096}, preferred=512, shards=8)
    assert (spread.num_microbatches, spread.num_rows, spread.row_length) == (1, 8, 576)
    for num_groups in range(1, 40):
        plan = plan_for(num_groups, 4, budget=400)
        assert (plan.num_microbatches - 1) * plan.num_rows < num_groups <= plan.num_microbatches * plan.num_rows
        assert plan.num_rows <= max(num_groups // 7, 1)


def test_the_mask_of_a_row_stays_small():
    sizes = {"max_prompt": 500, "budget": 100_000, "preferred": 512}
    assert plan_for(4, 16, max_completion=480, **sizes).row_length == 8192  # a whole group
    assert plan_for(4, 16, max_completion=1000, **sizes).row_length <= 8192  # several completions of one
    assert plan_for(4, 16, max_completion=9000, **sizes).row_length == 9728  # one


@pytest.mark.parametrize(("budget", "shards"), [(12, 1), (25, 2), (103, 8)])
def test_a_budget_below_one_longest_sequence_per_shard_is_refused(budget, shards):
    need = 13 * shards
    with pytest.raises(ValueError, match=rf"max_tokens_per_microbatch must be >= {need} .*got {budget}"):
        plan_for(budget=budget, shards=shards)
    assert plan_for(budget=need, shards=shards).row_length == 13


def test_any_minibatch_of_episodes_with_several_sequences_fits_its_plan():
    """Also the longest: each sequence with a longest prompt of its own. One-token sequences of one prompt predict more
    tokens than the row has, and the same prompt of several episodes is stored once.
    """
    options = {"budget": 3 * 2 * (6 + 7), "shards": 2, "max_sequences": 3, "max_drawn": 9, "cuts_rows": True}
    plan = plan_for(**options)
    assert (plan.completion_length, plan.max_sequences) == (9, 3)
    for seed in range(20):
        rng, groups, full = np.random.default_rng(seed), ragged_groups(seed, full=seed == 0), seed == 0
        drawn = 3 if full else int(rng.integers(1, 4))

        def tokens(full=full, rng=rng, drawn=drawn):
            ids = rng.integers(1, 900, 7 if full else drawn).astype(np.int32)
            return TrainCompletion(ids, trained=np.arange(len(ids)) < drawn)

        prompts = [rng.integers(1, 900, 6 if full else int(rng.integers(1, 7))).astype(np.int32) for _ in range(3)]
        groups = [
            TrainGroup(
                group.prompt_ids,
                [
                    TrainCompletion(
                        tokens().token_ids,
                        trained=tokens().trained,
                        further=[
                            TrainSequence(
                                rng.integers(1, 900, 6).astype(np.int32)
                                if full
                                else [group.prompt_ids, *prompts][rng.integers(4)],
                                tokens(),
                            )
                            for _ in range(2 if full else rng.integers(3))
                        ],
                    )
                    for _ in group.completions
                ],
            )
            for group in groups
        ]
        batch = pack(groups, plan)
        own = [c.num_trained for group in groups for c in group.completions]
        assert {n: int(batch.mask_MRCL[place].sum()) for n, place in places(batch).items()} == dict(enumerate(own))
        assert batch.target_mask_MRN.sum() == sum(own)
    same = [TrainSequence(np.int32([3, 4]), TrainCompletion(np.int32([LAST])))] * 2
    one = plan_for(1, 4, max_prompt=2, max_completion=1, max_sequences=3, max_drawn=3)
    batch = pack([TrainGroup(np.int32([3, 4]), [TrainCompletion(np.int32([LAST]), further=same)] * 4)], one)
    assert (batch.group_ids_MRT >= 0).sum() == 2, "one prompt and no other input"
    assert batch.target_mask_MRN.sum() == 12


def test_a_plan_of_several_sequences_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match=r"must be >= 39 .* for rollout.max_sequences = 3 of them"):
        plan_for(budget=38, max_sequences=3)
    with pytest.raises(ValueError, match=r"rollout.max_sequences must be 1 for a model that cannot tell"):
        plan_for(budget=99, max_sequences=2, packs_rows=False)
