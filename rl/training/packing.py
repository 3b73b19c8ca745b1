"""Packs the groups of a minibatch into rows of tokens, on the host.

In: prompts, their completions, one advantage for each completion. Out: a `Batch` of numpy arrays in fixed shapes:
pieces of rows without padding between sequences. A row stores a prompt once for all its completions: prompt,
completion 1, ..., completion G, next prompt, ... `rl.models.ops.visible` keeps completions apart. The positions of each
completion go on from its prompt's. A group that is longer than a row is cut between completions, and its prompt is
repeated. The cut never changes loss or gradient, because every denominator is that of the whole minibatch.

An episode may have several sequences. All stand in one row, each behind its prompt: as one more branch of the group's
prompt where it begins with that, else behind a prompt of its own. Their drawn tokens, sequence after sequence, are one
completion c of the arrays [..., C, L], so whatever counts, sums or averages over completions counts the episode once.

Legend: M pieces, R rows, T token positions, N trained tokens of a row, C completions of a row, L tokens of a
completion, S sequences of an episode, X words of `rl.models.drawn_from`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rl.models.inputs import PADDING_GROUP, Inputs, check_segments

_MIN_PIECES = 8
_LONG_ROW = 8192  # positions; the mask of a row is a square of booleans, 64 MiB at this length
# For `_shorter_lengths`: shares of a row, the unit of lengths, and the shortest row that is cut.
_CUTS, _CUT_STEP, _SHORTEST_CUT = (5 / 8, 13 / 16), 64, 1024


@dataclasses.dataclass(frozen=True)
class TrainCompletion:
    """A completion to learn from.

    Attributes:
      token_ids: int32 [L], EOS included.
      advantage: one number for all its tokens. With `grpo.kl_in_reward` it is the reward, from which
        `rl.training.token_advantages` computes advantages.
      sampler_logprobs: float [L] under the distribution from which the tokens were drawn; None when unknown.
      rollout_logprobs: float [L] under the distribution that is trained (the policy's plain softmax at the sampling
        temperature; that over the kept ids with `grpo.policy_distribution: sampled`), as the sampler computed it; None
        when unknown.
      trained: bool [L], which tokens the policy drew; None: all. The others are inputs, and nothing is learned from
        their being there; what the log-probs hold for them is not read.
      kept_words: uint32 [L, X], which ids could be drawn at each token, see `rl.models.drawn_from`; None: not needed.
      advantages: float [L], those of tokens where each turn has its own; None: `advantage` is that of all.
      further: more sequences of the same episode.
    """

    token_ids: np.ndarray
    advantage: float = 0.0
    sampler_logprobs: np.ndarray | None = None
    rollout_logprobs: np.ndarray | None = None
    trained: np.ndarray | None = None
    kept_words: np.ndarray | None = None
    advantages: np.ndarray | None = None
    further: "Sequence[TrainSequence]" = ()

    @property
    def has_advantage(self) -> bool:
        """Whether an advantage of its tokens is not 0."""
        return bool(self.advantage if self.advantages is None else np.any(self.advantages))

    @property
    def num_trained(self) -> int:
        """The number of tokens that the policy drew, further sequences included."""
        own = len(self.token_ids) if self.trained is None else int(np.sum(self.trained))
        return own + sum(sequence.completion.num_trained for sequence in self.further)

    @property
    def trained_places(self) -> slice | np.ndarray:
        """What picks the tokens that the policy drew, in order, from an array of all; without further sequences."""
        if self.trained is None:
            return slice(0, len(self.token_ids))
        assert np.shape(self.trained) == np.shape(self.token_ids), (np.shape(self.trained), np.shape(self.token_ids))
        return np.flatnonzero(self.trained)


class TrainSequence(NamedTuple):
    """A further sequence of an episode: a prompt (int32 ids, at least one token) and what follows it.

    The advantage of its completion is not read, because the episode has one.
    """

    prompt_ids: np.ndarray
    completion: TrainCompletion


@dataclasses.dataclass(frozen=True)
class TrainGroup:
    """A prompt (int32 ids, at least one token) and its completions."""

    prompt_ids: np.ndarray
    completions: Sequence[TrainCompletion]


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Static shapes of a run's batches, so that the train step compiles once.

    Attributes:
      num_microbatches: M, an upper bound; a `Batch` says how many are used.
      num_rows: R, a multiple of the number of row shards.
      row_length: T.
      completions_per_row: C, upper bound.
      completion_length: L, upper bound. With one sequence for each completion, of all its tokens, and a token has the
        place l that it has in the completion. With more, of its drawn tokens, which stand side by side.
      shorter_lengths: lengths below T, in increasing order. A piece whose rows hold no more is computed at such a
        length. One compiled program holds all lengths.
      kept_words: X, words of each completion token that say which ids could be drawn; 0: no batch has them.
      max_sequences: S, upper bound.
      token_advantages: whether completions have an advantage for each token.
    """

    num_microbatches: int
    num_rows: int
    row_length: int
    completions_per_row: int
    completion_length: int
    shorter_lengths: tuple[int, ...] = ()
    kept_words: int = 0
    max_sequences: int = 1
    token_advantages: bool = False


class Batch(NamedTuple):
    """One minibatch as arrays. The name of every field has its dims.

    Attributes:
      tokens_MRT, positions_MRT, group_ids_MRT, branch_ids_MRT: int32; padding has group -1.
      predictors_MRN: int32, the position in the row whose hidden state predicts trained token n.
      targets_MRN: int32, trained token n. Tokens of one sequence are consecutive.
      target_mask_MRN: bool, False on padding.
      slots_MRCL: int32, the index n of token l of completion c, see `PackingPlan.completion_length`.
      mask_MRCL: 1.0 where completion c has a token l that the policy drew (`TrainCompletion.trained`).
      sequence_mask_MRC: 1.0 where there is a completion c.
      advantages_MRC: one for each completion (see `TrainCompletion`).
      sampler_logprobs_MRCL, rollout_logprobs_MRCL: (see `TrainCompletion`), NaN where unknown.
      old_logprobs_MRCL, reference_logprobs_MRCL: log-probs of the policy before the first update, and of the reference.
        The trainer adds them when the loss needs them; None otherwise.
      advantages_MRCL: one for each token, of completions with `TrainCompletion.advantages`, or added by the trainer
        with `grpo.kl_in_reward`; None otherwise.
      kept_words_MRNX: uint32, which ids could be drawn at completion token n; 0 on padding; None without such words.
      sequence_ids_MRC: int32, the index of the completion in the order of the given groups; -1 on padding.
      num_microbatches: int32 [], pieces in use.
    """

    tokens_MRT: Any
    positions_MRT: Any
    group_ids_MRT: Any
    branch_ids_MRT: Any
    predictors_MRN: Any
    targets_MRN: Any
    target_mask_MRN: Any
    slots_MRCL: Any
    mask_MRCL: Any
    sequence_mask_MRC: Any
    advantages_MRC: Any
    sampler_logprobs_MRCL: Any
    rollout_logprobs_MRCL: Any
    sequence_ids_MRC: Any
    num_microbatches: Any
    old_logprobs_MRCL: Any = None
    reference_logprobs_MRCL: Any = None
    advantages_MRCL: Any = None
    kept_words_MRNX: Any = None

    @property
    def inputs(self) -> Inputs:
        """What the policy computes on; of a single piece without its leading dim."""
        return Inputs(self.tokens_MRT, self.positions_MRT, self.group_ids_MRT, self.branch_ids_MRT)


def plan_packing(
    *,
    num_groups: int,
    group_size: int,
    max_prompt_length: int,
    max_completion_length: int,
    max_tokens_per_microbatch: int,
    num_row_shards: int,
    preferred_row_length: int,
    packs_rows: bool = True,
    skips_blocks: bool = True,
    cuts_rows: bool = False,
    max_sequences: int = 1,
    max_drawn: int | None = None,
) -> PackingPlan:
    """Shapes that hold any minibatch of `num_groups` prompts with `group_size` completions each.

    Rows have the length at which a minibatch of the longest sequences costs least (`_row_length`). A piece has as many
    rows as the budget allows, but at most 1 / `_MIN_PIECES` of such a minibatch, because shorter completions need fewer
    rows, and their last piece is computed whole.

    Args:
      preferred_row_length: rows are not shorter than this, unless the budget is. It is the hidden size: at that length
        all scores of a row cost about a sixth of the rest of a layer, less than half-empty rows would.
      packs_rows: False for a policy that cannot tell the sequences of a row apart. Each row then holds one prompt with
        one completion.
      skips_blocks: whether attention skips what nobody sees. Otherwise long rows cost more for each token.
      cuts_rows: whether pieces of rows with gaps may be computed at a shorter length.
      max_sequences: of an episode; each may have a longest prompt of its own and a longest completion.
      max_drawn: drawn tokens of an episode of several sequences; None: as many as they have tokens.

    Raises:
      ValueError: the budget does not hold one longest completion, with all its sequences, for each row shard; or the
        policy needs a row for each sequence, and completions may have several.
    """
    if max_sequences > 1 and not packs_rows:
        raise ValueError(
            "rollout.max_sequences must be 1 for a model that cannot tell the sequences of a row apart, got "
            f"{max_sequences}"
        )
    sequence = max_sequences * (max_prompt_length + max_completion_length)
    budget = max_tokens_per_microbatch // num_row_shards
    if sequence > budget:
        times = f", for rollout.max_sequences = {max_sequences} of them" if max_sequences > 1 else ""
        raise ValueError(
            f"grpo.max_tokens_per_microbatch must be >= {sequence * num_row_shards} (longest prompt "
            f"{max_prompt_length} + longest completion {max_completion_length}{times}, on {num_row_shards} device(s) "
            f"that share the rows), got {max_tokens_per_microbatch}"
        )
    completion_length = max_completion_length
    if max_sequences > 1:
        completion_length = max_sequences * max_completion_length if max_drawn is None else max_drawn
        max_completion_length = sequence - max_prompt_length  # what all sequences of an episode put behind its prompt
    if not packs_rows:
        row_length = min(_round_up(sequence), budget)
        shard_rows = min(budget // row_length, math.ceil(num_groups * group_size / num_row_shards))
        return PackingPlan(
            num_microbatches=math.ceil(num_groups * group_size / (shard_rows * num_row_shards)),
            num_rows=shard_rows * num_row_shards,
            row_length=row_length,
            completions_per_row=1,
            completion_length=max_completion_length,
        )
    sizes = (num_groups, group_size, max_prompt_length, max_completion_length)
    row_length = _row_length(*sizes, num_row_shards, preferred_row_length, budget, skips_blocks)
    completions_per_group_row = min(group_size, (row_length - max_prompt_length) // max_completion_length)
    worst_rows = num_groups * math.ceil(group_size / completions_per_group_row)
    rows_per_shard = math.ceil(worst_rows / num_row_shards)
    num_microbatches = math.ceil(rows_per_shard / min(budget // row_length, max(rows_per_shard // _MIN_PIECES, 1)))
    return PackingPlan(
        num_microbatches=num_microbatches,
        num_rows=num_row_shards
        * math.ceil(rows_per_shard / num_microbatches),  # equal pieces, so that none is half empty
        row_length=row_length,
        completions_per_row=min(max(completions_per_group_row, row_length // 8), num_groups * group_size),
        completion_length=completion_length,
        shorter_lengths=_shorter_lengths(row_length) if cuts_rows else (),
        max_sequences=max_sequences,
    )


def pack(groups: Sequence[TrainGroup], plan: PackingPlan, dtype: Any = np.float32) -> Batch:
    """Packs groups in decreasing order of their lengths, each into the fullest row that can hold it (`_rows`).

    Rows are filled up to the one of the plan's lengths with which the fewest positions are computed. The result is
    deterministic, and every completion keeps its `sequence_ids` index.

    Groups without completions are left out. A minibatch without any completion gives a batch of padding. `dtype` is
    that of the batch's floating-point fields: float32, or float64 for a float64 model. ValueError where the plan has
    words of kept ids and a completion has none.
    """
    segments = _segments(groups, plan)
    shorter = [length for length in reversed(plan.shorter_lengths) if _fits(segments, length)]
    packings = [_rows(segments, plan, length) for length in (plan.row_length, *shorter)]
    most = plan.num_microbatches * plan.num_rows
    assert len(packings[0]) <= most, (len(packings[0]), plan)
    rows = min((rows for rows in packings if len(rows) <= most), key=lambda rows: _cost(rows, plan))
    num_microbatches = max(math.ceil(len(rows) / plan.num_rows), 1)
    batch = _empty_batch(plan, num_microbatches, np.dtype(dtype))
    for index, row in enumerate(rows):
        _fill_row(batch, *divmod(index, plan.num_rows), row, is_dense=plan.max_sequences > 1)
    check_segments(batch.inputs)
    return batch


class _Segment(NamedTuple):
    """A sequence of a completion as it stands in a row.

    Attributes:
      prompt: the same for all that share a prompt; the group's number for its prompt. prompt_ids: what it stands for.
      begun: the rest of the sequence's own prompt, which is read only.
      completion: the tokens behind it. advantage, sequence_id: of the whole completion, the second its index in the
        minibatch.
      first: drawn tokens of the completion in sequences before this one.
    """

    prompt: int | bytes
    prompt_ids: np.ndarray
    begun: np.ndarray
    completion: TrainCompletion
    advantage: float
    sequence_id: int
    first: int

    @property
    def num_inputs(self) -> int:
        """The tokens that it puts into a row. Its last token predicts nothing, so it is no input."""
        return len(self.begun) + len(self.completion.token_ids) - 1


class _Unit(NamedTuple):
    """Segments that share one copy of their prompt."""

    prompt_ids: np.ndarray
    segments: list[_Segment]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(segment.num_inputs for segment in self.segments)


_NOTHING = np.zeros(0, np.int32)


def _segments(groups: Sequence[TrainGroup], plan: PackingPlan) -> list[list[list[_Segment]]]:
    """The segments of each completion of each group."""
    ids = itertools.count()
    found = []
    for number, group in enumerate(groups):
        assert len(group.prompt_ids) > 0
        found.append([])
        for completion in group.completions:
            segments = [_Segment(number, group.prompt_ids, _NOTHING, completion, completion.advantage, next(ids), 0)]
            (main,), num_trained = segments, completion.num_trained
            first = num_trained - sum(further.completion.num_trained for further in completion.further)
            for prompt_ids, further in completion.further:
                prompt, shared, begun = _prompt_of(prompt_ids, group.prompt_ids, number)
                whole = main.advantage, main.sequence_id
                segments.append(_Segment(prompt, shared, begun, further, *whole, first))
                first += further.num_trained
            lengths = [len(segment.completion.token_ids) for segment in segments]
            length = num_trained if plan.max_sequences > 1 else lengths[0]
            assert all(lengths), lengths
            assert length <= plan.completion_length, (lengths, num_trained, plan)
            assert len(segments) <= plan.max_sequences, (len(segments), plan)
            found[-1].append(segments)
    return found


def _prompt_of(
    prompt_ids: np.ndarray, group_prompt_ids: np.ndarray, number: int
) -> tuple[int | bytes, np.ndarray, np.ndarray]:
    """Prompt, prompt_ids and begun of a further sequence's `_Segment`: the group's prompt where it begins with that."""
    assert len(prompt_ids) > 0
    count = len(group_prompt_ids)
    if np.array_equal(prompt_ids[:count], group_prompt_ids):
        return number, group_prompt_ids, np.asarray(prompt_ids[count:], np.int32)
    return np.asarray(prompt_ids, np.int32).tobytes(), prompt_ids, _NOTHING


def _size(segments: Iterable[_Segment]) -> int:
    """The tokens of segments in a row that holds nothing else."""
    segments = list(segments)
    prompts = {segment.prompt: len(segment.prompt_ids) for segment in segments}
    return sum(prompts.values()) + sum(segment.num_inputs for segment in segments)


def _fits(groups: Sequence[Sequence[Sequence[_Segment]]], row_length: int) -> bool:
    """Whether a row of this length can hold every completion."""
    return all(_size(segments) <= row_length for group in groups for segments in group)


def _cost(rows: Sequence[Sequence[_Unit]], plan: PackingPlan) -> int:
    """The computed positions of a row, summed over all pieces."""
    longest_rows = rows[:: plan.num_rows]  # in decreasing order of their tokens
    filled = [sum(unit.num_tokens for unit in row) for row in longest_rows]
    return sum(min(length for length in (*plan.shorter_lengths, plan.row_length) if n <= length) for n in filled)


def _rows(groups: Sequence[Sequence[Sequence[_Segment]]], plan: PackingPlan, row_length: int) -> list[list[_Unit]]:
    """The units of each row of at most `row_length` tokens. The fullest row comes first, so that rows with gaps share a
    piece.

    Groups are taken in decreasing order of their tokens, and each goes whole into the fullest row that can hold it. A
    group that is longer than a row is split. Its completions are taken in decreasing order of their tokens; each goes
    beside others of its group if it fits there, else into the fullest row that can also hold its prompt. All sequences
    of a completion go into one row.
    """
    rows: list[dict[int | bytes, _Unit]] = []  # by prompt
    free: list[tuple[int, int]] = []  # tokens and completions that still fit in each row

    def put(index: int, completions: Sequence[Sequence[_Segment]]) -> None:
        """Puts these completions of a group into one of the rows, or into a new row."""
        segments = [segment for completion in completions for segment in completion]
        num_tokens = sum(segment.num_inputs for segment in segments)
        prompts = {segment.prompt: len(segment.prompt_ids) for segment in segments}

        def need(r: int) -> int:
            return num_tokens + sum(length for prompt, length in prompts.items() if prompt not in rows[r])

        fitting = [r for r in range(len(rows)) if need(r) <= free[r][0] and len(completions) <= free[r][1]]
        if not fitting:
            fitting = [len(rows)]
            rows.append({})
            free.append((row_length, plan.completions_per_row))
        r = min(fitting, key=lambda r: (index not in rows[r], free[r][0]))
        free[r] = (free[r][0] - need(r), free[r][1] - len(completions))
        for segment in segments:
            rows[r].setdefault(segment.prompt, _Unit(segment.prompt_ids, [])).segments.append(segment)

    sizes = [_size(segment for completion in group for segment in completion) for group in groups]
    for index in sorted(range(len(groups)), key=lambda i: -sizes[i]):  # stable: ties keep their order
        group = groups[index]
        if not group:
            continue
        if sizes[index] <= row_length and len(group) <= plan.completions_per_row:
            put(index, group)
            continue
        for completion in sorted(group, key=lambda segments: -_size(segments)):
            put(index, [completion])
    return [list(row.values()) for row, _ in sorted(zip(rows, free, strict=True), key=lambda pair: pair[1][0])]


def batch_fields(plan: PackingPlan, dtype: Any) -> dict[str, tuple[tuple[int, ...], Any, Any]]:
    """(shape, dtype, value of padding) of each field of a `Batch` that `pack` fills."""
    M, R, T = plan.num_microbatches, plan.num_rows, plan.row_length
    C, L = plan.completions_per_row, plan.completion_length
    N = min(T + plan.max_sequences * C, C * L)  # every sequence has one predicted token more than inputs
    fields = {
        "tokens_MRT": ((M, R, T), np.int32, 0),
        "positions_MRT": ((M, R, T), np.int32, 0),
        "group_ids_MRT": ((M, R, T), np.int32, PADDING_GROUP),
        "branch_ids_MRT": ((M, R, T), np.int32, 0),
        "predictors_MRN": ((M, R, N), np.int32, 0),
        "targets_MRN": ((M, R, N), np.int32, 0),
        "target_mask_MRN": ((M, R, N), bool, False),
        "slots_MRCL": ((M, R, C, L), np.int32, 0),
        "mask_MRCL": ((M, R, C, L), dtype, 0),
        "sequence_mask_MRC": ((M, R, C), dtype, 0),
        "advantages_MRC": ((M, R, C), dtype, 0),
        "sampler_logprobs_MRCL": ((M, R, C, L), dtype, np.nan),
        "rollout_logprobs_MRCL": ((M, R, C, L), dtype, np.nan),
        "sequence_ids_MRC": ((M, R, C), np.int32, -1),
    }
    if plan.kept_words:
        fields["kept_words_MRNX"] = ((M, R, N, plan.kept_words), np.uint32, 0)
    if plan.token_advantages:
        fields["advantages_MRCL"] = ((M, R, C, L), dtype, 0)
    return fields


def _empty_batch(plan: PackingPlan, num_microbatches: int, dtype: np.dtype) -> Batch:
    arrays = {name: np.full(shape, value, kind) for name, (shape, kind, value) in batch_fields(plan, dtype).items()}
    return Batch(**arrays, num_microbatches=np.int32(num_microbatches))


def _fill_row(batch: Batch, m: int, r: int, units: list[_Unit], is_dense: bool) -> None:
    """is_dense: whether the drawn tokens of a completion stand side by side, see `PackingPlan.completion_length`."""
    tokens_T, positions_T = batch.tokens_MRT[m, r], batch.positions_MRT[m, r]
    groups_T, branches_T = batch.group_ids_MRT[m, r], batch.branch_ids_MRT[m, r]
    t, n = 0, 0
    rows_c: dict[int, int] = {}  # of each completion, by its sequence_id
    for group_id, unit in enumerate(units):
        length = len(unit.prompt_ids)
        tokens_T[t : t + length] = unit.prompt_ids
        positions_T[t : t + length] = np.arange(length)
        groups_T[t : t + unit.num_tokens] = group_id
        t += length
        prompt_end = t - 1
        for branch, segment in enumerate(unit.segments, start=1):
            completion, count = segment.completion, segment.num_inputs
            c = rows_c.setdefault(segment.sequence_id, len(rows_c))
            inputs = slice(t, t + count)
            ids = np.concatenate([segment.begun, completion.token_ids])
            tokens_T[inputs] = ids[:-1]
            positions_T[inputs] = length + np.arange(count)
            branches_T[inputs] = branch
            # The first token is predicted at the prompt's last position, the others at the token before them.
            predictors = np.arange(t - 1, t + count)
            predictors[0] = prompt_end
            trained = completion.trained_places
            drawn = np.asarray(completion.token_ids)[trained]
            targets = slice(n, n + len(drawn))
            places = slice(segment.first, segment.first + len(drawn)) if is_dense else trained
            batch.predictors_MRN[m, r, targets] = predictors[len(segment.begun) :][trained]
            batch.targets_MRN[m, r, targets] = drawn
            batch.target_mask_MRN[m, r, targets] = True
            batch.slots_MRCL[m, r, c, places] = np.arange(n, n + len(drawn))
            batch.mask_MRCL[m, r, c, places] = 1.0
            batch.sequence_mask_MRC[m, r, c] = 1.0
            batch.advantages_MRC[m, r, c] = segment.advantage
            batch.sequence_ids_MRC[m, r, c] = segment.sequence_id
            if completion.sampler_logprobs is not None:
                batch.sampler_logprobs_MRCL[m, r, c, places] = np.asarray(completion.sampler_logprobs)[trained]
            if completion.rollout_logprobs is not None:
                batch.rollout_logprobs_MRCL[m, r, c, places] = np.asarray(completion.rollout_logprobs)[trained]
            if batch.advantages_MRCL is not None:
                assert completion.advantages is not None
                batch.advantages_MRCL[m, r, c, places] = completion.advantages[trained]
            if batch.kept_words_MRNX is not None:
                if completion.kept_words is None:
                    raise ValueError(
                        "completions must say which ids could be drawn (Completion.kept_words) with "
                        "grpo.policy_distribution=sampled, got None of this sampler; set it to full"
                    )
                batch.kept_words_MRNX[m, r, targets] = completion.kept_words[trained]
            t, n = t + count, n + len(drawn)


def _row_length(
    num_groups: int,
    group_size: int,
    max_prompt_length: int,
    max_completion_length: int,
    num_row_shards: int,
    preferred_row_length: int,
    budget: int,
    skips_blocks: bool,
) -> int:
    """The length of rows at which a minibatch of the longest sequences costs least, among those for 1, 2, ...
    completions.

    Rows of more than `_LONG_ROW` positions hold one completion. A shorter row repeats the prompt more often; few long
    rows leave shards without any. Where attention skips nothing, every token of a longer row pays for more of other
    completions. In rows of `preferred_row_length` positions, a token's attention costs a sixth of the rest of a layer.
    """

    def cost(row_length: int) -> float:
        completions = min(group_size, (row_length - max_prompt_length) // max_completion_length)
        rows = num_groups * math.ceil(group_size / completions)
        if completions == group_size:
            groups = row_length // (max_prompt_length + group_size * max_completion_length)
            rows = math.ceil(num_groups / groups)
        attention = 0 if skips_blocks else row_length / (6 * preferred_row_length)
        return math.ceil(rows / num_row_shards) * row_length * (1 + attention)

    most = (min(budget, _LONG_ROW) - max_prompt_length) // max_completion_length
    lengths = []
    for completions in range(1, max(min(group_size, most), 1) + 1):
        needed = max_prompt_length + completions * max_completion_length
        lengths.append(min(_round_up(max(needed, preferred_row_length)), budget))
    return min(reversed(lengths), key=cost)  # of equal costs, the one that repeats prompts less


def _shorter_lengths(row_length: int) -> tuple[int, ...]:
    """The shorter lengths of long rows, which have gaps. At their full length about a quarter of the computed positions
    is padding.

    Two more lengths make it a tenth. Each takes as long to compile as the first.
    """
    if row_length < _SHORTEST_CUT:
        return ()
    return tuple(_CUT_STEP * math.ceil(share * row_length / _CUT_STEP) for share in _CUTS)


def _round_up(length: int) -> int:
    """Rounds up to a length of a geometric series with 16 steps in each doubling, so that padding is at most 1/16."""
    step = max(8, 2 ** (max(length - 1, 1).bit_length() - 5))
    return math.ceil(length / step) * step
