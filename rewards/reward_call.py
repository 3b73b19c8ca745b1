"""One call of a reward function in a worker: its arguments, and the reward in what it returns.

In: a bound function and a request, whose fields are lists with an entry for each sample. Out: what the function
returned; the reward and what was logged. Not here: time limits, tries and replies (`rewards.worker`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rewards.contract import ENVIRONMENTS, BoundReward
from rewards.in_worker import Rejected, as_reward, short
from rewards.logged import CallLog, Sums


class Judged(NamedTuple):
    """The fields of a result that come from the function, see `rewards.replies.Result`."""

    value: float | None
    logged: dict[str, Any]
    sums: Sums


def kept(log: CallLog) -> list[dict[str, Any]]:
    """The values that a call logged, for each of its completions."""
    if problem := log.problem():
        raise Rejected("wrong_length", problem)
    return [log.of_sample(index) for index in range(log.size)]


def arguments(bound: BoundReward, request: Mapping[str, Any], rows: slice, log: CallLog) -> dict[str, Any]:
    ids = request["completion_ids"]
    columns = {name: values[rows] for name, values in request["columns"].items()}
    of_samples = [_of_sample(request, index) for index in range(len(request["prompts"]))[rows]]
    of_run = {name: [values[name] for values in of_samples] for name in of_samples[0]}
    return bound.batch_arguments(
        request["prompts"][rows],
        request["completions"][rows],
        columns,
        None if ids is None else ids[rows],
        of_run | _of_call(request, log),
    )


def _of_call(request: Mapping[str, Any], log: CallLog) -> dict[str, Any]:
    """What is injected for a whole call, by name."""
    logs = {"log_metric": log.log_metric, "log_extra": log.log_extra}
    return request["of_run"] | logs | {"rewards_timeout_seconds": request["limit"], "is_trial": request["is_trial"]}


def _of_sample(request: Mapping[str, Any], index: int) -> dict[str, Any]:
    """What is injected for one sample beside what was drawn, by name."""
    reason, groups = request["finish_reasons"][index], request["groups"]
    values = {"truncated": reason == "length", "finish_reason": reason, "seed": request["seeds"][index]}
    if ENVIRONMENTS in request:
        values[ENVIRONMENTS] = request[ENVIRONMENTS][index]
    if groups is not None:
        values["group"] = list(groups["members"][groups["group_of"][index]])  # its own: a function may sort it
    return values


def call_one(bound: BoundReward, request: Mapping[str, Any], index: int, log: CallLog) -> Any:
    """Call the function for one sample; a batch function gets a batch of one."""
    if bound.style == "batch":
        return bound.function(**arguments(bound, request, slice(index, index + 1), log))
    ids = request["completion_ids"]
    row = {name: values[index] for name, values in request["columns"].items()}
    prompt, completion = request["prompts"][index], request["completions"][index]
    of_run = _of_sample(request, index) | _of_call(request, log)
    texts = None if request["texts"] is None else request["texts"][index]
    own_ids = None if ids is None else ids[index]
    return bound.function(**bound.sample_arguments(prompt, completion, row, own_ids, of_run, texts))


def batch_rewards(result: Any, size: int) -> list[Any]:
    """The list that a batch function returned, of the right length; its entries are not looked at."""
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, (list, tuple)):
        raise Rejected("wrong_length", f"returned {short(result)}, must return a list of {size} rewards")
    if len(result) != size:
        raise Rejected("wrong_length", f"returned {len(result)} rewards for {size} completions")
    return list(result)


def judgement(bound: BoundReward, result: Any, log: CallLog) -> Judged:
    """What a call by `call_one` comes to. A dict has the reward in `score`, and all of it is kept with the sample."""
    if bound.style == "batch":
        result = batch_rewards(result, 1)[0]
    elif bound.style == "openrlhf":
        result = _openrlhf_reward(result, log)
    elif isinstance(result, Mapping):
        if "score" not in result:
            raise Rejected("not_a_number", f"returned {short(result)}, a dict must have the reward as its 'score'")
        log.keep(result)
        result = result["score"]
    reward = as_reward(result)
    return Judged(reward, kept(log)[0], log.sums)


def _openrlhf_reward(result: Any, log: CallLog) -> Any:
    """The reward in what a function of OpenRLHF 0.11 returned (`SingleTurnExecutor.execute` reads it there): lists or
    tensors of one, or numbers. `scores`, which stand for the rewards where there are none, and `extra_logs` are kept.
    """
    if not isinstance(result, Mapping) or "rewards" not in result:
        raise Rejected("not_a_number", f"returned {short(result)}, must return a dict with 'rewards'")
    reward = _only(result["rewards"])
    score = reward if result.get("scores") is None else _only(result["scores"])
    log.keep({"score": score} | {name: _only(value) for name, value in (result.get("extra_logs") or {}).items()})
    return reward


def _only(value: Any) -> Any:
    """The entry of a list or an array of one; another value itself."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return _only(value[0]) if isinstance(value, (list, tuple)) and len(value) == 1 else value
