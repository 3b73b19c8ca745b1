"""From prompts to scored completions: who is judged when, and in which order the results stand."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from rewards.batch import COUNTS, Effort, RewardResult
from rewards.contract import RewardSpec
from rewards.moment import Moment, sample_seed
from rewards.runner import RewardRunner
from rl.config.load import load_config
from rl.data.prompt_rows import PromptRow
from rl.rollout.groups import Judged, judge, minibatches, sample_records, with_advantages
from rl.rollout.scoring import ScoredCompletions, sample_and_score
from rl.run.metrics import Stopwatch
from rl.sampler.contract import Completion
from rl.sampler.token_draw import SamplingParams


class Letters:
    """Stands in for a tokenizer: token i is the i-th letter, and token 2 is special."""

    def decode(self, ids, skip_special_tokens=True):
        text = "".join("<s>" if token == 2 else chr(ord("a") + int(token)) for token in ids)
        return text.replace("<s>", "c") if skip_special_tokens else text


class OneByOne:
    """Stands in for a sampler whose completions end in the opposite order, each only once `waits_for` holds."""

    def __init__(self, waits_for):
        self.waits_for = waits_for

    def stream(self, params, prompts, requests, sampling, key):
        for number in reversed(range(len(requests))):
            request = requests[number]
            tokens = np.array([request.prompt, request.sample_index], np.int32)
            zeros, none = np.zeros(2, np.float32), np.zeros((2, 0), np.float32)
            completion = Completion(
                request.prompt_index, request.sample_index, tokens, zeros, zeros, "length", None, none, none
            )
            yield number, completion
            assert self.waits_for(tokens)


def test_completions_are_judged_while_others_are_drawn_and_stand_in_order(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(
        f"def judge(completion, answer):\n"
        f"    open(f'{tmp_path}/judged_{{completion}}', 'w').close()\n"
        f"    return float(completion == answer)\n"
        f"def reward_func(queries, prompts, labels):\n"
        f"    return {{'rewards': [0.0], 'extra_logs': {{'seen': [*queries, *prompts, *labels]}}}}\n"
    )

    def is_judged(tokens):
        deadline, file = time.monotonic() + 10, tmp_path / f"judged_{Letters().decode(tokens)}"
        while time.monotonic() < deadline and not file.exists():
            time.sleep(0.01)
        return file.exists()

    rows = [PromptRow(p, np.array([1, 2]), {"answer": a}, 0) for p, a in (("x", "ab"), ("y", "ba"), ("z", "zz"))]
    watch = Stopwatch()
    specs = [RewardSpec(name, f"{path}:{name}", 1.0, {}) for name in ("judge", "reward_func")]
    with RewardRunner(specs, ["answer"], 1, 5.0) as runner:
        scored = sample_and_score(
            OneByOne(is_judged), {}, rows, 2, SamplingParams(2), jax.random.key(0), runner, Letters(), watch
        )
    assert scored.texts == ["aa", "ab", "ba", "bb", "ca", "cb"]
    assert scored.result.rewards == [[value, 0.0] for value in (0.0, 1.0, 1.0, 0.0, 0.0, 0.0)]
    seen = [values["reward_func"]["seen"] for values in scored.result.logged]
    assert seen[3:5] == [["b<s>bb", "y", "ba"], ["b<s><s>a", "z", "zz"]]  # OpenRLHF decodes special tokens
    assert [[c.sample_index for c in group] for group in scored.completions] == [[0, 1]] * 3
    assert {"seconds/rollout", "seconds/reward"} <= watch.lap().keys()


def test_rewards_judge_the_whole_answer_where_the_prompt_began_it(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(
        "def judge(prompts, completions, truncated, finish_reason, seed, step, **columns):\n"
        "    assert (step, truncated, finish_reason) == (5, [True] * len(prompts), ['length'] * len(prompts))\n"
        "    return [seen(*x) + s % 1000 for *x, s in zip(prompts, completions, seed)]\n"
    )
    with path.open("a") as file:
        file.write("def seen(prompt, completion):\n")
        file.write("    asked = [{'role': 'user', 'content': 'x'}]\n")
        file.write("    return float(prompt == asked and completion == [{'role': 'assistant', 'content': '<b>aa'}])\n")
    prompt = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<b>"}]
    rows = [PromptRow(prompt, np.array([1, 2]), {}, 0)]
    with RewardRunner([RewardSpec("judge", f"{path}:judge", 1.0, {}, "elementwise")], [], 1, 5.0) as runner:
        sampler = OneByOne(lambda tokens: True)
        scored = sample_and_score(
            sampler,
            {},
            rows,
            2,
            SamplingParams(2),
            jax.random.key(0),
            runner,
            Letters(),
            Stopwatch(),
            prompt_indices=[4],
            moment=Moment(5, 9),
            seed=3,
        )
    assert scored.texts == ["aa", "ab"], "what was drawn"
    seeds = [sample_seed(3, 5, 4, g) % 1000 for g in range(2)]
    assert scored.result.rewards == [[1.0 + seeds[0]], [0.0 + seeds[1]]]


def completion_of(p, g, finish_reason):
    tokens, logprobs, none = np.array([p, g], np.int32), np.zeros(2, np.float32), np.zeros((2, 0), np.float32)
    return Completion(p, g, tokens, logprobs, logprobs, finish_reason, None, none, none)


def test_a_length_makes_nothing_judged_that_only_functions_without_weight_judged():
    config = load_config(None, ["rewards.overlong_buffer=0.5", "grpo.group_size=2"])
    specs = [RewardSpec("judge", "x.py:judge", 1.0, {}), RewardSpec("seen", "x.py:seen", 0.0, {})]
    completions = [[completion_of(0, g, "eos") for g in range(2)]]
    scored = ScoredCompletions(completions, ["x"] * 2, RewardResult([[None, 0.3], [1.0, 0.3]], {}, [], {}, {}))
    judged = judge(config, [PromptRow("a", np.array([7], np.int32), {}, 0)], scored, specs)
    assert judged.rewards[0][-1] is None
    assert judged.rewards[1][-1] is not None
    assert with_advantages(config, judged).kept_B.tolist() == [False, True]


@pytest.mark.parametrize(("is_masked", "kept"), [("true", [[0, 2], [1]]), ("false", [[0, 1, 2], [0, 1, 2]])])
def test_truncated_completions_can_stay_out_of_the_loss_but_never_out_of_the_baseline(is_masked, kept):
    """Section 3.4 of https://arxiv.org/abs/2503.14476; advantages by hand."""
    config = load_config(None, [f"grpo.mask_truncated={is_masked}", "grpo.group_size=3", "grpo.scale_rewards=none"])
    rows = [PromptRow(text, np.array([7], np.int32), {}, i) for i, text in enumerate("ab")]
    reasons = [["eos", "length", "stop"], ["length", "eos", "length"]]
    completions = [[completion_of(p, g, reason) for g, reason in enumerate(group)] for p, group in enumerate(reasons)]
    rewards = [[3.0], [0.0], [0.0], [1.0], [2.0], [0.0]]
    judged = Judged(rows, completions, ["x"] * 6, rewards, ["mine"], [1.0], {}, [])
    unjudged = with_advantages(config, dataclasses.replace(judged, rewards=[[None]] * 6)).metrics
    assert (unjudged["unjudged_share"], unjudged["zero_variance_share"], unjudged["masked_share"]) == (1, 1, 1)
    rollout = with_advantages(config, judged)
    assert rollout.metrics["unjudged_share"] == 0
    np.testing.assert_allclose(rollout.advantages_B, [2, -1, -1, 0, 1, -1])
    assert rollout.metrics["truncated_share"] == 0.5
    assert rollout.metrics["masked_share"] == pytest.approx(1 - sum(map(len, kept)) / 6)
    (groups,) = minibatches(config, rollout)
    assert [[int(c.token_ids[1]) for c in group.completions] for group in groups] == kept
    expected = [rollout.advantages_B[3 * p + g] for p, group in enumerate(kept) for g in group]
    assert [c.advantage for group in groups for c in group.completions] == expected


def test_what_functions_log_goes_to_the_metrics_of_the_step_and_the_sample():
    config = load_config(None, ["grpo.group_size=2", "rewards.overlong_buffer=0.5"])
    rows = [PromptRow(text, np.array([7], np.int32), {}, i) for i, text in enumerate("ab")]
    completions = [[completion_of(p, g, "eos") for g in range(2)] for p in range(2)]

    def judged(shift):
        logged = [{"mine": {"said": b + shift}} for b in range(3)] + [{}]
        sums = {"mine": {"acc": [1.0 + shift, 4], "mean": [9.0, 1], "crash": [0.0, 1], "retries": [3.0, 1]}}
        rewards = [[0.0], [1.0], [2.0], [3.0]]
        counts = dict.fromkeys(COUNTS, 0) | {"timeout": 1, "wrong_length": shift}
        result = RewardResult(rewards, {"mine": counts}, [], {"mine": Effort(2.0, 1.5 + shift, 4, 1)}, {}, logged, sums)
        scored = ScoredCompletions(completions, ["x"] * 4, result)
        return judge(config, rows, scored, [RewardSpec("mine", "x.py:mine", 1.0, {})])

    both = judged(0).replace({0: 1}, judged(10))
    rollout = with_advantages(config, both)
    assert rollout.metrics["reward/mine/acc"] == 12 / 8  # the replaced groups counted
    assert (rollout.metrics["reward/mine/mean"], rollout.metrics["reward/mine/logged_mean"]) == (2.5, 9.0)
    assert (rollout.metrics["reward/mine/logged_crash"], "reward/mine/crash" in rollout.metrics) == (0.0, False)
    assert rollout.metrics["reward/mine/logged_retries"] == 3.0
    ran = [rollout.metrics[f"reward/mine/{name}"] for name in ("errors", "timeouts", "retries")]
    assert ran == [10, 2, 2]
    assert [rollout.metrics[f"reward/mine/seconds_{name}"] for name in ("mean", "max")] == [0.5, 11.5]
    kept = [record.get("logged") for record in sample_records(rollout)]
    assert kept == [{"mine": {"said": 12}}, {"mine": {"said": 2}}, None, None]
