"""What a run keeps of a step besides numbers: samples with the values of their tokens, and histograms.

In: a rollout, and what the updates measured of its tokens. Out: records for samples.jsonl; values for histograms, and a
group for the console. Not here: the fields of a record that need no tokenizer (`rl.rollout.groups.sample_records`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rl.data.token_texts import TokenTexts
from rl.files.token_values import encode
from rl.rollout.groups import Rollout, sample_records
from rl.run.step_values import Group, Member, StepValues
from rl.sampler.contract import Completion
from rl.training.token_values import TokenValues


def kept_samples(
    rollout: Rollout, count: int | None, texts: TokenTexts, measured: Sequence[TokenValues | None]
) -> list[dict[str, Any]]:
    """The records of `sample_records` with `token_texts`, the text of each token, and `per_token`, values of tokens as
    `rl.files.token_values` codes them. Further sequences of an episode have both, too.

    The values are those of `rl.training.token_values.TokenValues`, unknown for tokens that the policy did not draw. A
    sample that no update read has `sampler_logprob` alone: under the policy's plain softmax, as the sampler computed
    it.

    Args:
      measured: of each completion that the loss sees (`Rollout.kept_B`), in order; empty: of none.
    """
    of_kept = dict(zip(np.flatnonzero(rollout.kept_B).tolist(), measured, strict=True)) if measured else {}
    records = sample_records(rollout, count)
    places = {
        (done.prompt_index, done.sample_index): p * len(group) + g
        for p, group in enumerate(rollout.completions)
        for g, done in enumerate(group)
    }
    for record in records:
        b = places[record["prompt_index"], record["sample_index"]]
        completion = rollout.completions[b // len(rollout.completions[0])][b % len(rollout.completions[0])]
        own = [completion, *(further.completion for further in completion.further)]
        first = 0  # drawn tokens of the sequences before this one
        for part, sequence in zip([record, *record.get("further", ())], own, strict=True):
            part["token_texts"] = texts(sequence.token_ids.tolist())
            if values := _values_of(sequence, of_kept.get(b), first):
                part["per_token"] = values
            first += _drawn(sequence).sum()
    return records


def _values_of(sequence: Completion, measured: TokenValues | None, first: int) -> dict[str, Any]:
    """`per_token` of one sequence, whose drawn tokens are those from `first` on of what was measured."""
    drawn = _drawn(sequence)
    if measured is None:
        logprobs = sequence.policy_logprobs
        return {} if logprobs is None else {"sampler_logprob": encode(np.where(drawn, logprobs, np.nan))}
    found = {}
    for name, values in measured._asdict().items():
        if values is not None and not np.isnan(values).all():
            placed = np.full(drawn.shape, np.nan)
            placed[drawn] = values[first : first + drawn.sum()]
            found[name] = encode(placed)
    return found


def _drawn(sequence: Completion) -> np.ndarray:
    """bool per token: whether the policy drew it."""
    return np.ones(len(sequence.token_ids), bool) if sequence.trained is None else sequence.trained


def step_values(rollout: Rollout) -> StepValues:
    """What a person may want to see of a step: the values over all its completions of rewards (`reward`, and
    `reward/NAME` of each function where there are several), of lengths in tokens that the policy drew
    (`completion_length`) and of advantages, without those that are not finite; and a group, the first whose advantages
    differ, if there is one.
    """
    values = {"reward": rollout.weighted_B}
    if len(rollout.names) > 1:
        values |= {f"reward/{name}": rollout.rewards_BK[:, k] for k, name in enumerate(rollout.names)}
    lengths = [done.num_trained for group in rollout.completions for done in group]
    values |= {"completion_length": np.array(lengths, np.float64), "advantage": rollout.advantages_B}
    finite = {name: each[np.isfinite(each)] for name, each in values.items()}
    return StepValues({name: each for name, each in finite.items() if each.size}, _shown_group(rollout))


def _shown_group(rollout: Rollout) -> Group:
    size = len(rollout.completions[0])
    p = int(np.argmax(np.ptp(rollout.advantages_B.reshape(-1, size), axis=1) > 0))
    members = [
        Member(
            rollout.texts[b],
            done.num_trained,
            [_known(value) for value in rollout.rewards_BK[b]],
            _known(rollout.weighted_B[b]),
            float(rollout.advantages_B[b]),
            done.finish_reason,
        )
        for b, done in enumerate(rollout.completions[p], start=p * size)
    ]
    row = rollout.rows[p]
    return Group(row.prompt, row.columns.get("answer"), rollout.names, members)


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
