"""What a run keeps of a step besides numbers: samples with the values of their tokens, and histograms.

In: a rollout, and what the updates measured of its tokens. Out: records for samples.jsonl; values for histograms, and a
group for the console. Not here: the fields of a record that need no tokenizer (`rl.rollout.groups.sample_records`).
"""

from typing import Any

import numpy as np

from rl.data.token_texts import TokenTexts
from rl.files.token_values import encode
from rl.rollout.groups import Rollout, sample_records
from rl.run.step_values import Group, Member, StepValues
from rl.sampler.contract import Completion


def kept_samples(rollout: Rollout, count: int | None, texts: TokenTexts) -> list[dict[str, Any]]:
    """The records of `sample_records` with `token_texts`, the text of each token, and `per_token`, values of tokens as
    `rl.files.token_values` codes them. Further sequences of an episode have both, too.

    Values, unknown for tokens that the policy did not draw:
      sampler_logprob: under the policy's plain softmax, as the sampler computed it.
      advantage: only where it varies within a sample.
    """
    records = sample_records(rollout, count)
    places = {
        (done.prompt_index, done.sample_index): p * len(group) + g
        for p, group in enumerate(rollout.completions)
        for g, done in enumerate(group)
    }
    for record in records:
        b = places[record["prompt_index"], record["sample_index"]]
        completion = rollout.completions[b // len(rollout.completions[0])][b % len(rollout.completions[0])]
        _add(record, completion, texts)
        for own, further in zip(record.get("further", ()), completion.further, strict=True):
            _add(own, further.completion, texts)
    return records


def _add(record: dict[str, Any], completion: Completion, texts: TokenTexts) -> None:
    record["token_texts"] = texts(completion.token_ids.tolist())
    values = {"sampler_logprob": completion.policy_logprobs}
    per_token = {name: encode(_of_drawn(column, completion)) for name, column in values.items() if column is not None}
    if per_token:
        record["per_token"] = per_token


def _of_drawn(values: np.ndarray, completion: Completion) -> np.ndarray:
    """The values, NaN for tokens that the policy did not draw."""
    values = np.asarray(values, np.float64)
    return values if completion.trained is None else np.where(completion.trained, values, np.nan)


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
